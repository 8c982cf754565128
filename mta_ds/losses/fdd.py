"""FDD: the student follows the teacher's layers in output space, their place and their change (METHOD §8, ACL 2025).

    L_FDD = (1/M) Σ_l KL(softmax(z^T_l/τ) ‖ softmax(z^S_l/τ)) + (1/(M-1)) Σ_{l>first} (1 - cos(Δ^S_l, Δ^T_l))

over all valid tokens and M key layers, z_l a layer's state through its own model's head, Δ_l the change of
log softmax(z) since the key layer before. Streamed: when the teacher emits a key layer, all that is kept of it is its
state at the one before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mta_ds.losses.divergences import DivergenceConfig, describe, make_divergence
from mta_ds.losses.method import BaseLoss, KeyLayerOptions, Method, MethodConfig, MicroStep, Setting, Teacher
from mta_ds.ops import (
    Divergence,
    HeadGradient,
    TrajectoryGradients,
    align_trajectory,
    attach_trajectory,
)


class FDDConfig(MethodConfig, DivergenceConfig, KeyLayerOptions):
    """FDD beside a divergence at the final layer; its key layers are MTA's unless it names its own."""

    method: Literal["fdd"]
    temperature: float | None = Field(default=None, gt=0)
    """τ; 2 beside MTA and 5 alone unless given (released code)."""
    weight: float = Field(default=1.0, ge=0)
    """Of L_FDD beside the divergence."""
    derivative_weight: float = Field(default=1.0, ge=0)
    """Of the second term inside L_FDD."""
    final_norm: bool = False
    """Put states of lower layers through the model's final norm before its head."""

    @property
    def names_layers(self) -> bool:
        """Whether FDD has key layers of its own."""
        return any(getattr(self, name) is not None for name in KeyLayerOptions.model_fields)

    def make(self, setting: Setting) -> Method:
        temperature = self.temperature if self.temperature is not None else (2.0 if setting.beside_mta else 5.0)
        divergence = make_divergence(self, setting.vocab_size)
        return FDD(self, divergence, setting.key_layers, temperature, setting.top_layers)


class FDD(Method):
    """The divergence at the final layer, and L_FDD over key layers."""

    def __init__(
        self,
        config: FDDConfig,
        divergence: Divergence,
        key_layers: Mapping[int, int],
        temperature: float,
        top_layers: tuple[int, int],
    ) -> None:
        """``key_layers`` is teacher layer -> student layer, lowest first; ``top_layers`` the student's and the
        teacher's last, whose states are normed already."""
        super().__init__(divergence)
        self.config = config
        self.key_layers = key_layers
        self.temperature = temperature
        self.student_top, self.teacher_top = top_layers
        self.uses_norm = config.final_norm

    def describe(self) -> str:
        layers = " ".join(map(str, self.key_layers.values()))
        trajectory = f"{self.config.weight:g} L_FDD over student layers {layers}, τ = {self.temperature:g}"
        return f"fdd, {describe(self.divergence)}, + {trajectory}"

    def start(self, micro: MicroStep) -> BaseLoss:
        return TrajectoryLoss(self, micro)


class TrajectoryLoss(BaseLoss):
    """L_FDD of a micro-batch, layer by layer as the teacher emits them, then the divergence."""

    def __init__(self, method: FDD, micro: MicroStep) -> None:
        super().__init__(micro, method.divergence_on(micro.counts.source))
        self.method = method
        self._head_gradient = HeadGradient(micro.head)
        self._student = {layer: self._normed(layer) for layer in method.key_layers.values()}
        self._previous: tuple[int, Tensor] | None = None
        self._gradients: dict[int, tuple[int | None, TrajectoryGradients]] = {}

    def align(self, teacher_layer: int, hidden: Tensor, teacher: Teacher) -> None:
        if teacher_layer not in self.method.key_layers:
            return
        method, layer = self.method, self.method.key_layers[teacher_layer]
        if method.uses_norm and teacher_layer != method.teacher_top:
            hidden = teacher.norm()(hidden)
        by_kl, by_derivative = self._factors()
        before = None if self._previous is None else self._previous[0]
        self._gradients[layer] = (
            before,
            align_trajectory(
                self._student[layer].detach(),
                hidden,
                None if self._previous is None else (self._student[self._previous[0]].detach(), self._previous[1]),
                self.micro.head,
                teacher.head(),
                temperature=method.temperature,
                kl_factor=by_kl,
                derivative_factor=by_derivative,
                vocab_size=self.divergence.vocab_size,
                head_gradient=self._head_gradient,
            ),
        )
        self._previous = (layer, hidden)

    def finish(self, final: Tensor | None, teacher: Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        counts = self.micro.counts
        self._previous = None
        total = torch.zeros((), device=self.micro.final.device)
        shares = {"fdd": total}
        for layer, (before, gradients) in self._gradients.items():
            previous = None if before is None else self._student[before]
            total = total + attach_trajectory(self._student[layer], previous, gradients)
            tokens = max(1, counts.valid_tokens)
            shares |= {
                f"fdd_kl/{layer}": gradients.kl / tokens,
                f"fdd_derivative/{layer}": gradients.derivative / tokens,
            }
        weight = self.method.config.weight
        shares["fdd"] = total.detach() / (counts.scale * weight) if weight else total.detach()
        loss = total + self.divergence_loss(final, teacher, self._head_gradient)
        shares["base"] = loss.detach() / counts.scale
        return loss + self._head_gradient.attach(), shares

    def _normed(self, layer: int) -> Tensor:
        hidden = self.micro.key_layers[layer]
        wants_norm = self.method.uses_norm and layer != self.method.student_top
        return self.micro.norm(hidden) if wants_norm else hidden

    def _factors(self) -> tuple[float, float]:
        """Of the first term's sum over tokens, and of the second's."""
        counts, layers = self.micro.counts, len(self.method.key_layers)
        each = self.method.config.weight * counts.scale / max(1, counts.valid_tokens)
        return each / layers, each * self.method.config.derivative_weight / max(1, layers - 1)
