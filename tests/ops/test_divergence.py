"""Divergences: golden values, and the closed-form gradients against autograd of the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mta_ds.ops import Divergence, divergence_values
from mta_ds.ops.divergence import divergence_gradients, divergence_rows
from mta_ds.ops.kernels import divergence as kernels

TEACHER = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
STUDENT = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
ALL = [
    Divergence("fkl"),
    Divergence("rkl"),
    Divergence("tvd"),
    Divergence("jsd", beta=0.0),
    Divergence("jsd", beta=0.1),
    Divergence("jsd"),
    Divergence("jsd", beta=1.0),
    Divergence("skl"),
    Divergence("skl", alpha=0.7),
    Divergence("srkl"),
    Divergence("srkl", alpha=0.7),
    Divergence("srkl", detach_mixture=True),
]


def values(student, teacher, divergence):
    return divergence_values(student.log_softmax(-1), teacher.log_softmax(-1), divergence)


@pytest.mark.parametrize(
    ("divergence", "golden"),
    [
        (Divergence("fkl"), 0.170640),
        (Divergence("rkl"), 0.182282),
        (Divergence("skl", alpha=0.1), 0.138244),
        (Divergence("srkl", alpha=0.1), 0.143464),
        (Divergence("srkl", alpha=0.1, detach_mixture=True), 0.143464),
        (Divergence("tvd"), 0.281589),
        (Divergence("jsd", beta=0.5), 0.043200),
        (Divergence("jsd", beta=0.1), 0.015354),
        (Divergence("jsd", beta=0.9), 0.016162),
        (Divergence("jsd", beta=0.0), 0.170640),
        (Divergence("jsd", beta=1.0), 0.182282),
    ],
)
def test_golden_values(divergence, golden):
    assert float(values(STUDENT, TEACHER, divergence)) == pytest.approx(golden, abs=1e-6)
    closed, _ = divergence_gradients(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1), divergence)
    assert float(closed) == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    ("detach", "golden"), [(False, [-0.222102, 0.089965, 0.132137]), (True, [-0.249614, 0.096261, 0.153353])]
)
def test_golden_gradients_of_srkl(detach, golden):
    divergence = Divergence("srkl", alpha=0.1, detach_mixture=detach)
    _, gradient = divergence_gradients(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1), divergence)
    assert gradient[0].tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_closed_form_equals_autograd_of_the_definition(divergence):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    expected = values(student, teacher, divergence)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), student)
    log_q = student.detach().log_softmax(-1)
    kept = log_q.clone()
    got, gradient = divergence_gradients(log_q, teacher.log_softmax(-1), divergence)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(log_q, kept)


@pytest.mark.parametrize("divergence", [d for d in ALL if d.name in ("skl", "srkl")], ids=str)
def test_rows_may_have_their_own_alpha(divergence):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 33, generator=generator, dtype=torch.float64) for _ in range(2))
    alphas = torch.tensor([0.01, 0.1, 0.5, 0.9], dtype=torch.float64)
    log_q, log_p = student.log_softmax(-1).requires_grad_(), teacher.log_softmax(-1)
    single = [dataclasses.replace(divergence, alpha=float(alpha)) for alpha in alphas]
    expected = torch.cat([divergence_values(log_q[i : i + 1], log_p[i : i + 1], each) for i, each in enumerate(single)])
    (slopes,) = torch.autograd.grad(expected.sum(), log_q)
    got = divergence_values(log_q, log_p, divergence, alphas)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), log_q)[0], slopes)
    closed, gradient = divergence_gradients(log_q.detach(), log_p, divergence, alphas)
    torch.testing.assert_close(closed, expected.detach())
    torch.testing.assert_close(gradient, slopes - log_q.detach().exp() * slopes.sum(-1, keepdim=True))


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_distributions_that_do_not_overlap_stay_finite_in_fp32(divergence):
    student, teacher = torch.full((2, 5), -150.0), torch.full((2, 5), -150.0)
    student[0, 0] = teacher[0, 4] = teacher[1, 1] = student[1, 1] = 150.0
    exact = values(student.double(), teacher.double(), divergence)
    got, gradient = divergence_gradients(student.log_softmax(-1), teacher.log_softmax(-1), divergence)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()
    torch.testing.assert_close(values(student, teacher, divergence), got)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["fkl", "tvd", "srkl"])
def test_a_long_row_loses_no_digits_to_its_length(name, backend):
    rows = kernels.divergence_rows if backend == "triton" else divergence_rows
    generator = torch.Generator().manual_seed(2)
    student, teacher = (4 * torch.randn(1, 256_000, generator=generator) + shift for shift in (30, -500))
    found = []
    for dtype, fill in ((torch.float32, rows), (torch.float64, divergence_rows)):
        sums, logits = torch.empty(3, 1, dtype=dtype), student.to(dtype, copy=True)
        arguments = (logits, teacher.to(dtype, copy=True), torch.tensor([255_999]), None, Divergence(name))
        fill(*arguments, sums, logits)
        found.append((sums.double(), logits.double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=3e-6, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_equal_distributions_have_no_divergence_and_no_gradient(divergence):
    log_p = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    got, gradient = divergence_gradients(log_p, log_p.clone(), divergence)
    torch.testing.assert_close(got, torch.zeros_like(got))
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "kl"}, "name: 'kl' is none of sft, fkl"),
        ({"name": "skl", "alpha": 0.0}, "alpha: want 0 < alpha < 1"),
        ({"name": "jsd", "beta": 1.5}, "beta: want 0 <= beta <= 1"),
        ({"kd_ratio": -0.1}, "kd_ratio: want 0 <= kd_ratio <= 1"),
        ({"vocab_size": 0}, "vocab_size: want a positive number"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Divergence(**options)


def test_sft_compares_with_no_distribution():
    assert not Divergence("sft").needs_teacher and not Divergence("fkl", kd_ratio=0.0).needs_teacher
    with pytest.raises(ValueError, match="sft has no teacher distribution"):
        values(STUDENT, TEACHER, Divergence("sft"))
