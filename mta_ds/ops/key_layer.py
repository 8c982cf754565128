"""One key layer, as a hook of the teacher calls it: every structural op over the layer's states, with gradients.

How often a hidden state [n, d] is read, and why not less often:
1. its rows' standard deviations, which every score needs (a CPU reads it for means: norms are the scores' diagonal);
2. the scores' row sums, and
3. (a GPU; a CPU has the block of scores at hand) their column sums, which need all row sums of the sequence;
4. pooling, which needs all weights of the sequence, so all its columns;
5. the projected distances of the covered tokens: a product with W, which a library's kernel does best by itself.
Work goes by groups of whole sequences, so 2 to 5 find a group in cache, and nothing but the gradients outlives it.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mta_ds.ops.arguments import check_rows, check_together, check_vector
from mta_ds.ops.backend import backend_of
from mta_ds.ops.dsa import align
from mta_ds.ops.hid import Projector
from mta_ds.ops.layout import Group, SpanLayout, beside
from mta_ds.ops.products import accumulating
from mta_ds.ops.span_pool import Pooled, normalise_within, pool, pool_gradient
from mta_ds.ops.token_weights import token_weights

Reduction = Literal["sequence_mean", "weighted_mean", "paper"]

# Tokens that are worked on at once.
_CPU_TOKENS = 2048
_GPU_TOKENS = 16_384
_TINY = 1e-30  # below any Z of two spans that weigh something


class LayerTerms(NamedTuple):
    """A key layer's sums over this rank's micro-batch, before any normaliser."""

    dsa: Tensor
    """Σ_b X_b, or Σ_b X_b / Z_b with ``sequence_mean``."""
    dsa_normaliser: Tensor
    """Σ_b Z_b, no gradient."""
    hid: Tensor
    """Σ_b Y_b with ``paper``, else Σ_b Y'_b (weights renormalised in each sequence)."""
    finite: Tensor
    """Two numbers, no gradient: 1 where all the student's, all the teacher's states are finite, else 0."""


class LayerGradients(NamedTuple):
    """Terms with their gradients; DSA's and Hid's apart, since their factors differ and one may be known only later."""

    terms: LayerTerms
    layout: SpanLayout
    pool_weights: Tensor
    """Token weights [n] that pooled the student's spans."""
    pool_mass: Tensor
    """Their sums over each span [K]."""
    dsa_spans: Tensor
    """∂dsa / ∂ the student's span states [K, d_S]: fewer than tokens; pooling is undone in backward."""
    hid_tokens: Tensor
    """∂hid / ∂ the student's covered tokens [m, d_S]."""
    hid_projection: Tensor
    """∂hid / ∂W [d_T, d_S]"""


@torch.no_grad()
def align_layer(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    layout: SpanLayout,
    reduction: Reduction = "sequence_mean",
    student_weights: Literal["own", "teacher"] = "own",
    teacher_weights: Tensor | None = None,
) -> LayerGradients:
    """DSA and Hid of one key layer (MTA eqs. 5-13) and the gradients of both sums; nothing of the teacher is kept.

    Args:
        student: [n, d_S], the layer's hidden states of the batch's n valid tokens.
        teacher: [n, d_T], no gradient.
        projection: W [d_T, d_S].
        layout: the spans of the layer's granularity.
        reduction: whether X_b is divided by Z_b and Hid's weights are renormalised, see :class:`LayerTerms`.
        student_weights: whose token weights pool the student's spans.
        teacher_weights: [n], the teacher's token weights instead of those that its states here would give, as
            :func:`entropy_weights` makes them; only states of covered tokens are read from the teacher then.

    Raises:
        ValueError: shapes or devices that do not fit, or a teacher that requires grad.
    """
    _check(student, teacher, projection, layout, teacher_weights)
    members = layout.members
    projector = Projector(projection, student.dtype, len(members.covered))
    zero = accumulating(projection.new_zeros(()))
    found = LayerGradients(
        terms=LayerTerms(zero, zero, zero, zero.new_ones(2)),
        layout=layout,
        pool_weights=zero.new_empty(layout.num_tokens),
        pool_mass=zero.new_empty(len(members.spans)),
        dsa_spans=student.new_empty(len(members.spans), student.shape[1]),
        hid_tokens=student.new_empty(len(members.covered), student.shape[1]),
        hid_projection=projection,
    )
    parts = [
        _align_group(
            student[group.tokens],
            teacher[group.tokens],
            projector,
            group,
            found,
            reduction,
            student_weights,
            None if teacher_weights is None else accumulating(teacher_weights[group.tokens]),
        )
        for group in layout.groups(tokens_at_once(student.is_cuda))
    ]
    found = found._replace(hid_projection=projector.gradient().to(projection.dtype))
    if not parts:
        return found
    dsa, normaliser, hid, finite = (torch.stack(column) for column in zip(*parts, strict=True))
    return found._replace(terms=LayerTerms(dsa.sum(), normaliser.sum(), hid.sum(), finite.amin(dim=0)))


def _align_group(
    student: Tensor,
    teacher: Tensor,
    projector: Projector,
    group: Group,
    found: LayerGradients,
    reduction: Reduction,
    student_weights: Literal["own", "teacher"],
    weights: Tensor | None,
) -> LayerTerms:
    """The terms of some whole sequences; their gradients go to their places in ``found``."""
    layout, members, narrow = group.layout, group.layout.members, student
    if backend_of(student) == "torch":  # once for all ops; kernels do it in registers
        student, teacher = accumulating(student), accumulating(teacher)
    given = weights is not None
    weights = token_weights(teacher, layout.cu_seqlens) if weights is None else weights
    own = weights if student_weights == "teacher" else token_weights(student, layout.cu_seqlens)
    found.pool_weights[group.tokens] = own
    x, normaliser = _align_spans(pool(student, own, members), pool(teacher, weights, members), group, found, reduction)
    covered = members.on("covered", student.device)
    covered_weights = weights[covered]
    if reduction != "paper":
        covered_weights = normalise_within(covered_weights, layout.cu_covered, layout.covered_owner)
    tokens = None if len(covered) == len(student) else covered
    hid = projector.project(narrow, teacher, covered_weights, tokens, found.hid_tokens[group.covered])
    seen = teacher if given else weights
    return LayerTerms(x, normaliser, hid, _finite(own, seen, own is weights, x + hid))


def _align_spans(
    ours: Pooled, theirs: Pooled, group: Group, found: LayerGradients, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """DSA and its normaliser of some whole sequences; of the span states nothing is left when Hid needs its memory."""
    layout, towards = group.layout, found.dsa_spans[group.spans]
    omega = normalise_within(theirs.mass, layout.cu_spans, layout.span_owner)
    x, normalisers, gradient = align(ours.states, theirs.states, omega, layout.cu_spans)
    if reduction == "sequence_mean":
        inverse = torch.where(normalisers > 0, 1 / normalisers.clamp_min(_TINY), 0.0)
        x = x * inverse
        torch.mul(gradient, inverse[beside(layout.span_owner, x.device), None], out=towards)
    else:
        towards.copy_(gradient)
    found.pool_mass[group.spans] = ours.mass
    return x.sum(), normalisers.sum()


def _finite(own: Tensor, theirs: Tensor, shared: bool, loss: Tensor) -> Tensor:
    """Whether the student's and the teacher's states are: seen in what comes of them, their weights for one.

    Args:
        own: the token weights that pooled the student's spans.
        theirs: the teacher's token weights, or its states where its weights come from elsewhere.
        shared: whether ``own`` does not depend on the student; then the loss does.
    """
    teacher = theirs.sum().isfinite()
    student = loss.isfinite() | ~teacher if shared else own.sum().isfinite()
    return torch.stack([student, teacher]).to(own.dtype)


def attach(student: Tensor, projection: Tensor, gradients: LayerGradients) -> LayerTerms:
    """The layer's terms in the student's graph: backward returns the stored gradients times what arrives.

    Where there was no span they are exact zeros, but every parameter still takes part, as collectives need.

    Args:
        student, projection: what :func:`align_layer` was given, [n, d_S] and [d_T, d_S].
    """
    return LayerTerms(*_Attach.apply(student, projection, gradients))  # type: ignore[no-untyped-call]


class _Attach(torch.autograd.Function):
    """Values whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, projection: Tensor, gradients: LayerGradients) -> tuple[Tensor, ...]:
        ctx.layout = gradients.layout
        ctx.save_for_backward(*gradients[2:])  # which backward lets go as soon as it has run
        dsa, normaliser, hid, finite = (term.clone() for term in gradients.terms)
        ctx.mark_non_differentiable(normaliser, finite)
        return dsa, normaliser, hid, finite

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        layout: SpanLayout = ctx.layout
        weights, mass, dsa_spans, hid_tokens, hid_projection = ctx.saved_tensors
        dtype = hid_tokens.dtype
        by_dsa, by_hid = upstream[0], upstream[2].to(dtype)
        student = hid_tokens.new_empty(layout.num_tokens, hid_tokens.shape[1])
        for group in layout.groups(tokens_at_once(student.is_cuda)):
            rows, spans, members = student[group.tokens], group.spans, group.layout.members
            rows.copy_(pool_gradient(dsa_spans[spans], weights[group.tokens], mass[spans], members, by_dsa))
            covered = hid_tokens[group.covered]
            if len(covered) == len(rows):
                rows.addcmul_(covered, by_hid)
            else:  # each token once: there is no order to keep
                rows.index_add_(0, members.on("covered", rows.device), covered * by_hid)
        return student, hid_projection * by_hid.to(hid_projection.dtype), None


def tokens_at_once(is_cuda: bool) -> int:
    """Tokens, in whole sequences, that are worked on at once."""
    return _GPU_TOKENS if is_cuda else _CPU_TOKENS


def _check(student: Tensor, teacher: Tensor, projection: Tensor, layout: SpanLayout, weights: Tensor | None) -> None:
    check_rows("student", student, layout.num_tokens)
    check_rows("teacher", teacher, layout.num_tokens)
    if teacher.requires_grad:
        raise ValueError("teacher: must not require grad; detach it")
    check_rows("projection", projection)
    if projection.shape != (teacher.shape[1], student.shape[1]):
        raise ValueError(f"projection: want [{teacher.shape[1]}, {student.shape[1]}], got {list(projection.shape)}")
    check_together(student=student, teacher=teacher, projection=projection)
    if weights is not None:
        check_vector("teacher_weights", weights, layout.num_tokens)
