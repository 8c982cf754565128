"""Divergences between next-token distributions: per-token values by definition, and their gradients in closed form.

``divergence_rows`` is the torch side of the chunked op; its Triton side is ``kernels.divergence``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mta_ds.ops.layout import row_blocks

# Rows are taken through all their passes a few at a time, so that what one pass writes the next finds in the cache.
_BLOCK_BYTES = 2 << 20
_GPU_BLOCK_BYTES = 256 << 20  # there, so that launches are few

DivergenceName = Literal["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of METHOD §8, p the teacher's distribution and q the student's.

    Attributes:
        name: ``sft`` is the label cross-entropy alone.
        alpha: share of the other distribution in the mixture of ``skl`` and ``srkl``, in (0, 1).
        beta: of ``jsd``, in [0, 1]; 0 and 1 are its limits, ``fkl`` and ``rkl``.
        detach_mixture: ``srkl`` without the gradient through its mixture (DistiLLM-2).
        kd_ratio: the loss is (1 - kd_ratio) · cross-entropy + kd_ratio · divergence, in [0, 1].
        vocab_size: rows of the heads that mean something; models pad them. None: all.

    Raises:
        ValueError: a name that does not exist, or a number outside its range.
    """

    name: DivergenceName = "fkl"
    alpha: float = 0.1
    beta: float = 0.5
    detach_mixture: bool = False
    kd_ratio: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(DivergenceName):
            raise ValueError(f"name: '{self.name}' is none of {', '.join(get_args(DivergenceName))}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha: want 0 < alpha < 1, got {self.alpha}; without a mixture it is fkl or rkl")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta: want 0 <= beta <= 1, got {self.beta}")
        if not 0 <= self.kd_ratio <= 1:
            raise ValueError(f"kd_ratio: want 0 <= kd_ratio <= 1, got {self.kd_ratio}")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size: want a positive number of rows or None, got {self.vocab_size}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss depends on the teacher at all."""
        return self.name != "sft" and self.kd_ratio > 0

    @property
    def divergence_ratio(self) -> float:
        """Share of the divergence in the loss; the rest is the label cross-entropy."""
        return self.kd_ratio if self.needs_teacher else 0.0

    @property
    def formula(self) -> DivergenceName:
        """``name``, with the limits of ``jsd`` under the names of what they are."""
        if self.name == "jsd" and self.beta in (0.0, 1.0):
            return "rkl" if self.beta else "fkl"
        return self.name


def divergence_values(log_q: Tensor, log_p: Tensor, divergence: Divergence, alphas: Tensor | None = None) -> Tensor:
    """Per-token values [m] by definition (METHOD §8), differentiable in ``log_q``.

    Args:
        log_q, log_p: log-probabilities [m, V] of student and teacher, float32 or float64.
        alphas: [m], α of ``skl`` and ``srkl`` in each row instead of the divergence's own.

    Raises:
        ValueError: ``sft``, which compares with a label and not with a distribution.
    """
    alpha, beta = _alpha(divergence, alphas), divergence.beta
    match divergence.formula:
        case "fkl":
            return _kl(log_p, log_q)
        case "rkl":
            return _kl(log_q, log_p)
        case "tvd":
            return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
        case "jsd":
            log_m = _log_mixture(log_p, log_q, beta)
            return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
        case "skl":
            return _kl(log_p, _log_mixture(log_p, log_q, alpha))
        case "srkl":
            log_m = _log_mixture(log_q, log_p, alpha)
            return _kl(log_q, log_m.detach() if divergence.detach_mixture else log_m)
        case "sft":
            raise ValueError("divergence: sft has no teacher distribution; it is the label cross-entropy")


def divergence_rows(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    divergence: Divergence,
    values: Tensor,
    gradient: Tensor | None,
    alphas: Tensor | None = None,
) -> None:
    """Fill ``values`` [2 or 3, m] with divergence, cross-entropy and teacher entropy, and ``gradient`` [m, V].

    Args:
        student, teacher: fp32 or fp64 logits [m, V], overwritten; no teacher: the divergence is 0.
        targets, weights: [m]; None: every weight is 1.
        values: with a third row the teacher's entropy is computed.
        gradient: of the weighted loss to the student's logits, in any dtype; may be ``student`` itself.
        alphas: [m], α of each row, in the logits' dtype; None: the divergence's own.
    """
    for part in row_parts(student, len(student)):
        _block(
            log_softmax_(student[part]),
            None if teacher is None else log_softmax_(teacher[part]),
            targets[part],
            None if weights is None else weights[part],
            divergence,
            values[:, part],
            None if gradient is None else gradient[part],
            None if alphas is None else alphas[part],
        )


def entropy_rows(logits: Tensor, entropy: Tensor) -> None:
    """Fill ``entropy`` [m] from fp32 or fp64 logits [m, V], which are overwritten."""
    for part in row_parts(logits, len(logits)):
        _entropy(log_softmax_(logits[part]), entropy[part])


def row_parts(logits: Tensor, num_rows: int, layers: int = 1) -> Iterator[slice]:
    """``num_rows`` rows of [m, V] a few at a time, where each goes with rows of ``layers`` key layers."""
    block_bytes = (_GPU_BLOCK_BYTES if logits.is_cuda else _BLOCK_BYTES) // layers
    return row_blocks(num_rows, block_bytes // (logits.shape[1] * logits.element_size()))


def _entropy(log_p: Tensor, out: Tensor) -> None:
    torch.neg(_dot(log_p.exp(), log_p), out=out)


def _block(
    log_q: Tensor,
    log_p: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    divergence: Divergence,
    values: Tensor,
    gradient: Tensor | None,
    alphas: Tensor | None,
) -> None:
    """``divergence_rows`` from log-probabilities; overwrites both."""
    torch.neg(log_q.gather(1, targets[:, None])[:, 0], out=values[1])
    if log_p is not None and len(values) == 3:
        _entropy(log_p, values[2])
    ratio = divergence.divergence_ratio
    slope = None
    if log_p is None or divergence.name == "sft":
        values[0] = 0
    elif gradient is not None and ratio > 0:
        values[0], slope = divergence_gradients(log_q, log_p, divergence, alphas)
    else:
        values[0] = divergence_values(log_q, log_p, divergence, alphas)
    if gradient is None:
        return
    if ratio < 1:
        label = log_q.exp_().mul_(1 - ratio)  # (1 - ratio) (q - onehot)
        label.scatter_add_(1, targets[:, None], label.new_full((len(targets), 1), ratio - 1))
        slope = label if slope is None else label.add_(slope, alpha=ratio)
    assert slope is not None
    gradient.copy_(slope if weights is None else slope.mul_(weights[:, None]))


def divergence_gradients(
    log_q: Tensor, log_p: Tensor, divergence: Divergence, alphas: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Per-token values [m] and their gradients with respect to the student's logits [m, V], in closed form.

    With g = ∂value/∂log q, q held fixed as a factor, the gradient through the softmax is g - q Σ g.

    Args:
        log_q: the student's log-probabilities [m, V]; left as they are.
        log_p: the teacher's; overwritten, since such a matrix is what the memory of the loss is made of.
        alphas: [m], α of each row instead of the divergence's own.
    """
    if divergence.formula == "fkl":  # Σ g = -1, so all that is left is q - p
        p = log_p.exp()
        values = log_p.sub_(log_q).mul_(p).sum(-1)
        return values, torch.exp(log_q, out=log_p).sub_(p)
    q = log_q.exp()
    values, slope = _values_and_slopes(q, log_q, log_p, divergence, _alpha(divergence, alphas))
    weighted = slope.mul_(q)
    return values, weighted.sub_(q.mul_(weighted.sum(-1, keepdim=True)))


def _values_and_slopes(
    q: Tensor, log_q: Tensor, log_p: Tensor, divergence: Divergence, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Values [m] and ∂value/∂q [m, V], up to a constant in each row (the softmax removes it); overwrites ``log_p``."""
    beta, name = divergence.beta, divergence.formula
    if name == "rkl":
        ratio = torch.sub(log_q, log_p, out=log_p)
        return _dot(q, ratio), ratio
    p = log_p.exp()
    if name == "tvd":
        difference = p.sub_(q)
        return 0.5 * difference.abs().sum(-1), difference.sign_().mul_(-0.5)
    if name == "jsd":
        log_m = _log_of_mixture(p, q, beta)
        ratio = log_q - log_m
        values = beta * _dot(p, log_p.sub_(log_m)) + (1 - beta) * _dot(q, ratio)
        return values, ratio.mul_(1 - beta)
    if name == "skl":
        ratio = log_p.sub_(_log_of_mixture(p, q, alpha))
        return _dot(p, ratio), ratio.exp_().mul_(alpha - 1)
    assert name == "srkl", name
    ratio = torch.sub(log_q, _log_of_mixture(q, p, alpha), out=log_p)
    values = _dot(q, ratio)
    return values, ratio if divergence.detach_mixture else ratio.sub_(ratio.exp().mul_(alpha))


def _alpha(divergence: Divergence, alphas: Tensor | None) -> float | Tensor:
    """α of every row, or of each as a column [m, 1]."""
    return divergence.alpha if alphas is None else alphas[:, None]


def log_softmax_(logits: Tensor) -> Tensor:
    """In place, the sum of a long row by halves: torch's own adds it up in order and loses two digits of 256k terms."""
    logits.sub_(logits.amax(-1, keepdim=True))
    return logits.sub_(logits.exp().sum(-1, keepdim=True).log_())


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _log_mixture(log_a: Tensor, log_b: Tensor, share: float | Tensor) -> Tensor:
    """log(share · a + (1 - share) · b), exact however small a and b are."""
    if isinstance(share, Tensor):
        share = share.to(log_a.dtype)
        return torch.logaddexp(log_a + share.log(), log_b + (-share).log1p())
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _log_of_mixture(a: Tensor, b: Tensor, share: float | Tensor) -> Tensor:
    """The same from probabilities, in one pass less; where both underflow the result has no weight, but is finite."""
    return torch.lerp(b, a, share).clamp_min_(torch.finfo(a.dtype).tiny).log_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)
