"""FDD at one key layer, as a hook of the teacher calls it: both models' states in output space and how they changed.

Tokens go through both LM heads in chunks, this key layer's states and the ones before as one product. A chunk's logits
give both terms and, at once, their gradients to the student's states and head; then they are gone.

Letters: n tokens, V vocabulary, d features, S student, T teacher; z logits, Δ a token's change of log softmax(z).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_teacher, check_trained
from mta_ds.ops.autograd import differentiable_once
from mta_ds.ops.backend import backend_of
from mta_ds.ops.divergence import log_softmax_, row_parts
from mta_ds.ops.head_gradient import HeadGradient
from mta_ds.ops.heads import (
    add_head_gradient,
    check_student,
    check_teacher_side,
    chunk_tokens,
    gradient_dtype,
    logits_of,
    write_hidden_gradient,
)
from mta_ds.ops.products import total_dtype


class TrajectoryGradients(NamedTuple):
    """A key layer's terms, detached, and the gradients of ``loss`` in fp32 (float64 stays)."""

    kl: Tensor
    """Σ over all n tokens of KL(softmax(z^T/τ) ‖ softmax(z^S/τ))."""
    derivative: Tensor
    """Σ of 1 - cos(Δ^S, Δ^T), 0 at the first key layer."""
    loss: Tensor
    """kl_factor · kl + derivative_factor · derivative"""
    student: Tensor
    """∂loss / ∂ the student's states at this key layer [n, d_S]."""
    previous: Tensor | None
    """∂loss / ∂ its states at the key layer before [n, d_S]; None at the first."""


class Factors(NamedTuple):
    """What the rows are computed with."""

    temperature: float
    kl: float
    derivative: float


def align_trajectory(
    student: Tensor,
    teacher: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    student_head: Tensor,
    teacher_head: Tensor,
    *,
    temperature: float,
    kl_factor: float,
    derivative_factor: float,
    vocab_size: int | None = None,
    head_gradient: HeadGradient | None = None,
    chunk_bytes: int | None = None,
) -> TrajectoryGradients:
    """Both terms of FDD at one key layer (METHOD §8; ACL 2025) and their gradients; nothing of the teacher is kept.

        Σ_t [kl_factor · KL(softmax(z^T/τ) ‖ softmax(z^S/τ)) + derivative_factor · (1 - cos(Δ^S, Δ^T))]

    over all n tokens, z = head · state and Δ = log softmax(z) - log softmax(z of the key layer before), without τ. A
    token whose Δ is zero on either side has cosine 0 and no gradient from it; a Δ of nothing but rounding has some
    direction, and a gradient of 1/|Δ|.

    Args:
        student, student_head: [n, d_S] and the LM head [V_S, d_S], of one dtype.
        teacher, teacher_head: [n, d_T] and [V_T, d_T], of one dtype, no gradient.
        previous: both models' states at the key layer before, the student's [n, d_S] and the teacher's [n, d_T]; None
            at the first key layer, which has no second term.
        temperature: τ > 0.
        vocab_size: rows of the heads that mean something; None: all.
        head_gradient: takes the gradient of the student's head, as in :func:`linear_divergence`; needed where the head
            requires grad.
        chunk_bytes: memory for all logits of one chunk of tokens.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive, a teacher that
            requires grad, or a trained head without ``head_gradient``.
    """
    _check(student, teacher, previous, student_head, teacher_head, temperature, vocab_size, head_gradient)
    collected = None if head_gradient is None else head_gradient.buffer(student_head)
    heads = student_head[:vocab_size], teacher_head[:vocab_size]
    states = [(student, teacher)] if previous is None else [(student, teacher), previous]
    size = chunk_tokens(len(heads[0]), student, chunk_bytes, len(states))
    return _align(states, heads, Factors(temperature, kl_factor, derivative_factor), collected, size)


@torch.no_grad()
def _align(
    states: list[tuple[Tensor, Tensor]],
    heads: tuple[Tensor, Tensor],
    factors: Factors,
    collected: Tensor | None,
    chunk_size: int,
) -> TrajectoryGradients:
    """``states`` of student and teacher at this key layer and, if there is one, at the one before."""
    student = states[0][0]
    values = student.new_zeros((2, len(student)), dtype=total_dtype(student.dtype))
    gradients = [torch.empty_like(student, dtype=values.dtype) for _ in states]
    for first in range(0, len(student), chunk_size):
        part = slice(first, first + chunk_size)
        ours, theirs = (torch.cat([state[part] for state in side]) for side in zip(*states, strict=True))
        grad_logits = _chunk(
            logits_of(ours, heads[0]),
            logits_of(theirs, heads[1]),
            len(student[part]),
            factors,
            values[:, part],
            gradient_dtype(student),
        )
        towards = torch.empty_like(ours, dtype=values.dtype)
        write_hidden_gradient(towards, grad_logits, heads[0])
        for gradient, rows in zip(gradients, towards.chunk(len(states)), strict=True):
            gradient[part] = rows
        if collected is not None:
            add_head_gradient(collected[: len(heads[0])], grad_logits, ours)
        del grad_logits  # the next chunk's logits take its place
    kl, derivative = values.sum(1).unbind()
    loss = factors.kl * kl + factors.derivative * derivative
    return TrajectoryGradients(kl, derivative, loss, *gradients, *[None] * (2 - len(gradients)))


def attach_trajectory(student: Tensor, previous: Tensor | None, gradients: TrajectoryGradients) -> Tensor:
    """The loss in the student's graph: backward returns the stored gradients times what arrives.

    Args:
        student, previous: the states [n, d_S] that :func:`align_trajectory` was given, in the graph.
    """
    return _Attach.apply(student, previous, gradients)  # type: ignore[no-untyped-call,no-any-return]


class _Attach(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, previous: Tensor | None, gradients: TrajectoryGradients) -> Tensor:
        assert (previous is None) == (gradients.previous is None), "previous: as align_trajectory was given it"
        ctx.dtype = student.dtype
        ctx.save_for_backward(gradients.student, gradients.previous)  # which backward lets go as soon as it has run
        return gradients.loss.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if each is None else (each * upstream.to(each.dtype)).to(ctx.dtype) for each in ctx.saved_tensors
        )
        return *scaled, None


def _chunk(
    student: Tensor, teacher: Tensor, num_tokens: int, factors: Factors, values: Tensor, dtype: torch.dtype
) -> Tensor:
    """Fill ``values`` from a chunk's logits and return the gradient to the student's, in ``dtype``.

    The first ``num_tokens`` rows of both matrices are this key layer's; others, if any, are of the one before.
    Overwrites both: the gradient takes the student's place where it has its dtype.
    """
    gradient = student if student.dtype == dtype else torch.empty_like(student, dtype=dtype)
    rows = trajectory_rows
    if backend_of(student) == "triton":
        from mta_ds.ops.kernels import trajectory as kernels

        rows = kernels.trajectory_rows
    rows(student, teacher, num_tokens, factors, values, gradient)
    return gradient


def trajectory_rows(
    student: Tensor, teacher: Tensor, num_tokens: int, factors: Factors, values: Tensor, gradient: Tensor
) -> None:
    """Fill ``values`` [2, m] with KL and 1 - cos, and ``gradient`` [m or 2m, V].

    Args:
        student, teacher: fp32 or fp64 logits, overwritten: m = ``num_tokens`` rows of this key layer [m, V], then, if
            there is one, as many of the key layer before [2m, V].
        gradient: of the factored sum to the student's logits, in any dtype; may be ``student`` itself.
    """
    for now in row_parts(student, num_tokens, layers=2):
        toward = _kl(student[now], teacher[now], factors, values[0, now])
        if len(student) == num_tokens:
            gradient[now].copy_(toward)
            continue
        before = slice(now.start + num_tokens, now.stop + num_tokens)
        ours, theirs = ((log_softmax_(logits[now]), log_softmax_(logits[before])) for logits in (student, teacher))
        change = _change_gradient(torch.sub(*ours), torch.sub(*theirs, out=theirs[0]), factors, values[1, now])
        total = change.sum(-1, keepdim=True)
        # Δ = log softmax(now) - log softmax(before): through either softmax a gradient g becomes g - q Σ g
        gradient[now].copy_(toward.add_(change).sub_(ours[0].exp_().mul_(total)))
        gradient[before].copy_(ours[1].exp_().mul_(total).sub_(change))


def _kl(student: Tensor, teacher: Tensor, factors: Factors, values: Tensor) -> Tensor:
    """Fill ``values`` [m] with KL(p ‖ q) at the temperature; kl_factor (q - p) / τ, its gradient to the logits."""
    log_q, log_p = (log_softmax_(logits / factors.temperature) for logits in (student, teacher))
    p = log_p.exp()
    torch.sum(log_p.sub_(log_q).mul_(p), -1, out=values)
    return log_q.exp_().sub_(p).mul_(factors.kl / factors.temperature)


def _change_gradient(ours: Tensor, theirs: Tensor, factors: Factors, values: Tensor) -> Tensor:
    """Fill ``values`` [m] with 1 - cos(Δ^S, Δ^T); derivative_factor times its gradient to Δ^S, over ``theirs``."""
    length, their_length = (each.square().sum(-1).sqrt_() for each in (ours, theirs))
    norms = length * their_length
    nonzero = norms > 0
    inverse = torch.where(nonzero, 1 / torch.where(nonzero, norms, 1.0), 0.0)
    cosine = (ours * theirs).sum(-1).mul_(inverse)
    torch.sub(1, cosine, out=values)
    back = cosine / torch.where(nonzero, length.square(), 1.0)
    along = inverse.mul_(-factors.derivative)
    return theirs.mul_(along[:, None]).addcmul_(ours, back.mul_(factors.derivative)[:, None])


def _check(
    student: Tensor,
    teacher: Tensor,
    previous: tuple[Tensor, Tensor] | None,
    student_head: Tensor,
    teacher_head: Tensor,
    temperature: float,
    vocab_size: int | None,
    head_gradient: HeadGradient | None,
) -> None:
    check_student(student, student_head, vocab_size)
    check_trained(student=student)  # its gradients are made whether it is in a graph or, in a hook, is not
    check_teacher_side(teacher, teacher_head, student, student_head, vocab_size)
    sides = ("student", "teacher"), (student, teacher), previous or (student, teacher)
    for side, now, before in zip(*sides, strict=True):
        if (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device):
            raise ValueError(
                f"previous: want the {side}'s {now.dtype} {list(now.shape)} on {now.device}, "
                f"got {before.dtype} {list(before.shape)} on {before.device}"
            )
    if previous is not None:
        check_teacher("previous", previous[1])
    if not temperature > 0:
        raise ValueError(f"temperature: want a positive number, got {temperature}")
    if head_gradient is None and student_head.requires_grad:
        raise ValueError("head_gradient: the student's head requires grad; give one, or detach the head")
