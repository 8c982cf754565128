"""Token weights in two passes over score tiles that never leave the chip: row log-sum-exps, then column sums.

    S_st = <H_s, H_t> c_s c_t,    c_t = d^-¼ / (std(H_t) + 1e-5),    S_tt = -inf
    lse_s = log Σ_t exp S_st
    log w_t = log Σ_s exp(S_st - lse_s) - log n

S is symmetric, so a program owns a tile of tokens and walks the other tokens of its sequence in both passes: once as
rows whose exponentials it sums, once as columns whose shares it sums, both beside the largest, so that no weight
underflows. Sums have one order and no atomics. Memory beside
the states is O(n); the scores are made twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, block_size, gram_tile, on_their_device, precision
from mta_ds.ops.layout import TILE_ROWS, Segments
from mta_ds.ops.reference import STD_EPSILON

ROWS, COLUMNS = TILE_ROWS, 64
STAT_BLOCK = 1024


@triton.jit
def _row_scales(hidden, scales, stride, num_features, factor, EPSILON: tl.constexpr, BLOCK: tl.constexpr):
    """c_t = factor / (std(H_t) + ε): the mean first, then the squares about it; the row is in cache the second time."""
    row = tl.program_id(0).to(tl.int64)
    hidden += row * stride
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_features, BLOCK):
        total += tl.load(hidden + first + offsets, mask=first + offsets < num_features, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / num_features
    square = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_features, BLOCK):
        mask = first + offsets < num_features
        centred = tl.load(hidden + first + offsets, mask=mask, other=0.0).to(tl.float32) - mean
        square += tl.where(mask, centred * centred, 0.0)
    deviation = tl.sqrt(tl.sum(square, 0) / (num_features - 1))
    tl.store(scales + row, factor / (deviation + EPSILON))


@triton.jit
def _score_tile(
    hidden, scales, rows, row_mask, row_scales, columns, column_mask, stride, num_features,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """S [ROWS, COLUMNS] of a tile; -inf on the diagonal and beyond the sequence."""
    tile = gram_tile(
        hidden, rows, row_mask, columns, column_mask, stride, num_features,
        PRECISION, ROWS, COLUMNS, FEATURES,
    )  # fmt: skip
    tile *= row_scales[:, None] * tl.load(scales + columns, mask=column_mask, other=0.0)[None, :]
    return tl.where(column_mask[None, :] & (rows[:, None] != columns[None, :]), tile, -float("inf"))


@triton.jit
def _row_sums(
    hidden, scales, tiles, lse, stride, num_features,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """lse_s of a tile of tokens, online."""
    tile_id = tl.program_id(0)
    start, end = tl.load(tiles + 3 * tile_id + 1), tl.load(tiles + 3 * tile_id + 2)
    rows = tl.load(tiles + 3 * tile_id) + tl.arange(0, ROWS)
    row_mask = rows < end
    row_scales = tl.load(scales + rows, mask=row_mask, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(start, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        scores = _score_tile(
            hidden, scales, rows, row_mask, row_scales, columns, columns < end, stride, num_features,
            PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        highest = tl.maximum(top, tl.max(scores, 1))
        # a tile may hold nothing but the token itself; exp(-inf - -inf) would be NaN
        base = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        top = highest
    tl.store(lse + rows, top + tl.log(total), mask=row_mask)


@triton.jit
def _column_sums(
    hidden, scales, tiles, lse, logs, stride, num_features,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """log w_t of a tile of tokens: its row of S is its column, so it sums exp(S_ts - lse_s) over the others."""
    tile_id = tl.program_id(0)
    start, end = tl.load(tiles + 3 * tile_id + 1), tl.load(tiles + 3 * tile_id + 2)
    rows = tl.load(tiles + 3 * tile_id) + tl.arange(0, ROWS)
    row_mask = rows < end
    row_scales = tl.load(scales + rows, mask=row_mask, other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(start, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        column_mask = columns < end
        scores = _score_tile(
            hidden, scales, rows, row_mask, row_scales, columns, column_mask, stride, num_features,
            PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        # beyond the sequence a score is -inf, and so is the share whatever the finite sum taken off
        scores -= tl.load(lse + columns, mask=column_mask, other=0.0)[None, :]
        highest = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        top = highest
    length = end - start
    # float64 keeps the digits of what has been summed; a token alone attends to nothing: its weight is 1, or NaN with
    # its state
    log = top.to(tl.float64) + tl.log(total.to(tl.float64)) - tl.log(length.to(tl.float64))
    tl.store(logs + rows, tl.where(length == 1, 0.0 * row_scales.to(tl.float64), log), mask=row_mask)


@on_their_device
def log_token_weights(hidden: Tensor, sequences: Segments) -> Tensor:
    """See :func:`mta_ds.ops.token_weights.log_token_weights`."""
    num_tokens, num_features = hidden.shape
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    scales, lse = (hidden.new_empty(num_tokens, dtype=torch.float32) for _ in range(2))
    logs = hidden.new_empty(num_tokens, dtype=torch.float64)
    grid = sequences.on("tiles", hidden.device, torch.int32)
    if not len(grid):
        return logs
    _row_scales[num_tokens,](
        hidden, scales, hidden.stride(0), num_features, num_features**-0.25, STD_EPSILON, STAT_BLOCK, num_warps=4
    )
    tile = (precision(hidden.dtype), ROWS, COLUMNS, feature_block(hidden.dtype, num_features))
    shape = (hidden.stride(0), num_features)
    _row_sums[len(grid),](hidden, scales, grid, lse, *shape, *tile, num_warps=4, num_stages=3)
    _column_sums[len(grid),](hidden, scales, grid, lse, logs, *shape, *tile, num_warps=4, num_stages=3)
    return logs


def feature_block(dtype: torch.dtype, num_features: int) -> int:
    """Features of a tile at once: 128 bytes of a row."""
    return block_size(num_features, 32 if dtype == torch.float32 else 64)


def specialisations(width: int) -> list[Specialisation]:
    """Every compiled form for states of this width."""
    found = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        pointers = {"hidden": f"*{name}", "scales": "*fp32", "tiles": "*i32", "lse": "*fp32"}
        numbers = {"stride": "i32", "num_features": "i32"}
        tile = {
            "PRECISION": precision(dtype), "ROWS": ROWS, "COLUMNS": COLUMNS, "FEATURES": feature_block(dtype, width)
        }  # fmt: skip
        scales = {"hidden": f"*{name}", "scales": "*fp32", **numbers, "factor": "fp32"}
        found += [
            Specialisation(
                f"row_scales {name}", _row_scales, scales, {"EPSILON": STD_EPSILON, "BLOCK": STAT_BLOCK}, 4, 3
            ),
            Specialisation(f"row_sums {name}", _row_sums, pointers | numbers, tile, 4, 3),
            Specialisation(f"column_sums {name}", _column_sums, pointers | {"logs": "*fp64"} | numbers, tile, 4, 3),
        ]
    return found
