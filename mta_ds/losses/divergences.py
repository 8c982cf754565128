"""Divergences as a configuration chooses them, and what each optimises in one line."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from mta_ds.config import Section
from mta_ds.ops import Divergence, DivergenceName

_OPTIONS = {
    "alpha": ("skl", "srkl"),
    "beta": ("jsd",),
    "detach_mixture": ("srkl",),
    "kd_ratio": ("fkl", "rkl", "jsd", "tvd", "skl", "srkl"),
}
_FORMULAS = {
    "sft": "cross-entropy with the labels",
    "fkl": "KL(p ‖ q)",
    "rkl": "KL(q ‖ p)",
    "jsd": "β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q, β = {beta:g}",
    "tvd": "½ Σ |p - q|",
    "skl": "KL(p ‖ α p + (1-α) q), α = {alpha:g}",
    "srkl": "KL(q ‖ (1-α) p + α q), α = {alpha:g}",
}


class DivergenceConfig(Section):
    """A divergence between teacher and student, mixed with the label cross-entropy; every method has these keys that
    leaves the divergence open."""

    divergence: DivergenceName = "fkl"
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """Mixture of ``skl`` and ``srkl``."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of ``jsd``; 0 and 1 are the limits ``fkl`` and ``rkl``."""
    detach_mixture: bool = False
    """``srkl`` without the gradient through its mixture (DistiLLM-2)."""
    kd_ratio: float = Field(default=1.0, ge=0, le=1)
    """The loss is (1 - kd_ratio) · cross-entropy + kd_ratio · divergence."""

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        for option, names in _OPTIONS.items():
            if option in self.model_fields_set and self.divergence not in names:
                raise ValueError(f"{option} is an option of {' and '.join(names)}, not of {self.divergence}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _own_options(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is written down names no option of another divergence, so that it can be read back."""
        foreign = {option for option, names in _OPTIONS.items() if self.divergence not in names}
        return {name: value for name, value in serialize(self).items() if name not in foreign}


def make_divergence(config: DivergenceConfig, vocab_size: int | None = None) -> Divergence:
    """The op's description of the configured divergence; ``vocab_size`` cuts padding rows off the heads."""
    return Divergence(
        name=config.divergence,
        alpha=config.alpha,
        beta=config.beta,
        detach_mixture=config.detach_mixture,
        kd_ratio=config.kd_ratio,
        vocab_size=vocab_size,
    )


def describe(divergence: Divergence) -> str:
    """What is optimised, p the teacher and q the student; token mean."""
    formula = _FORMULAS[divergence.name].format(alpha=divergence.alpha, beta=divergence.beta)
    if divergence.detach_mixture:
        formula += ", mixture detached"
    ratio = divergence.kd_ratio
    if divergence.name == "sft" or ratio == 1:
        return f"{divergence.name}: {formula}"
    return f"{1 - ratio:g} sft + {ratio:g} {divergence.name}: {formula}"
