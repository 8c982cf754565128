"""DSA, tile by tile: a program owns a tile of spans, walks the others of its sequence, and makes values and gradient.

    gap_ij = cos^S_ij - cos^T_ij,    p_ij = ω_i ω_j for i ≠ j, else 0
    X_i = Σ_j p_ij gap_ij²,    Z_i = Σ_j p_ij
    G_i = Σ_j c_ij Û_j,    c_ij = 4 p_ij gap_ij,    <Û_i, G_i> = Σ_j c_ij cos^S_ij
    ∂X/∂U_i = (G_i - Û_i <Û_i, G_i>) / |U_i|

The pairs never leave the chip. G_i is d_S wide, which no program can hold, so it is added up in its own rows of the
output: nobody else writes them, and the order is that of the walk. Spans are fp32: their cosines are subtracted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mta_ds.ops.kernels.launch import Specialisation, dot, gram_tile, on_their_device
from mta_ds.ops.kernels.segments import sums_within
from mta_ds.ops.layout import TILE_ROWS, Segments

ROWS, COLUMNS, FEATURES = TILE_ROWS, 64, 16
PRECISION = "tf32x3"


@triton.jit
def _cosines(
    states, rows, row_mask, row_inverse, columns, column_mask, column_inverse, num_features,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile = gram_tile(
        states, rows, row_mask, columns, column_mask, num_features, num_features,
        PRECISION, ROWS, COLUMNS, FEATURES,
    )  # fmt: skip
    return tile * row_inverse[:, None] * column_inverse[None, :]


@triton.jit
def _align(
    student, teacher, student_inverse, teacher_inverse, omega, tiles, values, normalisers, gradient,
    student_width, teacher_width,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    tile_id = tl.program_id(0)
    start, end = tl.load(tiles + 3 * tile_id + 1), tl.load(tiles + 3 * tile_id + 2)
    rows = tl.load(tiles + 3 * tile_id) + tl.arange(0, ROWS)
    row_mask = rows < end
    ours = tl.load(student_inverse + rows, mask=row_mask, other=0.0)
    theirs = tl.load(teacher_inverse + rows, mask=row_mask, other=0.0)
    weight = tl.load(omega + rows, mask=row_mask, other=0.0)
    value = tl.zeros([ROWS], tl.float32)
    normaliser = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    features = tl.arange(0, FEATURES)
    own = rows[:, None].to(tl.int64) * student_width
    for first in range(start, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        column_mask = columns < end
        column_ours = tl.load(student_inverse + columns, mask=column_mask, other=0.0)
        column_theirs = tl.load(teacher_inverse + columns, mask=column_mask, other=0.0)
        cosine = _cosines(
            student, rows, row_mask, ours, columns, column_mask, column_ours, student_width,
            PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        gap = cosine - _cosines(
            teacher, rows, row_mask, theirs, columns, column_mask, column_theirs, teacher_width,
            PRECISION, ROWS, COLUMNS, FEATURES,
        )  # fmt: skip
        pair = weight[:, None] * tl.load(omega + columns, mask=column_mask, other=0.0)[None, :]
        pair = tl.where(rows[:, None] == columns[None, :], 0.0, pair)
        slope = 4.0 * pair * gap
        value += tl.sum(pair * gap * gap, 1)
        normaliser += tl.sum(pair, 1)
        along += tl.sum(slope * cosine, 1)
        slope *= column_ours[None, :]
        for block in range(0, student_width, FEATURES):
            inside = (block + features < student_width)[None, :]
            at = gradient + own + (block + features)[None, :]
            states = tl.load(
                student + columns[:, None].to(tl.int64) * student_width + (block + features)[None, :],
                mask=column_mask[:, None] & inside, other=0.0,
            )  # fmt: skip
            total = tl.zeros([ROWS, FEATURES], tl.float32)
            if first > start:
                total = tl.load(at, mask=row_mask[:, None] & inside, other=0.0)
            total = dot(slope, states, total, PRECISION)
            tl.store(at, total, mask=row_mask[:, None] & inside)
        # the rows are this program's alone, but not this thread's
        tl.debug_barrier()
    for block in range(0, student_width, FEATURES):
        mask = row_mask[:, None] & (block + features < student_width)[None, :]
        at = own + (block + features)[None, :]
        state = tl.load(student + at, mask=mask, other=0.0)
        total = tl.load(gradient + at, mask=mask, other=0.0)
        total = ours[:, None] * (total - state * (ours * along)[:, None])
        tl.store(gradient + at, total, mask=mask)
    tl.store(values + rows, value, mask=row_mask)
    tl.store(normalisers + rows, normaliser, mask=row_mask)


@on_their_device
def align(
    student: Tensor, teacher: Tensor, student_inverse: Tensor, teacher_inverse: Tensor, omega: Tensor, spans: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """X [B], Z [B] and ∂X/∂student [K, d_S], all fp32; ``*_inverse`` [K] are 1 / |row|, or 0."""
    student, teacher, omega = student.contiguous(), teacher.contiguous(), omega.contiguous()
    gradient = torch.empty_like(student)
    values, normalisers = torch.empty_like(omega), torch.empty_like(omega)
    grid = spans.on("tiles", student.device, torch.int32)
    if len(grid):
        _align[len(grid),](
            student, teacher, student_inverse, teacher_inverse, omega, grid, values, normalisers, gradient,
            student.shape[1], teacher.shape[1], PRECISION, ROWS, COLUMNS, FEATURES, num_warps=8, num_stages=2,
        )  # fmt: skip
    cu = spans.on("cu", student.device)
    return sums_within(values, cu), sums_within(normalisers, cu), gradient


def specialisations(width: int) -> list[Specialisation]:
    """The compiled form: pooled spans are fp32 whatever the models are, and go by blocks whatever their width."""
    names = ("student", "teacher", "student_inverse", "teacher_inverse", "omega", "tiles", "values", "normalisers")
    pointers = {name: "*i32" if name == "tiles" else "*fp32" for name in (*names, "gradient")}
    tile = {"PRECISION": PRECISION, "ROWS": ROWS, "COLUMNS": COLUMNS, "FEATURES": FEATURES}
    return [Specialisation("dsa", _align, pointers | {"student_width": "i32", "teacher_width": "i32"}, tile, 8, 2)]
