"""The chunked op against whole logits and autograd in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from divergence_cases import (
    D_STUDENT,
    D_TEACHER,
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mta_ds.ops import Divergence, HeadGradient, heads, linear_divergence

NAMES = ["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl"]


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def inputs(request):
    return padded(request.param)


@pytest.fixture
def small(monkeypatch, backend):
    return small_chunks(monkeypatch, backend)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_by_name(small, inputs, name, kd_ratio, weighted):
    divergence = Divergence(name, kd_ratio=kd_ratio, vocab_size=VOCAB)
    arguments = inputs if weighted else inputs | {"weights": None}
    result = linear_divergence(**arguments, divergence=divergence, **small)
    exact = in_float64(inputs)
    expected = whole(exact, divergence, weighted)
    single = inputs["student"].dtype == torch.float32
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if single else {"rtol": 1e-10, "atol": 1e-12}
    for got, want in zip(result[:3], expected, strict=True):
        assert got.dtype == inputs["student"].dtype
        torch.testing.assert_close(got.double(), want, **tolerance)
    assert result.count == N - 3 and result.entropy is None
    assert_same_gradients(result.loss, expected[0], trained(inputs), trained(exact), **tolerance)


OPTIONS = [
    Divergence("jsd", beta=0.0, vocab_size=VOCAB),
    Divergence("jsd", beta=0.1, vocab_size=VOCAB),
    Divergence("jsd", beta=1.0, vocab_size=VOCAB),
    Divergence("skl", alpha=0.7, vocab_size=VOCAB),
    Divergence("srkl", alpha=0.7, vocab_size=VOCAB),
    Divergence("srkl", detach_mixture=True, kd_ratio=0.6, vocab_size=VOCAB),
]


@pytest.mark.parametrize("divergence", OPTIONS, ids=str)
def test_every_option(small, inputs, divergence):
    result = linear_divergence(**inputs, divergence=divergence, **small)
    expected = whole(inputs, divergence)[0]
    assert_same_gradients(result.loss, expected, trained(inputs), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result.loss, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("n", "name"), [(0, "fkl"), (1, "rkl"), (2, "jsd"), (63, "skl"), (64, "srkl"), (65, "tvd"), (257, "fkl")]
)
def test_any_number_of_tokens(monkeypatch, backend, n, name):
    monkeypatch.setattr(heads, "_MIN_TOKENS", 64)
    inputs = sized(n, 130)
    exact = in_float64(inputs)
    divergence = Divergence(name, kd_ratio=0.5)
    result = linear_divergence(**inputs, divergence=divergence, teacher_entropy=True, chunk_bytes=1)
    expected = whole(exact, divergence, vocab=130)
    assert result.count == n and result.entropy.shape == (n,)
    for got, want in zip(result[:3], expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    assert_same_gradients(result.loss, expected[0], trained(inputs), trained(exact), rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name", ["sft", "rkl", "skl"])
def test_teacher_entropy_of_the_counted_positions(small, inputs, name):
    divergence = Divergence(name, vocab_size=VOCAB)
    result = linear_divergence(**inputs, divergence=divergence, teacher_entropy=True, **small)
    p = (inputs["teacher"].double() @ inputs["teacher_head"].double()[:VOCAB].T).softmax(-1)
    expected = -(p * p.log()).sum(-1)[inputs["targets"] != -100]
    torch.testing.assert_close(result.entropy.double(), expected, rtol=1e-5, atol=1e-6)
    assert not result.entropy.requires_grad
    torch.testing.assert_close(result.loss, whole(inputs, divergence)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["fkl", "srkl"])
def test_two_runs_agree_to_the_bit_and_no_unwritten_memory_is_read(monkeypatch, small, name):
    inputs = sized(11, VOCAB)

    def run():
        options = {"divergence": Divergence(name, kd_ratio=0.5), "teacher_entropy": True}
        result = linear_divergence(**inputs, **options, **small)
        return [*result[:3], result.entropy, *torch.autograd.grad(result.loss, list(trained(inputs).values()))]

    first = run()
    plain = {owner: owner for owner in (torch.empty, torch.empty_like, torch.Tensor.new_empty)}

    def poisoned(make):
        def fill(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    for owner, attribute in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, attribute, poisoned(plain[getattr(owner, attribute)]))
    for ours, theirs in zip(run(), first, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_far_from_zero_and_from_each_other(small, name):
    """The teacher's mass is where the student has none, behind a large common offset."""
    inputs = sized(4, VOCAB)
    with torch.no_grad():
        inputs["student_head"].mul_(10)[:, 0] = 50
        inputs["student"][:, 0] = 4
    inputs["teacher_head"].mul_(10)[:, 0] = -100
    exact = in_float64(inputs)
    result = linear_divergence(**inputs, divergence=Divergence(name), **small)
    expected = whole(exact, Divergence(name))[0]
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=1e-4)
    assert_same_gradients(result.loss, expected, trained(inputs), trained(exact), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_nan_is_not_hidden(small, side):
    inputs = sized(4, VOCAB)
    inputs[side].detach()[2] = float("nan")
    assert linear_divergence(**inputs, divergence=Divergence("fkl"), **small).loss.isnan()


@pytest.mark.parametrize("divergence", [Divergence("sft"), Divergence("rkl", kd_ratio=0.0)], ids=str)
def test_without_a_teacher(small, inputs, divergence):
    arguments = (inputs["student"], inputs["student_head"], None, None, inputs["targets"], divergence)
    result = linear_divergence(*arguments, **small)
    torch.testing.assert_close(result.loss.detach(), result.cross_entropy)
    assert float(result.divergence) == 0
    keep = inputs["targets"] != -100
    logits = inputs["student"] @ inputs["student_head"].T
    expected = torch.nn.functional.cross_entropy(logits[keep], inputs["targets"][keep], reduction="sum")
    torch.testing.assert_close(result.loss, expected)
    assert_same_gradients(result.loss, expected, trained(inputs), rtol=2e-5, atol=2e-5)


def test_only_what_needs_a_gradient_gets_one(backend, inputs):
    student, head = inputs["student"].detach(), inputs["student_head"]
    rest = (inputs["teacher"], inputs["teacher_head"], inputs["targets"], Divergence("fkl", vocab_size=VOCAB))
    linear_divergence(student, head, *rest).loss.backward()
    assert student.grad is None and head.grad.shape == head.shape
    assert not linear_divergence(student, head.detach(), *rest).loss.requires_grad
    linear_divergence(inputs["student"], head.detach(), *rest).loss.backward()
    assert inputs["student"].grad.shape == student.shape


def test_nothing_to_count_is_a_zero_that_depends_on_the_parameters(backend, inputs):
    inputs["targets"].fill_(-100)
    result = linear_divergence(**inputs, divergence=Divergence("fkl", vocab_size=VOCAB), teacher_entropy=True)
    assert result.loss.item() == 0 and result.count == 0 and result.entropy.shape == (0,)
    grads = torch.autograd.grad(result.loss, (inputs["student"], inputs["student_head"]))
    assert all((g == 0).all() for g in grads)


class Seen(TorchDispatchMode):
    """The most elements that any result has, what was called, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        self.names.add(func.overloadpacket.__name__)
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result


def test_gradients_of_counted_positions_are_copied_not_added_up(inputs):
    """A GPU adds in an order of its own."""
    loss = linear_divergence(**inputs, divergence=Divergence("fkl", vocab_size=VOCAB)).loss
    with Seen() as seen:
        loss.backward()
    assert "index_copy_" in seen.names and not seen.names & {"index_add", "index_add_"}
    assert inputs["student"].grad[inputs["targets"] == -100].eq(0).all()


def test_logits_never_exist_and_evaluation_makes_no_gradients():
    n, vocab, width = 512, 700, 4
    head = torch.nn.Parameter(random(vocab, width, seed=0, dtype=torch.float32))
    student = random(n, width, seed=1, dtype=torch.float32)
    teacher, targets = random(n, width, seed=2, dtype=torch.float32), torch.zeros(n, dtype=torch.int64)
    arguments = (student, head, teacher, head.detach(), targets, Divergence("fkl"))
    with Seen() as training:
        linear_divergence(*arguments, chunk_bytes=1)
    with torch.no_grad(), Seen() as evaluation:
        linear_divergence(*arguments, chunk_bytes=1)
    assert training.elements <= 32 * vocab and evaluation.elements <= 32 * vocab
    assert training.products == 3 * n // 32 and evaluation.products == 2 * n // 32


@pytest.mark.parametrize("name", ["fkl", "skl"])
def test_bfloat16_is_multiplied_and_summed_in_fp32(monkeypatch, small, inputs, name):
    monkeypatch.setattr(heads, "_SLAB_ROWS", 10)
    low = {key: v.detach().bfloat16() if v.is_floating_point() else v for key, v in inputs.items()}
    leaves = {key: leaf.requires_grad_() for key, leaf in trained(low).items()}
    exact = in_float64(low)
    divergence = Divergence(name, vocab_size=VOCAB, kd_ratio=0.8)
    result = linear_divergence(**low, divergence=divergence, **small)
    assert result.loss.dtype == torch.float32
    expected = whole(exact, divergence)[0]
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(result.loss, expected, leaves, trained(exact), rtol=2**-8, atol=1e-4)  # rounded once


def test_the_kernel_writes_its_gradient_in_any_dtype(monkeypatch):
    kernels = importlib.import_module("mta_ds.ops.kernels.divergence")
    monkeypatch.setattr(kernels, "BLOCK", 16)
    student, teacher = (random(3, VOCAB, seed=seed, dtype=torch.float32) for seed in (0, 1))
    rows = (student, teacher, torch.tensor([0, 36, 5]), None, Divergence("jsd", kd_ratio=0.5))
    kept, values = student.clone(), torch.empty(2, 3)
    kernels.divergence_rows(*rows, values, low := torch.empty(3, VOCAB, dtype=torch.bfloat16))
    assert torch.equal(student, kept)
    kernels.divergence_rows(*rows, values, student)
    torch.testing.assert_close(low.float(), student, rtol=2**-7, atol=0)  # the interpreter cuts off, a GPU rounds


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_agrees_and_is_not_waited_for(name, dtype):
    host = sized(257, 1000, dtype)
    inputs = {key: v.detach().cuda() if key != "targets" else v for key, v in host.items()}
    leaves = {key: leaf.requires_grad_() for key, leaf in trained(inputs).items()}
    divergence = Divergence(name, kd_ratio=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = linear_divergence(**inputs, divergence=divergence, teacher_entropy=True, chunk_bytes=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = in_float64(inputs) | {"targets": host["targets"].cuda()}
    expected = whole(exact, divergence, vocab=1000)[0]
    torch.testing.assert_close(result.loss.double(), expected, rtol=1e-4, atol=1e-4)
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    assert_same_gradients(result.loss, expected, leaves, trained(exact), **tolerance)


def test_backward_runs_once(inputs):
    loss = linear_divergence(**inputs, divergence=Divergence("fkl", vocab_size=VOCAB)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        loss.backward()


def test_a_tied_head_sums_both_uses(inputs):
    head = inputs["student_head"]
    student = inputs["student"].detach() + head[:N]
    arguments = inputs | {"student": student}
    divergence = Divergence("fkl", vocab_size=VOCAB)
    (got,) = torch.autograd.grad(linear_divergence(**arguments, divergence=divergence).loss, head, retain_graph=True)
    (want,) = torch.autograd.grad(whole(arguments, divergence)[0], head)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": torch.zeros(N, 3)}, r"student and student_head: want \[n, d\] and \[V, d\]"),
        (
            {"student": torch.zeros(N, D_STUDENT, dtype=torch.float16)},
            "student and student_head: want one floating dtype",
        ),
        ({"targets": torch.zeros(N)}, r"targets: want int64 \[11\]"),
        ({"targets": torch.zeros(N, dtype=torch.int64, device="meta")}, "targets: want them on the CPU"),
        ({"targets": torch.full((N,), VOCAB)}, "targets: want -100 or 0 <= target < 37 rows of the head"),
        ({"weights": torch.zeros(3)}, r"weights: want floating \[11\]"),
        ({"weights": torch.zeros(N, requires_grad=True)}, "weights: must not require grad"),
        ({"weights": torch.zeros(N, device="meta")}, "weights: want it on cpu as student is, or on the CPU, got meta"),
        (
            {"alphas": torch.zeros(3), "divergence": Divergence("skl", vocab_size=VOCAB)},
            r"alphas: want floating \[11\]",
        ),
        (
            {"alphas": torch.zeros(N, device="meta"), "divergence": Divergence("skl", vocab_size=VOCAB)},
            "alphas: want it on cpu as student is, or on the CPU, got meta",
        ),
        ({"alphas": torch.zeros(N)}, "alphas: are of skl and srkl, 'fkl' has no α"),
        ({"head_gradient": HeadGradient(torch.zeros(3, 2))}, r"head_gradient: is of a head torch.float32 \[3, 2\]"),
        ({"teacher_head": torch.zeros(VOCAB, D_TEACHER, device="meta")}, "teacher"),
        ({"teacher": None}, "teacher and teacher_head: give both or neither"),
        ({"teacher": None, "teacher_head": None}, "teacher: the divergence 'fkl' needs it"),
        (
            {"teacher": None, "teacher_head": None, "divergence": Divergence("sft"), "teacher_entropy": True},
            "teacher: teacher_entropy needs it",
        ),
        ({"divergence": Divergence("fkl")}, "vocab_size: the heads have 40 and 38 rows"),
        ({"divergence": Divergence("fkl", vocab_size=39)}, "teacher_head: 38 rows, fewer than vocab_size 39"),
    ],
)
def test_wrong_arguments_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**({"divergence": Divergence("fkl", vocab_size=VOCAB)} | inputs | change))


def test_a_float16_student_is_evaluated_but_not_trained(backend):
    low = sized(5, VOCAB, torch.float16)
    for frozen in ({}, {"student": low["student"].detach()}, {"student_head": low["student_head"].detach()}):
        with pytest.raises(ValueError, match="student: gradients underflow in float16"):
            linear_divergence(**low | frozen, divergence=Divergence("fkl"))
    with torch.no_grad():
        value = linear_divergence(**low, divergence=Divergence("fkl")).loss
    expected = whole(in_float64(low), Divergence("fkl"))[0]
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_float64_goes_with_float64_only(inputs):
    other = torch.float32 if inputs["student"].dtype == torch.float64 else torch.float64
    inputs |= {key: inputs[key].to(other) for key in ("teacher", "teacher_head")}
    with pytest.raises(ValueError, match="teacher: float64 goes with float64 only"):
        linear_divergence(**inputs, divergence=Divergence("fkl", vocab_size=VOCAB))


def test_a_teacher_that_requires_grad_is_refused(inputs):
    inputs["teacher"].requires_grad_()
    divergence = Divergence("fkl", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="must not require grad"):
        linear_divergence(**inputs, divergence=divergence)
    with torch.no_grad():
        assert float(linear_divergence(**inputs, divergence=divergence).loss) > 0
