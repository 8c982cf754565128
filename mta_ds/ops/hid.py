"""Hidden Representation Alignment (MTA eqs. 12-13): the student's tokens, projected, against the teacher's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mta_ds.ops.arguments import (
    check_dtypes,
    check_projection,
    check_rows,
    check_teacher,
    check_together,
    check_trained,
    check_vector,
)
from mta_ds.ops.autograd import differentiable_once, without_autocast
from mta_ds.ops.backend import backend_of
from mta_ds.ops.layout import row_blocks
from mta_ds.ops.products import ROW_STEP, accumulating, add_product, product, total_dtype, write_product

# Tokens that are projected at once: enough for products at full speed, few beside a batch; on a CPU half as many in
# half precision, of which fp32 copies are made.
_CPU_TOKENS = 1024
_GPU_TOKENS = 4096
_FULL = (torch.float32, torch.float64)
# Below this share of ||h||² times the largest ||column of W||², where a random state has all of it, ||W h||² is not
# computed through WᵀW.
_WEAK = 0.25


def hid(student: Tensor, projection: Tensor, teacher: Tensor, token_weights: Tensor) -> Tensor:
    """The weighted cosine distances between projected student and teacher tokens: Σ_t w_t (1 - cos(W h^S_t, h^T_t)).

    The projected tensor [m, d_T] is never kept: chunks of it become the gradients at once.

    Args:
        student: [m, d_S].
        projection: W [d_T, d_S].
        teacher: [m, d_T], no gradient.
        token_weights: [m], no gradient.

    Returns:
        A scalar sum in fp32 (float64 stays), differentiable in ``student`` and ``projection``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a teacher that requires grad.
    """
    check_rows("student", student)
    check_rows("teacher", teacher, len(student))
    check_teacher("teacher", teacher)
    check_vector("token_weights", token_weights, len(student))
    check_projection(projection, student, teacher)
    check_together(student=student, projection=projection, teacher=teacher, token_weights=token_weights)
    check_dtypes(student=student, projection=projection, teacher=teacher, token_weights=token_weights)
    check_trained(student=student, projection=projection)
    value: Tensor = _Hid.apply(  # type: ignore[no-untyped-call]
        student, projection, teacher, accumulating(token_weights.detach())
    )
    return value


class _Hid(torch.autograd.Function):
    """Gradients are made in the forward, chunk by chunk."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, student: Tensor, projection: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        projector = Projector(projection, student, len(weights))
        gradient = torch.empty_like(student)
        value = projector.project(student, teacher, weights, None, gradient)
        ctx.save_for_backward(gradient, projector.gradient())
        ctx.dtypes = student.dtype, projection.dtype
        return value

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # a scale that is rounded first would scale all of the gradient wrongly
        student, projection = (
            (accumulating(gradient) * upstream).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return student, projection, None, None


class Projector:
    """:func:`hid` with its gradients, over as many batches of tokens as one projection has.

    Args:
        projection: W [d_T, d_S].
        student: states of the dtype and device that will be projected.
        num_tokens: about how many there will be in all; decides which algebra pays.
    """

    def __init__(self, projection: Tensor, student: Tensor, num_tokens: int) -> None:
        self._dtype = torch.promote_types(student.dtype, projection.dtype)
        # not in half precision, where WᵀW would be rounded, nor on a GPU, which would be waited for to see which tokens
        # it is exact enough for
        through_gram = self._dtype in _FULL and not student.is_cuda and gram_pays(num_tokens, *projection.shape)
        way = _ThroughGram if through_gram else _Direct
        self._way = way(projection.detach().to(self._dtype))

    @torch.no_grad()
    def project(
        self, student: Tensor, teacher: Tensor, weights: Tensor, tokens: Tensor | None, gradient: Tensor
    ) -> Tensor:
        """Σ_t w_t (1 - cos(W h_t, h^T_t)); writes ∂/∂student [m, d_S] into ``gradient``, in the student's dtype.

        Args:
            student, teacher: [n, d_S], [n, d_T].
            weights: [m] in the accumulating dtype.
            tokens: the rows that count, int64 [m] beside the others; None for all, m = n.
        """
        values = torch.empty_like(weights)
        # chunks of about one size: a small rest would run at half the speed
        num_chunks = max(1, -(-len(weights) // hid_chunk_tokens(student.is_cuda, student.element_size())))
        size = -(-len(weights) // (num_chunks * ROW_STEP)) * ROW_STEP
        for chunk in row_blocks(len(weights), size):
            rows = chunk if tokens is None else tokens[chunk]
            ours = _rows_of(student, rows).to(self._dtype)
            values[chunk] = self._way(ours, teacher, rows, weights[chunk], gradient[chunk])
        return values.sum()

    def gradient(self) -> Tensor:
        """∂/∂W of the sum over all batches so far, [d_T, d_S] in the accumulating dtype; call it once, at the end."""
        return self._way.projection_gradient()


def hid_chunk_tokens(is_cuda: bool, element_bytes: int) -> int:
    """The most tokens that are projected at once."""
    return _GPU_TOKENS if is_cuda else _CPU_TOKENS if element_bytes >= 4 else _CPU_TOKENS // 2


def gram_pays(num_tokens: int, d_teacher: int, d_student: int) -> bool:
    """Whether WᵀW and the teacher's tokens projected down cost less than the student's projected up.

    Three products of m d_S d_T become two, two of m d_S² and two of d_T d_S².
    """
    return d_teacher > 2 * d_student * (1 + d_teacher / max(1, num_tokens))


def _rows_of(x: Tensor, rows: slice | Tensor, room: Tensor | None = None) -> Tensor:
    """A view of neighbouring rows, or a copy of chosen ones, in ``room`` if there is any."""
    return x[rows] if isinstance(rows, slice) else torch.index_select(x, 0, rows, out=room)


class _Direct:
    """Project up: P = h Wᵀ, and ∂/∂P back through W."""

    def __init__(self, projection: Tensor) -> None:
        self._projection = projection
        self._total = torch.zeros_like(projection, dtype=total_dtype(projection.dtype))
        self._rooms: dict[str, Tensor] = {}

    def __call__(
        self, student: Tensor, teacher: Tensor, rows: slice | Tensor, weights: Tensor, gradient: Tensor
    ) -> Tensor:
        """Values [c] of a chunk; its gradient into ``gradient`` [c, d_S], the projection's is added up."""
        projected = product(student, self._projection.T, lambda: self._room("projected", student))
        if backend_of(student) == "triton":
            import mta_ds.ops.kernels.hid as kernels

            values, towards = kernels.distances(projected, teacher, rows, weights, student.dtype)
        else:
            room = None if isinstance(rows, slice) else self._room("teacher", student, teacher.dtype)
            theirs = accumulating(_rows_of(teacher, rows, room))
            values, towards = _distances(projected, theirs, weights, self._room("products", student))
        towards = towards.to(student.dtype)
        add_product(self._total, towards.T, student)
        if gradient.dtype == student.dtype:
            write_product(gradient, towards, self._projection)
        else:
            gradient.copy_(product(towards, self._projection))
        return values

    def projection_gradient(self) -> Tensor:
        return self._total

    def _room(self, name: str, student: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Memory [c, d_T] that all chunks share: on a CPU, writing to fresh memory takes longer than most sums.

        A GPU's allocator does that itself.
        """
        if student.is_cuda:
            return None
        room = self._rooms.get(name)
        if room is None or len(room) < len(student):
            room = self._total.new_empty(len(student), len(self._projection), dtype=dtype)
            self._rooms[name] = room
        return room[: len(student)]


class _ThroughGram:
    """Project down: <W h, t> = <h, Wᵀ t> and ||W h||² = hᵀ (WᵀW) h, so nothing is d_T wide but the teacher.

    hᵀ (WᵀW) h loses as many digits as it is smaller than ||h||² ||WᵀW||, where W h loses half of them: tokens that W
    makes small are projected up.
    """

    def __init__(self, projection: Tensor) -> None:
        self._projection = projection
        self._total = torch.zeros_like(projection)
        self._gram = torch.mm(projection.T, projection)
        self._outer = torch.zeros_like(self._gram)
        self._least = _WEAK * self._gram.diagonal().amax()
        self._direct: _Direct | None = None

    def __call__(
        self, student: Tensor, teacher: Tensor, rows: slice | Tensor, weights: Tensor, gradient: Tensor
    ) -> Tensor:
        """As :class:`_Direct`."""
        through = product(student, self._gram)
        square = (student * through).sum(dim=1)
        weak = square < self._least * student.square().sum(dim=1)
        is_weak = bool(weak.any())
        strong = weights.masked_fill(weak, 0.0) if is_weak else weights
        theirs = _rows_of(teacher, rows).to(student.dtype)
        down = product(theirs, self._projection)
        values, along, back = _slopes(
            (student * down).sum(dim=1),
            square.masked_fill_(weak, 1.0).sqrt_(),
            torch.linalg.vector_norm(theirs, dim=1),
            strong,
        )
        self._total.addmm_(theirs.T, student * along[:, None])
        self._outer.addmm_(student.T, student * back[:, None])
        gradient.copy_(down.mul_(along[:, None]).addcmul_(through, back[:, None]))
        if is_weak:
            self._project_up(student, theirs, weak.nonzero()[:, 0], weights, values, gradient)
        return values

    def _project_up(
        self, student: Tensor, theirs: Tensor, weak: Tensor, weights: Tensor, values: Tensor, gradient: Tensor
    ) -> None:
        """Values and gradients of the ``weak`` rows."""
        self._direct = self._direct or _Direct(self._projection)
        room = student.new_empty(len(weak), student.shape[1])
        values[weak] = self._direct(student[weak], theirs, weak, weights[weak], room)
        gradient[weak] = room.to(gradient.dtype)

    def projection_gradient(self) -> Tensor:
        """Σ_t b_t W h hᵀ is multiplied once for all tokens."""
        total = self._total.addmm_(self._projection, self._outer)
        return total if self._direct is None else total.add_(self._direct.projection_gradient())


def _distances(
    projected: Tensor, teacher: Tensor, weights: Tensor, room: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w (1 - cos(P, T)) of each row [c] and its gradient to P [c, d_T], written over ``projected``; P·T in ``room``."""
    ours, theirs = (torch.linalg.vector_norm(x, dim=1) for x in (projected, teacher))
    values, along, back = _slopes(torch.mul(projected, teacher, out=room).sum(dim=1), ours, theirs, weights)
    return values, projected.mul_(back[:, None]).addcmul_(teacher, along[:, None])


def _slopes(dot: Tensor, ours: Tensor, theirs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and a, b of the gradient a T + b P: ∂/∂P w (1 - <P, T> / (|P| |T|)) = -w T / (|P| |T|) + w cos P / |P|².

    A zero vector's cosine is 0, and so is its gradient.
    """
    zero = ~((ours > 0) & (theirs > 0))
    inverse = (ours * theirs).reciprocal_().masked_fill_(zero, 0.0)
    cosine = dot * inverse
    back = (weights * cosine).div_(ours.square()).masked_fill_(zero, 0.0)
    return weights * (1 - cosine), -weights * inverse, back
