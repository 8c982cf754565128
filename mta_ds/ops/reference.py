"""The structural ops by definition: plain torch, ragged, differentiable. Every faster path is held to this one.

A batch is concatenated: ``hidden`` [n, d] holds the valid tokens of B sequences one after another, ``cu_seqlens``
[B + 1] bounds them. ``spans`` [K, 2] are half-open token ranges into that concatenation, sorted by sequence, and
``cu_spans`` [B + 1] bounds each sequence's spans. Everything is computed in fp32 (float64 inputs stay float64).

Letters: n tokens, K spans, B sequences, d features, S student, T teacher.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

_ROW_BLOCK = 256


@torch.no_grad()
def token_weights(hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
    """How much each token is attended to by the tokens of its own sequence (MTA eqs. 5-7); no gradient.

    Args:
        hidden: [n, d].
        cu_seqlens: int64 [B + 1].

    Returns:
        [n], positive, summing to 1 in each sequence; a sequence of one token has weight 1.
    """
    hidden = _accumulating(hidden)
    num_features = hidden.shape[1]
    scaled = hidden / (hidden.std(dim=1, keepdim=True) + 1e-5)
    weights = hidden.new_zeros(hidden.shape[0])
    for start, end in _bounds(cu_seqlens):
        length = end - start
        if length == 1:
            weights[start] = 1.0
            continue
        tokens = scaled[start:end]
        # by blocks of rows: a long sequence's n × n matrix is never held
        for first in range(0, length, _ROW_BLOCK):
            rows = tokens[first : first + _ROW_BLOCK]
            scores = rows @ tokens.T / num_features**0.5
            index = torch.arange(len(rows), device=hidden.device)
            scores[index, first + index] = -torch.inf
            weights[start:end] += scores.softmax(dim=1).sum(0) / length
    return weights


def span_pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> Tensor:
    """Weighted mean of each span's tokens (MTA eq. 8): U_i = Σ w_t H_t / Σ w_t.

    Args:
        hidden: [n, d]; weights: [n]; spans: int64 [K, 2], may overlap.

    Returns:
        [K, d]; a span whose tokens weigh nothing pools to zeros.
    """
    hidden, weights = _accumulating(hidden), _accumulating(weights)
    owner, token = _members(spans)
    part = weights[token]
    total = part.new_zeros(len(spans)).index_add(0, owner, part)
    inverse = torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)
    share = part * inverse[owner]
    return hidden.new_zeros(len(spans), hidden.shape[1]).index_add(0, owner, hidden[token] * share[:, None])


def span_weights(weights: Tensor, spans: Tensor, cu_spans: Tensor) -> Tensor:
    """Each span's share of its sequence's span weight (MTA eq. 9): ω_i = Σ_{t∈i} w_t / Σ_j Σ_{t∈j} w_t.

    Returns:
        [K], summing to 1 over the spans of each sequence that has any.
    """
    weights = _accumulating(weights)
    owner, token = _members(spans)
    raw = weights.new_zeros(len(spans)).index_add(0, owner, weights[token])
    sequence = sequence_of(cu_spans, len(spans))
    total = raw.new_zeros(len(cu_spans) - 1).index_add(0, sequence, raw)[sequence]
    return torch.where(total > 0, raw / torch.where(total > 0, total, 1.0), 0.0)


def covered_tokens(spans: Tensor, num_tokens: int) -> Tensor:
    """Sorted indices int64 [m] of the tokens inside any span."""
    change = torch.zeros(num_tokens + 1, dtype=torch.int64, device=spans.device)
    ones = torch.ones(len(spans), dtype=torch.int64, device=spans.device)
    change.index_add_(0, spans[:, 0], ones).index_add_(0, spans[:, 1], -ones)
    return change.cumsum(0)[:-1].nonzero()[:, 0]


def dsa(student: Tensor, teacher: Tensor, span_weights: Tensor, cu_spans: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic Structural Alignment (MTA eqs. 10-11) of each sequence.

        X_b = Σ_i Σ_{j≠i} ω_i ω_j (cos(U^S_i, U^S_j) - cos(U^T_i, U^T_j))²,    Z_b = Σ_i Σ_{j≠i} ω_i ω_j

    Args:
        student: [K, d_S]; teacher: [K, d_T], no gradient; span_weights: [K], no gradient.

    Returns:
        X [B], Z [B]; exact zeros for a sequence with fewer than two spans.
    """
    student, omega = _unit(_accumulating(student)), _accumulating(span_weights)
    teacher = _unit(_accumulating(teacher))
    numerators, normalisers = [], []
    for start, end in _bounds(cu_spans):
        ours, theirs, weight = student[start:end], teacher[start:end], omega[start:end]
        pair = weight[:, None] * weight[None, :]
        pair = pair - torch.diag(pair.diagonal())
        numerators.append((pair * (ours @ ours.T - theirs @ theirs.T).square()).sum())
        normalisers.append(pair.sum())
    if not numerators:
        return student.new_zeros(0) + 0 * student.sum(), omega.new_zeros(0)
    return torch.stack(numerators), torch.stack(normalisers)


def hid(student: Tensor, projection: Tensor, teacher: Tensor, token_weights: Tensor) -> Tensor:
    """Hidden Representation Alignment (MTA eqs. 12-13) over the given tokens: Σ_t w_t (1 - cos(W h^S_t, h^T_t)).

    Args:
        student: [m, d_S]; projection: W [d_T, d_S]; teacher: [m, d_T], no gradient; token_weights: [m], no gradient.

    Returns:
        A scalar sum.
    """
    projected = _unit(_accumulating(student) @ _accumulating(projection).T)
    cosine = (projected * _unit(_accumulating(teacher))).sum(1)
    return (_accumulating(token_weights) * (1 - cosine)).sum()


def sequence_of(cu: Tensor, num: int) -> Tensor:
    """For bounds ``cu`` [B + 1], the sequence that each of ``num`` items belongs to, int64 [num]."""
    items = torch.arange(num, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous(), items, right=True)


def _members(spans: Tensor) -> tuple[Tensor, Tensor]:
    """Every (span, token) pair, span by span: span index [Σ lengths] and token index [Σ lengths]."""
    lengths = spans[:, 1] - spans[:, 0]
    owner = torch.repeat_interleave(torch.arange(len(spans), device=spans.device), lengths)
    first = spans[:, 0] - (lengths.cumsum(0) - lengths)
    return owner, torch.arange(len(owner), device=spans.device) + first[owner]


def _unit(x: Tensor) -> Tensor:
    """Rows at length 1; a zero row stays zero, with zero gradient."""
    square = x.square().sum(1, keepdim=True)
    nonzero = square > 0
    return x * torch.where(nonzero, torch.where(nonzero, square, 1.0).rsqrt(), 0.0)


def _accumulating(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _bounds(cu: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu.tolist()))
