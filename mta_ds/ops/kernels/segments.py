"""Shares and sums within segments: a program owns a segment, however long, and sums it a block at a time.

    share_i = exp(x_i - lse),    lse = log Σ_i exp x_i

Logarithms are float64, few as they are. Sums have one order and no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, on_their_device

# Spans are short, sequences long: the programs of the first would idle in blocks of the second.
SHORT, LONG = 32, 1024
WARPS = {SHORT: 1, LONG: 8}  # float64 takes two registers


@triton.jit
def _softmax_within(logs, cu, shares, sums, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu + segment), tl.load(cu + segment + 1)
    values = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(start, end, BLOCK):
        log = tl.load(logs + first + values, mask=first + values < end, other=-float("inf"))
        highest = tl.maximum(top, log)
        # a lane may have seen nothing yet; exp(-inf - -inf) would be NaN
        base = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(top - base) + tl.exp(log - base)
        top = highest
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    whole = tl.sum(total * tl.exp(top - base), 0)
    # the largest adds 1: a whole of zero weighs nothing
    divisor = tl.where(whole == 0.0, 1.0, whole)
    tl.store(sums + segment, tl.where(whole == 0.0, -float("inf"), base + tl.log(divisor)))
    for first in range(start, end, BLOCK):
        inside = first + values < end
        log = tl.load(logs + first + values, mask=inside, other=-float("inf"))
        share = tl.exp(log - base) / divisor
        tl.store(shares + first + values, share.to(shares.dtype.element_ty), mask=inside)


@triton.jit
def _sums_within(values, cu, sums, BLOCK: tl.constexpr):
    segment = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu + segment), tl.load(cu + segment + 1)
    each = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        total += tl.load(values + first + each, mask=first + each < end, other=0.0)
    tl.store(sums + segment, tl.sum(total, 0))


@on_their_device
def softmax_within(logs: Tensor, cu: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See :func:`mta_ds.ops.segments.softmax_within`; ``cu`` int64 [B + 1] beside ``logs``."""
    num_segments = len(cu) - 1
    shares, sums = logs.new_empty(len(logs), dtype=dtype), logs.new_empty(num_segments)
    if num_segments:
        block = _block(logs, num_segments)
        _softmax_within[num_segments,](logs.contiguous(), cu, shares, sums, block, num_warps=WARPS[block])
    return shares, sums


@on_their_device
def sums_within(values: Tensor, cu: Tensor) -> Tensor:
    """Σ of fp32 ``values`` [N] over each segment, [B]."""
    num_segments = len(cu) - 1
    sums = values.new_empty(num_segments)
    if num_segments:
        block = _block(values, num_segments)
        _sums_within[num_segments,](values, cu, sums, block, num_warps=WARPS[block])
    return sums


def _block(values: Tensor, num_segments: int) -> int:
    return SHORT if len(values) <= SHORT * num_segments else LONG


def specialisations(width: int) -> list[Specialisation]:
    """Every compiled form; none depends on the width of states."""
    softmax = {"logs": "*fp64", "cu": "*i64", "shares": "*fp32", "sums": "*fp64"}
    sums = {"values": "*fp32", "cu": "*i64", "sums": "*fp32"}
    return [
        Specialisation(f"{name} {block}", kernel, signature, {"BLOCK": block}, WARPS[block], 3)
        for name, kernel, signature in (
            ("softmax_within", _softmax_within, softmax),
            ("sums_within", _sums_within, sums),
        )
        for block in (SHORT, LONG)
    ]
