"""α of each position, a factor, a head gradient that ops share, and log-probabilities of labels."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from divergence_cases import (
    D_STUDENT,
    VOCAB,
    N,
    assert_same_gradients,
    in_float64,
    padded,
    sized,
    small_chunks,
    trained,
    whole,
)
from op_cases import random

from mta_ds.ops import Divergence, HeadGradient, label_log_probs, linear_divergence, token_entropy

DETACHED = Divergence("srkl", detach_mixture=True, kd_ratio=0.6)


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def inputs(request):
    return padded(request.param)


@pytest.fixture
def small(monkeypatch, backend):
    return small_chunks(monkeypatch, backend)


@pytest.mark.parametrize("divergence", [Divergence("skl"), Divergence("srkl"), DETACHED], ids=str)
def test_each_position_may_have_its_own_alpha(small, inputs, divergence):
    divergence = dataclasses.replace(divergence, vocab_size=VOCAB)
    alphas = torch.linspace(0.01, 0.9, N)
    exact = in_float64(inputs)
    result = linear_divergence(**inputs, divergence=divergence, alphas=alphas, **small)
    expected = [
        whole(at_one, dataclasses.replace(divergence, alpha=float(alphas[i])))[0]
        for i in range(N)
        if inputs["targets"][i] != -100
        for at_one in [exact | {"targets": inputs["targets"].masked_fill(torch.arange(N) != i, -100)}]
    ]
    tolerance = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(result.loss.double(), sum(expected), **tolerance)
    assert_same_gradients(result.loss, sum(expected), trained(inputs), trained(exact), **tolerance)
    same = linear_divergence(**inputs, divergence=divergence, alphas=torch.full((N,), divergence.alpha), **small)
    plain = linear_divergence(**inputs, divergence=divergence, **small)
    torch.testing.assert_close(same.divergence, plain.divergence, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        torch.stack(whole(exact, divergence, alphas=torch.full((N,), divergence.alpha))),
        torch.stack(whole(exact, divergence)),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_a_factor_scales_loss_and_gradients_but_no_sum(small, inputs, weighted):
    divergence = Divergence("srkl", kd_ratio=0.6, vocab_size=VOCAB)
    arguments = (inputs if weighted else inputs | {"weights": None}) | {"divergence": divergence} | small
    result, plain = linear_divergence(**arguments, factor=0.3), linear_divergence(**arguments)
    assert torch.equal(result.divergence, plain.divergence) and torch.equal(result.cross_entropy, plain.cross_entropy)
    exact = in_float64(inputs)
    expected = 0.3 * whole(exact, divergence, weighted)[0]
    torch.testing.assert_close(result.loss.double(), expected, rtol=2e-5, atol=2e-5)
    assert_same_gradients(result.loss, expected, trained(inputs), trained(exact), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_ops_share_one_gradient_of_the_head(small, dtype):
    """And each hands its states their own, under a scale that arrives from above."""
    inputs = sized(N, VOCAB, dtype)
    exact = in_float64(inputs)
    collected, other = HeadGradient(inputs["student_head"]), random(N, D_STUDENT, seed=9, dtype=dtype)
    other.requires_grad_()
    factors = {"fkl": 0.3, "srkl": 1.4}
    losses = [
        linear_divergence(
            **inputs | {"student": states}, divergence=Divergence(name), factor=factor, head_gradient=collected, **small
        ).loss
        for states, (name, factor) in zip((inputs["student"], other), factors.items(), strict=True)
    ]
    exact_other = other.detach().double().requires_grad_()
    expected = sum(
        factor * whole(exact | {"student": states}, Divergence(name))[0]
        for states, (name, factor) in zip((exact["student"], exact_other), factors.items(), strict=True)
    )
    leaves, exact_leaves = trained(inputs) | {"other": other}, trained(exact) | {"other": exact_other}
    tolerance = {"rtol": 2e-5, "atol": 5e-5} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-4}
    assert_same_gradients(sum(losses) + collected.attach(), expected, leaves, exact_leaves, **tolerance)


def test_a_collected_gradient_is_not_handed_out_by_the_op(backend, inputs):
    options = {"divergence": Divergence("fkl", vocab_size=VOCAB), "head_gradient": HeadGradient(inputs["student_head"])}
    loss = linear_divergence(**inputs, **options).loss
    assert torch.autograd.grad(loss, inputs["student_head"], allow_unused=True, retain_graph=True) == (None,)
    with torch.no_grad():
        linear_divergence(**inputs, **options)  # an evaluation adds nothing
    (got,) = torch.autograd.grad(options["head_gradient"].attach(), inputs["student_head"])
    (want,) = torch.autograd.grad(whole(inputs, options["divergence"])[0], inputs["student_head"])
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


def test_log_probabilities_of_the_labels(small, inputs):
    got = label_log_probs(inputs["student"], inputs["student_head"], inputs["targets"], VOCAB, **small)
    log_q = (inputs["student"] @ inputs["student_head"][:VOCAB].T).double().log_softmax(-1)
    keep = inputs["targets"] != -100
    assert got.shape == (N - 3,) and got.dtype == inputs["student"].dtype and not got.requires_grad
    want = log_q[keep].gather(1, inputs["targets"][keep][:, None])[:, 0]
    torch.testing.assert_close(got.double(), want.detach(), rtol=1e-5, atol=1e-5)
    nothing = torch.full_like(inputs["targets"], -100)
    assert label_log_probs(inputs["teacher"], inputs["teacher_head"], nothing).shape == (0,)
    with pytest.raises(ValueError, match="targets: want -100 or 0 <= target < 5 rows"):
        label_log_probs(inputs["student"], inputs["student_head"], inputs["targets"], 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entropy_of_every_token(small, dtype):
    inputs = sized(N, VOCAB, dtype)
    hidden, head = inputs["teacher"] * 3, inputs["teacher_head"]
    got = token_entropy(hidden, head, VOCAB, **small)
    log_p = (hidden.double() @ head[:VOCAB].double().T).log_softmax(-1)
    want = torch.stack([-sum(row.exp() * row) for row in log_p])
    assert got.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert token_entropy(hidden[:0], head).shape == (0,)
    with pytest.raises(ValueError, match="head: 5 rows, fewer"):
        token_entropy(hidden, head[:5], VOCAB)
