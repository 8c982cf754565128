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


WHOLE = (CU_SEQLENS, SPANS, CU_SPANS)


def check(dtype, reduction="sequence_mean", student_weights="own", tolerance=None, weights=None, layout=WHOLE):
    num_tokens = int(layout[0][-1])
    teacher = random(num_tokens, 24, seed=1, dtype=dtype)
    inputs = {"student": random(num_tokens, 10, dtype=dtype), "projection": random(24, 10, seed=2, dtype=dtype)}
    compare(inputs, teacher, layout, reduction, student_weights, tolerance, weights)


def compare(inputs, teacher, layout, reduction="sequence_mean", student_weights="own", tolerance=None, weights=None):
    spans = SpanLayout(*layout)

    def fused(student, projection):
        gradients = align_layer(student, teacher, projection, spans, reduction, student_weights, weights)
        terms = attach(student, projection, gradients)
        return [terms.dsa, terms.hid, terms.dsa_normaliser]

    def expected(student, projection):
        given = None if weights is None else weights.double()
        arguments = student, teacher.double(), projection, *layout, reduction, student_weights, given
        dsa, normaliser, hid = reference.align_layer(*arguments)
        return [dsa, hid, normaliser]

    assert_matches(fused, expected, inputs, ["student", "projection"], tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_reference(backend, dtype):
    check(dtype)


@pytest.mark.parametrize("length", [63, 64, 65, 257])
def test_lengths_around_blocks(backend, length):
    spans, cu_spans = random_spans((length, 2), (length, 1), seed=length)
    check(torch.float32, layout=(bounds((length, 2)), spans, cu_spans))


ODD = {
    "with two others": [[6, 7], [0, 2], [2, 4]],
    "with one other": [[6, 7], [0, 4]],
    "alone": [[6, 7]],
    "twice": [[6, 7], [6, 7]],
    "among others": [[4, 7], [0, 2], [3, 5]],
}


@pytest.mark.parametrize("reduction", ["sequence_mean", "weighted_mean"])
@pytest.mark.parametrize("spans", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("gap", [30.0, 45.0, 90.0, 110.0, 300.0])
def test_a_span_that_hardly_weighs_anything_pools_and_compares_as_any(backend, crowd, gap, spans, reduction):
    """Its weight is subnormal, or zero, in fp32; what it pools to and its sequence's own ratio are not."""
    states = crowd(gap)
    layout = (bounds([7]), torch.tensor(spans), bounds([len(spans)]))
    teacher, projection = states + 0.1 * random(7, 64, seed=9), torch.eye(64)

    def run(op, dtype):
        student, weights = (x.to(dtype).requires_grad_() for x in (states, projection))
        dsa, normaliser, hid = op(student, teacher.to(dtype), weights)
        return dsa, normaliser, hid, torch.autograd.grad(1.7 * dsa, student, retain_graph=True)[0]

    def fused(student, teacher, weights):
        terms = attach(student, weights, align_layer(student, teacher, weights, SpanLayout(*layout), reduction))
        return terms.dsa, terms.dsa_normaliser, terms.hid

    def exact(*tensors):
        return reference.align_layer(*tensors, *layout, reduction)

    got, again, want = run(fused, torch.float32), run(exact, torch.float32), run(exact, torch.float64)
    for name, ours, single, theirs in zip(("dsa", "Z", "hid", "gradient"), got, again, want, strict=True):
        for each in (ours, single):
            scale = float(theirs.abs().max())
            # a score of 136 has an ulp of 1.5e-5; spans that are twice the same have nothing but rounding
            close = {"rtol": 1e-3, "atol": max(1e-3 * scale, 1e-10)}
            torch.testing.assert_close(each.double(), theirs, **close, msg=lambda text, name=name: f"{name}: {text}")


def test_weights_of_zero_give_exact_zeros(backend):
    """A uniform teacher: entropy weights are all zero."""
    spans, weights = (
        SpanLayout(bounds([4, 3]), torch.tensor([[0, 2], [1, 4], [4, 6], [5, 7]]), bounds([2, 2])),
        torch.ones(7),
    )
    weights[:4] = 0
    student, projection = random(7, 4).requires_grad_(), random(6, 4, seed=1).requires_grad_()
    found = align_layer(student, random(7, 6, seed=2), projection, spans, teacher_weights=weights)
    terms = attach(student, projection, found)
    gradient, _ = torch.autograd.grad(terms.dsa + terms.hid, (student, projection))
    assert terms.finite.tolist() == [1.0, 1.0] and gradient.isfinite().all()
    assert gradient[:4].eq(0).all() and gradient[4:].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_memory_is_read_before_it_is_written(backend, poisoned, dtype):
    check(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [2, 75, 2000])
def test_a_graph_that_is_kept_runs_again_and_one_that_is_not_gives_the_same_bits(monkeypatch, dtype, group):
    """Without it the stored gradients' own memory becomes the student's gradient, from the last group on."""
    monkeypatch.setattr(key_layer, "_CPU_TOKENS", group)
    spans = SpanLayout(*WHOLE)
    student, projection, teacher = (
        x.to(dtype) for x in (random(sum(LENGTHS), 10), random(24, 10, seed=2), random(sum(LENGTHS), 24, seed=1))
    )
    leaves = [student.requires_grad_(), projection.requires_grad_()]
    assert 0 < len(spans.members.covered) < len(student)

    def loss():
        terms = attach(*leaves, align_layer(leaves[0], teacher, leaves[1], spans))
        return 0.7 * terms.dsa + 0.3 * terms.hid

    kept = loss()
    first, again = (torch.autograd.grad(kept, leaves, retain_graph=True) for _ in range(2))
    last, alone = torch.autograd.grad(kept, leaves), torch.autograd.grad(loss(), leaves)
    for gradients in zip(first, again, last, alone, strict=True):
        assert all(torch.equal(each, gradients[0]) for each in gradients)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(kept, leaves)


def test_gradients_that_became_another_are_not_used_again():
    spans, leaves = SpanLayout(*WHOLE), [random(sum(LENGTHS), 10), random(24, 10, seed=2)]
    found = align_layer(leaves[0], random(sum(LENGTHS), 24, seed=1), leaves[1], spans)
    both = [attach(*(x.requires_grad_() for x in leaves), found).hid for _ in range(2)]
    both[0].backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        both[1].backward()


def test_a_scale_is_not_rounded_before_the_gradient_is():
    """A loss's scale of 1/3 in bf16 is 0.2 % too large, and so would every gradient be."""
    spans = SpanLayout(*WHOLE)
    student, projection, teacher = (
        x.bfloat16() for x in (random(sum(LENGTHS), 64), random(96, 64, seed=2) / 8, random(sum(LENGTHS), 96, seed=1))
    )

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (student, projection)]
        terms = attach(*leaves, align_layer(leaves[0], teacher.to(dtype), leaves[1], spans))
        return [torch.autograd.grad(term / 3, leaves, retain_graph=True) for term in (terms.dsa, terms.hid)]

    for got, want in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        for ours, theirs in zip(got, want, strict=True):
            if theirs.any():
                bias = float((ours.double() * theirs).sum() / theirs.square().sum()) - 1
                error = float((ours.double() - theirs).norm() / theirs.norm())
                assert abs(bias) < 7e-4 and error < 4e-3


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
    layout, weights = SpanLayout(*WHOLE), torch.rand(sum(LENGTHS))
    student, teacher, projection = random(sum(LENGTHS), 6), random(sum(LENGTHS), 8, seed=1), random(8, 6, seed=2)
    blank = torch.zeros_like(teacher)
    blank[layout.members.covered] = teacher[layout.members.covered]
    assert not torch.equal(blank, teacher)
    both = [align_layer(student, each, projection, layout, teacher_weights=weights) for each in (teacher, blank)]
    both = [each._replace(hid_tokens=each.hid_tokens[: len(layout.members.covered)]) for each in both]
    for whole, covered in zip((*both[0].terms, *both[0][2:]), (*both[1].terms, *both[1][2:]), strict=True):
        assert torch.equal(whole, covered)


def test_what_is_kept_is_the_students_alone():
    """Nothing of the teacher, nothing of the projected tokens, and nothing whole on the way."""
    n, d_student, d_teacher = 8 * key_layer._CPU_TOKENS, 4, 200
    spans = torch.arange(n).reshape(-1, 2)
    layout = SpanLayout(bounds([128] * (n // 128)), spans, bounds([64] * (n // 128)))
    student, teacher, projection = random(n, d_student), random(n, d_teacher), random(d_teacher, d_student)
    with Largest() as seen:
        kept = align_layer(student, teacher, projection, layout)
    assert seen.elements <= max(key_layer._CPU_TOKENS * d_teacher, 1 << 18)  # a group, or a block of pairs
    assert sum(t.numel() for t in (*kept.terms, *kept[2:])) <= 2 * n * d_student + n + d_teacher * d_student + 10


def finite_flags(layout, broken, row, bad, student_weights="own"):
    spans = SpanLayout(*layout)
    states = {"student": random(spans.num_tokens, 6), "teacher": random(spans.num_tokens, 6, seed=1)}
    for name in broken:
        states[name][row, 2] = bad
    terms = align_layer(**states, projection=torch.eye(6), layout=spans, student_weights=student_weights).terms
    return terms.finite.tolist()


@pytest.mark.parametrize("student_weights", ["own", "teacher"])
@pytest.mark.parametrize("row", [1, 6])  # a token in spans, and the sequence of one token, which is in none
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_whose_state_is_not_finite_is_told(backend, student_weights, row, bad):
    layout = bounds([6, 1, 3]), torch.tensor([[0, 2], [1, 4], [7, 9]]), bounds([2, 0, 1])
    for broken in ((), ("student",), ("teacher",)):
        told = finite_flags(layout, broken, row, bad, student_weights)
        assert told == [float("student" not in broken), float("teacher" not in broken)]


@pytest.mark.parametrize("row", [int(SPANS[0, 0]), 33, 34 + 69])  # the last is beyond a tile of its sequence
def test_whose_state_is_not_finite_is_told_among_many(backend, row):
    assert finite_flags(WHOLE, ["teacher"], row, float("-inf")) == [1.0, 0.0]


@pytest.mark.parametrize("student_weights", ["own", "teacher"])
def test_whose_state_is_not_finite_is_told_beside_given_weights(student_weights):
    layout, row = SpanLayout(*WHOLE), int(SPANS[0, 0])
    student, teacher, weights = random(sum(LENGTHS), 6), random(sum(LENGTHS), 6, seed=1), torch.ones(sum(LENGTHS))
    teacher[row, 2] = torch.inf
    terms = align_layer(student, teacher, torch.eye(6), layout, "paper", student_weights, weights).terms
    assert terms.finite.tolist() == [1.0, 0.0]
    student[row, 2], teacher[row, 2] = torch.inf, 0.0
    terms = align_layer(student, teacher, torch.eye(6), layout, "paper", student_weights, weights).terms
    assert terms.finite.tolist() == [0.0, 1.0]


def test_a_large_teacher_in_float16_is_finite(backend):
    """What its states sum up to is not, in float16."""
    layout = SpanLayout(bounds([200]), torch.tensor([[0, 2], [1, 3]]), bounds([2]))
    teacher = (200 + random(200, 8)).half()
    assert teacher.isfinite().all() and not teacher.sum(dtype=torch.float32).half().isfinite()
    terms = align_layer(random(200, 8), teacher, torch.eye(8), layout, teacher_weights=torch.ones(200)).terms
    assert terms.finite.tolist() == [1.0, 1.0]


def test_a_projection_that_is_not_finite_is_the_students():
    layout, states = SpanLayout(*WHOLE), random(sum(LENGTHS), 6)
    terms = align_layer(states, states, torch.full((6, 6), torch.nan), layout).terms
    assert terms.finite.tolist() == [0.0, 1.0]


def test_wrong_arguments_are_named():
    layout = SpanLayout(*WHOLE)
    student, teacher, projection = random(sum(LENGTHS), 4), random(sum(LENGTHS), 6), random(6, 4)
    for change, message in (
        ({"student": student[1:]}, "student: want 151 rows, got 150"),
        ({"teacher": teacher[1:]}, "teacher: want 151 rows, got 150"),
        ({"teacher": teacher.clone().requires_grad_()}, "teacher: must not require grad"),
        ({"projection": projection.T}, r"projection: want \[6, 4\], got \[4, 6\]"),
        ({"projection": projection.to("meta")}, "projection: want it on cpu as student is, got meta"),
        ({"teacher_weights": torch.ones(3)}, r"teacher_weights: want floating \[151\]"),
        (
            {"teacher_weights": torch.ones(151, device="meta")},
            "teacher_weights: want it on cpu as student is, got meta",
        ),
        ({"teacher_weights": torch.ones(151).double()}, "teacher_weights: float64 goes with float64 only"),
        ({"teacher": teacher.double()}, "teacher: float64 goes with float64 only, got torch.float64 beside student's"),
        ({"projection": projection.double()}, "projection: float64 goes with float64 only"),
        ({"student": student.half()}, "student: gradients underflow in float16; want bfloat16, float32 or float64"),
        ({"projection": projection.half()}, "projection: gradients underflow in float16"),
        ({"student": student[:, :0]}, "student: want at least one feature"),
        ({"reduction": "mean"}, "reduction: want one of sequence_mean, weighted_mean, paper, got 'mean'"),
        ({"student_weights": "x"}, "student_weights: want one of own, teacher, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            align_layer(**({"student": student, "teacher": teacher, "projection": projection} | change), layout=layout)
