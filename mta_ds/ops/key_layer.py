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

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mta_ds.ops.arguments import (
    check_dtypes,
    check_projection,
    check_rows,
    check_teacher,
    check_together,
    check_trained,
    check_vector,
)
from mta_ds.ops.autograd import differentiable_once, graph_is_kept, without_autocast
from mta_ds.ops.backend import backend_of
from mta_ds.ops.dsa import align
from mta_ds.ops.hid import Projector
from mta_ds.ops.layout import Group, SpanLayout
from mta_ds.ops.products import accumulating, total_dtype
from mta_ds.ops.segments import pair_weights, softmax_within
from mta_ds.ops.span_pool import pool, pool_gradient, scatter, span_shares
from mta_ds.ops.token_weights import log_token_weights

Reduction = Literal["sequence_mean", "weighted_mean", "paper"]
StudentWeights = Literal["own", "teacher"]

# Tokens that are worked on at once; on a CPU half as many in half precision, of which fp32 copies are made.
_CPU_TOKENS = 4096
_GPU_TOKENS = 16_384


class LayerTerms(NamedTuple):
    """A key layer's sums over this rank's micro-batch, before any normaliser."""

    dsa: Tensor
    """Σ_b X_b, or Σ_b X_b / Z_b with ``sequence_mean``."""
    dsa_normaliser: Tensor
    """Σ_b Z_b, no gradient."""
    hid: Tensor
    """Σ_b Y_b with ``paper``, else Σ_b Y'_b (weights renormalised in each sequence)."""
    finite: Tensor
    """Two numbers, no gradient: 1 where all the student's, all the teacher's states are finite, else 0; the student's
    is also 0 where the terms are not finite and the teacher's states are, for its projection may not be."""


class LayerGradients(NamedTuple):
    """Terms with their gradients; DSA's and Hid's apart, since their factors differ and one may be known only later."""

    terms: LayerTerms
    layout: SpanLayout
    pool_shares: Tensor
    """Each token's share of each of its spans, by which the student's were pooled [pairs]."""
    dsa_spans: Tensor
    """∂dsa / ∂ the student's span states [K, d_S], in its dtype: fewer than tokens; pooling is undone in backward."""
    hid_tokens: Tensor
    """∂hid / ∂ the student's covered tokens, the first m rows of [n, d_S] (on a GPU [m, d_S]), in its dtype; backward
    spreads them over the rest, which a CPU has no memory for until then."""
    hid_projection: Tensor
    """∂hid / ∂W [d_T, d_S] in the accumulating dtype."""


class _Options(NamedTuple):
    """See :func:`align_layer`."""

    reduction: Reduction
    student_weights: StudentWeights


def align_layer(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    layout: SpanLayout,
    reduction: Reduction = "sequence_mean",
    student_weights: StudentWeights = "own",
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
        ValueError: shapes, dtypes, devices or options that do not fit, or a teacher that requires grad.
    """
    _check(student, teacher, projection, layout, teacher_weights)
    options = _Options(reduction, student_weights)
    for name, kinds in (("reduction", Reduction), ("student_weights", StudentWeights)):
        if getattr(options, name) not in get_args(kinds):
            raise ValueError(f"{name}: want one of {', '.join(get_args(kinds))}, got {getattr(options, name)!r}")
    return _align(student, teacher, projection, layout, options, teacher_weights)


@torch.no_grad()
@without_autocast
def _align(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    layout: SpanLayout,
    options: _Options,
    teacher_weights: Tensor | None,
) -> LayerGradients:
    """Group by group, whose gradients go to their places."""
    members = layout.members
    projector = Projector(projection, student, len(members.covered))
    zero = student.new_zeros((), dtype=total_dtype(student.dtype))
    given = None if teacher_weights is None else teacher_weights.double().log()
    found = LayerGradients(
        terms=LayerTerms(zero, zero, zero, zero.new_ones(2)),
        layout=layout,
        pool_shares=zero.new_empty(len(members.span_tokens)),
        dsa_spans=student.new_empty(len(members.spans), student.shape[1]),
        hid_tokens=student.new_empty(len(members.covered) if student.is_cuda else len(student), student.shape[1]),
        hid_projection=projection,
    )
    parts = [
        _align_group(
            student[group.tokens],
            teacher[group.tokens],
            projector,
            group,
            found,
            options,
            None if given is None else given[group.tokens],
        )
        for group in layout.groups(tokens_at_once(student.is_cuda, student.element_size()))
    ]
    found = found._replace(hid_projection=projector.gradient())
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
    options: _Options,
    given: Tensor | None,
) -> LayerTerms:
    """The terms of some whole sequences; their gradients go to their places in ``found``."""
    layout, members = group.layout, group.layout.members
    wide = student, teacher
    if backend_of(student) == "torch":  # once for weights and spans; kernels do it in registers
        wide = accumulating(student), accumulating(teacher)
    theirs = log_token_weights(wide[1], layout.tokens) if given is None else given
    ours = theirs if options.student_weights == "teacher" else log_token_weights(wide[0], layout.tokens)
    x, normaliser = _align_spans(wide[0], ours, wide[1], theirs, group, found, options)
    del wide  # its memory is Hid's now
    covered = members.on("covered", student.device)
    weights = theirs[covered]
    if options.reduction == "paper":
        weights = weights.exp().to(x.dtype)
    else:
        weights, _ = softmax_within(weights, layout.covered, x.dtype)
    tokens = None if len(covered) == len(student) else covered
    hid = projector.project(student, teacher, weights, tokens, found.hid_tokens[group.covered])
    # a state shows in the token weights that come of it
    seen = (student if ours is theirs else ours, theirs if given is None else teacher)
    return LayerTerms(x, normaliser, hid, _finite(*seen, x + hid))


def _align_spans(
    student: Tensor,
    ours: Tensor,
    teacher: Tensor,
    theirs: Tensor,
    group: Group,
    found: LayerGradients,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """DSA and its normaliser of some whole sequences; of the span states nothing is left when Hid needs its memory.

    Args:
        ours, theirs: logarithms of the token weights [n].
    """
    layout, members = group.layout, group.layout.members
    teacher_shares, log_mass = span_shares(theirs, members, teacher)
    shares = teacher_shares if ours is theirs else span_shares(ours, members, student)[0]
    found.pool_shares[group.pairs] = shares
    omega, lift = pair_weights(log_mass, layout.spans, shares.dtype)
    aligned = align(pool(student, shares, members), pool(teacher, teacher_shares, members), omega, layout.spans)
    # what the lifted products are too large by cancels in a sequence's own ratio
    lowered = lift.neg().exp_().to(shares.dtype)
    some = aligned.normalisers > 0
    own_ratio = torch.where(some, 1 / torch.where(some, aligned.normalisers, 1.0), 0.0)
    factor = own_ratio if options.reduction == "sequence_mean" else lowered
    owners = layout.spans.on("owners", student.device)
    torch.mul(aligned.gradient, factor[owners, None], out=found.dsa_spans[group.spans])
    return (aligned.values * factor).sum(), (aligned.normalisers * lowered).sum()


def _finite(student: Tensor, teacher: Tensor, loss: Tensor) -> Tensor:
    """Whether the student's and the teacher's states are, by what shows it: anything not finite makes its sum so."""
    # float16's own sum of finite states may be infinite
    student_sum, teacher_sum = (seen.sum(dtype=total_dtype(seen.dtype)) for seen in (student, teacher))
    teacher_is = teacher_sum.isfinite()
    student_is = student_sum.isfinite() & (loss.isfinite() | ~teacher_is)
    return torch.stack([student_is, teacher_is]).to(loss.dtype)


def attach(student: Tensor, projection: Tensor, gradients: LayerGradients) -> LayerTerms:
    """The layer's terms in the student's graph: backward returns the stored gradients times what arrives.

    It writes over them where the graph is not kept for another backward, so they can be attached once.

    Where there was no span they are exact zeros, but every parameter still takes part, as collectives need.

    Args:
        student, projection: what :func:`align_layer` was given, [n, d_S] and [d_T, d_S].
    """
    return LayerTerms(*_Attach.apply(student, projection, gradients))  # type: ignore[no-untyped-call]


class _Attach(torch.autograd.Function):
    """Values whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, projection: Tensor, gradients: LayerGradients) -> tuple[Tensor, ...]:
        ctx.layout, ctx.projection_dtype = gradients.layout, projection.dtype
        ctx.save_for_backward(*gradients[2:])  # which backward lets go as soon as it has run
        dsa, normaliser, hid, finite = (term.clone() for term in gradients.terms)
        ctx.mark_non_differentiable(normaliser, finite)
        return dsa, normaliser, hid, finite

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        layout: SpanLayout = ctx.layout
        shares, dsa_spans, hid_tokens, hid_projection = ctx.saved_tensors
        by_dsa, _, by_hid, _ = upstream
        student = hid_tokens
        if len(student) < layout.num_tokens or graph_is_kept():
            student = hid_tokens.new_empty(layout.num_tokens, hid_tokens.shape[1])
        # from the last on: where a group's tokens lie, the covered ones of no group before it do
        for group in reversed(layout.groups(tokens_at_once(student.is_cuda, student.element_size()))):
            members = group.layout.members
            rows = pool_gradient(dsa_spans[group.spans], shares[group.pairs], members, by_dsa)
            # scaled and added up in the accumulating dtype, and rounded once
            rows.addcmul_(accumulating(hid_tokens[group.covered]), by_hid)
            scatter(student[group.tokens], rows, members)
        projection = hid_projection * by_hid if graph_is_kept() else hid_projection.mul_(by_hid)
        return student, projection.to(ctx.projection_dtype), None


def tokens_at_once(is_cuda: bool, element_bytes: int) -> int:
    """Tokens, in whole sequences, that are worked on at once."""
    return _GPU_TOKENS if is_cuda else _CPU_TOKENS if element_bytes >= 4 else _CPU_TOKENS // 2


def _check(student: Tensor, teacher: Tensor, projection: Tensor, layout: SpanLayout, weights: Tensor | None) -> None:
    check_rows("student", student, layout.num_tokens)
    check_rows("teacher", teacher, layout.num_tokens)
    check_teacher("teacher", teacher)
    check_projection(projection, student, teacher)
    check_trained(student=student, projection=projection)
    tensors = {"student": student, "teacher": teacher, "projection": projection}
    if weights is not None:
        check_vector("teacher_weights", weights, layout.num_tokens)
        tensors["teacher_weights"] = weights
    check_together(**tensors)
    check_dtypes(**tensors)
