"""Divergence and label cross-entropy from final hidden states, through both LM heads, without ever holding logits.

Tokens go through the heads in chunks. Each chunk's logits give the loss and, at once, its gradients to the student's
hidden states and head; then they are gone. Backward only scales what the forward has stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.divergence import Divergence, divergence_gradients, divergence_values

# [tokens, vocabulary] matrices that a chunk keeps in fp32 at its peak: both log-probabilities, p, q and a mixture.
_MATRICES = 5
# Large enough that the products run at full speed and the head's gradient is not read and written too often, small
# beside the logits of a batch.
_CPU_BYTES = 96 << 20
_GPU_BYTES = 1 << 30
_MIN_TOKENS = 32


class LinearDivergence(NamedTuple):
    """Sums over the counted positions, each times its weight; ``loss`` is differentiable, the others are detached."""

    loss: Tensor
    divergence: Tensor
    """Zero where there is no teacher, and for ``sft``."""
    cross_entropy: Tensor
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    """Number of positions with a target."""


def linear_divergence(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
) -> LinearDivergence:
    """Σ over positions with target ≠ -100 of w [(1 - kd_ratio) · cross-entropy + kd_ratio · divergence] (METHOD §8).

    Products run in the inputs' dtype, softmax and sums in fp32 (float64 stays float64), the head's gradient is
    accumulated in fp32. Backward can run once: it hands out the gradients it stored instead of copies of them.

    Args:
        student, student_head: final hidden states [n, d_S] and the LM head [V_S, d_S], of one dtype.
        teacher, teacher_head: [n, d_T] and [V_T, d_T], of one dtype, no gradient; None where no teacher is needed.
        targets: int64 [n], the label of the next token, -100 = not counted. On a GPU, finding the counted positions is
            the op's one wait for the device: their number is the size of every product, and with prompts left out
            often half of n. Targets on the CPU avoid the wait.
        weights: [n], a factor for each position, no gradient; 1 if not given.
        chunk_bytes: memory for the logits of one chunk of tokens and what is computed from them.

    Raises:
        ValueError: shapes or dtypes that do not fit, a teacher that is needed and missing, or one that requires grad.
    """
    _check(student, student_head, teacher, teacher_head, targets, divergence, weights)
    index = (targets != -100).nonzero()[:, 0].to(student.device, non_blocking=True)
    rows = slice(0, divergence.vocab_size)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(student.device, non_blocking=True).index_select(0, index)

    tokens = _chunk_tokens(len(student_head[rows]), student, chunk_bytes)
    loss, divergence_sum, cross_entropy = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student.index_select(0, index),
        student_head,
        pick(teacher),
        teacher_head[rows] if teacher_head is not None else None,
        pick(targets),
        pick(weights),
        divergence,
        tokens,
        torch.is_grad_enabled(),
    )
    return LinearDivergence(loss, divergence_sum, cross_entropy, len(index))


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
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # needs_input_grad tells of the inputs alone: it is set under no_grad too, where gradients would be for nothing
        needs_hidden, needs_head = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        head = student_head[: divergence.vocab_size]
        total = torch.float64 if student.dtype == torch.float64 else torch.float32
        sums = torch.zeros(3, dtype=total, device=student.device)
        grad_hidden = torch.empty_like(student) if needs_hidden else None
        grad_head = torch.zeros(student_head.shape, dtype=total, device=student.device) if needs_head else None
        for first in range(0, len(student), chunk_tokens):
            part = slice(first, first + chunk_tokens)
            hidden = student[part]
            log_q = _log_softmax(hidden, head)
            log_p = None
            if teacher is not None and teacher_head is not None:
                log_p = _log_softmax(teacher[part], teacher_head)
            weight = None if weights is None else weights[part].to(total)
            values, grad_logits = _chunk(log_q, log_p, targets[part], divergence, weight, needs_hidden or needs_head)
            sums += values
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(student.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, head, out=grad_hidden[part])
            if grad_head is not None:
                _accumulate(grad_head[: len(head)], grad_logits.T, hidden)
        ctx.gradients = (grad_hidden, None if grad_head is None else grad_head.to(student_head.dtype))
        loss, divergence_sum, cross_entropy = sums.unbind()
        ctx.mark_non_differentiable(divergence_sum, cross_entropy)
        return loss.clone(), divergence_sum, cross_entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_divergence: backward ran already; its gradients exist once, run the op again")
        # The head's gradient can be gigabytes: it is scaled in place and given away, so that it becomes the leaf's own.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(upstream[0].to(g.dtype)) for g in gradients), *(None,) * 7


def _chunk(
    log_q: Tensor,
    log_p: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums [loss, divergence, cross-entropy] of one chunk and the loss' gradient to its logits [m, V].

    Overwrites both matrices of log-probabilities.
    """
    ratio = divergence.divergence_ratio
    cross_entropy = -log_q.gather(1, targets[:, None])[:, 0]
    gradient = None
    if log_p is None or divergence.name == "sft":
        values = torch.zeros_like(cross_entropy)
    elif needs_gradient and ratio > 0:
        values, gradient = divergence_gradients(log_q, log_p, divergence)
    else:
        values = divergence_values(log_q, log_p, divergence)
    sums = torch.stack([(1 - ratio) * cross_entropy + ratio * values, values, cross_entropy])
    sums = sums.sum(1) if weights is None else sums @ weights
    if not needs_gradient:
        return sums, None
    if ratio < 1:
        label_gradient = log_q.exp_().mul_(1 - ratio)  # (1 - ratio) (q - onehot)
        label_gradient.scatter_add_(1, targets[:, None], label_gradient.new_full((len(targets), 1), ratio - 1))
        gradient = label_gradient if gradient is None else label_gradient.add_(gradient, alpha=ratio)
    assert gradient is not None
    return sums, gradient if weights is None else gradient.mul_(weights[:, None])


def _log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    """log softmax of hidden · headᵀ, in fp32 (float64 stays)."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, head.T, out_dtype=torch.float32)  # the tensor cores' own sums, not rounded
    else:
        logits = torch.mm(hidden, head.T)
    if logits.dtype in (torch.float32, torch.float64):
        return torch.log_softmax(logits, -1, out=logits)
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b; the sum over chunks is in ``total``'s dtype, whatever the product's."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(a @ b)


def _chunk_tokens(vocab_size: int, like: Tensor, chunk_bytes: int | None) -> int:
    """Tokens that go through the heads at once."""
    if chunk_bytes is None:
        chunk_bytes = _GPU_BYTES if like.is_cuda else _CPU_BYTES
    return max(_MIN_TOKENS, chunk_bytes // (_MATRICES * vocab_size * max(4, like.element_size())))


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
    num_positions = len(student)
    if targets.shape != (num_positions,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: want int64 [{num_positions}], got {targets.dtype} {list(targets.shape)}")
    if weights is not None and weights.shape != (num_positions,):
        raise ValueError(f"weights: want [{num_positions}], got {list(weights.shape)}")
    if teacher is None or teacher_head is None:
        if teacher is not None or teacher_head is not None:
            raise ValueError("teacher and teacher_head: give both or neither")
        if divergence.needs_teacher:
            raise ValueError(f"teacher: the divergence '{divergence.name}' needs it")
        return
    _check_side("teacher", teacher, teacher_head, divergence.vocab_size)
    if len(teacher) != num_positions:
        raise ValueError(f"teacher: want {num_positions} positions as the student has, got {len(teacher)}")
    if torch.is_grad_enabled() and (teacher.requires_grad or teacher_head.requires_grad):
        raise ValueError("teacher and teacher_head: must not require grad; detach them")
    sizes = [len(head[: divergence.vocab_size]) for head in (student_head, teacher_head)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"vocab_size: the heads have {sizes[0]} and {sizes[1]} rows; say how many ids mean something")


def _check_side(side: str, hidden: Tensor, head: Tensor, vocab_size: int | None) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{side} and {side}_head: want [n, d] and [V, d], got {list(hidden.shape)}, {list(head.shape)}"
        )
    if hidden.dtype != head.dtype or not hidden.is_floating_point():
        raise ValueError(f"{side} and {side}_head: want one floating dtype, got {hidden.dtype} and {head.dtype}")
    if vocab_size is not None and len(head) < vocab_size:
        raise ValueError(f"{side}_head: {len(head)} rows, fewer than vocab_size {vocab_size}")
