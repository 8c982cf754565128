"""Divergence and label cross-entropy from final hidden states, through both LM heads, without ever holding logits.

Tokens go through the heads in chunks. Each chunk's logits give the loss and, at once, its gradients to the student's
hidden states and head; then they are gone. Backward only scales what the forward has stored. The products are the
vendor's; what lies between them is one launch over a chunk's rows, or, on torch, passes over a few rows at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_teacher, check_together, check_vector
from mta_ds.ops.autograd import differentiable_once
from mta_ds.ops.backend import backend_of
from mta_ds.ops.divergence import Divergence, divergence_rows, entropy_rows
from mta_ds.ops.head_gradient import HeadGradient
from mta_ds.ops.heads import (
    add_head_gradient,
    check_side,
    check_student,
    check_teacher_side,
    chunk_tokens,
    gradient_dtype,
    logits_of,
    write_hidden_gradient,
)
from mta_ds.ops.layout import beside
from mta_ds.ops.products import total_dtype

IGNORED = -100


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
    alphas: Tensor | None = None,
    factor: float = 1.0,
    head_gradient: HeadGradient | None = None,
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
        weights: [n], a factor for each position, beside the states or on the CPU, no gradient; 1 if not given.
        alphas: [n], α of ``skl`` and ``srkl`` at each position instead of the divergence's own; as weights.
        factor: the loss and its gradients are multiplied by it; the detached sums are not.
        head_gradient: takes the gradient of the student's head, shared with other ops of the micro-step: then this loss
            must enter the total with coefficient 1 (hence ``factor``), and ``head_gradient.attach()`` be added to it.
        teacher_entropy: also return the teacher's entropy, from the same pass.
        chunk_bytes: memory for the logits of one chunk of tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, labels that are no rows of the head, a teacher that is
            needed and missing, or one that requires grad; α for a divergence that has none.
    """
    _check(student, student_head, teacher, teacher_head, targets, divergence, weights, alphas)
    if teacher is None and (teacher_entropy or divergence.needs_teacher):
        what = "teacher_entropy" if teacher_entropy else f"the divergence '{divergence.name}'"
        raise ValueError(f"teacher: {what} needs it")
    if divergence.name == "sft" and not teacher_entropy:
        teacher = teacher_head = None  # nothing would be read from it
    rows = slice(0, divergence.vocab_size)
    labels = targets[counted := (targets != IGNORED).nonzero()[:, 0]]
    index = beside(counted, student.device)

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else beside(values, student.device).index_select(0, index)

    loss, divergence_sum, cross_entropy, entropy = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
        student,
        student_head if head_gradient is None else student_head.detach(),
        index,
        pick(teacher),
        teacher_head[rows] if teacher_head is not None else None,
        beside(labels, student.device),
        pick(weights),
        pick(alphas),
        _Options(
            divergence,
            factor,
            teacher_entropy,
            chunk_tokens(len(student_head[rows]), student, chunk_bytes),
            torch.is_grad_enabled(),
            None if head_gradient is None else head_gradient.buffer(student_head),
        ),
    )
    return LinearDivergence(loss, divergence_sum, cross_entropy, len(labels), entropy)


@torch.no_grad()
def label_log_probs(
    hidden: Tensor, head: Tensor, targets: Tensor, vocab_size: int | None = None, chunk_bytes: int | None = None
) -> Tensor:
    """Log-probability of each counted label, [count] in fp32 (float64 stays); no gradient.

    Args:
        hidden, head: final hidden states [n, d] and the LM head [V, d], of one dtype.
        targets: int64 [n] on the CPU, -100 = not counted.
        vocab_size: rows of the head that mean something; None: all.
        chunk_bytes: memory for the logits of one chunk of tokens.

    Raises:
        ValueError: as :func:`linear_divergence`.
    """
    sft = Divergence("sft", vocab_size=vocab_size)
    _check(hidden, head, None, None, targets, sft)
    labels = targets[counted := (targets != IGNORED).nonzero()[:, 0]]
    hidden, head = hidden.index_select(0, beside(counted, hidden.device)), head[:vocab_size]
    labels = beside(labels, hidden.device)
    values = hidden.new_empty((2, len(hidden)), dtype=total_dtype(hidden.dtype))
    size = chunk_tokens(len(head), hidden, chunk_bytes)
    for first in range(0, len(hidden), size):
        part = slice(first, first + size)
        _chunk(logits_of(hidden[part], head), None, labels[part], None, None, sft, values[:, part], None)
    return values[1].neg_()


@torch.no_grad()
def token_entropy(
    hidden: Tensor, head: Tensor, vocab_size: int | None = None, chunk_bytes: int | None = None
) -> Tensor:
    """The entropy in nats of each token's next-token distribution, [n] in fp32 (float64 stays); no gradient.

    Args:
        hidden, head: final hidden states [n, d] and the LM head [V, d], of one dtype.
        vocab_size: rows of the head that mean something; None: all.
        chunk_bytes: memory for the logits of one chunk of tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_side("hidden", "head", hidden, head, vocab_size)
    check_together(hidden=hidden, head=head)
    head = head[:vocab_size]
    entropy = hidden.new_empty(len(hidden), dtype=total_dtype(hidden.dtype))
    size = chunk_tokens(len(head), hidden, chunk_bytes)
    for first in range(0, len(hidden), size):
        part = slice(first, first + size)
        entropy_rows(logits_of(hidden[part], head), entropy[part])
    return entropy


class _Options(NamedTuple):
    """What :class:`_LinearDivergence` is given beside the tensors of its graph."""

    divergence: Divergence
    factor: float
    teacher_entropy: bool
    chunk_tokens: int
    grad_enabled: bool
    head_gradient: Tensor | None
    """[V, d] that takes the head's gradient, instead of one of the op's own."""


class _LinearDivergence(torch.autograd.Function):
    """The op on counted positions only; the gradients are made in the forward.

    The student's are picked in here: the backward of a pick in the graph would add them up by atomics on a GPU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        index: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        alphas: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        # needs_input_grad tells of the inputs alone: it is set under no_grad too, where gradients would be for nothing
        needs_hidden, needs_head = (options.grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        divergence, total = options.divergence, total_dtype(student.dtype)
        num_positions, student = len(student), student.index_select(0, index)
        head = student_head[: divergence.vocab_size]
        values = student.new_empty((3 if options.teacher_entropy else 2, len(student)), dtype=total)
        weights, alphas = (None if each is None else each.to(total) for each in (weights, alphas))
        scales = _scales(weights, options.factor, values[0])
        grad_hidden = torch.empty_like(student, dtype=total) if needs_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=total) if needs_head else None
        adds_up = (options.head_gradient if options.grad_enabled else None) if grad_head is None else grad_head
        needs_any = grad_hidden is not None or adds_up is not None
        for first in range(0, len(student), options.chunk_tokens):
            part = slice(first, first + options.chunk_tokens)
            grad_logits = _chunk(
                logits_of(student[part], head),
                None if teacher is None or teacher_head is None else logits_of(teacher[part], teacher_head),
                targets[part],
                None if scales is None else scales[part],
                None if alphas is None else alphas[part],
                divergence,
                values[:, part],
                gradient_dtype(student) if needs_any else None,
            )
            if grad_logits is None:
                continue
            if grad_hidden is not None:
                write_hidden_gradient(grad_hidden[part], grad_logits, head)
            if adds_up is not None:
                add_head_gradient(adds_up[: len(head)], grad_logits, student[part])
            del grad_logits  # the next chunk's logits take its place
        ctx.gradients, ctx.dtypes = (grad_hidden, grad_head), (student.dtype, student_head.dtype)
        ctx.index, ctx.num_positions = index, num_positions
        divergence_sum, cross_entropy = (values[:2] if weights is None else values[:2] * weights).sum(1).unbind()
        ratio = divergence.divergence_ratio
        entropy = values[2] if options.teacher_entropy else None
        ctx.mark_non_differentiable(divergence_sum, cross_entropy, *(() if entropy is None else (entropy,)))
        loss = ((1 - ratio) * cross_entropy + ratio * divergence_sum).mul_(options.factor)
        return loss, divergence_sum, cross_entropy, entropy

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_divergence: backward ran already; its gradients exist once, run the op again")
        # The head's gradient can be gigabytes: it is scaled in place and given away, so that it becomes the leaf's own.
        gradients, ctx.gradients = ctx.gradients, None
        hidden, head = (
            None if gradient is None else gradient.mul_(upstream[0].to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        if hidden is not None and len(hidden) < ctx.num_positions:  # zeros where nothing is counted
            hidden = hidden.new_zeros(ctx.num_positions, hidden.shape[1]).index_copy_(0, ctx.index, hidden)
        return hidden, head, *(None,) * 7


def _scales(weights: Tensor | None, factor: float, like: Tensor) -> Tensor | None:
    """What each position's gradient is multiplied by; None: nothing."""
    if factor == 1:
        return weights
    return torch.full_like(like, factor) if weights is None else weights * factor


def _chunk(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    scales: Tensor | None,
    alphas: Tensor | None,
    divergence: Divergence,
    values: Tensor,
    dtype: torch.dtype | None,
) -> Tensor | None:
    """Fill ``values`` from a chunk's logits; the gradient to the student's, in ``dtype`` unless that is None.

    Overwrites both matrices of logits: the gradient takes the student's place where it has its dtype.
    """
    gradient = None
    if dtype is not None:
        gradient = student if student.dtype == dtype else torch.empty_like(student, dtype=dtype)
    rows = divergence_rows
    if backend_of(student) == "triton":
        from mta_ds.ops.kernels import divergence as kernels

        rows = kernels.divergence_rows
    rows(student, teacher, targets, scales, divergence, values, gradient, alphas)
    return gradient


def _check(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    targets: Tensor,
    divergence: Divergence,
    weights: Tensor | None = None,
    alphas: Tensor | None = None,
) -> None:
    """Shapes, dtypes and who may require grad; nothing here waits for a device."""
    check_student(student, student_head, divergence.vocab_size)
    num_positions = len(student)
    if targets.shape != (num_positions,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: want int64 [{num_positions}], got {targets.dtype} {list(targets.shape)}")
    if targets.device.type != "cpu":
        raise ValueError(f"targets: want them on the CPU, where counting them waits for nothing, got {targets.device}")
    vocab_size = len(student_head[: divergence.vocab_size])
    if bool(((targets != IGNORED) & ((targets < 0) | (targets >= vocab_size))).any()):
        raise ValueError(f"targets: want {IGNORED} or 0 <= target < {vocab_size} rows of the head")
    for name, values in (("weights", weights), ("alphas", alphas)):
        if values is None:
            continue
        check_vector(name, values, num_positions)
        check_teacher(name, values)
        if values.device not in (student.device, targets.device):
            raise ValueError(f"{name}: want it on {student.device} as student is, or on the CPU, got {values.device}")
    if alphas is not None and divergence.name not in ("skl", "srkl"):
        raise ValueError(f"alphas: are of skl and srkl, '{divergence.name}' has no α")
    if teacher is None or teacher_head is None:
        if teacher is not None or teacher_head is not None:
            raise ValueError("teacher and teacher_head: give both or neither")
        return
    check_teacher_side(teacher, teacher_head, student, student_head, divergence.vocab_size)
