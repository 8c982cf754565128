"""Dynamic Structural Alignment (MTA eqs. 10-11): do the student's spans relate to each other as the teacher's do?"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import (
    check_bounds,
    check_dtypes,
    check_rows,
    check_teacher,
    check_together,
    check_trained,
    check_vector,
)
from mta_ds.ops.autograd import differentiable_once, without_autocast
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import Segments, row_blocks, runs
from mta_ds.ops.products import accumulating, gram

# Pairs of spans of a CPU at once: 2 MB in fp32 stay in cache until their gradient is made.
_BLOCK_PAIRS = 1 << 19


class Aligned(NamedTuple):
    """Sums of each sequence with the gradient of the first."""

    values: Tensor
    """X [B]"""
    normalisers: Tensor
    """Z [B]"""
    gradient: Tensor
    """∂X_b/∂U of the student's spans [K, d_S]: each span is in one sequence."""


def dsa(student: Tensor, teacher: Tensor, span_weights: Tensor, cu_spans: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted squared differences of cosines between spans, of each sequence.

        X_b = Σ_i Σ_{j≠i} ω_i ω_j (cos(U^S_i, U^S_j) - cos(U^T_i, U^T_j))²,    Z_b = Σ_i Σ_{j≠i} ω_i ω_j

    The cosines are subtracted before they are squared, tile by tile. The feature form ||AᵀA||² - 2||AᵀC||² + ||CᵀC||²
    would cost less where K > d, but loses all digits of X_b in fp32 once student and teacher agree.

    Args:
        student: span states [K, d_S].
        teacher: [K, d_T], no gradient.
        span_weights: ω [K], no gradient.
        cu_spans: int64 [B + 1] on the CPU.

    Returns:
        X [B], differentiable in ``student``, and Z [B]; exact zeros for a sequence with fewer than two spans.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a teacher that requires grad.
    """
    check_rows("student", student)
    check_rows("teacher", teacher, len(student))
    check_teacher("teacher", teacher)
    check_vector("span_weights", span_weights, len(student))
    check_together(student=student, teacher=teacher, span_weights=span_weights)
    check_dtypes(student=student, teacher=teacher, span_weights=span_weights)
    check_trained(student=student)
    check_bounds("cu_spans", cu_spans, len(student))
    values, normalisers = _DSA.apply(  # type: ignore[no-untyped-call]
        student, teacher, accumulating(span_weights.detach()), Segments(cu_spans)
    )
    return values, normalisers


class _DSA(torch.autograd.Function):
    """Gradients are made in the forward, while the tiles of cosines are at hand."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, student: Tensor, teacher: Tensor, omega: Tensor, spans: Segments) -> tuple[Tensor, Tensor]:
        aligned = align(accumulating(student), accumulating(teacher), omega, spans)
        ctx.save_for_backward(aligned.gradient)
        ctx.spans, ctx.dtype = spans, student.dtype
        ctx.mark_non_differentiable(aligned.normalisers)
        return aligned.values, aligned.normalisers

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        owners = ctx.spans.on("owners", upstream.device)
        return (gradient * upstream[owners, None]).to(ctx.dtype), None, None, None


@torch.no_grad()
def align(student: Tensor, teacher: Tensor, omega: Tensor, spans: Segments) -> Aligned:
    """:func:`dsa` with its gradient, in the accumulating dtype; overwrites nothing."""
    if backend_of(student) == "triton":
        import mta_ds.ops.kernels.dsa as kernels

        return Aligned(*kernels.align(student, teacher, _inverse_norm(student), _inverse_norm(teacher), omega, spans))
    gradient = torch.empty_like(student)
    ours, theirs = _inverse_norm(student), _inverse_norm(teacher)
    sums = omega.new_zeros(len(spans.cu) - 1, 2)
    for first, run in runs(spans.cu, _BLOCK_PAIRS):
        parts = _Run(*(run.of(each) for each in (student, teacher, ours, theirs, omega, gradient)))
        sums[first : first + run.num_segments] = _align_run(parts)
    values, normalisers = sums.unbind(dim=1)
    return Aligned(values, normalisers, gradient)


class _Run(NamedTuple):
    """c sequences of K spans each: states [c, K, d], inverse norms and weights [c, K], and where results go."""

    student: Tensor
    teacher: Tensor
    ours: Tensor
    theirs: Tensor
    omega: Tensor
    gradient: Tensor


def _align_run(spans: _Run) -> Tensor:
    """[X, Z] of each sequence [c, 2]; writes ``gradient``.

    With Û the unit rows and c_ij = ω_i ω_j (cos^S_ij - cos^T_ij), ∂X/∂Û_i = 4 Σ_j c_ij Û_j =: 4 G_i, and through the
    normalisation ∂X/∂U_i = 4 (G_i - Û_i <Û_i, G_i>) / ||U_i|| with <Û_i, G_i> = Σ_j c_ij cos^S_ij: one product, where
    c_ii, else 0, is minus that. Norms scale pairs, which are fewer than features.
    """
    student, teacher, ours, theirs, omega, gradient = spans
    count, length, _ = student.shape
    sums = omega.new_zeros(count, 2)
    for rows in row_blocks(length, _BLOCK_PAIRS // max(1, count * length)):
        cosine, gap = _cosines(student, ours, rows), _cosines(teacher, theirs, rows)
        gap.neg_().add_(cosine)
        pair = omega[:, rows, None] * omega[:, None]
        # the diagonal goes by its weight: a zero vector's cosine with itself is 0, not 1
        pair.diagonal(offset=rows.start, dim1=1, dim2=2).zero_()
        sums[:, 1] += pair.sum(dim=(1, 2))
        slope = pair.mul_(gap)
        sums[:, 0] += gap.mul_(slope).sum(dim=(1, 2))
        slope.diagonal(offset=rows.start, dim1=1, dim2=2).copy_(cosine.mul_(slope).sum(dim=2).neg_())
        slope.mul_(4 * ours[:, rows, None]).mul_(ours[:, None])
        torch.bmm(slope, student, out=gradient[:, rows])
    return sums


def _cosines(states: Tensor, inverse_norms: Tensor, rows: slice) -> Tensor:
    """Cosines [c, rows, K] of some states of c sequences [c, K, d] with all of their own sequence."""
    whole = rows == slice(0, states.shape[1])
    products = gram(states) if whole else torch.bmm(states[:, rows], states.mT)
    return products.mul_(inverse_norms[:, rows, None]).mul_(inverse_norms[:, None])


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / ||row||, and 0 for a zero row: it has no direction, and no gradient."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norm.reciprocal().masked_fill_(~(norm > 0), 0.0)
