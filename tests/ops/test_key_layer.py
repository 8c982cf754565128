"""A whole key layer, as a hook calls it, against the reference ops put together by autograd."""

from __future__ import annotations

import importlib

import pytest
import torch
from op_cases import Largest, assert_matches, bounds, random, random_spans

from mta_ds.ops import SpanLayout, align_layer, attach, reference

key_layer = importlib.import_module("mta_ds.ops.key_layer")
LENGTHS, COUNTS = (33, 1, 70, 2, 40, 5), (20, 1, 70, 0, 0, 3)
CU_SEQLENS = bounds(LENGTHS)
SPANS, CU_SPANS = random_spans(LENGTHS, COUNTS)


def by_reference(student, teacher, projection, reduction, student_weights, weights=None):
    """The layer's two sums, op by op."""
    weights = reference.token_weights(teacher, CU_SEQLENS) if weights is None else weights.double()
    own = weights if student_weights == "teacher" else reference.token_weights(student, CU_SEQLENS)
    x, z = reference.dsa(
        reference.span_pool(student, own, SPANS),
        reference.span_pool(teacher, weights, SPANS),
        reference.span_weights(weights, SPANS, CU_SPANS),
        CU_SPANS,
    )
    if reduction == "sequence_mean":
        x = x[z > 0] / z[z > 0]
    tokens = reference.covered_tokens(SPANS, len(student))
    covered = weights[tokens]
    if reduction != "paper":
        covered = reference.normalise_within(covered, torch.searchsorted(tokens, CU_SEQLENS))
    return [x.sum(), reference.hid(student[tokens], projection, teacher[tokens], covered)]


def check(dtype, reduction="sequence_mean", student_weights="own", tolerance=None, weights=None):
    teacher = random(sum(LENGTHS), 24, seed=1, dtype=dtype)
    layout = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS)

    def fused(student, projection):
        gradients = align_layer(student, teacher, projection, layout, reduction, student_weights, weights)
        terms = attach(student, projection, gradients)
        return [terms.dsa, terms.hid]

    def expected(student, projection):
        return by_reference(student, teacher.double(), projection, reduction, student_weights, weights)

    inputs = {
        "student": random(sum(LENGTHS), 10, dtype=dtype),
        "projection": random(24, 10, seed=2, dtype=dtype),
    }
    assert_matches(fused, expected, inputs, ["student", "projection"], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(backend, dtype):
    check(dtype)


@pytest.mark.parametrize("reduction", ["sequence_mean", "weighted_mean", "paper"])
@pytest.mark.parametrize("student_weights", ["own", "teacher"])
@pytest.mark.parametrize("group", [1, 75, 1000])
def test_groups_reductions_and_weights(monkeypatch, reduction, student_weights, group):
    monkeypatch.setattr(key_layer, "_CPU_TOKENS", group)
    check(torch.float64, reduction, student_weights)


@pytest.mark.parametrize("reduction", ["sequence_mean", "weighted_mean", "paper"])
@pytest.mark.parametrize("student_weights", ["own", "teacher"])
def test_the_teachers_weights_may_come_from_elsewhere(backend, monkeypatch, reduction, student_weights):
    monkeypatch.setattr(key_layer, "_CPU_TOKENS", 75)
    weights = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(5))
    check(torch.float32, reduction, student_weights, weights=weights)


def test_of_the_teacher_covered_tokens_alone_are_read_beside_given_weights():
    layout, weights = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS), torch.rand(sum(LENGTHS))
    student, teacher, projection = random(sum(LENGTHS), 6), random(sum(LENGTHS), 8, seed=1), random(8, 6, seed=2)
    blank = torch.zeros_like(teacher)
    blank[layout.members.covered] = teacher[layout.members.covered]
    assert not torch.equal(blank, teacher)
    both = [align_layer(student, each, projection, layout, teacher_weights=weights) for each in (teacher, blank)]
    for whole, covered in zip((*both[0].terms, *both[0][2:]), (*both[1].terms, *both[1][2:]), strict=True):
        assert torch.equal(whole, covered)


def test_what_is_kept_is_the_students_alone():
    """Nothing of the teacher, nothing of the projected tokens, and nothing whole on the way."""
    n, d_student, d_teacher = 8 * 1024, 4, 200
    spans = torch.arange(n).reshape(-1, 2)
    layout = SpanLayout(bounds([128] * 64), spans, bounds([64] * 64))
    student, teacher, projection = random(n, d_student), random(n, d_teacher), random(d_teacher, d_student)
    with Largest() as seen:
        kept = align_layer(student, teacher, projection, layout)
    assert seen.elements <= max(key_layer._CPU_TOKENS * d_teacher, 1 << 18)  # a group, or a block of pairs
    assert sum(t.numel() for t in (*kept.terms, *kept[2:])) <= 2 * n * d_student + 2 * n + d_teacher * d_student + 10


@pytest.mark.parametrize(
    ("student_weights", "row"),
    # a token in a span, and the sequence of one token, which is in none: shared weights do not read the student there
    [("own", int(SPANS[0, 0])), ("teacher", int(SPANS[0, 0])), ("own", 33)],
)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_whose_state_is_not_finite_is_told(backend, student_weights, row, bad):
    layout = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS)
    for broken in ((), ("student",), ("teacher",)):
        states = {"student": random(sum(LENGTHS), 6), "teacher": random(sum(LENGTHS), 6, seed=1)}
        for name in broken:
            states[name][row, 2] = bad
        terms = align_layer(**states, projection=torch.eye(6), layout=layout, student_weights=student_weights).terms
        assert terms.finite.tolist() == [float("student" not in broken), float("teacher" not in broken)]


@pytest.mark.parametrize("student_weights", ["own", "teacher"])
def test_whose_state_is_not_finite_is_told_beside_given_weights(student_weights):
    layout, row = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS), int(SPANS[0, 0])
    student, teacher, weights = random(sum(LENGTHS), 6), random(sum(LENGTHS), 6, seed=1), torch.ones(sum(LENGTHS))
    teacher[row, 2] = torch.inf
    terms = align_layer(student, teacher, torch.eye(6), layout, "paper", student_weights, weights).terms
    assert terms.finite.tolist() == [1.0, 0.0]
    student[row, 2], teacher[row, 2] = torch.inf, 0.0
    terms = align_layer(student, teacher, torch.eye(6), layout, "paper", student_weights, weights).terms
    assert terms.finite.tolist() == [0.0, 1.0]


def test_wrong_arguments_are_named():
    layout = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS)
    student, teacher, projection = random(sum(LENGTHS), 4), random(sum(LENGTHS), 6), random(6, 4)
    for change, message in (
        ({"student": student[1:]}, "student: want 151 rows, got 150"),
        ({"teacher": teacher[1:]}, "teacher: want 151 rows, got 150"),
        ({"teacher": teacher.clone().requires_grad_()}, "teacher: must not require grad"),
        ({"projection": projection.T}, r"projection: want \[6, 4\], got \[4, 6\]"),
        ({"projection": projection.to("meta")}, "projection: want it on cpu as student is, got meta"),
        ({"teacher_weights": torch.ones(3)}, r"teacher_weights: want floating \[151\]"),
    ):
        with pytest.raises(ValueError, match=message):
            align_layer(**({"student": student, "teacher": teacher, "projection": projection} | change), layout=layout)
