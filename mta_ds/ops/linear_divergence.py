"""Divergence and label cross-entropy from final hidden states, through both LM heads, without ever holding logits.

Tokens go through the heads in chunks. Each chunk's logits give the loss and, at once, its gradients to the student's
hidden states and head; then they are gone. Backward only scales what the forward has stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.divergence import Divergence, divergence_gradients

# Elements of one chunk's [tokens, vocabulary] matrix; about six such matrices in fp32 are alive at the peak.
_CHUNK_ELEMENTS = 1 << 22


class LinearDivergence(NamedTuple):
    """Sums over the counted positions; ``loss`` is differentiable, the others are detached."""

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    count: Tensor


def linear_divergence(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None = None,
) -> LinearDivergence:
    """Σ over positions with target ≠ -100 of w [(1 - kd_ratio) · cross-entropy + kd_ratio · divergence] (METHOD §8).

    Args:
        student: final hidden states [n, d_S]; student_head: [V_S, d_S].
        teacher, teacher_head: [n, d_T] and [V_T, d_T], no gradient; None where the teacher is not needed.
        targets: int64 [n], the label of the next token, -100 = not counted.
        weights: [n], a factor for each position; 1 if not given.

    Raises:
        ValueError: shapes that do not fit together, or a teacher that is needed and missing.
    """
    _check(student, student_head, teacher, teacher_head, targets, divergence)
    # The counted positions alone go through the heads; finding them is one host sync, and saves every prompt token.
    index = (targets != -100).nonzero()[:, 0]
    sums = _LinearDivergence.apply(student, student_head, teacher, teacher_head, targets, index, divergence, weights)
    return LinearDivergence(*sums, count=torch.tensor(len(index), device=student.device))


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        index: Tensor,
        divergence: Divergence,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        rows = slice(0, divergence.vocab_size)
        head = student_head.detach()[rows]
        total = torch.float64 if student.dtype == torch.float64 else torch.float32
        sums = torch.zeros(3, dtype=total, device=student.device)
        grad_hidden = torch.zeros_like(student) if needs_hidden else None
        grad_head = torch.zeros(student_head.shape, dtype=total, device=student.device) if needs_head else None
        size = max(1, _CHUNK_ELEMENTS // len(head))
        for part in index.split(size):
            hidden = student.detach()[part]
            log_q = (hidden @ head.T).to(total).log_softmax(-1)
            log_p = None
            if teacher is not None and teacher_head is not None:
                log_p = (teacher.detach()[part] @ teacher_head.detach()[rows].T).to(total).log_softmax(-1)
            weight = weights[part].to(total) if weights is not None else None
            values, grad_logits = _chunk(log_q, log_p, targets[part], divergence, weight, needs_hidden or needs_head)
            sums += values
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(student.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ head
            if grad_head is not None:
                grad_head[rows].addmm_(grad_logits.T.to(total), hidden.to(total))
        # kept in the head's dtype from here on: backward hands them to leaves of that dtype
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(student_head.dtype))
        ctx.mark_non_differentiable(sums[1], sums[2])
        return sums[0].clone(), sums[1].clone(), sums[2].clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = upstream[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * scale.to(grad_head.dtype),
            *(None,) * 6,
        )


def _chunk(
    log_q: Tensor,
    log_p: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Sums [loss, divergence, cross-entropy] of one chunk and the loss' gradient to its logits [m, V]."""
    ratio = divergence.divergence_ratio
    cross_entropy = -log_q.gather(1, targets[:, None])[:, 0]
    if log_p is None or divergence.name == "sft":
        values, gradient = torch.zeros_like(cross_entropy), None
    else:
        values, gradient = divergence_gradients(log_q, log_p, divergence)
    loss = (1 - ratio) * cross_entropy + ratio * values
    w = 1.0 if weights is None else weights
    sums = torch.stack([(w * x).sum() for x in (loss, values, cross_entropy)])
    if not needs_gradient:
        return sums, None
    gradient = torch.zeros_like(log_q) if gradient is None or ratio == 0 else gradient.mul_(ratio)
    if ratio < 1:
        gradient.add_(log_q.exp(), alpha=1 - ratio)
        gradient.scatter_add_(1, targets[:, None], torch.full_like(gradient[:, :1], ratio - 1))
    return sums, gradient if weights is None else gradient.mul_(weights[:, None])


def _check(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
) -> None:
    if student.ndim != 2 or student_head.ndim != 2 or student.shape[1] != student_head.shape[1]:
        raise ValueError(
            f"student {tuple(student.shape)} and student_head {tuple(student_head.shape)}: want [n, d], [V, d]"
        )
    if targets.shape != student.shape[:1]:
        raise ValueError(f"targets: want one for each of {len(student)} positions, got {tuple(targets.shape)}")
    if (teacher is None) != (teacher_head is None):
        raise ValueError("teacher and teacher_head: give both or neither")
    if divergence.needs_teacher and (teacher is None or teacher_head is None):
        raise ValueError(f"teacher: the divergence '{divergence.name}' needs it")
    if teacher is not None and teacher_head is not None:
        if teacher.requires_grad or (
            teacher_head.requires_grad and torch.is_grad_enabled() and teacher_head.is_leaf is False
        ):
            raise ValueError("teacher: must not require grad")
        if len(teacher) != len(student) or teacher.shape[1] != teacher_head.shape[1]:
            raise ValueError(
                f"teacher {tuple(teacher.shape)} and teacher_head {tuple(teacher_head.shape)}: want [n, d], [V, d]"
            )
    for name, head in (("student_head", student_head), ("teacher_head", teacher_head)):
        if head is not None and divergence.vocab_size is not None and len(head) < divergence.vocab_size:
            raise ValueError(f"{name}: {len(head)} rows, fewer than vocab_size {divergence.vocab_size}")
