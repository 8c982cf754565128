"""The chunked op against whole logits and autograd in float64."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mta_ds.ops import Divergence, divergence_values, linear_divergence

# the package exports the function under its module's name
op = importlib.import_module("mta_ds.ops.linear_divergence")
N, VOCAB, PADDED, D_STUDENT, D_TEACHER = 11, 37, 40, 6, 8
NAMES = ["sft", "fkl", "rkl", "jsd", "tvd", "skl", "srkl"]


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def inputs(request):
    dtype = request.param
    targets = torch.randint(0, VOCAB, (N,), generator=torch.Generator().manual_seed(5))
    targets[[0, 3, 10]] = -100
    return {
        "student": random(N, D_STUDENT, seed=0, dtype=dtype).requires_grad_(),
        "student_head": random(PADDED, D_STUDENT, seed=1, dtype=dtype).requires_grad_(),
        "teacher": random(N, D_TEACHER, seed=2, dtype=dtype),
        "teacher_head": random(VOCAB + 1, D_TEACHER, seed=3, dtype=dtype),
        "targets": targets,
        "weights": random(N, seed=4, dtype=dtype).abs(),
    }


def whole(inputs, divergence, weighted=True):
    """Loss, divergence and cross-entropy sums from whole logits."""
    log_q, log_p = (
        (inputs[side] @ inputs[f"{side}_head"][:VOCAB].T).log_softmax(-1) for side in ("student", "teacher")
    )
    keep = inputs["targets"] != -100
    cross_entropy = -log_q.gather(1, inputs["targets"].clamp_min(0)[:, None])[:, 0]
    values = torch.zeros_like(cross_entropy)
    if divergence.name != "sft":
        values = divergence_values(log_q, log_p, divergence)
    ratio = 0.0 if divergence.name == "sft" else divergence.kd_ratio
    weights = inputs["weights"] if weighted else torch.ones_like(values)
    total = (1 - ratio) * cross_entropy + ratio * values
    return [(weights * each)[keep].sum() for each in (total, values, cross_entropy)]


def small_chunks(monkeypatch):
    """Three tokens at a time."""
    monkeypatch.setattr(op, "_MIN_TOKENS", 3)
    return {"chunk_bytes": 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kd_ratio", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_gradients_by_name(monkeypatch, inputs, name, kd_ratio, weighted):
    divergence = Divergence(name, kd_ratio=kd_ratio, vocab_size=VOCAB)
    arguments = inputs if weighted else inputs | {"weights": None}
    result = linear_divergence(**arguments, divergence=divergence, **small_chunks(monkeypatch))
    expected = whole(inputs, divergence, weighted)
    single = inputs["student"].dtype == torch.float32
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if single else {"rtol": 1e-10, "atol": 1e-12}
    for got, want in zip(result[:3], expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    assert result.count == N - 3
    trained = {key: inputs[key] for key in ("student", "student_head")}
    got = torch.autograd.grad(result.loss * -1.7, list(trained.values()))
    want = torch.autograd.grad(expected[0] * -1.7, list(trained.values()))
    for key, ours, theirs in zip(trained, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda text, key=key: f"{key}: {text}")
        assert ours.dtype == inputs[key].dtype


@pytest.mark.parametrize("divergence", [Divergence("sft"), Divergence("rkl", kd_ratio=0.0)], ids=str)
def test_without_a_teacher(inputs, divergence):
    result = linear_divergence(inputs["student"], inputs["student_head"], None, None, inputs["targets"], divergence)
    torch.testing.assert_close(result.loss.detach(), result.cross_entropy)
    assert float(result.divergence) == 0
    keep = inputs["targets"] != -100
    logits = inputs["student"] @ inputs["student_head"].T
    expected = torch.nn.functional.cross_entropy(logits[keep], inputs["targets"][keep], reduction="sum")
    torch.testing.assert_close(result.loss, expected)


def test_only_what_needs_a_gradient_gets_one(inputs):
    student, head = inputs["student"].detach(), inputs["student_head"]
    rest = (inputs["teacher"], inputs["teacher_head"], inputs["targets"], Divergence("fkl", vocab_size=VOCAB))
    linear_divergence(student, head, *rest).loss.backward()
    assert student.grad is None and head.grad.shape == head.shape
    assert not linear_divergence(student, head.detach(), *rest).loss.requires_grad
    linear_divergence(inputs["student"], head.detach(), *rest).loss.backward()
    assert inputs["student"].grad.shape == student.shape


def test_nothing_to_count_is_a_zero_that_depends_on_the_parameters(inputs):
    inputs["targets"].fill_(-100)
    result = linear_divergence(**inputs, divergence=Divergence("fkl", vocab_size=VOCAB))
    assert result.loss.item() == 0 and result.count == 0
    grads = torch.autograd.grad(result.loss, (inputs["student"], inputs["student_head"]))
    assert all((g == 0).all() for g in grads)


class Largest(TorchDispatchMode):
    """The most elements that any result has, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return result


def test_logits_never_exist_and_evaluation_makes_no_gradients():
    n, vocab, width = 512, 700, 4
    head = torch.nn.Parameter(random(vocab, width, seed=0, dtype=torch.float32))
    student = random(n, width, seed=1, dtype=torch.float32)
    teacher, targets = random(n, width, seed=2, dtype=torch.float32), torch.zeros(n, dtype=torch.int64)
    arguments = (student, head, teacher, head.detach(), targets, Divergence("fkl"))
    with Largest() as training:
        linear_divergence(*arguments, chunk_bytes=1)
    with torch.no_grad(), Largest() as evaluation:
        linear_divergence(*arguments, chunk_bytes=1)
    assert training.elements <= 32 * vocab and evaluation.elements <= 32 * vocab
    assert training.products == 3 * n // 32 and evaluation.products == 2 * n // 32


def test_chunks_grow_with_the_budget():
    like = torch.zeros(1)
    assert op._chunk_tokens(1000, like, 5 * 4 * 1000 * 64) == 64
    assert op._chunk_tokens(256_000, like, 1) == 32
    assert 64 <= op._chunk_tokens(49_152, like, None) <= 256


def test_bfloat16_is_near_and_its_head_gradient_is_summed_in_fp32(monkeypatch, inputs):
    low = {key: v.detach().bfloat16() if v.is_floating_point() else v for key, v in inputs.items()}
    leaves = [low["student"].requires_grad_(), low["student_head"].requires_grad_()]
    divergence = Divergence("skl", vocab_size=VOCAB)
    result = linear_divergence(**low, divergence=divergence, **small_chunks(monkeypatch))
    assert result.loss.dtype == torch.float32
    exact = {key: v.detach().double() if v.is_floating_point() else v for key, v in low.items()}
    exact_leaves = [exact["student"].requires_grad_(), exact["student_head"].requires_grad_()]
    expected = whole(exact, divergence)[0]
    torch.testing.assert_close(result.loss.double(), expected, rtol=2e-2, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(result.loss, leaves), torch.autograd.grad(expected, exact_leaves), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.03)


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
        ({"weights": torch.zeros(3)}, r"weights: want \[11\]"),
        ({"teacher": None}, "teacher and teacher_head: give both or neither"),
        ({"teacher": None, "teacher_head": None}, "teacher: the divergence 'fkl' needs it"),
        ({"divergence": Divergence("fkl")}, "vocab_size: the heads have 40 and 38 rows"),
        ({"divergence": Divergence("fkl", vocab_size=39)}, "teacher_head: 38 rows, fewer than vocab_size 39"),
    ],
)
def test_wrong_arguments_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        linear_divergence(**({"divergence": Divergence("fkl", vocab_size=VOCAB)} | inputs | change))


def test_a_teacher_that_requires_grad_is_refused(inputs):
    inputs["teacher"].requires_grad_()
    divergence = Divergence("fkl", vocab_size=VOCAB)
    with pytest.raises(ValueError, match="must not require grad"):
        linear_divergence(**inputs, divergence=divergence)
    with torch.no_grad():
        assert float(linear_divergence(**inputs, divergence=divergence).loss) > 0
