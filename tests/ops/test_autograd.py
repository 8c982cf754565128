"""What surrounds an op: autocast, a second derivative, a graph that is kept, and gradient checkpointing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_cases import bounds, random, random_spans
from torch.utils.checkpoint import checkpoint

from mta_ds.losses import MTALoss
from mta_ds.ops import (
    Divergence,
    HeadGradient,
    SpanLayout,
    align_layer,
    align_trajectory,
    attach,
    attach_trajectory,
    dsa,
    entropy_weights,
    hid,
    label_log_probs,
    linear_divergence,
    normalise_within,
    span_pool,
    span_weights,
    token_entropy,
    token_weights,
)

LENGTHS, COUNTS, VOCAB = (33, 1, 70), (20, 1, 30), 30
CU_SEQLENS, N, K = bounds(LENGTHS), sum(LENGTHS), sum(COUNTS)
SPANS, CU_SPANS = random_spans(LENGTHS, COUNTS)
LAYOUT = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS)
TEACHER, TEACHER_HEAD, BEFORE = random(N, 20, seed=1), random(VOCAB, 20, seed=2), random(N, 20, seed=3)
WEIGHTS, OMEGA = random(N, seed=4).abs(), random(K, seed=5).abs()
TARGETS = torch.arange(N) % VOCAB
TARGETS[::3] = -100


def make_leaves():
    """Student states, projection and head."""
    shapes = ((N, 12), (20, 12), (VOCAB, 12))
    return [torch.nn.Parameter(random(*shape, seed=6 + i)) for i, shape in enumerate(shapes)]


def pooled(student, projection, head):
    return [span_pool(student, WEIGHTS, SPANS)]


def compared(student, projection, head):
    return list(dsa(student[:K], TEACHER[:K], OMEGA, CU_SPANS))


def projected(student, projection, head):
    return [hid(student, projection, TEACHER, WEIGHTS)]


def projected_down(student, projection, head):
    """By the other algebra: the teacher is more than twice as wide."""
    teacher = torch.cat([TEACHER, BEFORE], dim=1)
    return [hid(student, torch.cat([projection, projection]), teacher, WEIGHTS)]


def key_layer(student, projection, head):
    return list(attach(student, projection, align_layer(student.detach(), TEACHER, projection.detach(), LAYOUT)))


def key_layers(student, projection, head):
    module = MTALoss(12, 20, ["word"])
    arguments = [student], [TEACHER], CU_SEQLENS, {"word": SimpleNamespace(ranges=SPANS, cu_spans=CU_SPANS)}
    return [torch.func.functional_call(module, {"projections.0.weight": projection}, arguments)[0]]


def divergence(student, projection, head):
    return list(linear_divergence(student, head, TEACHER, TEACHER_HEAD, TARGETS, Divergence("srkl"))[:3])


def trajectory(student, projection, head):
    arguments = student.detach(), TEACHER, (student.detach() + 1, BEFORE), head.detach(), TEACHER_HEAD
    found = align_trajectory(*arguments, temperature=2.0, kl_factor=0.7, derivative_factor=1.3)
    return [attach_trajectory(student, student + 1, found)]


def collected(student, projection, head):
    gradient = HeadGradient(head)
    options = {"temperature": 2.0, "kl_factor": 0.7, "derivative_factor": 1.3, "head_gradient": gradient}
    align_trajectory(student.detach(), TEACHER, None, head, TEACHER_HEAD, **options)
    return [gradient.attach()]


def weights(student, projection, head):
    """What has no gradient."""
    return [
        token_weights(student, CU_SEQLENS),
        span_weights(WEIGHTS, SPANS, CU_SPANS),
        normalise_within(WEIGHTS, CU_SEQLENS),
        token_entropy(TEACHER, TEACHER_HEAD),
        label_log_probs(student, head, TARGETS),
        entropy_weights(WEIGHTS, VOCAB, CU_SEQLENS),
    ]


ONCE = [divergence, collected]  # hand out what they stored
OPS = [pooled, compared, projected, projected_down, key_layer, key_layers, trajectory, *ONCE]
by_name = {"ids": lambda op: op.__name__}


def are_equal(ours, theirs):
    """Gradients, of which an op has none to what it does not read."""
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(ours, theirs, strict=True)
    )


def total(op, leaves):
    """The differentiable values, each with a factor of its own."""
    values = [value for value in op(*leaves) if value.requires_grad]
    return sum((value * (1.3 + i)).sum() for i, value in enumerate(values))


@pytest.mark.parametrize("op", [*OPS, weights], **by_name)
def test_autocast_changes_no_bit(backend, op):
    """Nor is a backward that runs under it the worse for it."""

    def run():
        leaves = make_leaves()
        values = op(*leaves)
        loss = total(lambda *_: values, leaves)
        grads = [] if op is weights else torch.autograd.grad(loss, leaves, allow_unused=True)
        return [*values, *(grad for grad in grads if grad is not None)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert (random(3, 3) @ random(3, 3)).dtype == torch.bfloat16
        cast = run()
    assert len(plain) == len(cast)
    for ours, theirs in zip(cast, plain, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS, **by_name)
def test_a_second_derivative_is_refused(op):
    """Also beside a loss that has one, and where what arrives from above is a constant."""
    leaves = make_leaves()
    loss = total(op, leaves) + sum(leaf.pow(3).sum() for leaf in leaves)
    grads = torch.autograd.grad(loss, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(grad.sum() for grad in grads).backward()


@pytest.mark.parametrize("op", [op for op in OPS if op not in ONCE], **by_name)
def test_a_graph_that_is_kept_runs_again(op):
    leaves = make_leaves()
    loss = total(op, leaves)
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    assert are_equal(first, second)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("op", [op for op in OPS if op is not key_layers], **by_name)  # it wants a Parameter
def test_gradient_checkpointing_gives_the_same(op, use_reentrant):
    leaves, again = make_leaves(), make_leaves()
    total(op, leaves).backward()

    def loss(*inputs):
        found = total(op, inputs)
        # its first pass is under no_grad, where nothing is differentiable
        return found if isinstance(found, torch.Tensor) else torch.zeros(())

    checkpoint(loss, *again, use_reentrant=use_reentrant).backward()
    assert are_equal([leaf.grad for leaf in again], [leaf.grad for leaf in leaves])
