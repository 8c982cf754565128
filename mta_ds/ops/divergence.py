"""Divergences between next-token distributions: per-token values from logits, and their gradients in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

DivergenceName = Literal["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which divergence of METHOD §8, p the teacher's distribution and q the student's.

    Attributes:
        name: ``sft`` is the label cross-entropy alone.
        alpha: share of the other distribution in the mixture of ``skl`` and ``srkl``.
        beta: of ``jsd``; 0 and 1 are its limits, ``fkl`` and ``rkl``.
        detach_mixture: ``srkl`` without the gradient through its mixture (DistiLLM-2).
        kd_ratio: the loss is (1 - kd_ratio) · cross-entropy + kd_ratio · divergence.
        vocab_size: rows of the heads that mean something; models pad them. None: all.
    """

    name: DivergenceName = "fkl"
    alpha: float = 0.1
    beta: float = 0.5
    detach_mixture: bool = False
    kd_ratio: float = 1.0
    vocab_size: int | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether teacher logits are read at all."""
        return self.name != "sft" and self.kd_ratio > 0

    @property
    def divergence_ratio(self) -> float:
        """Share of the divergence in the loss; the rest is the label cross-entropy."""
        return self.kd_ratio if self.needs_teacher else 0.0


def divergence_values(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """Per-token divergence [m] from logits [m, V], by definition and differentiable in ``student``."""
    return _values_and_slopes(student.log_softmax(-1), teacher.log_softmax(-1), divergence)[0]


def divergence_gradients(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Per-token values [m] and their gradients with respect to the student's logits [m, V].

    Args:
        log_q, log_p: log-probabilities [m, V] of student and teacher.

    With g = ∂value/∂q, the gradient through the softmax is q (g - Σ q g).
    """
    values, slopes = _values_and_slopes(log_q, log_p, divergence)
    if slopes is None:  # fkl: the closed form needs no slope, and 1/q would overflow
        return values, log_q.exp() - log_p.exp()
    weighted = slopes.mul_(log_q.exp())
    return values, weighted - log_q.exp() * weighted.sum(-1, keepdim=True)


def _values_and_slopes(log_q: Tensor, log_p: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor | None]:
    """Values [m] and slopes ∂value/∂q [m, V]; None for ``fkl``, whose slope -p/q may overflow."""
    p, q = log_p.exp(), log_q.exp()
    name, beta = divergence.name, divergence.beta
    if name == "jsd" and beta in (0.0, 1.0):
        name = "rkl" if beta else "fkl"
    if name == "fkl":
        return _sum(p * (log_p - log_q)), None
    if name == "rkl":
        ratio = log_q - log_p
        return _sum(q * ratio), ratio
    if name == "tvd":
        return 0.5 * _sum((p - q).abs()), -0.5 * (p - q).sign()
    if name == "jsd":
        log_m = torch.logaddexp(log_p + _log(beta, p), log_q + _log(1 - beta, p))
        ours = log_q - log_m
        return beta * _sum(p * (log_p - log_m)) + (1 - beta) * _sum(q * ours), (1 - beta) * ours
    alpha = divergence.alpha
    if name == "skl":
        log_m = torch.logaddexp(log_p + _log(alpha, p), log_q + _log(1 - alpha, p))
        return _sum(p * (log_p - log_m)), -(1 - alpha) * (log_p - log_m).exp()
    assert name == "srkl", name
    log_m = torch.logaddexp(log_p + _log(1 - alpha, p), log_q + _log(alpha, p))
    if divergence.detach_mixture:
        log_m = log_m.detach()
    ratio = log_q - log_m
    slope = ratio if divergence.detach_mixture else ratio - alpha * ratio.exp()
    return _sum(q * ratio), slope


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1)


def _log(share: float, like: Tensor) -> Tensor:
    return torch.log(torch.tensor(share, dtype=like.dtype, device=like.device))
