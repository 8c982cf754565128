"""Multi-Granular Trajectory Alignment: the two structural losses of a key layer, their reductions and their factors.

Two ways in. :class:`MTALoss` takes hidden states and returns a loss, for people with their own loop. The engine
streams: :func:`mta_ds.ops.align_layer` runs inside the teacher's forward at a key layer and returns values and
gradients, so the teacher's hidden state can go; :func:`mta_ds.ops.attach` later puts them into the student's graph,
where the factors of this module, made of global counts, weigh them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mta_ds.losses.method import KeyLayerOptions
from mta_ds.ops import LayerTerms, SpanLayout, align_layer, attach
from mta_ds.ops.key_layer import Reduction

# A Σ Z below has too few digits in fp32, and the X over it too: no pair of spans weighs anything.
_TINY = 1e-30


class MTAConfig(KeyLayerOptions):
    """Weights, reduction and key layers of the structural losses (METHOD §4-7)."""

    lambda_dsa: float = Field(default=2.0, ge=0)
    lambda_hid: float = Field(default=0.2, ge=0)
    reduction: Reduction = "sequence_mean"
    """``sequence_mean`` is exact for every split of a batch; ``weighted_mean`` (the released code) over ranks but not
    over accumulation steps; ``paper`` sums over spans and sums Hid over layers."""
    student_weights: Literal["own", "teacher"] = "own"
    """Token weights that pool the student's spans: its own, detached (released code), or the teacher's."""
    teacher_weights: Literal["attention", "entropy"] = "attention"
    """The teacher's token weights: attention received among the layer's states, or 1 - H/log|V|, how sure the teacher
    is of the next token: the same at all key layers, and known only at the end, so that the teacher's states of covered
    tokens are kept until then, in bfloat16."""
    num_word_layers: int = Field(default=1, ge=0)
    """Key layers, from the lowest, that align words; the others align phrases."""
    projection_lr: float = Field(default=5e-4, gt=0)


class Spans(Protocol):
    """Spans of one granularity in a ragged batch."""

    @property
    def ranges(self) -> Tensor:
        """Token ranges int64 [K, 2]."""

    @property
    def cu_spans(self) -> Tensor:
        """Bounds of each sequence's spans, int64 [B + 1]."""


class GlobalCounts(NamedTuple):
    """What the normalisers of a step need (METHOD §6), summed over all ranks and, where said, micro-steps."""

    sequences: int
    """Sequences of the optimizer step."""
    covered: Mapping[str, int]
    """Sequences of the step with a covered token, so with a span that is not empty, by granularity."""
    comparable: Mapping[str, int]
    """Sequences of the step with at least two spans that are not empty, by granularity."""
    micro_comparable: Mapping[str, int]
    """The same of this micro-step alone."""


def layer_weights(config: MTAConfig, num_layers: int) -> tuple[float, float]:
    """What one layer's DSA and Hid count in the loss: λ / layers; with ``paper`` Hid is summed over layers instead."""
    return config.lambda_dsa / num_layers, config.lambda_hid / (1 if config.reduction == "paper" else num_layers)


def dsa_scale(
    config: MTAConfig, counts: GlobalCounts, granularity: str, normaliser: Tensor | None = None
) -> Tensor | float:
    """Factor that turns a rank's DSA sum of a micro-step into its share of the layer's L_DSA (METHOD §4, §6).

    The shares of all ranks and micro-steps add up to L_DSA; what a rank returns to DeepSpeed is its share times
    world_size · gradient_accumulation_steps.

    Args:
        normaliser: Σ_b Z_b of the micro-step over all ranks, for ``weighted_mean``. Its ratios are averaged over
            micro-steps weighted by their sequences with two spans or more, so accumulation changes the loss slightly.

    Raises:
        ValueError: ``weighted_mean`` without its normaliser.
    """
    if config.reduction == "paper":
        return 1 / max(1, counts.sequences)
    if config.reduction == "sequence_mean":
        return 1 / max(1, counts.comparable[granularity])
    if normaliser is None:
        raise ValueError("normaliser: weighted_mean divides by the micro-step's Σ Z")
    weight = counts.micro_comparable[granularity] / max(1, counts.comparable[granularity])
    weighs = normaliser > _TINY
    return torch.where(weighs, weight / torch.where(weighs, normaliser, 1.0), 0.0)


def hid_scale(config: MTAConfig, counts: GlobalCounts, granularity: str) -> float:
    """Factor that turns a rank's Hid sum into its share of the layer's L_Hid (METHOD §5, §6)."""
    return 1 / max(1, counts.sequences if config.reduction == "paper" else counts.covered[granularity])


def count_sequences(spans: Mapping[str, Spans]) -> GlobalCounts:
    """The counts of one batch that is a whole optimizer step, as on one process without accumulation."""
    per_sequence = {name: _num_spans(each) for name, each in spans.items()}
    comparable = {name: int((num >= 2).sum()) for name, num in per_sequence.items()}
    return GlobalCounts(
        sequences=max((len(num) for num in per_sequence.values()), default=0),
        covered={name: int((num >= 1).sum()) for name, num in per_sequence.items()},
        comparable=comparable,
        micro_comparable=comparable,
    )


def _num_spans(spans: Spans) -> Tensor:
    """Spans of each sequence [B] but for empty ones, which cover nothing."""
    some = (spans.ranges[:, 1] > spans.ranges[:, 0]).cumsum(0)
    return torch.cat([some.new_zeros(1), some])[spans.cu_spans].diff()


class MTALoss(nn.Module):
    """λ_DSA L_DSA + λ_Hid L_Hid over several key layers, for a training loop of your own.

    Owns the projections (``projections.0.weight`` ..., d_S → d_T, no bias): give their parameters to your optimizer at
    ``config.projection_lr``.

    Args:
        student_size, teacher_size: d_S and d_T.
        granularities: the name of the spans that each key layer aligns, lowest layer first, e.g.
            ("word", "phrase", "phrase").
    """

    def __init__(
        self, student_size: int, teacher_size: int, granularities: Sequence[str], config: MTAConfig | None = None
    ) -> None:
        super().__init__()
        if not granularities:
            raise ValueError("granularities: want one for each key layer, got none")
        self.config = config or MTAConfig()
        self.granularities = tuple(granularities)
        self.projections = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in granularities)

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        cu_seqlens: Tensor,
        spans: Mapping[str, Spans],
        counts: GlobalCounts | None = None,
        teacher_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and of each layer i the unweighted "dsa/i" and "hid/i" and :func:`non_finite`'s alarms (detached).

        Args:
            student, teacher: one [n, d_S] and one [n, d_T] for each key layer, lowest first; n valid tokens, one
                sequence after another.
            cu_seqlens: int64 [B + 1].
            spans: the batch's spans by granularity.
            counts: of the whole optimizer step, when this batch is a part of it; the results are then this part's
                shares and add up over ranks and micro-steps. ``micro_comparable`` is this batch's own: the DSA of
                ``weighted_mean`` becomes the mean of the parts' ratios. Without counts, the batch is the step.
            teacher_weights: [n], of :func:`mta_ds.ops.entropy_weights`, for a config with ``teacher_weights: entropy``.

        Raises:
            ValueError: layers or spans that are missing, shapes that do not fit, or, on a CPU, a NaN or Inf; on a GPU
                nobody waits to see it, and the alarms tell.
        """
        if not len(student) == len(teacher) == len(self.projections):
            raise ValueError(f"student, teacher: want one for each of the {len(self.projections)} key layers")
        if missing := set(self.granularities) - set(spans):
            raise ValueError(f"spans: want those of {', '.join(sorted(missing))} too")
        if (self.config.teacher_weights == "entropy") != (teacher_weights is not None):
            raise ValueError("teacher_weights: want entropy_weights(...) with 'teacher_weights: entropy', else none")
        layouts = {
            name: SpanLayout(cu_seqlens, spans[name].ranges, spans[name].cu_spans) for name in set(self.granularities)
        }
        counts = counts or count_sequences({name: spans[name] for name in self.granularities})
        by_dsa, by_hid = layer_weights(self.config, len(self.projections))
        parts: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for i, (name, layer) in enumerate(zip(self.granularities, self.projections, strict=True)):
            projection = layer.get_parameter("weight")
            gradients = align_layer(
                student[i],
                teacher[i],
                projection,
                layouts[name],
                self.config.reduction,
                self.config.student_weights,
                teacher_weights,
            )
            terms = attach(student[i], projection, gradients)
            alarms = non_finite(terms, i, i)
            if terms.finite.device.type == "cpu" and not bool(terms.finite.all()):
                models = " and ".join(alarm.split("/")[1] for alarm, value in alarms.items() if value > 0)
                raise ValueError(f"{models}: NaN or Inf in the hidden state of key layer {i} ({name})")
            dsa_share = terms.dsa * dsa_scale(self.config, counts, name, terms.dsa_normaliser)
            hid_share = terms.hid * hid_scale(self.config, counts, name)
            parts.append(by_dsa * dsa_share + by_hid * hid_share)
            values |= {f"dsa/{i}": dsa_share.detach(), f"hid/{i}": hid_share.detach()}
            values |= alarms
        return torch.stack(parts).sum(), values


def non_finite(terms: LayerTerms, student_layer: int, teacher_layer: int) -> dict[str, Tensor]:
    """A key layer's alarms: "non_finite/student/l", "non_finite/teacher/l", above 0 if its state has a NaN or Inf."""
    student, teacher = (1 - terms.finite).unbind()
    return {f"non_finite/student/{student_layer}": student, f"non_finite/teacher/{teacher_layer}": teacher}
