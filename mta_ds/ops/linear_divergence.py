"""Divergence and label cross-entropy from final hidden states, through both LM heads, without ever holding logits.

Tokens go through the heads in chunks. Each chunk's logits give the loss and, at once, its gradients to the student's
hidden states and head; then they are gone. Backward only scales what the forward has stored. The products are the
vendor's; what lies between them is one launch over a chunk's rows, or, on torch, passes over a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_teacher, check_together, check_vector
from mta_ds.ops.backend import backend_of
from mta_ds.ops.divergence import Divergence, divergence_rows
from mta_ds.ops.products import product

IGNORED = -100
# Large enough that the products run at full speed and the head's gradient is not read and written too often, small
# beside the logits of a batch.
_CPU_BYTES = 64 << 20
_GPU_BYTES = 1 << 30
_MIN_TOKENS = 32  # and a multiple of it: the products' own tiles
# Rows of a low-precision head that are in fp32 at a time where the CPU multiplies.
_SLAB_ROWS = 2048


class LinearDivergence(NamedTuple):
    """Sums over the counted positions, each times its weight; ``loss`` is differentiable, the others are detached."""

    loss: Tensor
    divergence: Tensor
    """Zero where there is no teacher, and for ``sft``."""
    cross_entropy: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """Number of positions with a target."""
    entropy: Tensor | None = None
    """The teacher's entropy in nats at each counted position [count], not weighted, if it was asked for."""


def linear_divergence(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None = None,
    *,
    teacher_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> LinearDivergence:
    """Σ over positions with target ≠ -100 of w [(1 - kd_ratio) · cross-entropy + kd_ratio · divergence] (METHOD §8).

    Logits, softmax and sums are fp32 (float64 stays float64), whatever the inputs' dtype, and the gradients are kept in
    fp32 until backward has scaled them. Nothing here waits for a GPU. Backward can run once: it hands out the gradients
    it stored instead of copies of them.

    Args:
        student, student_head: final hidden states [n, d_S] and the LM head [V_S, d_S], of one dtype.
        teacher, teacher_head: [n, d_T] and [V_T, d_T], of one dtype, no gradient; None where no teacher is needed.
        targets: int64 [n] on the CPU, the label of the next token, -100 = not counted. How many are counted is the
            size of every product: read from a GPU it would have to be waited for.
        weights: [n], a factor for each position, no gradient; 1 if not given.
        teacher_entropy: also return the teacher's entropy, from the same pass.
        chunk_bytes: memory for the logits of one chunk of tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, labels that are no rows of the head, a teacher that is
            needed and missing, or one that requires grad.
    """
    _check(student, student_head, teacher, teacher_head, targets, divergence, weights)
    if teacher is None and (teacher_entropy or divergence.needs_teacher):
        what = "teacher_entropy" if teacher_entropy else f"the divergence '{divergence.name}'"
        raise ValueError(f"teacher: {what} needs it")
    if divergence.name == "sft" and not teacher_entropy:
        teacher = teacher_head = None  # nothing would be read from it
    rows = slice(0, divergence.vocab_size)
    labels = targets[counted := (targets != IGNORED).nonzero()[:, 0]]
    index = _upload(counted, student.device)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(student.device, non_blocking=True).index_select(0, index)

    loss, divergence_sum, cross_entropy, entropy = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student.index_select(0, index),
        student_head,
        pick(teacher),
        teacher_head[rows] if teacher_head is not None else None,
        _upload(labels, student.device),
        pick(weights),
        divergence,
        teacher_entropy,
        _chunk_tokens(len(student_head[rows]), student, chunk_bytes),
        torch.is_grad_enabled(),
    )
    return LinearDivergence(loss, divergence_sum, cross_entropy, len(labels), entropy)


class _LinearDivergence(torch.autograd.Function):
    """The op on counted positions only; the gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        divergence: Divergence,
        teacher_entropy: bool,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # needs_input_grad tells of the inputs alone: it is set under no_grad too, where gradients would be for nothing
        needs_hidden, needs_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        head = student_head[: divergence.vocab_size]
        total = _total(student)
        values = student.new_empty((3 if teacher_entropy else 2, len(student)), dtype=total)
        weights = None if weights is None else weights.to(total)
        grad_hidden = torch.empty_like(student, dtype=total) if needs_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=total) if needs_head else None
        for first in range(0, len(student), chunk_tokens):
            part = slice(first, first + chunk_tokens)
            grad_logits = _chunk(
                _logits(student[part], head),
                None if teacher is None or teacher_head is None else _logits(teacher[part], teacher_head),
                targets[part],
                None if weights is None else weights[part],
                divergence,
                values[:, part],
                student.dtype if _has_mixed_products(student) else total,
                needs_hidden or needs_head,
            )
            if grad_hidden is not None:
                _hidden_gradient(grad_logits, head, grad_hidden[part])
            if grad_head is not None:
                _accumulate(grad_head[: len(head)], grad_logits, student[part])
            del grad_logits  # the next chunk's logits take its place
        ctx.gradients, ctx.dtypes = (grad_hidden, grad_head), (student.dtype, student_head.dtype)
        divergence_sum, cross_entropy = (values[:2] if weights is None else values[:2] * weights).sum(1).unbind()
        ratio = divergence.divergence_ratio
        entropy = values[2] if teacher_entropy else None
        ctx.mark_non_differentiable(divergence_sum, cross_entropy, *(() if entropy is None else (entropy,)))
        return (1 - ratio) * cross_entropy + ratio * divergence_sum, divergence_sum, cross_entropy, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_divergence: backward ran already; its gradients exist once, run the op again")
        # The head's gradient can be gigabytes: it is scaled in place and given away, so that it becomes the leaf's own.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(upstream[0].to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, *(None,) * 8


def _chunk(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    divergence: Divergence,
    values: Tensor,
    dtype: torch.dtype,
    needs_gradient: bool,
) -> Tensor:
    """Fill ``values`` from a chunk's logits; the gradient to the student's, in ``dtype``, if it is needed.

    Overwrites both matrices of logits: the gradient takes the student's place where it has its dtype.
    """
    gradient = student if student.dtype == dtype else torch.empty_like(student, dtype=dtype)
    rows = divergence_rows
    if backend_of(student) == "triton" and student.dtype == torch.float32:  # the kernel's sums are fp32
        from mta_ds.ops.kernels import divergence as kernels

        rows = kernels.divergence_rows
    rows(student, teacher, targets, weights, divergence, values, gradient if needs_gradient else None)
    return gradient


def _total(like: Tensor) -> torch.dtype:
    """The dtype of logits and sums."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _has_mixed_products(like: Tensor) -> bool:
    """Whether low-precision factors give an fp32 product: the tensor cores' own sums, not rounded."""
    return like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)


def _slabs(head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in fp32 (float64 stays), a part of its rows at a time unless it is so already.

    A CPU's bfloat16 product rounds its sums to eight bits, so that a logit of 20 is off by up to 0.06 and its
    probability by 6 per cent; without instructions for it, it takes a hundred times as long as in fp32. Slabs that stay
    in the cache cost what fp32 factors would: twice the time of the fastest rounded product.
    """
    if head.dtype == _total(head):
        yield slice(0, len(head)), head
        return
    for first in range(0, len(head), _SLAB_ROWS):
        yield (part := slice(first, first + _SLAB_ROWS)), head[part].to(_total(head))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden · headᵀ in fp32 (float64 stays)."""
    if _has_mixed_products(hidden):
        return product(hidden, head.T)
    logits = hidden.new_empty((len(hidden), len(head)), dtype=_total(hidden))
    hidden = hidden.to(logits.dtype)
    for part, rows in _slabs(head):
        torch.mm(hidden, rows.T, out=logits[:, part])
    return logits


def _hidden_gradient(grad_logits: Tensor, head: Tensor, out: Tensor) -> None:
    """out = grad_logits · head, summed in ``out``'s dtype."""
    if _has_mixed_products(head):
        out.copy_(product(grad_logits, head))
        return
    out.zero_()
    for part, rows in _slabs(head):
        out.addmm_(grad_logits[:, part], rows)


def _accumulate(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logitsᵀ · hidden, summed in ``total``'s dtype; no second matrix of the head's size exists."""
    if _has_mixed_products(hidden):
        torch.addmm(total, grad_logits.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(grad_logits.T, hidden.to(total.dtype))


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Host data on the device, without waiting for it."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _chunk_tokens(vocab_size: int, like: Tensor, chunk_bytes: int | None) -> int:
    """Tokens that go through the heads at once: both models' logits, and the gradient where it has its own dtype."""
    if chunk_bytes is None:
        chunk_bytes = _GPU_BYTES if like.is_cuda else _CPU_BYTES
    size = 2 * _total(like).itemsize + (like.element_size() if _has_mixed_products(like) else 0)
    return max(1, chunk_bytes // (size * vocab_size * _MIN_TOKENS)) * _MIN_TOKENS


def _check(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None,
) -> None:
    """Shapes, dtypes and who may require grad; nothing here waits for a device."""
    _check_side("student", student, student_head, divergence.vocab_size)
    check_together(student=student, student_head=student_head)
    num_positions = len(student)
    if targets.shape != (num_positions,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: want int64 [{num_positions}], got {targets.dtype} {list(targets.shape)}")
    if targets.device.type != "cpu":
        raise ValueError(f"targets: want them on the CPU, where counting them waits for nothing, got {targets.device}")
    vocab_size = len(student_head[: divergence.vocab_size])
    if bool(((targets != IGNORED) & ((targets < 0) | (targets >= vocab_size))).any()):
        raise ValueError(f"targets: want {IGNORED} or 0 <= target < {vocab_size} rows of the head")
    if weights is not None:
        check_vector("weights", weights, num_positions)
        check_teacher("weights", weights)
    if teacher is None or teacher_head is None:
        if teacher is not None or teacher_head is not None:
            raise ValueError("teacher and teacher_head: give both or neither")
        return
    _check_side("teacher", teacher, teacher_head, divergence.vocab_size)
    if len(teacher) != num_positions:
        raise ValueError(f"teacher: want {num_positions} positions as the student has, got {len(teacher)}")
    if _total(teacher) != _total(student):
        raise ValueError(f"teacher: float64 goes with float64 only, got {teacher.dtype} beside {student.dtype}")
    check_together(student=student, teacher=teacher, teacher_head=teacher_head)
    check_teacher("teacher", teacher)
    check_teacher("teacher_head", teacher_head)
    if len(teacher_head[: divergence.vocab_size]) != vocab_size:
        sizes = f"{vocab_size} and {len(teacher_head)}"
        raise ValueError(f"vocab_size: the heads have {sizes} rows; say how many ids mean something")


def _check_side(side: str, hidden: Tensor, head: Tensor, vocab_size: int | None) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{side} and {side}_head: want [n, d] and [V, d], got {list(hidden.shape)}, {list(head.shape)}"
        )
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"{side} and {side}_head: want one floating dtype, got {hidden.dtype} and {head.dtype}")
    if vocab_size is not None and len(head) < vocab_size:
        raise ValueError(f"{side}_head: {len(head)} rows, fewer than vocab_size {vocab_size}")
