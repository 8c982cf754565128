"""The structural ops by definition: plain torch, ragged, differentiable. Every faster path is held to this one.

A batch is concatenated: ``hidden`` [n, d] holds the valid tokens of B sequences one after another, ``cu_seqlens``
[B + 1] bounds them. ``spans`` [K, 2] are half-open token ranges into that concatenation, sorted by sequence, and
``cu_spans`` [B + 1] bounds each sequence's spans. Everything is computed in fp32 (float64 inputs stay float64).
A zero denominator (a zero vector, a span without weight, a sequence without pairs) gives exact zeros, in gradients too.

Layout tensors (``cu_seqlens``, ``spans``, ``cu_spans``) may be on the CPU while the others are on a GPU; then their
contents are checked as well, and nothing here waits for the GPU.

Letters: n tokens, K spans, B sequences, d features, S student, T teacher.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mta_ds.ops.arguments import check_bounds, check_rows, check_spans, check_teacher, check_vector

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
        [n], positive, summing to 1 in each sequence; a sequence of one token has weight 1.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows("hidden", hidden)
    check_bounds("cu_seqlens", cu_seqlens, len(hidden))
    hidden = _accumulating(hidden)
    weights = hidden.new_empty(len(hidden))
    for start, end in _pairs(cu_seqlens):
        weights[start:end] = _attention_received(hidden[start:end])
    return weights


def _attention_received(hidden: Tensor) -> Tensor:
    """Token weights [n] of one sequence [n, d]: column means of softmax(Ĥ Ĥᵀ / √d) without its diagonal."""
    length, num_features = hidden.shape
    if length <= 1:
        return hidden.new_ones(length)
    scaled = hidden / (hidden.std(dim=1, keepdim=True) + STD_EPSILON)
    received = hidden.new_zeros(length)
    num_rows = max(1, _BLOCK_SCORES // length)
    for first in range(0, length, num_rows):
        scores = scaled[first : first + num_rows] @ scaled.T * num_features**-0.5
        scores.diagonal(offset=first).fill_(-torch.inf)
        received += scores.softmax(dim=1).sum(dim=0)
    return received / length


def span_pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> Tensor:
    """Weighted mean of each span's tokens (MTA eq. 8): U_i = Σ w_t H_t / Σ w_t.

    Args:
        hidden: [n, d].
        weights: [n], no gradient.
        spans: int64 [K, 2], may overlap.

    Returns:
        [K, d], differentiable in ``hidden``; a span whose tokens weigh nothing pools to zeros.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_rows("hidden", hidden)
    check_vector("weights", weights, len(hidden))
    check_spans(spans, len(hidden))
    weights = _accumulating(weights.detach())
    owners, tokens = (index.to(hidden.device, non_blocking=True) for index in _members(spans))
    shares = weights[tokens] * _inverse(_range_sums(weights, spans))[owners]
    return _weighted_sums(_accumulating(hidden), spans, tokens, shares)


def span_weights(weights: Tensor, spans: Tensor, cu_spans: Tensor) -> Tensor:
    """Each span's share of its sequence's span weight (MTA eq. 9): ω_i = Σ_{t∈i} w_t / Σ_j Σ_{t∈j} w_t.

    Args:
        weights: [n], no gradient.
        spans: int64 [K, 2].
        cu_spans: int64 [B + 1].

    Returns:
        [K], summing to 1 over the spans of each sequence that has any.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_vector("weights", weights, len(weights))
    check_spans(spans, len(weights))
    return normalise_within(_range_sums(_accumulating(weights.detach()), spans), cu_spans)


def normalise_within(values: Tensor, cu: Tensor) -> Tensor:
    """Each value's share of the sum over its own segment; ``cu`` [B + 1] bounds the segments of ``values`` [N]."""
    check_vector("values", values, len(values))
    check_bounds("cu", cu, len(values))
    totals = _range_sums(values, torch.stack([cu[:-1], cu[1:]], dim=1))
    owner = torch.searchsorted(cu[1:].contiguous(), torch.arange(len(values), device=cu.device), right=True)
    return values * _inverse(totals)[owner.to(values.device, non_blocking=True)]


def covered_tokens(spans: Tensor, num_tokens: int) -> Tensor:
    """Sorted indices int64 [m] of the tokens inside any span, on the device of ``spans``."""
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
    check_rows("projection", projection)
    if projection.shape != (teacher.shape[1], student.shape[1]):
        raise ValueError(f"projection: want [{teacher.shape[1]}, {student.shape[1]}], got {list(projection.shape)}")
    projected = _unit(_accumulating(student) @ _accumulating(projection).T)
    cosine = (projected * _unit(_accumulating(teacher))).sum(dim=1)
    return _accumulating(token_weights.detach()) @ (1 - cosine)


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


def _range_sums(values: Tensor, ranges: Tensor) -> Tensor:
    """Σ of ``values`` [N] over each half-open range [K, 2] of them, [K]."""
    _, tokens = _members(ranges)
    return _weighted_sums(values[:, None], ranges, tokens.to(values.device, non_blocking=True), None)[:, 0]


def _weighted_sums(rows: Tensor, ranges: Tensor, members: Tensor, weights: Tensor | None) -> Tensor:
    """Σ of ``rows`` [N, d] over each range's ``members``, each times its weight; [K, d], no [members, d] copy."""
    lengths = ranges[:, 1] - ranges[:, 0]
    offsets = (lengths.cumsum(0) - lengths).to(rows.device, non_blocking=True)
    if len(ranges) == 0 or len(rows) == 0:
        return rows.new_zeros(len(ranges), rows.shape[1]) + rows.sum(dim=0)[None] * 0.0
    return embedding_bag(members, rows, offsets, mode="sum", per_sample_weights=weights)


def _members(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Every (range, token) pair, range by range: range index [Σ lengths] and token index [Σ lengths]."""
    lengths = ranges[:, 1] - ranges[:, 0]
    owners = torch.repeat_interleave(torch.arange(len(ranges), device=ranges.device), lengths)
    first = ranges[:, 0] - (lengths.cumsum(0) - lengths)
    return owners, torch.arange(len(owners), device=ranges.device) + first[owners]


def _unit(x: Tensor) -> Tensor:
    """Rows at length 1; a zero row stays zero, with zero gradient."""
    square = x.square().sum(dim=1, keepdim=True)
    nonzero = square > 0
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return torch.where(x == 0, 0.0, 1 / torch.where(x == 0, 1.0, x))


def _accumulating(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pairs(cu: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu.tolist()))
