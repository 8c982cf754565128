"""DistiLLM: skewed divergences on a mixture of data and the student's own text that adapts (METHOD §8, ICML 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from mta_ds.losses.divergences import describe, make_divergence
from mta_ds.losses.method import Method, OnPolicyConfig, Setting, Source
from mta_ds.ops import Divergence, DivergenceName

Schedule = Literal["decreasing", "constant", "increasing"]


class DistiLLMConfig(OnPolicyConfig):
    """DistiLLM; ``divergence`` is ``srkl`` or ``skl`` in the paper."""

    method: Literal["distillm"]
    divergence: DivergenceName = "srkl"
    schedule: Schedule = "decreasing"
    """ρ, the share of steps on fresh rollouts, over the run: φ (1 - step/total), φ/2, or φ step/total."""
    initial_phi: float = Field(default=0.0, ge=0, le=1)
    """φ, the share of steps on student text, before the first validation."""
    phi_step: float = Field(default=0.1, ge=0, le=1)
    """What φ grows by when the held-out loss has risen."""
    tolerance: float = Field(default=0.1, ge=0)
    """How far the held-out loss may rise, in nats, before φ grows."""
    buffer_size: int = Field(default=1000, ge=1)
    """Sequences of the replay buffer, over all ranks; the oldest go first."""

    @property
    def adapts(self) -> bool:
        return self.phi_step > 0

    def make(self, setting: Setting) -> Method:
        return DistiLLM(self, make_divergence(self, setting.vocab_size))


class DistiLLM(Method):
    """The adaptive off-policy schedule: φ grows when the held-out loss rises, ρ falls with the steps."""

    def __init__(self, config: DistiLLMConfig, divergence: Divergence) -> None:
        super().__init__(divergence)
        self.config = config
        self.rollouts = config.rollouts
        self.buffer_size = config.buffer_size
        self.phi = config.initial_phi
        self.previous: float | None = None
        """The held-out loss that the next one is compared with."""

    def describe(self) -> str:
        return f"distillm, adaptive off-policy ({self.config.schedule}), {describe(self.divergence)}"

    def source(self, step: int, num_steps: int, draw: float, buffer_full: bool) -> Source:
        if draw < self.fresh_share(step, num_steps) or (draw < self.phi and not buffer_full):
            return Source.STUDENT
        return Source.BUFFER if draw < self.phi else Source.DATA

    def fresh_share(self, step: int, num_steps: int) -> float:
        """ρ at ``step`` (from 1)."""
        done = step / num_steps
        return self.phi * {"decreasing": 1 - done, "constant": 0.5, "increasing": done}[self.config.schedule]

    def after_validation(self, loss: float) -> None:
        if self.previous is None:
            self.previous = loss
        elif loss >= self.previous + self.config.tolerance:
            self.phi = min(self.phi + self.config.phi_step, 1.0)
            self.previous = loss

    def state(self) -> dict[str, float]:
        return {"phi": self.phi} | ({} if self.previous is None else {"previous_loss": self.previous})

    def load_state(self, state: Mapping[str, float]) -> None:
        self.phi = state["phi"]
        self.previous = state.get("previous_loss")
