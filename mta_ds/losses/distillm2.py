"""DistiLLM-2: skewed KL on the teacher's responses, skewed reverse KL on the student's (METHOD §8, ICML 2025).

A record is a prompt with a chosen response (the teacher's) and a rejected one (the student's). With p̄ and q̄ the
teacher's and the student's probability of a response's labels (geometric mean), the loss of a pair is

    (2 - β) mean_t KL(p ‖ α₁ p + (1-α₁) q) on chosen  +  β mean_t KL(q ‖ (1-α₂) p + α₂ q) on rejected, mixture detached
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from mta_ds.losses.method import BaseLoss, Method, MethodConfig, MicroStep, Setting, Teacher
from mta_ds.ops import IGNORED, Divergence, HeadGradient, label_log_probs
from mta_ds.ops.layout import beside

_SMALLEST_ALPHA = 0.01


class DistiLLM2Config(MethodConfig):
    """DistiLLM-2; the records are ``{prompt, chosen, rejected}``, as ``mta-ds generate --pair-with`` writes them; any
    with a response for ``regenerate: rejected``, any with a prompt for ``both``."""

    method: Literal["distillm2"]
    alpha: float = Field(default=0.1, gt=_SMALLEST_ALPHA, lt=1)
    """Mixture of both halves; the largest one with ``alpha_curriculum``."""
    beta_curriculum: bool = True
    """β = 1 + ½ min(1, 2 step/total): the rejected half counts more and more. Off: β = 1."""
    alpha_curriculum: bool = True
    """Fit α to how far teacher and student are apart on a response, which costs another pass through both heads."""
    gap_steps: int = Field(default=100, ge=1)
    """Steps over which ``alpha_curriculum`` takes the mean gap between teacher and student; then it is frozen."""
    regenerate: Literal["rejected", "both"] | None = None
    """Write responses to the prompts of ``data.train`` anew at the start of each epoch, as section ``generation`` says:
    the student's alone, or the teacher's too. Whole copies stand on every rank one after the other meanwhile; one that
    does not fit is refused."""

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        if "gap_steps" in self.model_fields_set and not self.alpha_curriculum:
            raise ValueError("gap_steps is an option of alpha_curriculum, which is off; remove it")
        return self

    @model_serializer(mode="wrap")
    def _own_options(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written down can be read back."""
        return {n: value for n, value in serialize(self).items() if n != "gap_steps" or self.alpha_curriculum}

    def make(self, setting: Setting) -> Method:
        return DistiLLM2(self, setting.vocab_size)


class DistiLLM2(Method):
    """The two curricula, and the gaps p̄ - q̄ on chosen and q̄ - p̄ on rejected that α is measured against."""

    pairs = True

    def __init__(self, config: DistiLLM2Config, vocab_size: int | None) -> None:
        super().__init__(Divergence("skl", alpha=config.alpha, vocab_size=vocab_size))
        self.config = config
        self.rejected = Divergence("srkl", alpha=config.alpha, detach_mixture=True, vocab_size=vocab_size)
        self.gaps = {half: torch.zeros((), dtype=torch.float64) for half in ("chosen", "rejected")}
        """Sums of each step's mean gap, on the device once a step has added to them: no step waits for it."""
        self.gap_steps = 0

    def describe(self) -> str:
        fitted = f"fitted in [{_SMALLEST_ALPHA:g}, {self.config.alpha:g}]"
        alpha = fitted if self.config.alpha_curriculum else f"{self.config.alpha:g}"
        beta = "1 to 1.5" if self.config.beta_curriculum else "1"
        return f"distillm2, (2-β) skl on chosen + β srkl (mixture detached) on rejected, β {beta}, α {alpha}"

    def start(self, micro: MicroStep) -> BaseLoss:
        return PairLoss(self, micro)

    def beta(self, step: int, num_steps: int) -> float:
        """β at ``step`` (from 1)."""
        return 1 + 0.5 * min(1.0, 2 * step / num_steps) if self.config.beta_curriculum else 1.0

    def alphas(self, gaps: Tensor, half: str) -> Tensor:
        """α of each response [B] from its gap [B]: clip(1 - (1-α) m / (gap + 1e-5), 0.01, α)."""
        if not self.gap_steps:
            return torch.full_like(gaps, self.config.alpha)
        mean = self.gaps[half] / self.gap_steps
        return (1 - (1 - self.config.alpha) * mean / (gaps + 1e-5)).clamp(_SMALLEST_ALPHA, self.config.alpha)

    def after_step(self, step: int, shares: Mapping[str, Tensor], all_reduce: Callable[[Tensor], Tensor]) -> None:
        if not self.config.alpha_curriculum or step > self.config.gap_steps:
            return
        summed = all_reduce(torch.stack([shares[f"gap/{half}"].double() for half in self.gaps]))
        for half, gap in zip(self.gaps, summed, strict=True):
            self.gaps[half] = self.gaps[half] + gap
        self.gap_steps += 1

    def state(self) -> dict[str, float]:
        return {f"gap_{half}": float(value) for half, value in self.gaps.items()} | {"gap_steps": self.gap_steps}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.gaps = {half: torch.tensor(state[f"gap_{half}"], dtype=torch.float64) for half in self.gaps}
        self.gap_steps = int(state["gap_steps"])


class PairLoss(BaseLoss):
    """The loss of a micro-batch of pairs: mean over each response's tokens, then over the step's pairs."""

    def __init__(self, method: DistiLLM2, micro: MicroStep) -> None:
        super().__init__(micro, method.divergence)
        self.method = method

    def finish(self, final: Tensor | None, teacher: Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert final is not None and teacher is not None  # the method needs a teacher
        micro = self.micro
        counts = micro.counts
        pairs = max(1, counts.sequences // 2)
        beta = self.method.beta(counts.step, counts.num_steps)
        head_gradient = HeadGradient(micro.head)
        loss = torch.zeros((), device=micro.final.device)
        shares: dict[str, Tensor] = {}
        halves = (("chosen", self.method.divergence, 2 - beta), ("rejected", self.method.rejected, beta))
        for half, divergence, weight in halves:
            targets, weights = half_of(micro, half == "rejected")
            alphas = self._alphas(half, targets, final, teacher, shares)
            sums = self.compare(
                final,
                teacher.head(),
                targets,
                divergence,
                weights=weights,
                alphas=alphas,
                factor=weight * counts.scale / pairs,
                head_gradient=head_gradient,
            )
            loss = loss + sums.loss
            shares[f"base/{half}"] = sums.divergence / pairs
        shares["base"] = loss.detach() / counts.scale
        return loss + head_gradient.attach(), shares

    def _alphas(
        self, half: str, targets: Tensor, final: Tensor, teacher: Teacher, shares: dict[str, Tensor]
    ) -> Tensor | None:
        """α at each position [n]; adds the mean gap's share to ``shares``."""
        if not self.method.config.alpha_curriculum:
            return None
        micro, vocab_size = self.micro, self.divergence.vocab_size
        ours = label_log_probs(micro.final.detach(), micro.head.detach(), targets, vocab_size)
        theirs = label_log_probs(final, teacher.head(), targets, vocab_size)
        owners = sequence_of_labels(targets, micro.cu_seqlens)
        gaps = response_probabilities(theirs, owners, micro) - response_probabilities(ours, owners, micro)
        if half == "rejected":
            gaps = -gaps
        mine = torch.tensor([is_rejected == (half == "rejected") for is_rejected in micro.rejected])
        pairs = max(1, micro.counts.sequences // 2)
        shares[f"gap/{half}"] = (gaps * beside(mine, gaps.device)).sum() / pairs
        lengths = beside(micro.cu_seqlens.diff(), gaps.device)
        return self.method.alphas(gaps, half).repeat_interleave(lengths, output_size=len(micro.final))


def half_of(micro: MicroStep, rejected: bool) -> tuple[Tensor, Tensor]:
    """Targets [n] with only one half's labels, and 1 / (labels of its sequence) for each position [n]."""
    lengths = micro.cu_seqlens.diff()
    other_half = (torch.tensor(micro.rejected) != rejected).repeat_interleave(lengths)
    targets = micro.targets.masked_fill(other_half, IGNORED)
    owners = torch.arange(len(lengths)).repeat_interleave(lengths)
    labels = torch.bincount(owners[targets != IGNORED], minlength=len(lengths))
    return targets, (1 / labels.clamp_min(1).double()).repeat_interleave(lengths)


def sequence_of_labels(targets: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [count]: the sequence of each counted position."""
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)[targets != IGNORED]


def response_probabilities(log_probs: Tensor, owners: Tensor, micro: MicroStep) -> Tensor:
    """exp(mean label log-probability) of each sequence [B]; 1 where a sequence has no label."""
    labels = torch.bincount(owners, minlength=len(micro.rejected))
    bounds = torch.cat([labels.new_zeros(1), labels.cumsum(0)])
    labels, bounds = (beside(each, log_probs.device) for each in (labels.clamp_min(1), bounds))
    # owners are sorted: each sum in its own order, where a GPU would add scattered ones up in any
    sums = torch.segment_reduce(log_probs, "sum", offsets=bounds, unsafe=True)
    return (sums / labels).exp()
