"""MTA's structural loss as it was published: padded batches, whole matrices, autograd. What ops.py measures against.

Every sequence's n × n softmax is held whole, one similarity matrix covers the spans of the whole batch (a mask drops
pairs of different sequences), and the projected states of all tokens stay for backward. Reduction ``weighted_mean``,
student spans pooled with the student's own weights. Everything runs in the dtype of the states.

Letters: B sequences, T padded length, K spans of the batch, d features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear, normalize


class PaddedSpans(NamedTuple):
    """Spans of one granularity, all sequences' together."""

    owner: Tensor
    """Which sequence a span belongs to, int64 [K]."""
    member_spans: Tensor
    """Every (span, token) pair: the span, int64 [members]."""
    member_tokens: Tensor
    """The token, as an index into the flattened [B * T]."""
    covered: Tensor
    """Tokens inside any span, bool [B, T]."""


def pad_spans(ranges: Tensor, cu_spans: Tensor, num_sequences: int, length: int) -> PaddedSpans:
    """From ragged spans of sequences that all have ``length`` tokens."""
    lengths = ranges[:, 1] - ranges[:, 0]
    spans = torch.repeat_interleave(torch.arange(len(ranges)), lengths)
    tokens = torch.arange(len(spans)) - (lengths.cumsum(0) - lengths)[spans] + ranges[spans, 0]
    covered = torch.zeros(num_sequences * length, dtype=torch.bool)
    covered[tokens] = True
    owner = torch.repeat_interleave(torch.arange(num_sequences), cu_spans.diff())
    return PaddedSpans(owner, spans, tokens, covered.view(num_sequences, length))


def published_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    projections: Sequence[Tensor],
    mask: Tensor,
    spans: Sequence[PaddedSpans],
    lambda_dsa: float = 2.0,
    lambda_hid: float = 0.2,
) -> Tensor:
    """λ_DSA L_DSA + λ_Hid L_Hid, means over key layers.

    Args:
        student, teacher: [B, T, d_S] and [B, T, d_T] of each key layer.
        projections: [d_T, d_S] of each.
        mask: valid tokens, bool [B, T].
        spans: of each key layer.
    """
    total = student[0].new_zeros(())
    for ours, theirs, projection, units in zip(student, teacher, projections, spans, strict=True):
        student_weights, teacher_weights = token_weights(ours, mask), token_weights(theirs, mask)
        dsa = dsa_loss(ours, theirs, student_weights, teacher_weights, units)
        hid = hid_loss(ours, theirs, projection, teacher_weights, units)
        total = total + lambda_dsa * dsa + lambda_hid * hid
    return total / len(student)


@torch.no_grad()
def token_weights(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: how much each token is attended to by the tokens of its sequence."""
    scaled = hidden / (hidden.std(dim=-1, keepdim=True) + 1e-5)
    scores = scaled @ scaled.transpose(1, 2) / hidden.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.eye(hidden.shape[1], dtype=torch.bool), -torch.inf)
    scores = scores.masked_fill(~mask[:, None, :], -torch.inf)
    attention = scores.softmax(dim=-1) * mask[:, :, None]
    return attention.sum(dim=1) / mask.sum(dim=1, keepdim=True)


def dsa_loss(student: Tensor, teacher: Tensor, own: Tensor, weights: Tensor, spans: PaddedSpans) -> Tensor:
    """Weighted mean of the squared difference of both similarity matrices [K, K] over pairs of one sequence."""
    span_weights = weights.new_zeros(len(spans.owner))
    span_weights = span_weights.index_add(0, spans.member_spans, weights.flatten()[spans.member_tokens])
    totals = weights.new_zeros(len(weights)).index_add(0, spans.owner, span_weights)
    omega = span_weights / totals[spans.owner]
    student_spans = normalize(pool(student, own, spans), dim=-1)
    teacher_spans = normalize(pool(teacher, weights, spans), dim=-1)
    difference = student_spans @ student_spans.T - teacher_spans @ teacher_spans.T
    same_sequence = spans.owner[:, None] == spans.owner[None, :]
    same_sequence.fill_diagonal_(False)
    pair_weights = omega[:, None] * omega[None, :] * same_sequence
    return (pair_weights * difference**2).sum() / pair_weights.sum()


def pool(hidden: Tensor, weights: Tensor, spans: PaddedSpans) -> Tensor:
    """Weighted mean of each span's tokens, [K, d]."""
    shares = weights.flatten()[spans.member_tokens]
    sums = hidden.new_zeros(len(spans.owner), hidden.shape[-1])
    sums = sums.index_add(0, spans.member_spans, hidden.flatten(0, 1)[spans.member_tokens] * shares[:, None])
    totals = shares.new_zeros(len(spans.owner)).index_add(0, spans.member_spans, shares)
    return sums / totals[:, None]


def hid_loss(student: Tensor, teacher: Tensor, projection: Tensor, weights: Tensor, spans: PaddedSpans) -> Tensor:
    """Weighted mean of 1 - cos between all projected student states and the teacher's, over covered tokens."""
    distance = 1 - cosine_similarity(linear(student, projection), teacher, dim=-1)
    weights = weights * spans.covered
    weights = weights / weights.sum(dim=1, keepdim=True)
    return (weights * distance).sum() / weights.sum()
