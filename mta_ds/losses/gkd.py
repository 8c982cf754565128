"""Generalised knowledge distillation: a share λ of steps on the student's own text (Agarwal et al., ICLR 2024).

With ``divergence: rkl`` and ``on_policy_share: 1`` it is MiniLLM's single-step reverse KL on rollouts.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mta_ds.losses.divergences import describe, make_divergence
from mta_ds.losses.method import Method, OnPolicyConfig, Setting, Source
from mta_ds.ops import Divergence, DivergenceName


class GKDConfig(OnPolicyConfig):
    """GKD; ``jsd`` in the paper, any other divergence works too."""

    method: Literal["gkd"]
    divergence: DivergenceName = "jsd"
    on_policy_share: float = Field(default=0.5, ge=0, le=1)
    """λ: share of the steps whose responses the student writes."""

    def make(self, setting: Setting) -> Method:
        return GKD(self, make_divergence(self, setting.vocab_size))


class GKD(Method):
    """λ of the steps on rollouts, the others on the data set."""

    def __init__(self, config: GKDConfig, divergence: Divergence) -> None:
        super().__init__(divergence)
        self.on_policy_share = config.on_policy_share
        self.rollouts = config.rollouts

    def describe(self) -> str:
        return f"gkd, {self.on_policy_share:g} of the steps on rollouts, {describe(self.divergence)}"

    def source(self, step: int, num_steps: int, draw: float, buffer_full: bool) -> Source:
        return Source.STUDENT if draw < self.on_policy_share else Source.DATA
