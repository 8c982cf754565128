"""What lies on both sides of a chunk of logits: products with an LM head, how many tokens a chunk has, what must fit.

Logits and sums are fp32 (float64 stays float64), whatever the states' and the head's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_teacher, check_together, check_trained
from mta_ds.ops.products import add_product, product, total_dtype

# Large enough that the products run at full speed and the head's gradient is not read and written too often, small
# beside the logits of a batch.
_CPU_BYTES = 64 << 20
_GPU_BYTES = 1 << 30
_MIN_TOKENS = 32  # and a multiple of it: the products' own tiles
# Rows of a low-precision head that are in fp32 at a time where the CPU multiplies.
_SLAB_ROWS = 2048
_MIXED = (torch.bfloat16, torch.float16)


def gradient_dtype(like: Tensor) -> torch.dtype:
    """The dtype of a chunk's gradient to its logits: the states' where products take it with fp32 sums."""
    return like.dtype if _has_mixed_products(like) else total_dtype(like.dtype)


def chunk_tokens(vocab_size: int, like: Tensor, chunk_bytes: int | None, layers: int = 1) -> int:
    """Tokens that go through the heads at once.

    Args:
        layers: how many states of each model; a chunk has both models' logits of each, and the gradient to the
            student's where it has its own dtype.
        chunk_bytes: memory for all of a chunk's matrices; None: the device's default.
    """
    return chunk_shape(vocab_size, like.dtype, like.is_cuda, chunk_bytes, layers)[0]


def chunk_shape(
    vocab_size: int, dtype: torch.dtype, is_cuda: bool, chunk_bytes: int | None = None, layers: int = 1
) -> tuple[int, int]:
    """:func:`chunk_tokens` of states in ``dtype`` before there are any, and the bytes of each token's matrices.

    Args:
        chunk_bytes, layers: as there.
    """
    if chunk_bytes is None:
        chunk_bytes = _GPU_BYTES if is_cuda else _CPU_BYTES
    own_gradient = is_cuda and dtype in _MIXED
    size = layers * vocab_size * (2 * total_dtype(dtype).itemsize + (dtype.itemsize if own_gradient else 0))
    return max(1, chunk_bytes // (size * _MIN_TOKENS)) * _MIN_TOKENS, size


def logits_of(hidden: Tensor, head: Tensor) -> Tensor:
    """hidden · headᵀ in fp32 (float64 stays)."""
    if _has_mixed_products(hidden):
        return product(hidden, head.T)
    logits = hidden.new_empty((len(hidden), len(head)), dtype=total_dtype(hidden.dtype))
    hidden = hidden.to(logits.dtype)
    for part, rows in _slabs(head):
        torch.mm(hidden, rows.T, out=logits[:, part])
    return logits


def write_hidden_gradient(out: Tensor, grad_logits: Tensor, head: Tensor) -> None:
    """out = grad_logits · head, summed in ``out``'s dtype."""
    if _has_mixed_products(head):
        out.copy_(product(grad_logits, head))
        return
    out.zero_()
    for part, rows in _slabs(head):
        out.addmm_(grad_logits[:, part], rows)


def add_head_gradient(total: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """total += grad_logitsᵀ · hidden, summed in ``total``'s dtype; no second matrix of the head's size exists."""
    # a CPU would round a product of bf16 on its way into the sum
    add_product(total, grad_logits.T, hidden if hidden.is_cuda else hidden.to(total.dtype))


def _has_mixed_products(like: Tensor) -> bool:
    """Whether low-precision factors give an fp32 product: the tensor cores' own sums, not rounded."""
    return like.is_cuda and like.dtype in _MIXED


def _slabs(head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The head in fp32 (float64 stays), a part of its rows at a time unless it is so already.

    A CPU's bfloat16 product rounds its sums to eight bits, so that a logit of 20 is off by up to 0.06 and its
    probability by 6 per cent; without instructions for it, it takes a hundred times as long as in fp32. Slabs that stay
    in the cache cost what fp32 factors would: twice the time of the fastest rounded product.
    """
    total = total_dtype(head.dtype)
    if head.dtype == total:
        yield slice(0, len(head)), head
        return
    for first in range(0, len(head), _SLAB_ROWS):
        yield (part := slice(first, first + _SLAB_ROWS)), head[part].to(total)


def check_student(student: Tensor, head: Tensor, vocab_size: int | None) -> None:
    """States [n, d] and head [V, d] of one dtype and device.

    Raises:
        ValueError: they are not, the head has fewer rows than ``vocab_size``, or float16 that is trained.
    """
    check_side("student", "student_head", student, head, vocab_size)
    check_together(student=student, student_head=head)
    if torch.is_grad_enabled() and (student.requires_grad or head.requires_grad):
        check_trained(student=student)


def check_teacher_side(
    teacher: Tensor, teacher_head: Tensor, student: Tensor, student_head: Tensor, vocab_size: int | None
) -> None:
    """The same of the teacher, as many states as the student has, as many rows in use, and no gradient.

    Raises:
        ValueError: it is not so.
    """
    check_side("teacher", "teacher_head", teacher, teacher_head, vocab_size)
    if len(teacher) != len(student):
        raise ValueError(f"teacher: want {len(student)} positions as the student has, got {len(teacher)}")
    if total_dtype(teacher.dtype) != total_dtype(student.dtype):
        raise ValueError(f"teacher: float64 goes with float64 only, got {teacher.dtype} beside {student.dtype}")
    check_together(student=student, teacher=teacher, teacher_head=teacher_head)
    check_teacher("teacher", teacher)
    check_teacher("teacher_head", teacher_head)
    if len(teacher_head[:vocab_size]) != len(student_head[:vocab_size]):
        sizes = f"{len(student_head[:vocab_size])} and {len(teacher_head)}"
        raise ValueError(f"vocab_size: the heads have {sizes} rows; say how many ids mean something")


def check_side(name: str, head_name: str, hidden: Tensor, head: Tensor, vocab_size: int | None) -> None:
    """States [n, d] and head [V, d] of one dtype; ValueError that names either if they are not."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{name} and {head_name}: want [n, d] and [V, d], got {list(hidden.shape)}, {list(head.shape)}"
        )
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"{name} and {head_name}: want one floating dtype, got {hidden.dtype} and {head.dtype}")
    if vocab_size is not None and len(head) < vocab_size:
        raise ValueError(f"{head_name}: {len(head)} rows, fewer than vocab_size {vocab_size}")
