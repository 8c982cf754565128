"""DSA on every backend against the reference, values and gradients."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import Largest, assert_matches, bounds, random

from mta_ds.ops import dsa, reference

op = importlib.import_module("mta_ds.ops.dsa")
COUNTS = (65, 1, 0, 2, 130, 64, 63)
CU_SPANS = bounds(COUNTS)


def check(student, teacher, omega, cu_spans=CU_SPANS, tolerance=None):
    assert_matches(
        lambda student: dsa(student, teacher, omega, cu_spans),
        lambda student: reference.dsa(student, teacher.double(), omega.double(), cu_spans),
        {"student": student},
        trained=["student"],
        tolerance=tolerance,
    )


def random_omega(counts=COUNTS):
    return reference.normalise_within(random(sum(counts), seed=2).abs(), bounds(counts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(1, 3), (20, 50), (70, 40)], ids=str)
def test_equals_the_reference(backend, dtype, widths):
    student, teacher = (random(sum(COUNTS), d, seed=d, dtype=dtype) for d in widths)
    # the gradient of a single feature is what is left of a cancellation
    check(student, teacher, random_omega(), tolerance=(2e-5, 1e-5) if dtype == torch.float32 else None)


def test_many_spans_go_in_blocks(monkeypatch):
    monkeypatch.setattr(op, "_BLOCK_PAIRS", 700)
    check(random(sum(COUNTS), 9), random(sum(COUNTS), 12, seed=1), random_omega())


def test_more_spans_than_tiles_have(backend):
    check(random(257, 5), random(257, 7, seed=1), random_omega((257,)), bounds([257]))


def test_two_thousand_spans_and_no_matrix_of_them():
    student, teacher = random(2000, 8).requires_grad_(), random(2000, 9, seed=1)
    with Largest() as seen:
        dsa(student, teacher, random_omega((2000,)), bounds([2000]))[0].sum().backward()
    assert seen.elements <= op._BLOCK_PAIRS < 2000**2 / 4
    check(student.detach(), teacher, random_omega((2000,)), bounds([2000]))


def test_wide_states(backend):
    check(random(5, 8192), random(5, 8192, seed=1), random_omega((3, 2)), bounds([3, 2]))


def test_no_memory_is_read_before_it_is_written(backend, poisoned):
    check(random(sum(COUNTS), 20), random(sum(COUNTS), 12, seed=1), random_omega())


def test_it_keeps_its_digits_where_student_and_teacher_nearly_agree(backend):
    teacher = random(70, 48)
    check(teacher + 1e-3 * random(70, 48, seed=1), teacher, random_omega((70,)), bounds([70]), (2e-3, 1e-9))


def test_vectors_of_zeros_have_no_direction(backend):
    student, teacher = random(70, 6), random(70, 5, seed=1)
    student[[0, 69]], teacher[[0, 3]] = 0, 0
    check(student, teacher, random_omega((70,)), bounds([70]))
    check(student, teacher, torch.zeros(70), bounds([70]))


def test_no_spans(backend):
    for cu in (bounds([]), bounds([0, 0])):
        student = torch.zeros(0, 4, requires_grad=True)
        x, z = dsa(student, torch.zeros(0, 5), torch.zeros(0), cu)
        assert x.tolist() == z.tolist() == [0.0] * (len(cu) - 1)
        assert torch.autograd.grad(x.sum(), student)[0].shape == (0, 4)


def test_wrong_arguments_are_named():
    states, omega, cu = torch.zeros(4, 3), torch.zeros(4), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="teacher: want 4 rows, got 3"):
        dsa(states, states[:3], omega, cu)
    with pytest.raises(ValueError, match="teacher: must not require grad"):
        dsa(states, states.clone().requires_grad_(), omega, cu)
    with pytest.raises(ValueError, match="teacher: float64 goes with float64 only"):
        dsa(states, states.double(), omega, cu)
    with pytest.raises(ValueError, match="span_weights: float64 goes with float64 only"):
        dsa(states, states, omega.double(), cu)
    with pytest.raises(ValueError, match="student: gradients underflow in float16"):
        dsa(states.half(), states, omega, cu)
    with pytest.raises(ValueError, match="cu_spans: want bounds from 0 to 4"):
        dsa(states, states, omega, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"span_weights: want floating \[4\]"):
        dsa(states, states, omega.long(), cu)
