"""Pooling: a program reads a block of features of one span's tokens; backward, of one covered token's spans.

    U_i = Σ_{t∈i} s_ti H_t;        ∂/∂H_t = Σ_{i∋t} s_ti ∂U_i,    s_ti the token's share of the span's weight

A token is gathered from its spans and a span from its tokens, so sums have one order and no atomics, and overlapping
spans cost what they overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, block_size, on_their_device

FEATURES = 1024


@triton.jit
def _pool(hidden, shares, spans, offsets, states, stride, num_features, FEATURES: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    start, end = tl.load(spans + 2 * span), tl.load(spans + 2 * span + 1)
    shares += tl.load(offsets + span)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = features < num_features
    total = tl.zeros([FEATURES], tl.float32)
    for token in range(start, end):
        state = tl.load(hidden + tl.cast(token, tl.int64) * stride + features, mask=inside, other=0.0)
        total += tl.load(shares + (token - start)) * state.to(tl.float32)
    tl.store(states + span * num_features + features, total, mask=inside)


@triton.jit
def _pool_gradient(upstream, shares, token_spans, offsets, gradient, num_features, FEATURES: tl.constexpr):
    """Row by row of the covered tokens, whose pairs ``offsets`` bounds."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = features < num_features
    total = tl.zeros([FEATURES], tl.float32)
    for pair in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        span = tl.load(token_spans + pair).to(tl.int64)
        towards = tl.load(upstream + span * num_features + features, mask=inside, other=0.0)
        total += tl.load(shares + pair) * towards.to(tl.float32)
    tl.store(gradient + row * num_features + features, total, mask=inside)


@on_their_device
def pool(hidden: Tensor, shares: Tensor, spans: Tensor, offsets: Tensor) -> Tensor:
    """States fp32 [K, d] of ``spans`` int32 [K, 2], whose ``shares`` fp32 [pairs] ``offsets`` int32 [K + 1] bounds."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    num_spans, num_features = len(spans), hidden.shape[1]
    states = hidden.new_empty(num_spans, num_features, dtype=torch.float32)
    if num_spans:
        block = block_size(num_features, FEATURES)
        grid = (num_spans, triton.cdiv(num_features, block))
        _pool[grid](hidden, shares, spans, offsets, states, hidden.stride(0), num_features, block, num_warps=4)
    return states


@on_their_device
def pool_gradient(upstream: Tensor, shares: Tensor, token_spans: Tensor, offsets: Tensor) -> Tensor:
    """∂/∂hidden of m tokens, fp32 [m, d], from ``upstream`` [K, d]; spans int32 and shares are of pairs token by token,
    which ``offsets`` int32 [m + 1] bounds."""
    num_tokens, num_features = len(offsets) - 1, upstream.shape[1]
    gradient = upstream.new_empty(num_tokens, num_features, dtype=torch.float32)
    if num_tokens:
        block = block_size(num_features, FEATURES)
        grid = (num_tokens, triton.cdiv(num_features, block))
        _pool_gradient[grid](
            upstream.contiguous(), shares, token_spans, offsets, gradient, num_features, block, num_warps=4
        )
    return gradient


def specialisations(width: int) -> list[Specialisation]:
    """Every compiled form for states of this width."""
    block = {"FEATURES": block_size(width, FEATURES)}
    forward = {"shares": "*fp32", "spans": "*i32", "offsets": "*i32", "states": "*fp32"}
    backward = {"shares": "*fp32", "token_spans": "*i32", "offsets": "*i32", "gradient": "*fp32", "num_features": "i32"}
    found = []
    for name in ("bf16", "fp32"):
        found += [
            Specialisation(
                f"pool {name}", _pool,
                {"hidden": f"*{name}", **forward, "stride": "i32", "num_features": "i32"}, block, 4, 3,
            ),
            Specialisation(f"pool_gradient {name}", _pool_gradient, {"upstream": f"*{name}", **backward}, block, 4, 3),
        ]  # fmt: skip
    return found
