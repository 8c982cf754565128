"""The structural ops by definition: plain torch, ragged, differentiable. Every faster path is held to this one.

A batch is concatenated: ``hidden`` [n, d] holds the valid tokens of B sequences one after another, ``cu_seqlens``
[B + 1] bounds them. ``spans`` [K, 2] are half-open token ranges into that concatenation, sorted by sequence, and
``cu_spans`` [B + 1] bounds each sequence's spans. Everything is computed in fp32 (float64 inputs stay float64).
A zero denominator (a zero vector, a span without weight, a sequence without pairs) gives exact zeros, in gradients too.

Layout tensors (``cu_seqlens``, ``spans``, ``cu_spans``) are on the CPU wherever the others are, and their contents are
checked there.

Letters: n tokens, K spans, B sequences, d features, S student, T teacher.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mta_ds.ops.arguments import (
    check_bounds,
    check_dtypes,
    check_projection,
    check_rows,
    check_spans,
    check_teacher,
    check_vector,
)

STD_EPSILON = 1e-5
# Scores that are held at once, 16 MB in fp32: a long sequence's n × n matrix is never whole.
_BLOCK_SCORES = 1 << 22


@torch.no_grad()
def token_weights(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How much each token is attended to by the tokens of its own sequence (MTA eqs. 5-7); no gradient.

    Args:
        hidden: [n, d].
        cu_seqlens: int64 [B + 1].

    Returns:
        [n], not negative, summing to 1 in each sequence; a sequence of one token has weight 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    return log_token_weights(hidden, cu_seqlens).exp().to(_accumulating(hidden[:0]).dtype)


@torch.no_grad()
def log_token_weights(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Logarithms of :func:`token_weights`, float64 [n]: what they are made of underflows in no dtype."""
    check_rows("hidden", hidden)
    check_bounds("cu_seqlens", cu_seqlens, len(hidden))
    hidden = _accumulating(hidden)
    parts = [_log_attention_received(hidden[start:end]) for start, end in _pairs(cu_seqlens)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float64)


def _log_attention_received(hidden: Tensor) -> Tensor:
    """Logarithms of the token weights [n] of one sequence [n, d]: column means of softmax(Ĥ Ĥᵀ / √d) without its
    diagonal."""
    length, num_features = hidden.shape
    if length <= 1:
        return hidden.new_zeros(length, dtype=torch.float64)
    scaled = hidden / (hidden.std(dim=1, keepdim=True) + STD_EPSILON)
    received = hidden.new_full((length,), -torch.inf, dtype=torch.float64)
    num_rows = max(1, _BLOCK_SCORES // length)
    for first in range(0, length, num_rows):
        scores = scaled[first : first + num_rows] @ scaled.T * num_features**-0.5
        scores.diagonal(offset=first).fill_(-torch.inf)
        received = torch.logaddexp(received, scores.log_softmax(dim=1).logsumexp(dim=0).double())
    return received - math.log(length)


def span_pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> Tensor:
    """Weighted mean of each span's tokens (MTA eq. 8): U_i = Σ w_t H_t / Σ w_t.

    Args:
        hidden: [n, d].
        weights: [n], not negative, no gradient.
        spans: int64 [K, 2], may overlap.

    Returns:
        [K, d], differentiable in ``hidden``; a span whose tokens weigh nothing pools to zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows("hidden", hidden)
    check_vector("weights", weights, len(hidden))
    check_dtypes(hidden=hidden, weights=weights)
    check_spans(spans, len(hidden))
    return _pool(hidden, _logs(weights), spans)


def _pool(hidden: Tensor, logs: Tensor, spans: Tensor) -> Tensor:
    """:func:`span_pool` by the weights' logarithms."""
    hidden = _accumulating(hidden)
    _, tokens = _members(spans)
    shares, _ = _softmax(logs, spans)
    return _weighted_sums(hidden, spans, tokens.to(hidden.device, non_blocking=True), shares.to(hidden.dtype))


def span_weights(weights: Tensor, spans: Tensor, cu_spans: Tensor) -> Tensor:
    """Each span's share of its sequence's span weight (MTA eq. 9): ω_i = Σ_{t∈i} w_t / Σ_j Σ_{t∈j} w_t.

    Args:
        weights: [n], not negative, no gradient.
        spans: int64 [K, 2].
        cu_spans: int64 [B + 1].

    Returns:
        [K], summing to 1 over the spans of each sequence that has any.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_vector("weights", weights, len(weights))
    check_spans(spans, len(weights))
    check_bounds("cu_spans", cu_spans, len(spans))
    _, mass = _softmax(_logs(weights), spans)
    return _softmax(mass, _ranges(cu_spans))[0].to(_accumulating(weights[:0]).dtype)


def normalise_within(values: Tensor, cu: Tensor) -> Tensor:
    """Each value's share of the sum over its own segment; ``cu`` [B + 1] bounds the segments of ``values`` [N] >= 0."""
    check_vector("values", values, len(values))
    check_bounds("cu", cu, len(values))
    return _softmax(_logs(values), _ranges(cu))[0].to(_accumulating(values[:0]).dtype)


def covered_tokens(spans: Tensor, num_tokens: int) -> Tensor:
    """Sorted indices int64 [m] of the tokens inside any span."""
    check_spans(spans, num_tokens)
    opened = torch.bincount(spans[:, 0], minlength=num_tokens + 1)
    closed = torch.bincount(spans[:, 1], minlength=num_tokens + 1)
    return (opened - closed).cumsum(0)[:-1].nonzero()[:, 0]


def dsa(student: Tensor, teacher: Tensor, span_weights: Tensor, cu_spans: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic Structural Alignment (MTA eqs. 10-11) of each sequence.

        X_b = Σ_i Σ_{j≠i} ω_i ω_j (cos(U^S_i, U^S_j) - cos(U^T_i, U^T_j))²,    Z_b = Σ_i Σ_{j≠i} ω_i ω_j

    The cosines are subtracted before they are squared: the feature form ||AᵀA||² - 2||AᵀC||² + ||CᵀC||² loses all
    digits of X_b in fp32 once student and teacher agree.

    Args:
        student: span states [K, d_S].
        teacher: [K, d_T], no gradient.
        span_weights: ω [K], no gradient.
        cu_spans: int64 [B + 1].

    Returns:
        X [B], differentiable in ``student``, and Z [B]; exact zeros for a sequence with fewer than two spans.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a teacher that requires grad.
    """
    check_rows("student", student)
    check_rows("teacher", teacher, len(student))
    check_teacher("teacher", teacher)
    check_vector("span_weights", span_weights, len(student))
    check_dtypes(student=student, teacher=teacher, span_weights=span_weights)
    check_bounds("cu_spans", cu_spans, len(student))
    student, teacher = _unit(_accumulating(student)), _unit(_accumulating(teacher))
    omega = _accumulating(span_weights.detach())
    numerators, normalisers = [], []
    for start, end in _pairs(cu_spans):
        ours, theirs, weight = student[start:end], teacher[start:end], omega[start:end]
        # the diagonal goes by its weight: a zero vector's cosine with itself is 0, not 1
        pair = torch.outer(weight, weight).fill_diagonal_(0.0)
        numerators.append((pair * (ours @ ours.T - theirs @ theirs.T).square()).sum())
        normalisers.append(pair.sum())
    if not numerators:
        return student.sum(1), omega.new_zeros(0)
    return torch.stack(numerators), torch.stack(normalisers)


def hid(student: Tensor, projection: Tensor, teacher: Tensor, token_weights: Tensor) -> Tensor:
    """Hidden Representation Alignment (MTA eqs. 12-13) over the given tokens: Σ_t w_t (1 - cos(W h^S_t, h^T_t)).

    Args:
        student: [m, d_S].
        projection: W [d_T, d_S].
        teacher: [m, d_T], no gradient.
        token_weights: [m], no gradient.

    Returns:
        A scalar sum, differentiable in ``student`` and ``projection``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a teacher that requires grad.
    """
    check_rows("student", student)
    check_rows("teacher", teacher, len(student))
    check_teacher("teacher", teacher)
    check_vector("token_weights", token_weights, len(student))
    check_projection(projection, student, teacher)
    check_dtypes(student=student, projection=projection, teacher=teacher, token_weights=token_weights)
    projected = _unit(_accumulating(student) @ _accumulating(projection).T)
    cosine = (projected * _unit(_accumulating(teacher))).sum(dim=1)
    return _accumulating(token_weights.detach()) @ (1 - cosine)


def align_layer(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    cu_seqlens: Tensor,
    spans: Tensor,
    cu_spans: Tensor,
    reduction: str = "sequence_mean",
    student_weights: str = "own",
    teacher_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A key layer's sums, see :func:`mta_ds.ops.align_layer`, op by op; by the weights' logarithms from end to end.

    Returns:
        DSA's sum, Σ_b Z_b and Hid's sum; the first and the last differentiable in ``student`` and ``projection``.
    """
    theirs = log_token_weights(teacher, cu_seqlens) if teacher_weights is None else _logs(teacher_weights)
    ours = theirs if student_weights == "teacher" else log_token_weights(student, cu_seqlens)
    _, mass = _softmax(theirs, spans)
    states = _unit(_pool(student, ours, spans)), _unit(_pool(teacher, theirs, spans))
    dsa_sum, normaliser = states[0].sum() * 0.0, states[0].new_zeros(())
    for start, end in _pairs(cu_spans):
        log_omega = _log_shares(mass[start:end])
        pairs = (log_omega[:, None] + log_omega).fill_diagonal_(-torch.inf)
        normaliser = normaliser + pairs.exp().sum().to(normaliser.dtype)
        if reduction == "sequence_mean":  # X / Z, however small Z is
            pairs = _log_shares(pairs)
        cosines = (side[start:end] @ side[start:end].T for side in states)
        gap = torch.sub(*cosines)
        dsa_sum = dsa_sum + (pairs.exp().to(gap.dtype) * gap.square()).sum()
    tokens = covered_tokens(spans, len(student))
    weights = theirs[tokens].exp()
    if reduction != "paper":
        weights, _ = _softmax(theirs[tokens], _ranges(torch.searchsorted(tokens, cu_seqlens)))
    hid_sum = hid(student[tokens], projection, teacher[tokens], weights.to(states[0].dtype))
    return dsa_sum, normaliser, hid_sum


def trajectory(
    student: Tensor,
    teacher: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    student_head: Tensor,
    teacher_head: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Both terms of FDD at one key layer (METHOD §8), from whole logits.

        KL(softmax(z^T/τ) ‖ softmax(z^S/τ))  and  1 - cos(Δ^S, Δ^T),   Δ = log softmax(z) - log softmax(z before)

    Args:
        student, student_head: [n, d_S] and [V, d_S].
        teacher, teacher_head: [n, d_T] and [V, d_T], no gradient.
        previous: the student's [n, d_S] and the teacher's [n, d_T] at the key layer before; None at the first.
        temperature: τ.

    Returns:
        Both for each token [n], differentiable in student, previous and head; at the first key layer the second is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a teacher that requires grad.
    """
    states = [(student, teacher)] if previous is None else [(student, teacher), previous]
    logits: list[list[Tensor]] = []
    for name, head, side in zip(
        ("student", "teacher"), (student_head, teacher_head), zip(*states, strict=True), strict=True
    ):
        for hidden in side:
            check_rows(name, hidden, len(student))
            if name == "teacher":
                check_teacher(name, hidden)
        logits.append([_accumulating(hidden) @ _accumulating(head).T for hidden in side])
    log_q, log_p = ((side[0] / temperature).log_softmax(-1) for side in logits)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    if previous is None:
        return kl, torch.zeros_like(kl)
    ours, theirs = (now.log_softmax(-1) - before.log_softmax(-1) for now, before in logits)
    return kl, 1 - (_unit(ours) * _unit(theirs)).sum(-1)


def _softmax(logs: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """What each value weighs in each range [K, 2] that it is in, range by range, and the logarithm of each range's sum;
    of logarithms float64 [N]. A range without weight has shares of zero and a sum of -inf."""
    owners, members = (index.to(logs.device, non_blocking=True) for index in _members(ranges))
    top = logs.new_full((len(ranges),), -torch.inf).scatter_reduce(0, owners, logs[members], "amax")
    top = torch.where(top == -torch.inf, 0.0, top)
    shares = (logs[members] - top[owners]).exp()
    total = logs.new_zeros(len(ranges)).index_add(0, owners, shares)
    return shares / torch.where(total == 0, 1.0, total)[owners], total.log() + top


def _log_shares(logs: Tensor) -> Tensor:
    """Of their sum; -inf where all are."""
    total = logs.flatten().logsumexp(dim=0)
    return torch.where(total == -torch.inf, logs, logs - total)


def _logs(weights: Tensor) -> Tensor:
    return weights.detach().double().log()


def _ranges(cu: Tensor) -> Tensor:
    return torch.stack([cu[:-1], cu[1:]], dim=1)


def _weighted_sums(rows: Tensor, ranges: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """Σ of ``rows`` [N, d] over each range's ``members``, each times its weight; [K, d], no [members, d] copy."""
    lengths = ranges[:, 1] - ranges[:, 0]
    offsets = (lengths.cumsum(0) - lengths).to(rows.device, non_blocking=True)
    if len(ranges) == 0 or len(rows) == 0:
        return rows.new_zeros(len(ranges), rows.shape[1]) + rows.sum(dim=0)[None] * 0.0
    return embedding_bag(members, rows, offsets, mode="sum", per_sample_weights=weights)


def _members(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Every (range, token) pair, range by range: range index [Σ lengths] and token index [Σ lengths]."""
    lengths = ranges[:, 1] - ranges[:, 0]
    owners = torch.repeat_interleave(torch.arange(len(ranges)), lengths)
    first = ranges[:, 0] - (lengths.cumsum(0) - lengths)
    return owners, torch.arange(len(owners)) + first[owners]


def _unit(x: Tensor) -> Tensor:
    """Rows at length 1; a zero row stays zero, with zero gradient."""
    square = x.square().sum(dim=1, keepdim=True)
    nonzero = square > 0
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def _accumulating(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(cu: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu.tolist()))
