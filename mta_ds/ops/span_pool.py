"""Spans (MTA eqs. 8-9): each span's weighted mean of tokens, and its share of its sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mta_ds.ops.arguments import check_bounds, check_rows, check_together, check_vector
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import Membership, beside, owners
from mta_ds.ops.products import accumulating


class Pooled(NamedTuple):
    """Span states with what their gradient needs."""

    states: Tensor
    """[K, d]"""
    mass: Tensor
    """Σ_{t∈i} w_t, [K]."""


def span_pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> Tensor:
    """Weighted mean of each span's tokens: U_i = Σ w_t H_t / Σ w_t.

    Args:
        hidden: [n, d].
        weights: [n], no gradient.
        spans: half-open token ranges int64 [K, 2] on the CPU, may overlap.

    Returns:
        [K, d] in fp32 (float64 stays), differentiable in ``hidden``; a span whose tokens weigh nothing pools to zeros.

    Raises:
        ValueError: shapes, dtypes, devices or ranges that do not fit.
    """
    check_rows("hidden", hidden)
    check_vector("weights", weights, len(hidden))
    check_together(hidden=hidden, weights=weights)
    states: Tensor = _SpanPool.apply(  # type: ignore[no-untyped-call]
        hidden, accumulating(weights.detach()), Membership(spans, len(hidden))
    )
    return states


class _SpanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, members: Membership) -> Tensor:
        pooled = pool(hidden, weights, members)
        ctx.save_for_backward(weights, pooled.mass)
        ctx.members, ctx.dtype = members, hidden.dtype
        return pooled.states

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        weights, mass = ctx.saved_tensors
        return pool_gradient(upstream, weights, mass, ctx.members).to(ctx.dtype), None, None


def pool(hidden: Tensor, weights: Tensor, members: Membership) -> Pooled:
    """:func:`span_pool` without a graph; ``weights`` [n] in the accumulating dtype."""
    if backend_of(hidden) == "triton" and hidden.dtype != torch.float64:
        import mta_ds.ops.kernels.span_pool as kernels

        return Pooled(*kernels.pool(hidden, weights, members.on("spans", hidden.device, torch.int32)))
    names = ("span_tokens", "span_owners", "span_offsets")
    tokens, spans, offsets = (members.on(name, hidden.device) for name in names)
    mass = _bags(weights[:, None], tokens, offsets)[:, 0]
    return Pooled(_bags(accumulating(hidden), tokens, offsets, weights[tokens] * _inverse(mass)[spans]), mass)


def pool_gradient(
    upstream: Tensor, weights: Tensor, mass: Tensor, members: Membership, factor: Tensor | None = None
) -> Tensor:
    """∂/∂hidden [n, d] of pooled states with this upstream gradient [K, d]: factor · w_t Σ_{i∋t} upstream_i / mass_i.

    Each token gathers from its spans, so that the sums have one order and need no atomics.
    """
    inverse = _inverse(mass) if factor is None else _inverse(mass) * factor
    if backend_of(upstream) == "triton" and upstream.dtype != torch.float64:
        import mta_ds.ops.kernels.span_pool as kernels

        names = ("token_spans", "token_offsets")
        spans, offsets = (members.on(name, upstream.device, torch.int32) for name in names)
        return kernels.pool_gradient(upstream * inverse[:, None], weights, spans, offsets)
    pairs = ("token_spans", "token_owners", "token_offsets")
    spans, tokens, offsets = (members.on(name, upstream.device) for name in pairs)
    return _bags(accumulating(upstream), spans, offsets, weights[tokens] * inverse[spans])


def span_weights(weights: Tensor, spans: Tensor, cu_spans: Tensor) -> Tensor:
    """Each span's share of its sequence's span weight: ω_i = Σ_{t∈i} w_t / Σ_j Σ_{t∈j} w_t.

    Args:
        weights: [n], no gradient.
        spans: int64 [K, 2] on the CPU.
        cu_spans: int64 [B + 1] on the CPU.

    Returns:
        [K], summing to 1 over the spans of each sequence that has any weight in spans.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_vector("weights", weights, len(weights))
    members = Membership(spans, len(weights))
    tokens, offsets = (members.on(name, weights.device) for name in ("span_tokens", "span_offsets"))
    return normalise_within(_bags(accumulating(weights.detach())[:, None], tokens, offsets)[:, 0], cu_spans)


def normalise_within(values: Tensor, cu: Tensor, owner: Tensor | None = None) -> Tensor:
    """Each value's share of the sum over its own segment.

    Args:
        values: [N].
        cu: bounds of the segments, int64 [B + 1] on the CPU.
        owner: the segment of each value, int64 [N] on the CPU, where that is known already.
    """
    check_vector("values", values, len(values))
    check_bounds("cu", cu, len(values))
    totals = segment_sums(values, cu)
    owner = owners(cu) if owner is None else owner
    return values * _inverse(totals)[beside(owner, values.device)]


def segment_sums(values: Tensor, cu: Tensor) -> Tensor:
    """Σ of ``values`` [N] over each segment that ``cu`` [B + 1] bounds, [B]; always in the same order."""
    every = torch.arange(len(values), device=values.device)
    return _bags(values[:, None], every, beside(cu, values.device))[:, 0]


def _bags(rows: Tensor, members: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ of ``rows`` [N, d] over each bag of ``members``, times their ``weights``; no [members, d] copy, no atomics."""
    if len(offsets) == 1 or len(members) == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    return embedding_bag(members, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0."""
    return x.reciprocal().masked_fill_(x == 0, 0.0)
