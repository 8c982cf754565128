"""Spans (MTA eqs. 8-9): each span's weighted mean of tokens, and its share of its sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mta_ds.ops.arguments import check_bounds, check_dtypes, check_rows, check_together, check_vector
from mta_ds.ops.autograd import differentiable_once
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import Membership, Segments
from mta_ds.ops.products import accumulating, total_dtype
from mta_ds.ops.segments import softmax_within


def span_pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> Tensor:
    """Weighted mean of each span's tokens: U_i = Σ w_t H_t / Σ w_t.

    Args:
        hidden: [n, d].
        weights: [n], not negative, no gradient; what counts is their ratios within a span, however small they are.
        spans: half-open token ranges int64 [K, 2] on the CPU, may overlap.

    Returns:
        [K, d] in fp32 (float64 stays), differentiable in ``hidden``; a span whose tokens weigh nothing pools to zeros.

    Raises:
        ValueError: shapes, dtypes, devices or ranges that do not fit.
    """
    check_rows("hidden", hidden)
    check_vector("weights", weights, len(hidden))
    check_together(hidden=hidden, weights=weights)
    check_dtypes(hidden=hidden, weights=weights)
    members = Membership(spans, len(hidden))
    states: Tensor = _SpanPool.apply(  # type: ignore[no-untyped-call]
        hidden, span_shares(_logs(weights), members, hidden)[0], members
    )
    return states


class _SpanPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shares: Tensor, members: Membership) -> Tensor:
        ctx.save_for_backward(shares)
        ctx.members, ctx.dtype = members, hidden.dtype
        return pool(hidden, shares, members)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (shares,) = ctx.saved_tensors
        members: Membership = ctx.members
        gradient = upstream.new_empty(members.num_tokens, upstream.shape[1], dtype=ctx.dtype)
        scatter(gradient, pool_gradient(upstream, shares, members), members)
        return gradient, None, None


def span_shares(logs: Tensor, members: Membership, like: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's share of each of its spans, w_t / Σ_{t∈i} w_t, and log Σ_{t∈i} w_t.

    Args:
        logs: log w, float64 [n].
        like: states that will be pooled.

    Returns:
        [pairs], span by span, in the accumulating dtype of ``like``, and float64 [K].
    """
    tokens = members.on("span_tokens", logs.device)
    return softmax_within(logs[tokens], members.pairs, total_dtype(like.dtype))


def pool(hidden: Tensor, shares: Tensor, members: Membership) -> Tensor:
    """Span states [K, d], the sum of each span's tokens times their ``shares`` [pairs]; no graph."""
    if backend_of(hidden) == "triton":
        import mta_ds.ops.kernels.span_pool as kernels

        spans, offsets = (members.on(name, hidden.device, torch.int32) for name in ("spans", "span_offsets"))
        return kernels.pool(hidden, shares, spans, offsets)
    tokens, offsets = (members.on(name, hidden.device) for name in ("span_tokens", "span_offsets"))
    return _bags(accumulating(hidden), tokens, offsets, shares)


def pool_gradient(upstream: Tensor, shares: Tensor, members: Membership, factor: Tensor | None = None) -> Tensor:
    """∂/∂hidden of pooled states with this upstream gradient [K, d], at the covered tokens alone: elsewhere it is zero.

    Each token gathers from its spans, factor · Σ_{i∋t} share_ti · upstream_i, so that the sums have one order and need
    no atomics.

    Returns:
        [m, d] in the accumulating dtype.
    """
    pairs = members.on("token_pairs", upstream.device)
    by_token = shares[pairs] if factor is None else shares[pairs] * factor
    names = ("token_spans", "covered_offsets")
    if backend_of(upstream) == "triton":
        import mta_ds.ops.kernels.span_pool as kernels

        spans, offsets = (members.on(name, upstream.device, torch.int32) for name in names)
        return kernels.pool_gradient(upstream, by_token, spans, offsets)
    spans, offsets = (members.on(name, upstream.device) for name in names)
    return _bags(accumulating(upstream), spans, offsets, by_token)


def scatter(out: Tensor, rows: Tensor, members: Membership) -> None:
    """Put the covered tokens' ``rows`` [m, d] into ``out`` [n, d], rounded to its dtype once, beside zeros."""
    if len(rows) == len(out):
        out.copy_(rows)
    else:  # each token once: there is no order to keep
        out.zero_().index_copy_(0, members.on("covered", out.device), rows.to(out.dtype))


def span_weights(weights: Tensor, spans: Tensor, cu_spans: Tensor) -> Tensor:
    """Each span's share of its sequence's span weight: ω_i = Σ_{t∈i} w_t / Σ_j Σ_{t∈j} w_t.

    Args:
        weights: [n], not negative, no gradient.
        spans: int64 [K, 2] on the CPU.
        cu_spans: int64 [B + 1] on the CPU.

    Returns:
        [K], summing to 1 over the spans of each sequence that has any weight in spans.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_vector("weights", weights, len(weights))
    members = Membership(spans, len(weights))
    check_bounds("cu_spans", cu_spans, len(spans))
    _, log_mass = span_shares(_logs(weights), members, weights)
    return softmax_within(log_mass, Segments(cu_spans), total_dtype(weights.dtype))[0]


def normalise_within(values: Tensor, cu: Tensor) -> Tensor:
    """Each value's share of the sum over its own segment.

    Args:
        values: [N], not negative, no gradient.
        cu: bounds of the segments, int64 [B + 1] on the CPU.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    check_vector("values", values, len(values))
    check_bounds("cu", cu, len(values))
    return softmax_within(_logs(values), Segments(cu), total_dtype(values.dtype))[0]


def _logs(weights: Tensor) -> Tensor:
    # float64 before the logarithm: of a subnormal fp32 it is exact
    return weights.detach().double().log()


def _bags(rows: Tensor, members: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Σ of ``rows`` [N, d] over each bag of ``members``, times their ``weights``; no [members, d] copy, no atomics."""
    if len(offsets) == 1 or len(members) == 0:
        return rows.new_zeros(len(offsets) - 1, rows.shape[1])
    return embedding_bag(members, rows, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)
