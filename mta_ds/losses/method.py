"""What every base method has in common: where a step's sequences come from, and what is optimised on them.

A run has one :class:`Method`, which its :class:`MethodConfig` makes. For each micro-batch it starts a
:class:`BaseLoss`, which sees the teacher's key layers as they are emitted, then both final states, and returns a loss.
A new method is one module with a config and a subclass of either, and its line in ``losses/methods.py``.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mta_ds.config import Section
from mta_ds.losses.divergences import DivergenceConfig, describe, make_divergence
from mta_ds.ops import (
    IGNORED,
    Divergence,
    HeadGradient,
    LinearDivergence,
    entropy_weights,
    linear_divergence,
    token_entropy,
)
from mta_ds.ops.layout import beside


class Source(Enum):
    """Where the sequences of an optimizer step come from."""

    DATA = "data"
    STUDENT = "student"
    """The step's prompts, answered by the student as it is now: rollouts."""
    BUFFER = "buffer"
    """Earlier rollouts."""


class Setting(NamedTuple):
    """What a method is told of the run around it."""

    vocab_size: int | None
    """Ids that mean something; heads are cut to it."""
    key_layers: Mapping[int, int]
    """Teacher layer -> student layer, lowest first, for a method that compares layers."""
    top_layers: tuple[int, int]
    """The student's last and the teacher's."""
    beside_mta: bool
    """Whether MTA runs as well."""


class MethodConfig(Section):
    """What the section ``loss`` of every method has."""

    @property
    def adapts(self) -> bool:
        """Whether the method changes with the validation loss: then validations come once an epoch unless the config
        says, and may not come at other steps when a run is resumed."""
        return False

    @abstractmethod
    def make(self, setting: Setting) -> Method:
        """The method."""


class KeyLayerOptions(Section):
    """Which student layers are aligned with which teacher layers (METHOD §7)."""

    student_layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None
    num_layers: int | None = Field(default=None, ge=1)
    """Key layers, strided from the top of each model; 3 unless given."""
    stride: int | None = Field(default=None, ge=1)
    """Student layers between key layers; a quarter of its depth unless given."""


class RolloutConfig(Section):
    """How the student writes the sequences that it then trains on, and when they are parsed."""

    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Sample from this many most probable tokens; 0 keeps all."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a response; ``data.max_length`` alone limits it if none."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences a rank generates at once."""
    ahead: int = Field(default=1, ge=0)
    """Steps between a rollout and its first training step, in which it is parsed; 0 waits for the parser. A fixed
    number, so that a run does not depend on how fast the parser was."""
    parser_workers: int = Field(default=1, ge=0)
    """Parser processes of each rank; 0 parses nothing, and MTA passes over rollouts."""


class OnPolicyConfig(MethodConfig, DivergenceConfig):
    """What methods have in common that train on the student's own text: it is no label, so they need the teacher."""

    rollouts: RolloutConfig = RolloutConfig()

    @model_validator(mode="after")
    def _compares(self) -> Self:
        if self.divergence == "sft" or self.kd_ratio == 0:
            option = "divergence: sft" if self.divergence == "sft" else "kd_ratio: 0"
            raise ValueError(f"{option} learns from labels alone, and rollouts have none; choose another, or method kd")
        return self


class StepCounts(NamedTuple):
    """What normalises the base loss of a micro-step, summed over all ranks and micro-steps before its forward."""

    tokens: int
    """Labelled tokens of the optimizer step."""
    valid_tokens: int
    """Tokens that are no padding."""
    sequences: int
    scale: int
    """world_size · gradient_accumulation_steps: undoes DeepSpeed's averaging, so that losses are sums."""
    step: int
    """From 1."""
    num_steps: int
    source: Source


class MicroStep(NamedTuple):
    """One micro-batch as a base loss sees it: n valid tokens of its sequences, one after another."""

    final: Tensor
    """The student's final state [n, d_S], in the graph."""
    key_layers: Mapping[int, Tensor]
    """Student layer -> [n, d_S], in the graph."""
    head: Tensor
    """The student's LM head [V, d_S]."""
    targets: Tensor
    """int64 [n] on the CPU, the label of the next token; -100 = not counted."""
    cu_seqlens: Tensor
    """int64 [B + 1] on the CPU."""
    rejected: Sequence[bool]
    """For each sequence: the rejected half of a preference pair."""
    counts: StepCounts
    norm: Callable[[Tensor], Tensor]
    """The student's final norm."""
    keep_entropy: bool = False
    """Whether :meth:`BaseLoss.teacher_weights` will be asked for."""


class Teacher(Protocol):
    """What a base loss reads of the teacher beside its states."""

    def head(self) -> Tensor:
        """The LM head [V, d_T], whole."""

    def norm(self) -> Callable[[Tensor], Tensor]:
        """The final norm."""


class BaseLoss:
    """The base loss of one micro-step: this class, the token mean of the method's divergence at the final layer."""

    def __init__(self, micro: MicroStep, divergence: Divergence) -> None:
        self.micro = micro
        self.divergence = divergence
        self._entropies: list[tuple[Tensor, Tensor]] = []  # (where [m], the teacher's entropies there [m])

    def align(self, teacher_layer: int, hidden: Tensor, teacher: Teacher) -> None:
        """The teacher emits a key layer [n, d_T]; only a method that compares layers looks at it."""

    def finish(self, final: Tensor | None, teacher: Teacher | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for DeepSpeed's backward (this micro-step's share times ``scale``), and the shares of its metrics.

        Args:
            final: the teacher's final state [n, d_T]; None without a teacher, for cross-entropy alone.
        """
        loss = self.divergence_loss(final, teacher)
        return loss, {"base": loss.detach() / self.micro.counts.scale}

    def divergence_loss(
        self, final: Tensor | None, teacher: Teacher | None, head_gradient: HeadGradient | None = None
    ) -> Tensor:
        """The divergence at the final layer, token mean over the step; full logits never exist."""
        counts, read_teacher = self.micro.counts, teacher is not None and self.divergence.needs_teacher
        return self.compare(
            final if read_teacher else None,
            teacher.head() if read_teacher and teacher is not None else None,
            self.micro.targets,
            self.divergence,
            factor=counts.scale / max(1, counts.tokens),
            head_gradient=head_gradient,
        ).loss

    def compare(
        self, final: Tensor | None, head: Tensor | None, targets: Tensor, divergence: Divergence, **options: Any
    ) -> LinearDivergence:
        """:func:`linear_divergence` of the micro-step; remembers the teacher's entropies that its pass gives."""
        keep = self.micro.keep_entropy and final is not None
        sums = linear_divergence(
            self.micro.final, self.micro.head, final, head, targets, divergence, teacher_entropy=keep, **options
        )
        if sums.entropy is not None:
            self._entropies.append(((targets != IGNORED).nonzero()[:, 0], sums.entropy))
        return sums

    @torch.no_grad()
    def teacher_weights(self, final: Tensor, teacher: Teacher) -> Tensor:
        """Token weights [n] of how sure the teacher is, after :meth:`finish`.

        Where a label stands, the entropy comes from the loss's own pass; the other tokens go through the head here.
        """
        rest = torch.ones(len(final), dtype=torch.bool)
        for known, _ in self._entropies:
            rest[known] = False
        others = rest.nonzero()[:, 0]
        hidden, head = final.index_select(0, beside(others, final.device)), teacher.head()
        vocab_size = len(head[: self.divergence.vocab_size])
        parts = [*self._entropies, (others, token_entropy(hidden, head, vocab_size))]
        order = torch.cat([places for places, _ in parts]).argsort()
        entropies = torch.cat([values for _, values in parts])[beside(order, final.device)]
        return entropy_weights(entropies, vocab_size, self.micro.cu_seqlens)


class Method:
    """Distillation on the data set (``kd``), and what the other methods change of it."""

    rollouts: RolloutConfig | None = None
    """How to generate, for a method that trains on the student's own text."""
    pairs = False
    """Whether a record is a chosen and a rejected response."""
    key_layers: Mapping[int, int] = {}
    """Teacher layer -> student layer, of a method that compares layers."""
    uses_norm = False
    """Whether states of key layers go through the final norms."""
    buffer_size = 0
    """Sequences of the replay buffer, over all ranks."""

    def __init__(self, divergence: Divergence) -> None:
        self.divergence = divergence

    def describe(self) -> str:
        """What is optimised, in one line."""
        return f"kd, {describe(self.divergence)}"

    def start(self, micro: MicroStep) -> BaseLoss:
        """Begin the base loss of a micro-step, after the student's forward and before the teacher's."""
        return BaseLoss(micro, self.divergence_on(micro.counts.source))

    def divergence_on(self, source: Source) -> Divergence:
        """The divergence for sequences of a source: the student's own text is no label to learn from."""
        return self.divergence if source is Source.DATA else dataclasses.replace(self.divergence, kd_ratio=1.0)

    def source(self, step: int, num_steps: int, draw: float, buffer_full: bool) -> Source:
        """Where the sequences of ``step`` (from 1) come from; the same on every rank.

        Args:
            draw: uniform in [0, 1), the step's own.
        """
        return Source.DATA

    def after_step(self, step: int, shares: Mapping[str, Tensor], all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Learn from a step's metrics what later steps need; every rank calls it."""

    def after_validation(self, loss: float) -> None:
        """Learn the held-out label cross-entropy; the first call is before any step."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold of the method; also logged."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's :meth:`state`."""


class KDConfig(MethodConfig, DivergenceConfig):
    """Distillation on the data set's own responses."""

    method: Literal["kd"] = "kd"

    def make(self, setting: Setting) -> Method:
        return Method(make_divergence(self, setting.vocab_size))
