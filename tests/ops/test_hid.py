"""Hid on every backend and by both algebras against the reference, values and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import Largest, assert_matches, random

from mta_ds.ops import hid, reference
from mta_ds.ops.hid import gram_pays

op = importlib.import_module("mta_ds.ops.hid")


def check(student, projection, teacher, weights, tolerance=None):
    assert_matches(
        lambda student, projection: [hid(student, projection, teacher, weights)],
        lambda student, projection: [reference.hid(student, projection, teacher.double(), weights.double())],
        {"student": student, "projection": projection},
        trained=["student", "projection"],
        tolerance=tolerance,
    )


def inputs(num_tokens, d_student, d_teacher, dtype=torch.float32):
    return (
        random(num_tokens, d_student, dtype=dtype),
        random(d_teacher, d_student, seed=1, dtype=dtype),
        random(num_tokens, d_teacher, seed=2, dtype=dtype),
        random(num_tokens, seed=3).abs() / max(1, num_tokens),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 63, 64, 65, 257])
def test_equals_the_reference(backend, monkeypatch, dtype, num_tokens):
    monkeypatch.setattr(op, "_CPU_TOKENS", 64)
    check(*inputs(num_tokens, 20, 50, dtype))


@pytest.mark.parametrize("num_tokens", [2, 130])
def test_projecting_the_teacher_down_gives_the_same(monkeypatch, num_tokens):
    monkeypatch.setattr(op, "_CPU_TOKENS", 64)
    monkeypatch.setattr(op, "gram_pays", lambda *sizes: True)
    check(*inputs(num_tokens, 6, 40))


@pytest.mark.parametrize("spread", [2, 3, 5])
@pytest.mark.parametrize("kind", ["any", "weak", "mixed"])
def test_projecting_down_keeps_the_digits_of_projecting_up(monkeypatch, spread, kind):
    """W with singular values from 1 to 10^-``spread``, and states along all of them, the weakest, or each in half."""
    left, _, right = torch.linalg.svd(random(256, 32, seed=1, dtype=torch.float64), full_matrices=False)
    strengths = torch.logspace(0, -spread, 32, dtype=torch.float64)
    student = random(100, 32, dtype=torch.float64)
    weak = student * strengths.flip(0) @ right
    student = {"any": student, "weak": weak, "mixed": torch.where(torch.arange(100)[:, None] < 50, student, weak)}[kind]
    teacher, weights = random(100, 256, seed=2), torch.full((100,), 0.01)
    tensors = student.float(), (left * strengths @ right).float(), teacher, weights

    def gradients(way, dtype):
        monkeypatch.setattr(op, "gram_pays", lambda *sizes: way == "down")
        leaves = [x.to(dtype).requires_grad_() for x in tensors[:2]]
        return torch.autograd.grad(hid(*leaves, *(x.to(dtype) for x in tensors[2:])), leaves)

    def errors(way):
        pairs = zip(gradients(way, torch.float32), gradients("up", torch.float64), strict=True)
        return [float((got - want).norm() / want.norm()) for got, want in pairs]

    for down, up in zip(errors("down"), errors("up"), strict=True):
        assert down <= max(4 * up, 2e-6)


def test_it_is_projected_down_where_that_costs_less():
    assert gram_pays(16_384, d_teacher=8192, d_student=2048)
    assert not gram_pays(16_384, d_teacher=8192, d_student=4096)
    assert not gram_pays(4096, d_teacher=1600, d_student=768)
    assert not gram_pays(0, d_teacher=8, d_student=1)

    def products(m, d_t, d_s):
        return 3 * m * d_s * d_t, 2 * m * d_s * d_t + 2 * m * d_s**2 + 2 * d_t * d_s**2

    for sizes in ((100, 64, 8), (100, 16, 8), (7, 640, 8), (1000, 2000, 900)):
        direct, gram = products(*sizes)
        assert gram_pays(*sizes) == (gram < direct)


def test_mixed_dtypes_are_computed_in_the_wider(backend):
    student, projection, teacher, weights = inputs(65, 8, 20, torch.bfloat16)
    check(student.float(), projection.float(), teacher, weights)
    value = hid(student, projection.float(), teacher, weights)
    exact = reference.hid(student.double(), projection.double(), teacher.double(), weights.double())
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_scale_is_not_rounded():
    """1/3 in bf16 is 0.2 % too large, and so would all of the gradient be."""
    tensors = inputs(257, 20, 50, torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in tensors[:2]]
    exact = [x.double().requires_grad_() for x in tensors[:2]]
    got = torch.autograd.grad(hid(*leaves, *tensors[2:]) / 3, leaves)
    want = torch.autograd.grad(hid(*exact, *(x.double() for x in tensors[2:])) / 3, exact)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.bfloat16
        bias = float((ours.double() * theirs).sum() / theirs.square().sum()) - 1
        assert abs(bias) < 5e-4


def test_no_memory_is_read_before_it_is_written(backend, poisoned):
    check(*inputs(65, 20, 50))


def test_vectors_of_zeros_have_a_cosine_of_zero(backend):
    student, projection, teacher, weights = inputs(5, 4, 6)
    student[1], teacher[2] = 0, 0
    check(student, projection, teacher, weights)
    check(torch.zeros_like(student), projection, teacher, weights)


def test_the_projected_tensor_is_never_whole():
    student, projection, teacher, weights = inputs(4096, 8, 400)
    with Largest() as seen:
        hid(student.requires_grad_(), projection.requires_grad_(), teacher, weights).backward()
    assert seen.elements <= op._CPU_TOKENS * 400


def test_wrong_arguments_are_named():
    student, projection, teacher, weights = inputs(4, 3, 3)
    with pytest.raises(ValueError, match=r"projection: want \[3, 3\], got \[5, 3\]"):
        hid(student, torch.zeros(5, 3), teacher, weights)
    with pytest.raises(ValueError, match="token_weights: want floating"):
        hid(student, projection, teacher, weights.long())
    for change, message in (
        ({"projection": projection.double()}, "projection: float64 goes with float64 only"),
        ({"teacher": teacher.double()}, "teacher: float64 goes with float64 only"),
        ({"token_weights": weights.double()}, "token_weights: float64 goes with float64 only"),
        ({"student": student.half()}, "student: gradients underflow in float16"),
        ({"student": student[:, :0], "projection": projection[:, :0]}, "student: want at least one feature"),
    ):
        arguments = {"student": student, "projection": projection, "teacher": teacher, "token_weights": weights}
        with pytest.raises(ValueError, match=message):
            hid(**(arguments | change))
    with pytest.raises(ValueError, match="teacher: must not require grad"):
        hid(student, projection, teacher.requires_grad_(), weights)
