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
from mta_ds.ops import covered_tokens, dsa, hid, normalise_within, span_pool, span_weights, token_weights

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
    tokens: Tensor
    """The tokens that have a gradient, those inside a span; int64 [m], sorted."""
    dsa_student: Tensor
    """[m, d_S]"""
    hid_student: Tensor
    """[m, d_S]"""
    hid_projection: Tensor
    """[d_T, d_S]"""


def layer_terms(
    student: Tensor, teacher: Tensor, projection: Tensor, cu_seqlens: Tensor, spans: Spans, config: MTAConfig
) -> LayerTerms:
    """DSA and Hid of one key layer (MTA eqs. 5-13), differentiable in ``student`` and ``projection``.

    Args:
        student: [n, d_S], the layer's hidden states of the batch's n valid tokens.
        teacher: [n, d_T], no gradient.
        projection: [d_T, d_S].
        cu_seqlens: int64 [B + 1].
        spans: the layer's granularity.

    Raises:
        ValueError: shapes that do not fit, or a teacher that requires grad.
    """
    target = _target(student, teacher, projection, cu_seqlens, spans, config)
    return _terms(student.index_select(0, target.tokens), projection, target, config)


@torch.no_grad()
def layer_gradients(
    student: Tensor, teacher: Tensor, projection: Tensor, cu_seqlens: Tensor, spans: Spans, config: MTAConfig
) -> LayerGradients:
    """:func:`layer_terms` with the gradients of its two sums, in the dtype of their inputs; keeps no graph.

    Made to be called from a hook of a teacher that runs without gradients: nothing of the teacher is kept.
    """
    target = _target(student, teacher, projection, cu_seqlens, spans, config)
    leaf = student.index_select(0, target.tokens).requires_grad_()
    weight = projection.detach().requires_grad_()
    with torch.enable_grad():
        terms = _terms(leaf, weight, target, config)
    (dsa_student,) = torch.autograd.grad(terms.dsa, leaf)
    hid_student, hid_projection = torch.autograd.grad(terms.hid, (leaf, weight))
    values = LayerTerms(*(term.detach() for term in terms))
    return LayerGradients(values, target.tokens, dsa_student, hid_student, hid_projection)


class _Target(NamedTuple):
    """All of a key layer that has no gradient, on the m covered tokens alone: no other token enters a loss."""

    tokens: Tensor
    """Which tokens of the batch these are, int64 [m]."""
    teacher: Tensor
    """[m, d_T]"""
    ranges: Tensor
    """The spans as ranges of covered tokens, int64 [K, 2]."""
    cu_spans: Tensor
    teacher_spans: Tensor
    """[K, d_T]"""
    omega: Tensor
    """Span weights [K]."""
    pool_weights: Tensor
    """Token weights [m] that pool the student's spans."""
    hid_weights: Tensor
    """[m]; summing to 1 in each sequence unless the reduction is ``paper``."""


@torch.no_grad()
def _target(
    student: Tensor, teacher: Tensor, projection: Tensor, cu_seqlens: Tensor, spans: Spans, config: MTAConfig
) -> _Target:
    _check(student, teacher, projection)
    covered = covered_tokens(spans.ranges, len(student))
    # every token of a span is covered, so a span stays one range when the others are left out
    starts = torch.searchsorted(covered, spans.ranges[:, 0].contiguous())
    ranges = torch.stack([starts, starts + spans.ranges[:, 1] - spans.ranges[:, 0]], dim=1)
    tokens = covered.to(student.device, non_blocking=True)
    weights = token_weights(teacher, cu_seqlens)[tokens]
    own = weights if config.student_weights == "teacher" else token_weights(student, cu_seqlens)[tokens]
    hid_weights = weights
    if config.reduction != "paper":
        hid_weights = normalise_within(weights, torch.searchsorted(covered, cu_seqlens.to(covered.device)))
    covered_teacher = teacher.index_select(0, tokens)
    return _Target(
        tokens=tokens,
        teacher=covered_teacher,
        ranges=ranges,
        cu_spans=spans.cu_spans,
        teacher_spans=span_pool(covered_teacher, weights, ranges),
        omega=span_weights(weights, ranges, spans.cu_spans),
        pool_weights=own,
        hid_weights=hid_weights,
    )


def _terms(student: Tensor, projection: Tensor, target: _Target, config: MTAConfig) -> LayerTerms:
    """The layer's sums from the student's covered tokens [m, d_S]."""
    student_spans = span_pool(student, target.pool_weights, target.ranges)
    x, z = dsa(student_spans, target.teacher_spans, target.omega, target.cu_spans)
    if config.reduction == "sequence_mean":
        x = x * torch.where(z > 0, 1 / torch.where(z > 0, z, 1.0), 0.0)
    return LayerTerms(x.sum(), z.sum(), hid(student, projection, target.teacher, target.hid_weights))


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

    Args:
        student, projection: what :func:`layer_gradients` was given, [n, d_S] and [d_T, d_S].
        dsa_factor, hid_factor: numbers or scalar tensors, no gradient.
    """
    terms = gradients.terms
    value = dsa_factor * terms.dsa + hid_factor * terms.hid
    grad_student = gradients.dsa_student * dsa_factor + gradients.hid_student * hid_factor
    grad_projection = gradients.hid_projection * hid_factor
    result: Tensor = _Attach.apply(  # type: ignore[no-untyped-call]
        student, projection, value, gradients.tokens, grad_student, grad_projection
    )
    return result


class _Attach(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        projection: Tensor,
        value: Tensor,
        tokens: Tensor,
        grad_student: Tensor,
        grad_projection: Tensor,
    ) -> Tensor:
        ctx.num_tokens = len(student)
        ctx.save_for_backward(tokens, grad_student.to(student.dtype), grad_projection.to(projection.dtype))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        tokens, grad_student, grad_projection = ctx.saved_tensors
        grad = grad_student.new_zeros(ctx.num_tokens, grad_student.shape[1])
        grad[tokens] = grad_student * upstream.to(grad.dtype)
        return grad, grad_projection * upstream.to(grad_projection.dtype), None, None, None, None


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
    return torch.where(normaliser > 0, weight / torch.where(normaliser > 0, normaliser, 1.0), 0.0)


def hid_scale(config: MTAConfig, counts: GlobalCounts, granularity: str) -> float:
    """Factor that turns a rank's Hid sum into its share of the layer's L_Hid (METHOD §5, §6)."""
    return 1 / max(1, counts.sequences if config.reduction == "paper" else counts.covered[granularity])


def count_sequences(spans: Mapping[str, Spans]) -> GlobalCounts:
    """The counts of one batch that is a whole optimizer step, as on one process without accumulation.

    Spans on a GPU are waited for; keep them on the CPU, or give :class:`MTALoss` counts from the data.
    """
    per_sequence = {name: each.cu_spans.diff() for name, each in spans.items()}
    comparable = {name: int((num >= 2).sum()) for name, num in per_sequence.items()}
    return GlobalCounts(
        sequences=max((len(num) for num in per_sequence.values()), default=0),
        covered={name: int((num >= 1).sum()) for name, num in per_sequence.items()},
        comparable=comparable,
        micro_comparable=comparable,
    )


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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each layer's unweighted "dsa/i" and "hid/i" (detached).

        Args:
            student, teacher: one [n, d_S] and one [n, d_T] for each key layer, lowest first; n valid tokens, one
                sequence after another.
            cu_seqlens: int64 [B + 1].
            spans: the batch's spans by granularity.
            counts: of the whole optimizer step, when this batch is a part of it; the results are then this part's
                shares and add up over ranks and micro-steps. ``micro_comparable`` is this batch's own: the DSA of
                ``weighted_mean`` becomes the mean of the parts' ratios. Without counts, the batch is the step.

        Raises:
            ValueError: layers or spans that are missing, or shapes that do not fit.
        """
        if not len(student) == len(teacher) == len(self.projections):
            raise ValueError(f"student, teacher: want one for each of the {len(self.projections)} key layers")
        if missing := set(self.granularities) - set(spans):
            raise ValueError(f"spans: want those of {', '.join(sorted(missing))} too")
        counts = counts or count_sequences({name: spans[name] for name in self.granularities})
        by_dsa, by_hid = layer_weights(self.config, len(self.projections))
        parts: list[Tensor] = []
        values: dict[str, Tensor] = {}
        for i, (name, projection) in enumerate(zip(self.granularities, self.parameters(), strict=True)):
            terms = layer_terms(student[i], teacher[i], projection, cu_seqlens, spans[name], self.config)
            dsa_share = terms.dsa * dsa_scale(self.config, counts, name, terms.dsa_normaliser)
            hid_share = terms.hid * hid_scale(self.config, counts, name)
            parts.append(by_dsa * dsa_share + by_hid * hid_share)
            values |= {f"dsa/{i}": dsa_share.detach(), f"hid/{i}": hid_share.detach()}
        return torch.stack(parts).sum(), values


def _check(student: Tensor, teacher: Tensor, projection: Tensor) -> None:
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}: want [n, d_S] and [n, d_T]"
        )
    if projection.shape != (teacher.shape[1], student.shape[1]):
        raise ValueError(f"projection: want [{teacher.shape[1]}, {student.shape[1]}], got {tuple(projection.shape)}")
    if teacher.requires_grad:
        raise ValueError("teacher: must not require grad; detach it")
