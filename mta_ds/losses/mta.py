"""Multi-Granular Trajectory Alignment: the two structural losses of a key layer, their reductions and their factors.

Two ways in. :class:`MTALoss` takes hidden states and returns a loss, for people with their own loop. The engine
streams: :func:`layer_gradients` runs inside the teacher's forward at a key layer and returns values and gradients, so
the teacher's hidden state can go; :func:`attach` later puts those gradients, scaled by global normalisers, into the
student's graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from mta_ds.config import Section
from mta_ds.ops import covered_tokens, dsa, hid, sequence_of, span_pool, span_weights, token_weights

Reduction = Literal["sequence_mean", "weighted_mean", "paper"]


class MTAConfig(Section):
    """Weights, reduction and key layers of the structural losses (METHOD §4-7)."""

    lambda_dsa: float = Field(default=2.0, ge=0)
    lambda_hid: float = Field(default=0.2, ge=0)
    reduction: Reduction = "sequence_mean"
    """``sequence_mean`` is exact for every split of a batch; ``weighted_mean`` (the released code) over ranks but not
    over accumulation steps; ``paper`` sums over spans and sums Hid over layers."""
    student_weights: Literal["own", "teacher"] = "own"
    """Token weights that pool the student's spans: its own, detached (released code), or the teacher's."""
    num_word_layers: int = Field(default=1, ge=0)
    """Key layers, from the lowest, that align words; the others align phrases."""
    projection_lr: float = Field(default=5e-4, gt=0)
    student_layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None
    num_layers: int | None = Field(default=None, ge=1)
    """Key layers, strided from the top of each model; 3 unless given."""
    stride: int | None = Field(default=None, ge=1)
    """Student layers between key layers; a quarter of its depth unless given."""


class Spans(Protocol):
    """Spans of one granularity in a ragged batch."""

    @property
    def ranges(self) -> Tensor:
        """Token ranges int64 [K, 2]."""

    @property
    def cu_spans(self) -> Tensor:
        """Bounds of each sequence's spans, int64 [B + 1]."""


class LayerTerms(NamedTuple):
    """A key layer's sums over this rank's micro-batch, before any normaliser."""

    dsa: Tensor
    """Σ_b X_b, or Σ_b X_b / Z_b with ``sequence_mean``."""
    dsa_normaliser: Tensor
    """Σ_b Z_b."""
    hid: Tensor
    """Σ_b Y_b with ``paper``, else Σ_b Y'_b (weights renormalised in each sequence)."""


class LayerGradients(NamedTuple):
    """Terms with their gradients; DSA's and Hid's apart, since their factors differ and one is known only later."""

    terms: LayerTerms
    dsa_student: Tensor
    """[n, d_S]"""
    hid_student: Tensor
    """[n, d_S]"""
    hid_projection: Tensor
    """[d_T, d_S]"""


def layer_terms(
    student: Tensor, teacher: Tensor, projection: Tensor, cu_seqlens: Tensor, spans: Spans, config: MTAConfig
) -> LayerTerms:
    """DSA and Hid of one key layer (MTA eqs. 5-13), differentiable in ``student`` and ``projection``.

    Args:
        student: [n, d_S]; teacher: [n, d_T], no gradient; projection: [d_T, d_S]; cu_seqlens: [B + 1].
        spans: the layer's granularity.

    Raises:
        ValueError: shapes that do not fit, or a teacher that requires grad.
    """
    _check(student, teacher, projection)
    ranges, cu_spans = spans.ranges, spans.cu_spans
    weights = token_weights(teacher, cu_seqlens)
    own = weights if config.student_weights == "teacher" else token_weights(student.detach(), cu_seqlens)
    omega = span_weights(weights, ranges, cu_spans)
    x, z = dsa(span_pool(student, own, ranges), span_pool(teacher, weights, ranges), omega, cu_spans)
    if config.reduction == "sequence_mean":
        x = torch.where(z > 0, x / torch.where(z > 0, z, 1.0), 0.0 * x)
    covered = covered_tokens(ranges, len(student))
    covered_weights = weights[covered]
    if config.reduction != "paper":
        sequence = sequence_of(cu_seqlens, len(student))[covered]
        total = weights.new_zeros(len(cu_seqlens) - 1).index_add(0, sequence, covered_weights)[sequence]
        covered_weights = torch.where(total > 0, covered_weights / torch.where(total > 0, total, 1.0), 0.0)
    return LayerTerms(x.sum(), z.sum(), hid(student[covered], projection, teacher[covered], covered_weights))


@torch.no_grad()
def layer_gradients(
    student: Tensor, teacher: Tensor, projection: Tensor, cu_seqlens: Tensor, spans: Spans, config: MTAConfig
) -> LayerGradients:
    """:func:`layer_terms` with the gradients of its two sums, in the dtype of their inputs; keeps no graph.

    Made to be called from a hook of a teacher that runs without gradients.
    """
    with torch.enable_grad():
        leaf = student.detach().requires_grad_()
        weight = projection.detach().requires_grad_()
        terms = layer_terms(leaf, teacher.detach(), weight, cu_seqlens, spans, config)
        (dsa_student,) = torch.autograd.grad(terms.dsa, leaf, retain_graph=True)
        hid_student, hid_projection = torch.autograd.grad(terms.hid, (leaf, weight))
    return LayerGradients(LayerTerms(*(t.detach() for t in terms)), dsa_student, hid_student, hid_projection)


def attach(
    student: Tensor,
    projection: Tensor,
    gradients: LayerGradients,
    dsa_factor: Tensor | float,
    hid_factor: Tensor | float,
) -> Tensor:
    """The layer's weighted value as a scalar in the student's graph: dsa_factor · DSA + hid_factor · Hid.

    Backward returns the stored gradients times the factors; where there was no span they are exact zeros, but every
    parameter still takes part, as collectives need.
    """
    terms = gradients.terms
    value = dsa_factor * terms.dsa + hid_factor * terms.hid
    grad_student = gradients.dsa_student * dsa_factor + gradients.hid_student * hid_factor
    result: Tensor = _Attach.apply(
        student, projection, value, grad_student.to(student.dtype), gradients.hid_projection * hid_factor
    )
    return result


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, projection: Tensor, value: Tensor, grad_student: Tensor, grad_projection: Tensor
    ) -> Tensor:
        ctx.save_for_backward(grad_student, grad_projection.to(projection.dtype))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_student, grad_projection = ctx.saved_tensors
        return (
            grad_student * upstream.to(grad_student.dtype),
            grad_projection * upstream.to(grad_projection.dtype),
            None,
            None,
            None,
        )


class GlobalCounts(NamedTuple):
    """What the normalisers of a step need (METHOD §6), summed over all ranks and, where said, micro-steps."""

    sequences: int
    """Sequences of the optimizer step."""
    covered: Mapping[str, int]
    """Sequences of the step with at least one span, by granularity."""
    comparable: Mapping[str, int]
    """Sequences of the step with at least two spans, by granularity."""
    micro_comparable: Mapping[str, int]
    """The same of this micro-step alone."""


def layer_weights(config: MTAConfig, num_layers: int) -> tuple[float, float]:
    """What one layer's DSA and Hid count in the loss: λ / layers; with ``paper`` Hid is summed over layers instead."""
    return config.lambda_dsa / num_layers, config.lambda_hid / (1 if config.reduction == "paper" else num_layers)


def dsa_scale(
    config: MTAConfig, counts: GlobalCounts, granularity: str, normaliser: Tensor | None = None
) -> Tensor | float:
    """Factor that turns a rank's DSA sum of a micro-step into its share of the layer's L_DSA.

    Args:
        normaliser: Σ_b Z_b of the micro-step over all ranks, for ``weighted_mean``. Its ratios are averaged over
            micro-steps weighted by their sequences with two spans or more, so accumulation changes the loss slightly.
    """
    if config.reduction == "paper":
        return 1 / max(1, counts.sequences)
    if config.reduction == "sequence_mean":
        return 1 / max(1, counts.comparable[granularity])
    assert normaliser is not None, "weighted_mean divides by the micro-step's Σ Z"
    weight = counts.micro_comparable[granularity] / max(1, counts.comparable[granularity])
    return torch.where(normaliser > 0, weight / torch.where(normaliser > 0, normaliser, 1.0), 0.0)


def hid_scale(config: MTAConfig, counts: GlobalCounts, granularity: str) -> float:
    """Factor that turns a rank's Hid sum into its share of the layer's L_Hid."""
    return 1 / max(1, counts.sequences if config.reduction == "paper" else counts.covered[granularity])


class MTALoss(nn.Module):
    """λ_DSA L_DSA + λ_Hid L_Hid over several key layers, for a training loop of your own on one process.

    Owns the projections (``projections.0`` ..., d_S → d_T, no bias): give their parameters to your optimizer at
    ``config.projection_lr``.
    """

    def __init__(self, student_size: int, teacher_size: int, num_layers: int, config: MTAConfig | None = None) -> None:
        super().__init__()
        self.config = config or MTAConfig()
        self.projections = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in range(num_layers))

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        cu_seqlens: Tensor,
        spans: Sequence[Spans],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each layer's unweighted "dsa/i" and "hid/i" (detached).

        Args:
            student, teacher: one [n, d_S] and one [n, d_T] for each key layer, lowest first.
            cu_seqlens: int64 [B + 1].
            spans: each layer's spans: words for the lower layers, phrases for the higher ones.
        """
        if not len(student) == len(teacher) == len(spans) == len(self.projections):
            raise ValueError(f"student, teacher, spans: want one for each of the {len(self.projections)} key layers")
        by_dsa, by_hid = layer_weights(self.config, len(self.projections))
        total = torch.zeros((), device=student[0].device)
        values: dict[str, Tensor] = {}
        for i, (ours, theirs, units, projection) in enumerate(
            zip(student, teacher, spans, self.projections, strict=True)
        ):
            terms = layer_terms(ours, theirs.detach(), projection.weight, cu_seqlens, units, self.config)
            per_sequence = units.cu_spans.diff()
            comparable = {"": int((per_sequence >= 2).sum())}
            counts = GlobalCounts(len(per_sequence), {"": int((per_sequence >= 1).sum())}, comparable, comparable)
            values[f"dsa/{i}"] = terms.dsa * dsa_scale(self.config, counts, "", terms.dsa_normaliser)
            values[f"hid/{i}"] = terms.hid * hid_scale(self.config, counts, "")
            total = total + by_dsa * values[f"dsa/{i}"] + by_hid * values[f"hid/{i}"]
        return total, {name: value.detach() for name, value in values.items()}


def _check(student: Tensor, teacher: Tensor, projection: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: want [n, d_S] and [n, d_T]"
        )
    if projection.shape != (teacher.shape[1], student.shape[1]):
        raise ValueError(f"projection: want [{teacher.shape[1]}, {student.shape[1]}], got {tuple(projection.shape)}")
    if teacher.requires_grad:
        raise ValueError("teacher: must not require grad")
