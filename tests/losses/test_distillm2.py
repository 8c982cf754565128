"""DistiLLM-2's pair loss against loops over every token of every pair in float64, and its two curricula by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mta_ds.config import validate
from mta_ds.errors import UsageError
from mta_ds.losses import DistiLLM2Config, MicroStep, Source, StepCounts, make_method

VOCAB, D_STUDENT, D_TEACHER = 11, 5, 7
HALVES = ("chosen", "rejected")
STEP, NUM_STEPS = 3, 24  # β = 1.125


class Sides(NamedTuple):
    """A micro-batch of pairs, and what teacher and student make of it; heads are padded to unequal sizes."""

    final: Tensor
    head: Tensor
    teacher: Tensor
    teacher_head: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    rejected: tuple[bool, ...]


class Teacher:
    """What a loss reads of the teacher beside its state."""

    def __init__(self, head):
        self._head = head

    def head(self):
        return self._head

    def norm(self):
        raise AssertionError("pairs need no norm")


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_sides(lengths=(6, 4, 1, 7, 5, 3), labels=(3, 2, 1, 5, 1, 2), seed=0, dtype=torch.float64):
    """Sequences chosen, rejected, chosen, ...; the last ``labels`` positions of each are counted."""
    num_tokens = sum(lengths)
    targets = torch.randint(0, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for end, length, count in zip(cu_seqlens[1:].tolist(), lengths, labels, strict=True):
        targets[end - length : end - count] = -100
    rejected = tuple(i % 2 == 1 for i in range(len(lengths)))
    return Sides(
        random(num_tokens, D_STUDENT, seed=seed + 1, dtype=dtype).requires_grad_(),
        random(VOCAB + 2, D_STUDENT, seed=90, dtype=dtype).requires_grad_(),
        random(num_tokens, D_TEACHER, seed=seed + 2, dtype=dtype),
        random(VOCAB + 1, D_TEACHER, seed=91, dtype=dtype),
        targets,
        cu_seqlens,
        rejected,
    )


def split(sides, sizes):
    """The same pairs as several micro-batches, which share the heads."""
    parts, first = [], 0
    for size in sizes:
        cu = sides.cu_seqlens[first : first + size + 1]
        tokens = slice(int(cu[0]), int(cu[-1]))
        rows = (sides.final[tokens].detach().clone().requires_grad_(), sides.head, sides.teacher[tokens])
        parts.append(Sides(*rows, sides.teacher_head, sides.targets[tokens], cu - cu[0], sides.rejected[first:][:size]))
        first += size
    return parts


def make(**options):
    return make_method(DistiLLM2Config(method="distillm2", **options), vocab_size=VOCAB)


def run(method, sides, num_sequences=None, scale=1, step=STEP):
    """Loss and shares of a micro-batch, as the engine asks for them."""
    sequences = num_sequences or len(sides.rejected)
    tokens = int((sides.targets != -100).sum())
    counts = StepCounts(tokens, len(sides.final), sequences, scale, step, NUM_STEPS, Source.DATA)
    micro = MicroStep(sides.final, {}, sides.head, sides.targets, sides.cu_seqlens, sides.rejected, counts, None)
    return method.start(micro).finish(sides.teacher, Teacher(sides.teacher_head))


def distribution(head, state):
    """Softmax over the vocabulary, written out."""
    exps = [(head[v] * state).sum().exp() for v in range(VOCAB)]
    return torch.stack(exps) / sum(exps)


class BruteForce(NamedTuple):
    """The whole micro-batch as one step."""

    loss: Tensor
    halves: dict[str, Tensor]
    gaps: dict[str, list[float]]
    alphas: dict[str, list[float]]


def brute_force(sides, method, step=STEP):
    """METHOD §8's sentence, pair by pair and token by token; the heads' and states' gradients are autograd's."""
    exact = Sides(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in sides))
    config = method.config
    beta = 1 + 0.5 * min(1, 2 * step / NUM_STEPS) if config.beta_curriculum else 1.0
    sums = {half: 0.0 * exact.final.sum() for half in HALVES}
    gaps: dict[str, list[float]] = {half: [] for half in HALVES}
    alphas: dict[str, list[float]] = {half: [] for half in HALVES}
    for (first, last), is_rejected in zip(pairwise(exact.cu_seqlens.tolist()), exact.rejected, strict=True):
        half = "rejected" if is_rejected else "chosen"
        positions = [t for t in range(first, last) if exact.targets[t] != -100]
        rows = [
            (distribution(exact.teacher_head, exact.teacher[t]), distribution(exact.head, exact.final[t]))
            for t in positions
        ]
        labels = [int(exact.targets[t]) for t in positions]
        means = [1.0, 1.0]
        for side in range(2 if positions else 0):
            logs = [float(row[side][label].detach().log()) for row, label in zip(rows, labels, strict=True)]
            means[side] = float(torch.tensor(sum(logs) / len(logs), dtype=torch.float64).exp())
        gap = means[1] - means[0] if is_rejected else means[0] - means[1]
        alpha = config.alpha
        if config.alpha_curriculum and method.gap_steps:
            m = method.gaps[half] / method.gap_steps
            alpha = min(max(1 - (1 - config.alpha) * m / (gap + 1e-5), 0.01), config.alpha)
        gaps[half].append(gap)
        alphas[half].append(alpha)
        for p, q in rows:
            if is_rejected:
                mixture = ((1 - alpha) * p + alpha * q).detach()
                value = sum(q[v] * (q[v] / mixture[v]).log() for v in range(VOCAB))
            else:
                mixture = alpha * p + (1 - alpha) * q
                value = sum(p[v] * (p[v] / mixture[v]).log() for v in range(VOCAB))
            sums[half] = sums[half] + value / len(positions)
    num_pairs = len(exact.rejected) // 2
    halves = {half: value / num_pairs for half, value in sums.items()}
    loss = (2 - beta) * halves["chosen"] + beta * halves["rejected"]
    return BruteForce(loss, halves, gaps, alphas)


def fit_to(method, sides):
    """Let the mean gaps be such that α falls inside its bounds for one response of each half."""
    gaps = brute_force(sides, method).gaps
    method.load_state({f"gap_{half}": 4 * 1.05 * gaps[half][1] for half in HALVES} | {"gap_steps": 4})


def assert_same(got, want, names, loss, expected, tolerance, factor=2.5):
    grads = torch.autograd.grad(loss, got, torch.tensor(factor, dtype=loss.dtype))
    exact = torch.autograd.grad(expected, want, torch.tensor(factor, dtype=torch.float64))
    for name, ours, theirs in zip(names, grads, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("beta_curriculum", [True, False])
@pytest.mark.parametrize("alpha_curriculum", [True, False])
@pytest.mark.parametrize("seed", [0, 10])
def test_equals_loops_over_pairs_and_tokens(dtype, beta_curriculum, alpha_curriculum, seed):
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    sides = make_sides(seed=seed, dtype=dtype)
    method = make(beta_curriculum=beta_curriculum, alpha_curriculum=alpha_curriculum)
    fit_to(method, sides)
    expected = brute_force(sides, method)
    loss, shares = run(method, sides)
    fitted = [alpha for half in HALVES for alpha in expected.alphas[half]]
    assert any(0.01 < alpha < 0.1 for alpha in fitted) == alpha_curriculum
    torch.testing.assert_close(loss.detach().double(), expected.loss.detach(), **tolerance)
    assert torch.equal(shares["base"], loss.detach())
    for half in HALVES:
        torch.testing.assert_close(shares[f"base/{half}"].double(), expected.halves[half].detach(), **tolerance)
        if alpha_curriculum:
            mean_gap = sum(expected.gaps[half]) / 3
            assert float(shares[f"gap/{half}"]) == pytest.approx(mean_gap, rel=tolerance["rtol"], abs=1e-7)
        else:
            assert f"gap/{half}" not in shares
    assert not any(share.requires_grad for share in shares.values())
    leaves = [sides.final, sides.head]
    assert_same(leaves, leaves, ("final", "head"), loss, expected.loss, tolerance)


class Called(TorchDispatchMode):
    """The names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_sum_is_made_of_scattered_additions():
    """A GPU makes those in an order of its own."""
    with Called() as called:
        run(make(), make_sides())[0].backward()
    assert "segment_reduce" in called.names and not called.names & {"index_add", "index_add_", "scatter_add"}


def test_alpha_is_its_largest_until_a_gap_is_known():
    sides = make_sides()
    fresh, fixed = make(), make(alpha_curriculum=False)
    assert torch.equal(run(fresh, sides)[0], run(fixed, sides)[0])
    assert fresh.alphas(torch.tensor([0.3, -0.3]), "chosen").tolist() == pytest.approx([0.1, 0.1])


# α = clip(1 - 0.9 m / (gap + 1e-5), 0.01, 0.1), computed by hand
@pytest.mark.parametrize(
    ("mean", "gap", "alpha"),
    [
        (0.2, 0.3, 0.1),  # 0.400 is clipped
        (0.2, 0.2, 0.1),  # 0.100045 too
        (0.2, 0.19, 0.052681437),
        (0.2, 0.1818, 0.01),  # 0.00995
        (0.2, 0.1, 0.01),  # -0.79991
        (0.2, -0.5, 0.1),  # 1.36
        (-0.2, 0.2, 0.1),  # 1.89996
        (-0.2, -0.2, 0.099954998),
        (-0.2, -0.1, 0.01),  # -0.80018
        (0.0, 0.0, 0.1),
    ],
)
def test_alpha_by_hand(mean, gap, alpha):
    method = make()
    for half, other in (HALVES, HALVES[::-1]):
        method.load_state({f"gap_{half}": 4 * mean, f"gap_{other}": 77.0, "gap_steps": 4})
        found = method.alphas(torch.tensor([gap], dtype=torch.float64), half)
        assert found.tolist() == pytest.approx([alpha], rel=1e-6)


def test_the_largest_alpha_is_an_option():
    method = make(alpha=0.3)
    method.load_state({"gap_chosen": 0.2, "gap_rejected": 0.0, "gap_steps": 1})
    found = method.alphas(torch.tensor([0.5, 0.18, 0.14], dtype=torch.float64), "chosen")
    assert found.tolist() == pytest.approx([0.3, 1 - 0.14 / 0.18001, 0.01])
    assert (method.divergence.alpha, method.rejected.alpha) == (0.3, 0.3)


def test_beta_by_hand():
    assert [make().beta(step, 24) for step in (1, 3, 6, 12, 13, 24)] == pytest.approx(
        [1 + 1 / 24, 1.125, 1.25, 1.5, 1.5, 1.5]
    )
    assert {make(beta_curriculum=False).beta(step, 24) for step in (1, 12, 24)} == {1.0}


def test_micro_steps_and_ranks_add_up_to_the_step():
    """Two ranks with two micro-steps each; the pairs are as uneven as they come."""
    lengths, labels = (6, 4, 1, 7, 5, 3, 2, 9, 4, 4, 3, 2), (3, 2, 1, 5, 1, 2, 1, 8, 3, 1, 2, 2)
    sides = make_sides(lengths, labels)
    method, at_once = make(), make()
    for each in (method, at_once):
        fit_to(each, sides)
    expected = brute_force(sides, method)
    whole, whole_shares = run(at_once, sides)
    ranks, loss, grads = [{}, {}], torch.zeros((), dtype=torch.float64), []
    head_gradient = torch.zeros_like(sides.head)
    for i, part in enumerate(split(sides, (4, 2, 2, 4))):
        part_loss, shares = run(method, part, num_sequences=12, scale=4)
        loss = loss + part_loss.detach() / 4  # DeepSpeed's mean over ranks and micro-steps
        by_final, by_head = torch.autograd.grad(part_loss, [part.final, part.head])
        grads.append(by_final / 4)
        head_gradient += by_head / 4
        for name, share in shares.items():
            ranks[i // 2][name] = ranks[i // 2].get(name, 0) + share
    torch.testing.assert_close(loss, expected.loss.detach(), rtol=1e-9, atol=1e-11)
    assert float(ranks[0]["base"] + ranks[1]["base"]) == pytest.approx(expected.loss.item(), rel=1e-9)
    exact = torch.autograd.grad(whole, [sides.final, sides.head])
    torch.testing.assert_close(torch.cat(grads), exact[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(head_gradient, exact[1], rtol=1e-9, atol=1e-11)

    before = method.state()
    others = torch.stack([ranks[1][f"gap/{half}"] for half in HALVES])
    method.after_step(5, ranks[0], lambda values: values + others)
    at_once.after_step(5, whole_shares, lambda values: values)
    for half in HALVES:
        name = f"gap_{half}"
        gained = method.state()[name] - before[name]
        assert gained == pytest.approx(sum(expected.gaps[half]) / 6, rel=1e-9)
        assert method.state()[name] == pytest.approx(at_once.state()[name], rel=1e-12)
    assert method.gap_steps == 5


def shares_of(chosen, rejected):
    return {"gap/chosen": torch.tensor(chosen), "gap/rejected": torch.tensor(rejected)}


def test_the_mean_gap_is_frozen_after_its_steps():
    method = make(gap_steps=2)
    method.after_step(1, shares_of(0.5, -0.25), lambda values: values)
    assert method.state() == {"gap_chosen": 0.5, "gap_rejected": -0.25, "gap_steps": 1}
    method.after_step(2, shares_of(0.25, 0.5), lambda values: values)
    frozen = {"gap_chosen": 0.75, "gap_rejected": 0.25, "gap_steps": 2}
    assert method.state() == frozen
    for step in (3, 4, 400):
        method.after_step(step, shares_of(9.0, 9.0), lambda values: values)
        assert method.state() == frozen


def test_a_step_waits_for_no_gap(monkeypatch):
    method = make(gap_steps=2)
    method.load_state({"gap_chosen": 0.5, "gap_rejected": 0.1, "gap_steps": 1})

    def wait(tensor):
        raise AssertionError("a step reads a number off the device")

    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, wait)
    shares = {f"gap/{half}": torch.tensor(0.25) for half in HALVES}
    method.after_step(2, shares, lambda summed: summed)
    method.alphas(torch.tensor([0.3, 0.1]), "chosen")


def test_without_the_curriculum_no_gap_is_learnt():
    method = make(alpha_curriculum=False)
    method.after_step(1, {}, lambda values: pytest.fail("nothing to reduce"))
    assert method.state() == {"gap_chosen": 0.0, "gap_rejected": 0.0, "gap_steps": 0}


def test_state_goes_through_a_checkpoint():
    method, resumed = make(), make()
    method.after_step(1, shares_of(0.3, 0.1), lambda values: values)
    resumed.load_state(json.loads(json.dumps(method.state())))
    assert resumed.state() == method.state() and isinstance(resumed.gap_steps, int)
    gaps = torch.tensor([0.29, 0.31, 0.2])
    for half in HALVES:
        assert torch.equal(resumed.alphas(gaps, half), method.alphas(gaps, half))


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("alpha_curriculum", [True, False])
def test_a_response_without_labels_counts_as_zero(half, alpha_curriculum):
    labels = [3, 2, 1, 5]
    labels[2 + half] = 0
    sides = make_sides((6, 4, 3, 7), labels)
    method = make(alpha_curriculum=alpha_curriculum)
    fit_to(method, make_sides((6, 4, 3, 7), (3, 2, 1, 5)))
    expected = brute_force(sides, method)
    loss, shares = run(method, sides)
    torch.testing.assert_close(loss.detach(), expected.loss.detach(), rtol=1e-9, atol=1e-11)
    leaves = [sides.final, sides.head]
    assert_same(leaves, leaves, ("final", "head"), loss, expected.loss, {"rtol": 1e-9, "atol": 1e-11})
    if alpha_curriculum:
        name = HALVES[half]
        assert float(shares[f"gap/{name}"]) == pytest.approx(expected.gaps[name][0] / 2, rel=1e-9)


def test_no_response_has_labels():
    sides = make_sides((3, 2), (0, 0))
    loss, shares = run(make(), sides)
    assert loss.item() == 0 and all(float(share) == 0 for share in shares.values())
    grads = torch.autograd.grad(loss, [sides.final, sides.head], allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


def test_a_frozen_head_gets_no_gradient():
    """As with LoRA; the states' gradients are the same."""
    sides = make_sides()
    method = make()
    frozen = sides._replace(head=sides.head.detach())
    (expected, _), (loss, _) = run(method, sides), run(method, frozen)
    (ours,), (theirs,) = (torch.autograd.grad(each, [sides.final]) for each in (loss, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"alpha": 0.01}, "alpha: "),
        ({"alpha": 1.0}, "alpha: "),
        ({"gap_steps": 0}, "gap_steps: "),
        ({"divergence": "skl"}, "divergence: unknown key"),
    ],
)
def test_wrong_values_are_one_line(values, message):
    with pytest.raises(UsageError, match=message):
        validate({"method": "distillm2"} | values, DistiLLM2Config, where="run.yaml")
