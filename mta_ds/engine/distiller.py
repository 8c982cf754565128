"""The step: what happens to one micro-batch between the student's first layer and the loss.

student forward ─▶ key layers and final state, in the graph
teacher forward ─▶ at each key layer: DSA and Hid against the student's, with their gradients; the state goes
both final states ─▶ through both LM heads, chunk by chunk, into the method's base loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    Method,
    MicroStep,
    MTAConfig,
    Source,
    SpanLayout,
    StepCounts,
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


class Counts(NamedTuple):
    """The global counts that normalise one micro-step, known before its forward."""

    base: StepCounts
    structural: GlobalCounts


class Distiller(nn.Module):
    """Student and projections: the one module that the student's engine wraps, so that one backward serves both."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PretrainedConfig,
        key_layers: Sequence[KeyLayer],
        mta: MTAConfig | None,
        method: Method,
    ) -> None:
        super().__init__()
        self.key_layers = tuple(key_layers)
        self.mta = mta
        self.method = method
        tapped = {layer.student for layer in key_layers} | set(method.key_layers.values())
        self.student = CausalBody(student, sorted(tapped))
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
        self, batch: Batch, teacher: StreamingTeacher | None, counts: Counts | None = None
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
        base = self.method.start(self.micro_step(student, batch, counts.base))
        final = None
        if teacher is not None:
            self.prepare_teacher(teacher)

            def on_key_layer(layer: int, hidden: Tensor) -> None:
                structural.align(layer, hidden)
                base.align(layer, hidden, teacher)

            final = teacher.run(batch, on_key_layer)
        base_loss = base.finish(final, teacher)
        if structural.awaits_entropy and final is not None and teacher is not None:
            structural.align_kept(base.teacher_weights(final, teacher))
        return combine(base_loss, structural, counts)

    def run_student(self, batch: Batch) -> StudentStates:
        """Final state and key layers of the student, in the graph."""
        key_layers: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor) -> None:
            key_layers[layer] = ragged(hidden, batch.valid)

        final = self.student(batch.input_ids, batch.attention_mask, on_layer=keep)
        return StudentStates(ragged(final, batch.valid), key_layers)

    def micro_step(self, student: StudentStates, batch: Batch, counts: StepCounts) -> MicroStep:
        """The micro-batch as a base loss sees it."""
        return MicroStep(
            student.final,
            student.key_layers,
            self.student.head,
            batch.targets,
            batch.cu_seqlens,
            batch.rejected,
            counts,
            self.student.norm,
            keep_entropy=self.mta is not None and self.mta.teacher_weights == "entropy",
        )

    def prepare_teacher(self, teacher: StreamingTeacher) -> None:
        """Gather now what a method reads inside the teacher's forward, where gathering would get in ZeRO-3's way."""
        if self.method.key_layers:
            teacher.head()
        if self.method.uses_norm:
            teacher.norm()

    @torch.no_grad()
    def score(self, batch: Batch, teacher: StreamingTeacher | None) -> dict[str, Tensor]:
        """Sums that validation needs, whatever the run trains on: cross_entropy, divergence (KL(p ‖ q)) and count.

        A dict because ZeRO-3 looks into what a module returns, and knows tensors, tuples and dicts only.
        """
        student = self.run_student(batch)
        final = teacher.run(batch) if teacher is not None else None
        divergence = Divergence("sft" if teacher is None else "fkl", vocab_size=self.method.divergence.vocab_size)
        teacher_head = teacher.head() if teacher is not None else None
        sums = linear_divergence(student.final, self.student.head, final, teacher_head, batch.targets, divergence)
        scores = {"cross_entropy": sums.cross_entropy, "count": torch.as_tensor(sums.count)}
        return scores if teacher is None else scores | {"divergence": sums.divergence}


class StructuralLoss:
    """DSA and Hid of one micro-batch: filled by the teacher's key layers, then put into the student's graph at once."""

    def __init__(self, distiller: Distiller, student: StudentStates, batch: Batch, counts: Counts) -> None:
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
        self._kept: dict[int, Tensor] = {}
        self._gradients: dict[int, LayerGradients] = {}

    @property
    def awaits_entropy(self) -> bool:
        """Whether the teacher's token weights are known only when its last layer is through both heads."""
        return self.config is not None and self.config.teacher_weights == "entropy"

    def align(self, teacher_layer: int, hidden: Tensor) -> None:
        """The teacher emits a key layer [n, d_T]: compute its losses with their gradients, and let the state go."""
        if teacher_layer not in self._pairs:  # a key layer of the method's alone
            return
        if self.awaits_entropy:  # ... but not yet: what will be read of it stays
            self._kept[teacher_layer] = hidden.index_select(0, self._covered(teacher_layer)).bfloat16()
            return
        self._align(teacher_layer, hidden)

    def align_kept(self, weights: Tensor) -> None:
        """Align all key layers, now that the teacher's token weights [n] are known."""
        for teacher_layer, kept in self._kept.items():
            dtype = self._student.key_layers[self._pairs[teacher_layer][0].student].dtype
            hidden = kept.new_zeros(len(weights), kept.shape[1], dtype=dtype)
            self._align(teacher_layer, hidden.index_copy_(0, self._covered(teacher_layer), kept.to(dtype)), weights)
        self._kept.clear()

    def _covered(self, teacher_layer: int) -> Tensor:
        granularity = self._pairs[teacher_layer][0].granularity
        return self._layouts[granularity].members.on("covered", self._student.final.device)

    def _align(self, teacher_layer: int, hidden: Tensor, weights: Tensor | None = None) -> None:
        assert self.config is not None  # there are no key layers without it
        layer, projection = self._pairs[teacher_layer]
        self._gradients[teacher_layer] = align_layer(
            self._student.key_layers[layer.student],
            hidden,
            projection,
            self._layouts[layer.granularity],
            self.config.reduction,
            self.config.student_weights,
            weights,
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
            total = total + self._counts.base.scale * (dsa_weight * dsa + hid_weight * hid)
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


def combine(
    base: tuple[Tensor, Mapping[str, Tensor]], structural: StructuralLoss, counts: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_base + λ_DSA L_DSA + λ_Hid L_Hid (MTA eq. 14), every sum over its global count."""
    base_loss, base_shares = base
    aligned, shares = structural.attach()
    loss = base_loss + aligned
    return loss, {**shares, **base_shares, "loss": loss.detach() / counts.base.scale}


def global_counts(
    batches: Sequence[Batch], step: int = 1, num_steps: int = 1, source: Source = Source.DATA
) -> list[Counts]:
    """The counts of one optimizer step, summed over ranks once; one entry for each micro-batch of this rank."""
    local: list[int] = []
    for counts in (batch.counts for batch in batches):
        local += [counts.tokens, counts.valid_tokens, counts.sequences]
        local += [per[g] for per in (counts.covered, counts.comparable) for g in GRANULARITIES]
    width = 3 + 2 * len(GRANULARITIES)
    summed = distributed.sum_counts(local)
    micro = [summed[i : i + width] for i in range(0, len(summed), width)]
    step_sums = [sum(column) for column in zip(*micro, strict=True)]
    tokens, valid_tokens, sequences = step_sums[:3]
    scale = distributed.world_size() * len(batches)
    base = StepCounts(tokens, valid_tokens, sequences, scale, step, num_steps, source)
    return [
        Counts(
            base,
            GlobalCounts(
                sequences=sequences,
                covered=dict(zip(GRANULARITIES, step_sums[3:5], strict=True)),
                comparable=dict(zip(GRANULARITIES, step_sums[5:7], strict=True)),
                micro_comparable=dict(zip(GRANULARITIES, row[5:7], strict=True)),
            ),
        )
        for row in micro
    ]
