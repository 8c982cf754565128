"""The step: what happens to one micro-batch between the student's first layer and the loss.

student forward ─▶ key layers and final state, in the graph
teacher forward ─▶ at each key layer: DSA and Hid against the student's, with their gradients; the state goes
both final states ─▶ through both LM heads, chunk by chunk, into the base loss
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mta_ds.data import GRANULARITIES, Batch
from mta_ds.engine import distributed
from mta_ds.losses import (
    Divergence,
    GlobalCounts,
    LayerGradients,
    LinearDivergence,
    MTAConfig,
    SpanLayout,
    align_layer,
    attach,
    dsa_scale,
    hid_scale,
    layer_weights,
    linear_divergence,
    non_finite,
)
from mta_ds.models import CausalBody, KeyLayer, StreamingTeacher, ragged, state_width


class StudentStates(NamedTuple):
    """What a student's forward leaves in the graph, for the n valid tokens."""

    final: Tensor
    """[n, d_S]"""
    key_layers: dict[int, Tensor]
    """Layer number -> [n, d_S]."""


class StepCounts(NamedTuple):
    """The global counts that normalise one micro-step, known before its forward."""

    tokens: int
    """Labelled tokens of the optimizer step, over all ranks and micro-steps."""
    structural: GlobalCounts
    scale: int
    """world_size · gradient_accumulation_steps: undoes DeepSpeed's averaging, so that losses are sums."""


class Distiller(nn.Module):
    """Student and projections: the one module that the student's engine wraps, so that one backward serves both."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PretrainedConfig,
        key_layers: Sequence[KeyLayer],
        mta: MTAConfig | None,
        divergence: Divergence,
    ) -> None:
        super().__init__()
        self.key_layers = tuple(key_layers)
        self.mta = mta
        self.divergence = divergence
        self.student = CausalBody(student, [layer.student for layer in key_layers])
        self.projections = nn.ModuleList(
            nn.Linear(state_width(student.config, k.student), state_width(teacher, k.teacher), bias=False)
            for k in key_layers
        )

    @property
    def projection_weights(self) -> list[nn.Parameter]:
        """W of each key layer [d_T, d_S], lowest first."""
        return [cast(nn.Parameter, projection.weight) for projection in self.projections]

    def register_taps(self) -> None:
        """Hook the key layers and declare the weights that forward reads outside their own modules' forward.

        Call once, after ``deepspeed.initialize``: under ZeRO-3 the head and the projections are partitioned, and this
        gathers them for as long as this module's forward and backward last.
        """
        self.student.register_taps()
        for weight in (self.student.head, *self.projection_weights):
            if hasattr(weight, "ds_id"):
                deepspeed.zero.register_external_parameter(self, weight)

    def forward(
        self, batch: Batch, teacher: StreamingTeacher | None, counts: StepCounts | None = None
    ) -> tuple[Tensor, dict[str, Tensor]] | dict[str, Tensor]:
        """One micro-batch; every rank must call it.

        Returns:
            With ``counts``: the loss to give to the engine's backward, and this micro-step's share of every metric
            (detached; shares add up over ranks and micro-steps). Without: :meth:`score`.
        """
        if counts is None:
            return self.score(batch, teacher)
        student = self.run_student(batch)
        structural = StructuralLoss(self, student, batch, counts)
        final = teacher.run(batch, on_key_layer=structural.align) if teacher is not None else None
        base = self.base_loss(student, final, batch, teacher, self.divergence)
        return combine(base, structural, counts)

    def run_student(self, batch: Batch) -> StudentStates:
        """Final state and key layers of the student, in the graph."""
        key_layers: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> None:
            key_layers[layer] = ragged(hidden, batch.valid)

        final = self.student(batch.input_ids, batch.attention_mask, on_layer=keep)
        return StudentStates(ragged(final, batch.valid), key_layers)

    def base_loss(
        self,
        student: StudentStates,
        teacher_final: Tensor | None,
        batch: Batch,
        teacher: StreamingTeacher | None,
        divergence: Divergence,
    ) -> LinearDivergence:
        """Sums of the divergence over this micro-batch's labelled tokens; full logits never exist."""
        if teacher is None or not divergence.needs_teacher:
            return linear_divergence(student.final, self.student.head, None, None, batch.targets, divergence)
        with teacher.gathered_head() as teacher_head:
            return linear_divergence(
                student.final, self.student.head, teacher_final, teacher_head, batch.targets, divergence
            )

    @torch.no_grad()
    def score(self, batch: Batch, teacher: StreamingTeacher | None) -> dict[str, Tensor]:
        """Sums that validation needs, whatever the run trains on: cross_entropy, divergence (KL(p ‖ q)) and count.

        A dict because ZeRO-3 looks into what a module returns, and knows tensors, tuples and dicts only.
        """
        student = self.run_student(batch)
        final = teacher.run(batch) if teacher is not None else None
        divergence = Divergence("sft" if teacher is None else "fkl", vocab_size=self.divergence.vocab_size)
        sums = self.base_loss(student, final, batch, teacher, divergence)
        scores = {"cross_entropy": sums.cross_entropy, "count": torch.as_tensor(sums.count)}
        return scores if teacher is None else scores | {"divergence": sums.divergence}


class StructuralLoss:
    """DSA and Hid of one micro-batch: filled by the teacher's key layers, then put into the student's graph at once."""

    def __init__(self, distiller: Distiller, student: StudentStates, batch: Batch, counts: StepCounts) -> None:
        self.config = distiller.mta
        self._counts = counts
        self._student = student
        self._layouts = {
            name: SpanLayout(batch.cu_seqlens, batch.spans[name].ranges, batch.spans[name].cu_spans)
            for name in {layer.granularity for layer in distiller.key_layers}
        }
        self._pairs = {
            layer.teacher: (layer, weight)
            for layer, weight in zip(distiller.key_layers, distiller.projection_weights, strict=True)
        }
        self._gradients: dict[int, LayerGradients] = {}

    def align(self, teacher_layer: int, hidden: Tensor) -> None:
        """The teacher emits a key layer [n, d_T]: compute its losses with their gradients, and let the state go."""
        assert self.config is not None  # without MTA the teacher has no key layers
        layer, projection = self._pairs[teacher_layer]
        self._gradients[teacher_layer] = align_layer(
            self._student.key_layers[layer.student],
            hidden,
            projection,
            self._layouts[layer.granularity],
            self.config.reduction,
            self.config.student_weights,
        )

    def attach(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum over layers, in the student's graph, and this micro-step's share of every layer's value."""
        total = torch.zeros((), device=self._student.final.device)
        shares: dict[str, Tensor] = {"dsa": total, "hid": total}
        if self.config is None:
            return total, shares
        dsa_weight, hid_weight = layer_weights(self.config, len(self._pairs))
        normalisers = self._global_normalisers()
        for teacher_layer, (layer, projection) in self._pairs.items():
            hidden = self._student.key_layers[layer.student]
            terms = attach(hidden, projection, self._gradients[teacher_layer])
            counts = self._counts.structural
            dsa = terms.dsa * dsa_scale(self.config, counts, layer.granularity, normalisers[teacher_layer])
            hid = terms.hid * hid_scale(self.config, counts, layer.granularity)
            total = total + self._counts.scale * (dsa_weight * dsa + hid_weight * hid)
            shares |= {f"dsa/{layer.student}": dsa.detach(), f"hid/{layer.student}": hid.detach()}
            shares |= non_finite(terms, layer.student, teacher_layer)
            # totals as they enter the loss, so that loss = base + λ_DSA · dsa + λ_Hid · hid
            shares["dsa"] = shares["dsa"] + dsa.detach() / len(self._pairs)
            by_layers = 1 if self.config.reduction == "paper" else len(self._pairs)
            shares["hid"] = shares["hid"] + hid.detach() / by_layers
        return total, shares

    def _global_normalisers(self) -> dict[int, Tensor]:
        """Σ_b Z_b of every layer over all ranks, in one all-reduce; only ``weighted_mean`` divides by it."""
        layers = list(self._pairs)
        values = torch.stack([self._gradients[layer].terms.dsa_normaliser for layer in layers])
        if self.config is not None and self.config.reduction == "weighted_mean":
            distributed.all_reduce_sum(values)
        return dict(zip(layers, values, strict=True))


def combine(base: LinearDivergence, structural: StructuralLoss, counts: StepCounts) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_base + λ_DSA L_DSA + λ_Hid L_Hid (MTA eq. 14), every sum over its global count."""
    aligned, shares = structural.attach()
    loss = base.loss * (counts.scale / max(1, counts.tokens)) + aligned
    shares["loss"] = loss.detach() / counts.scale
    shares["base"] = base.loss.detach() / max(1, counts.tokens)
    return loss, shares


def global_counts(batches: Sequence[Batch]) -> list[StepCounts]:
    """The counts of one optimizer step, summed over ranks once; one entry for each micro-batch of this rank."""
    local: list[int] = []
    for counts in (batch.counts for batch in batches):
        local += [counts.tokens, counts.sequences]
        local += [per[g] for per in (counts.covered, counts.comparable) for g in GRANULARITIES]
    width = 2 + 2 * len(GRANULARITIES)
    summed = distributed.sum_counts(local)
    micro = [summed[i : i + width] for i in range(0, len(summed), width)]
    step = [sum(column) for column in zip(*micro, strict=True)]
    return [
        StepCounts(
            tokens=step[0],
            structural=GlobalCounts(
                sequences=step[1],
                covered=dict(zip(GRANULARITIES, step[2:4], strict=True)),
                comparable=dict(zip(GRANULARITIES, step[4:6], strict=True)),
                micro_comparable=dict(zip(GRANULARITIES, row[4:6], strict=True)),
            ),
            scale=distributed.world_size() * len(batches),
        )
        for row in micro
    ]
