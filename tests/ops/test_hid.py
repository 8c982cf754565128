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
    with pytest.raises(ValueError, match="teacher: must not require grad"):
        hid(student, projection, teacher.requires_grad_(), weights)
