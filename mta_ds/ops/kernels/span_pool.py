"""Pooling: a program reads a block of features of one span's tokens; backward, of one token's spans.

    U_i = Σ_{t∈i} w_t H_t / m_i,    m_i = Σ_{t∈i} w_t;        ∂/∂H_t = w_t Σ_{i∋t} ∂U_i / m_i

A token is gathered from its spans and a span from its tokens, so sums have one order and no atomics, and overlapping
spans cost what they overlap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, block_size

FEATURES = 1024


@triton.jit
def _pool(hidden, weights, spans, states, mass, stride, num_features, FEATURES: tl.constexpr):
    span = tl.program_id(0).to(tl.int64)
    start, end = tl.load(spans + 2 * span), tl.load(spans + 2 * span + 1)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = features < num_features
    total = tl.zeros([FEATURES], tl.float32)
    weight = 0.0
    for token in range(start, end):
        share = tl.load(weights + token)
        weight += share
        total += share * tl.load(hidden + tl.cast(token, tl.int64) * stride + features, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(states + span * num_features + features, tl.where(weight == 0.0, 0.0, total / weight), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(mass + span, weight)


@triton.jit
def _pool_gradient(scaled, weights, token_spans, token_offsets, gradient, num_features, FEATURES: tl.constexpr):
    """``scaled`` is ∂U_i / m_i."""
    token = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    inside = features < num_features
    total = tl.zeros([FEATURES], tl.float32)
    for pair in range(tl.load(token_offsets + token), tl.load(token_offsets + token + 1)):
        span = tl.load(token_spans + pair).to(tl.int64)
        total += tl.load(scaled + span * num_features + features, mask=inside, other=0.0)
    total *= tl.load(weights + token)
    tl.store(gradient + token * num_features + features, total, mask=inside)


def pool(hidden: Tensor, weights: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """States [K, d] and masses [K] of ``spans`` int32 [K, 2], beside the others."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    num_spans, num_features = len(spans), hidden.shape[1]
    states = hidden.new_empty(num_spans, num_features, dtype=torch.float32)
    mass = hidden.new_empty(num_spans, dtype=torch.float32)
    if num_spans:
        block = block_size(num_features, FEATURES)
        grid = (num_spans, triton.cdiv(num_features, block))
        _pool[grid](
            hidden, weights.contiguous(), spans, states, mass, hidden.stride(0), num_features, block, num_warps=4
        )
    return states, mass


def pool_gradient(scaled: Tensor, weights: Tensor, token_spans: Tensor, token_offsets: Tensor) -> Tensor:
    """∂/∂hidden fp32 [n, d] from ``scaled`` fp32 [K, d] and each token's spans, int32."""
    num_tokens, num_features = len(weights), scaled.shape[1]
    gradient = scaled.new_empty(num_tokens, num_features)
    if num_tokens:
        block = block_size(num_features, FEATURES)
        grid = (num_tokens, triton.cdiv(num_features, block))
        _pool_gradient[grid](
            scaled.contiguous(), weights.contiguous(), token_spans, token_offsets, gradient, num_features, block,
            num_warps=4,
        )  # fmt: skip
    return gradient


def specialisations(width: int) -> list[Specialisation]:
    """Every compiled form for states of this width."""
    block = {"FEATURES": block_size(width, FEATURES)}
    numbers = {"stride": "i32", "num_features": "i32"}
    forward = {"weights": "*fp32", "spans": "*i32", "states": "*fp32", "mass": "*fp32", **numbers}
    found = [
        Specialisation(f"pool {name}", _pool, {"hidden": f"*{name}", **forward}, block, 4, 3)
        for name in ("bf16", "fp32")
    ]
    pointers = {"scaled": "*fp32", "weights": "*fp32", "token_spans": "*i32", "token_offsets": "*i32"}
    backward = pointers | {"gradient": "*fp32", "num_features": "i32"}
    return [*found, Specialisation("pool_gradient", _pool_gradient, backward, block, 4, 3)]
