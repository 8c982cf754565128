"""FDD's streamed op against whole logits and autograd in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from op_cases import Largest, random

from mta_ds.ops import (
    Divergence,
    HeadGradient,
    align_trajectory,
    attach_trajectory,
    heads,
    linear_divergence,
    reference,
)
from mta_ds.ops.trajectory import Factors, trajectory_rows

N, VOCAB, PADDED, D_STUDENT, D_TEACHER = 11, 37, 40, 6, 8
STUDENTS = ("student", "before")
TEACHERS = ("teacher", "teacher_before")
TRAINED = (*STUDENTS, "student_head")
FACTORS = {"temperature": 2.0, "kl_factor": 0.7, "derivative_factor": 1.3}
TOLERANCE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {"rtol": 2e-5, "atol": 2e-5}}


def make(n=N, dtype=torch.float64, vocab=PADDED):
    """States at two key layers and both heads; what is trained is a leaf."""
    shapes = {"student": (n, D_STUDENT), "before": (n, D_STUDENT), "student_head": (vocab, D_STUDENT)}
    shapes |= {"teacher": (n, D_TEACHER), "teacher_before": (n, D_TEACHER), "teacher_head": (vocab, D_TEACHER)}
    made = {name: random(*shape, seed=seed, dtype=dtype) for seed, (name, shape) in enumerate(shapes.items())}
    return {name: value.requires_grad_(name in TRAINED) for name, value in made.items()}


def make_exact(**options):
    """Quarters: their products are exact in fp32, in whatever order a library adds them up, so equal states have equal
    logits. Other equal states may differ in their last digit, and a change of nothing but rounding has some direction.
    """
    made = make(dtype=torch.float32, **options)
    return {name: ((4 * value.detach()).round() / 4).requires_grad_(name in TRAINED) for name, value in made.items()}


def in_float64(inputs):
    return {name: value.detach().double().requires_grad_(name in TRAINED) for name, value in inputs.items()}


def whole(inputs, temperature, kl_factor, derivative_factor, has_previous=True, vocab=VOCAB):
    """Sums of KL and 1 - cos and the loss, written down from METHOD §8 alone."""
    ours = [inputs[name] @ inputs["student_head"][:vocab].T for name in STUDENTS]
    theirs = [inputs[name] @ inputs["teacher_head"][:vocab].T for name in TEACHERS]
    p = (theirs[0] / temperature).softmax(-1)
    kl = (p * (p.log() - (ours[0] / temperature).softmax(-1).log())).sum()
    derivative = torch.zeros((), dtype=torch.float64)
    if has_previous:
        change, their_change = (x.log_softmax(-1) - y.log_softmax(-1) for x, y in (ours, theirs))
        dot = (change * their_change).sum(-1)
        derivative = (1 - dot / (change.norm(dim=-1) * their_change.norm(dim=-1))).sum()
    return kl, derivative, kl_factor * kl + derivative_factor * derivative


def run(inputs, has_previous=True, vocab_size=VOCAB, head_gradient=None, **options):
    """Value and graph: sums and the loss, with the head's gradient collected and attached."""
    collected = head_gradient or HeadGradient(inputs["student_head"])
    with torch.no_grad():  # as in a hook of the teacher
        found = align_trajectory(
            inputs["student"].detach(),
            inputs["teacher"],
            (inputs["before"].detach(), inputs["teacher_before"]) if has_previous else None,
            inputs["student_head"],
            inputs["teacher_head"],
            vocab_size=vocab_size,
            head_gradient=collected,
            **(FACTORS | options),
        )
    loss = attach_trajectory(inputs["student"], inputs["before"] if has_previous else None, found)
    return found, loss + collected.attach() if head_gradient is None else loss


def assert_same_gradients(loss, expected, inputs, exact, names=TRAINED, **tolerance):
    """Under one random factor, by name; each in its parameter's dtype."""
    factor = random(1, seed=17)[0]
    got = torch.autograd.grad(loss, [inputs[name] for name in names], factor.to(loss.dtype))
    want = torch.autograd.grad(expected, [exact[name] for name in names], factor.double())
    for name, ours, theirs in zip(names, got, want, strict=True):
        assert ours.dtype == inputs[name].dtype
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(ours.double(), theirs, **tolerance, msg=message)


@pytest.fixture
def small(monkeypatch, backend):
    """Three tokens at a time, and several blocks of the vocabulary in a row, or of rows in a chunk."""
    monkeypatch.setattr(heads, "_MIN_TOKENS", 3)
    if backend == "triton":
        monkeypatch.setattr(importlib.import_module("mta_ds.ops.kernels.trajectory"), "BLOCK", 16)
    else:
        monkeypatch.setattr(importlib.import_module("mta_ds.ops.divergence"), "_BLOCK_BYTES", 2 * 2 * VOCAB * 4)
    return {"chunk_bytes": 1}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
@pytest.mark.parametrize("has_previous", [True, False])
def test_values_and_gradients_by_name(small, dtype, temperature, has_previous):
    inputs = make(dtype=dtype)
    exact = in_float64(inputs)
    found, loss = run(inputs, has_previous, temperature=temperature, **small)
    expected = whole(exact, **FACTORS | {"temperature": temperature}, has_previous=has_previous)
    for got, want in zip((found.kl, found.derivative, found.loss), expected, strict=True):
        assert got.dtype == dtype and not got.requires_grad
        torch.testing.assert_close(got.double(), want.detach(), **TOLERANCE[dtype])
    assert torch.equal(loss.detach(), found.loss) and (found.previous is None) == (not has_previous)
    names = TRAINED if has_previous else ("student", "student_head")
    assert_same_gradients(loss, expected[2], inputs, exact, names, **TOLERANCE[dtype])


@pytest.mark.parametrize("has_previous", [True, False])
def test_the_reference_is_the_method(has_previous):
    exact = in_float64(make(vocab=VOCAB))
    previous = (exact["before"], exact["teacher_before"]) if has_previous else None
    arguments = (exact["student"], exact["teacher"], previous, exact["student_head"], exact["teacher_head"])
    kl, derivative = reference.trajectory(*arguments, FACTORS["temperature"])
    expected = whole(exact, **FACTORS, has_previous=has_previous)
    assert kl.shape == derivative.shape == (N,)
    torch.testing.assert_close((kl.sum(), derivative.sum()), expected[:2])
    loss = FACTORS["kl_factor"] * kl.sum() + FACTORS["derivative_factor"] * derivative.sum()
    names = TRAINED if has_previous else ("student", "student_head")
    assert_same_gradients(loss, expected[2], exact, exact, names, rtol=1e-10, atol=1e-12)


def test_golden_numbers(backend):
    """Logits straight from states through heads that are the identity."""
    eye = torch.eye(3)
    teacher, student = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    before, their_before = torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    found = align_trajectory(
        student, teacher, (before, their_before), eye, eye, temperature=1.0, kl_factor=1.0, derivative_factor=1.0
    )
    assert float(found.kl) == pytest.approx(0.170640, abs=1e-6)  # the divergence's own golden number

    def change(now, then):
        log_now, log_then = (math.log(sum(map(math.exp, row))) for row in (now, then))
        return [x - log_now - (y - log_then) for x, y in zip(now, then, strict=True)]

    ours, theirs = change([0.5, 0.5, 0], [0.5, 0, 0]), change([2, 1, 0], [1, 1, 1])
    dot = sum(x * y for x, y in zip(ours, theirs, strict=True))
    assert float(found.derivative) == pytest.approx(1 - dot / (math.hypot(*ours) * math.hypot(*theirs)), abs=1e-6)


def test_a_student_that_did_not_change_has_no_gradient_from_its_change(small):
    inputs = make_exact()
    inputs["before"] = inputs["student"].detach().clone().requires_grad_()
    found, loss = run(inputs, kl_factor=0.0, **small)
    assert float(found.derivative) == N and float(loss.detach()) == pytest.approx(FACTORS["derivative_factor"] * N)
    for name, grad in zip(TRAINED, torch.autograd.grad(loss, [inputs[name] for name in TRAINED]), strict=True):
        assert not grad.any(), name


def test_a_teacher_that_did_not_change_gives_no_gradient(small):
    inputs = make_exact()
    inputs["teacher_before"] = inputs["teacher"].clone()
    found, loss = run(inputs, **small)
    assert float(found.derivative) == N
    assert not found.previous.any()
    exact = in_float64(inputs)
    names = ("student", "student_head")
    expected = whole(exact, **FACTORS, has_previous=False)[2]
    assert_same_gradients(loss, expected, inputs, exact, names, **TOLERANCE[torch.float32])


def test_a_student_that_is_the_teacher_is_at_the_minimum(small):
    inputs = make(dtype=torch.float32)
    for ours, theirs in (("teacher", "student"), ("teacher_before", "before"), ("teacher_head", "student_head")):
        inputs[ours] = inputs[theirs].detach().clone()
    found, loss = run(inputs, **small)
    torch.testing.assert_close(found.loss, torch.tensor(0.0), rtol=0, atol=2e-5)
    for grad in torch.autograd.grad(loss, [inputs[name] for name in TRAINED]):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=2e-5)


def test_a_small_change_keeps_its_digits(small):
    """Δ of 1e-3 behind logits of 50: differences of log-probabilities, not of moments."""
    inputs = make(dtype=torch.float32, vocab=VOCAB)
    with torch.no_grad():
        inputs["student_head"][:, 0] = 10
        inputs["student"][:, 0] = 5
        inputs["before"].copy_(inputs["student"] + 1e-2 * inputs["before"])
    exact = in_float64(inputs)
    found, loss = run(inputs, **small)
    expected = whole(exact, **FACTORS)
    torch.testing.assert_close(found.derivative.double(), expected[1].detach(), rtol=2e-3, atol=0)
    assert_same_gradients(loss, expected[2], inputs, exact, STUDENTS, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("n", [0, 1, 32, 33, 65])
def test_any_number_of_tokens(backend, n):
    inputs = make(n, torch.float32, vocab=130)
    exact = in_float64(inputs)
    found, loss = run(inputs, vocab_size=None, chunk_bytes=1)
    expected = whole(exact, **FACTORS, vocab=None)
    assert found.student.shape == found.previous.shape == (n, D_STUDENT)
    torch.testing.assert_close(found.loss.double(), expected[2].detach(), rtol=2e-5, atol=2e-5)
    assert_same_gradients(loss, expected[2], inputs, exact, rtol=5e-5, atol=5e-5)


def test_no_tokens_are_exact_zeros_that_depend_on_the_parameters(backend):
    inputs = make(0, torch.float32)
    found, loss = run(inputs)
    assert found.kl.item() == found.derivative.item() == loss.item() == 0
    grads = torch.autograd.grad(loss, [inputs[name] for name in TRAINED])
    assert not grads[-1].any() and grads[-1].shape == inputs["student_head"].shape


def test_two_runs_agree_to_the_bit(small):
    inputs = make(dtype=torch.float32)

    def once():
        found, loss = run(inputs, **small)
        return [found.kl, found.derivative, loss, *torch.autograd.grad(loss, [inputs[name] for name in TRAINED])]

    for ours, theirs in zip(once(), once(), strict=True):
        assert torch.equal(ours, theirs)


def test_bfloat16_is_multiplied_and_summed_in_fp32(monkeypatch, small):
    monkeypatch.setattr(heads, "_SLAB_ROWS", 10)
    inputs = make(dtype=torch.bfloat16)
    exact = in_float64(inputs)
    found, loss = run(inputs, **small)
    expected = whole(exact, **FACTORS)
    assert {each.dtype for each in found} == {torch.float32}
    torch.testing.assert_close(found.loss.double(), expected[2].detach(), rtol=1e-5, atol=0)
    assert_same_gradients(loss, expected[2], inputs, exact, rtol=2**-8, atol=1e-4)  # rounded once


@pytest.mark.parametrize("name", [*STUDENTS, *TEACHERS])
def test_a_nan_is_not_hidden(small, name):
    inputs = make(4, torch.float32)
    inputs[name].detach()[2] = float("nan")
    assert run(inputs, **small)[0].loss.isnan()


def test_three_key_layers_and_a_divergence_share_one_gradient_of_the_head(small):
    """The whole of FDD as a micro-step has it, under the loss scale that a step multiplies it with."""
    inputs = make(dtype=torch.float32)
    inputs |= {"last": random(N, D_STUDENT, seed=20).requires_grad_(), "teacher_last": random(N, D_TEACHER, seed=21)}
    exact = in_float64(inputs)
    exact["last"].requires_grad_()
    head = inputs["student_head"]
    collected = HeadGradient(head)
    targets = torch.arange(N)
    targets[2] = -100
    layers = [("before", "teacher_before"), ("student", "teacher"), ("last", "teacher_last")]
    total, expected, previous = torch.zeros(()), torch.zeros((), dtype=torch.float64), None
    for ours, theirs in layers:
        named = {"student": ours, "teacher": theirs}
        if previous is not None:
            named |= {"before": previous[0], "teacher_before": previous[1]}
        pick = lambda source, named=named: source | {role: source[name] for role, name in named.items()}  # noqa: E731
        total = total + run(pick(inputs), previous is not None, head_gradient=collected, **small)[1]
        expected = expected + whole(pick(exact), **FACTORS, has_previous=previous is not None)[2]
        previous = (ours, theirs)
    divergence = Divergence("fkl", vocab_size=VOCAB)
    sides = (inputs["last"], head, inputs["teacher_last"], inputs["teacher_head"])
    base = linear_divergence(*sides, targets, divergence, factor=0.4, head_gradient=collected, **small)
    log_q, log_p = (
        (exact[state] @ exact[head][:VOCAB].T).log_softmax(-1)
        for state, head in (("last", "student_head"), ("teacher_last", "teacher_head"))
    )
    expected = expected + 0.4 * (log_p.exp() * (log_p - log_q)).sum(-1)[targets != -100].sum()
    torch.testing.assert_close((total + base.loss).double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(
        3 * (total + base.loss + collected.attach()),
        3 * expected,
        inputs,
        exact,
        (*TRAINED, "last"),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_frozen_head_needs_no_gradient(backend):
    inputs = make(dtype=torch.float32)
    frozen = inputs | {"student_head": inputs["student_head"].detach()}
    loss = run(frozen)[1]
    exact = in_float64(inputs)
    assert_same_gradients(loss, whole(exact, **FACTORS)[2], frozen, exact, STUDENTS, **TOLERANCE[torch.float32])


def test_logits_of_all_layers_never_exist():
    n, vocab = 256, 700
    inputs = make(n, torch.float32, vocab)
    with Largest() as seen:
        run(inputs, vocab_size=None, chunk_bytes=1)
    assert seen.elements == 2 * 32 * vocab


def test_the_kernel_writes_its_gradient_in_any_dtype(monkeypatch):
    kernels = importlib.import_module("mta_ds.ops.kernels.trajectory")
    monkeypatch.setattr(kernels, "BLOCK", 16)
    student, teacher = (random(6, VOCAB, seed=seed) for seed in (0, 1))
    factors, values = Factors(2.0, 0.7, 1.3), torch.empty(2, 3)
    kept, low = student.clone(), torch.empty(6, VOCAB, dtype=torch.bfloat16)
    kernels.trajectory_rows(student, teacher, 3, factors, values, low)
    assert torch.equal(student, kept)
    kernels.trajectory_rows(student, teacher, 3, factors, values, student)
    torch.testing.assert_close(low.float(), student, rtol=2**-7, atol=0)  # the interpreter cuts off, a GPU rounds
    trajectory_rows(kept, teacher, 3, factors, torch.empty(2, 3), kept)
    torch.testing.assert_close(student, kept, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_far_from_zero_lose_no_digits(backend):
    """What counts is how a layer's logits differ from the last one's, and those are small beside a common offset."""
    rows = importlib.import_module("mta_ds.ops.kernels.trajectory").trajectory_rows
    student, teacher = (3 * random(6, 3000, seed=seed) + shift for seed, shift in ((0, -100), (1, 1000)))
    for logits, seed in ((student, 2), (teacher, 3)):
        logits[3:] = logits[:3] + 0.05 * random(3, 3000, seed=seed)
    found = []
    for dtype, fill in (
        (torch.float32, rows if backend == "triton" else trajectory_rows),
        (torch.float64, trajectory_rows),
    ):
        ours, values = student.to(dtype, copy=True), torch.empty(2, 3, dtype=dtype)
        fill(ours, teacher.to(dtype, copy=True), 3, Factors(2.0, 0.5, 0.5), values, ours)
        found.append((values.double(), ours.double()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 5e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_agrees_and_is_not_waited_for(dtype):
    inputs = {
        name: value.detach().cuda().requires_grad_(name in TRAINED) for name, value in make(257, dtype, 1000).items()
    }
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, loss = run(inputs, vocab_size=None, chunk_bytes=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = in_float64(inputs)
    expected = whole(exact, **FACTORS, vocab=None)
    torch.testing.assert_close(found.loss.double(), expected[2].detach(), rtol=1e-4, atol=1e-4)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_same_gradients(loss, expected[2], inputs, exact, **tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(N, 3)}, r"student and student_head: want \[n, d\] and \[V, d\]"),
        (
            {"student": torch.zeros(N, D_STUDENT).half(), "student_head": torch.zeros(PADDED, D_STUDENT).half()},
            "student: gradients underflow in float16",
        ),
        ({"teacher": torch.zeros(3, D_TEACHER)}, "teacher: want 11 positions as the student has, got 3"),
        ({"teacher": torch.zeros(N, D_TEACHER, requires_grad=True)}, "teacher: must not require grad"),
        ({"previous": (torch.zeros(3, D_STUDENT), torch.zeros(N, D_TEACHER))}, "previous: want the student's"),
        ({"previous": (torch.zeros(N, D_STUDENT), torch.zeros(N, 3))}, "previous: want the teacher's"),
        ({"vocab_size": 41}, "student_head: 40 rows, fewer than vocab_size 41"),
        ({"teacher_head": torch.zeros(38, D_TEACHER), "vocab_size": None}, "vocab_size: the heads have 40 and 38 rows"),
        ({"temperature": 0.0}, "temperature: want a positive number, got 0.0"),
        ({"head_gradient": None}, "head_gradient: the student's head requires grad"),
        ({"head_gradient": HeadGradient(torch.zeros(3, 2))}, r"head_gradient: is of a head torch.float32 \[3, 2\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    inputs = make(dtype=torch.float32)
    arguments = {name: inputs[name] for name in ("student", "teacher", "student_head", "teacher_head")}
    arguments |= FACTORS | {
        "previous": None,
        "vocab_size": VOCAB,
        "head_gradient": HeadGradient(inputs["student_head"]),
    }
    with pytest.raises(ValueError, match=message):
        align_trajectory(**(arguments | change))
