"""FDD's loss against an implementation of its own in float64: loops over layers and tokens, gradients by autograd."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from mta_ds.config import validate
from mta_ds.errors import UsageError
from mta_ds.losses import FDDConfig, KDConfig, MicroStep, Source, StepCounts, make_method

VOCAB, D_STUDENT, D_TEACHER, N, EPS = 13, 6, 8, 7, 1e-5
LABELLED = (1, 2, 4, 5)
TOPS = (3, 6)
THREE, ONE = {2: 1, 4: 2, 6: 3}, {4: 2}
TAU = 2.0
EXACT = {"rtol": 1e-9, "atol": 1e-11}


class Models(NamedTuple):
    """States by layer, heads padded to unequal sizes, and final norms; what is trained is a leaf."""

    student: dict[int, Tensor]
    head: Tensor
    norm: nn.Module
    teacher: dict[int, Tensor]
    teacher_head: Tensor
    teacher_norm: nn.Module
    targets: Tensor

    def trained(self):
        named = {f"student layer {layer}": hidden for layer, hidden in self.student.items()}
        return named | {"head": self.head} | {f"norm {name}": value for name, value in self.norm.named_parameters()}


class Teacher:
    """What a loss reads of the teacher beside its states."""

    def __init__(self, models):
        self._models = models

    def head(self):
        return self._models.teacher_head

    def norm(self):
        return self._models.teacher_norm


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_norm(kind, width, seed, dtype):
    norm = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[kind](width, eps=EPS, dtype=dtype)
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(1 + 0.3 * random(width, seed=seed + i))
    return norm


def make_models(kind="rms", dtype=torch.float64):
    """The three student layers and six teacher layers that a pair of this shape could tap."""
    targets = torch.full((N,), -100)
    targets[list(LABELLED)] = torch.tensor([4, 0, VOCAB - 1, 7])
    student = {layer: random(N, D_STUDENT, seed=layer, dtype=dtype).requires_grad_() for layer in range(1, 4)}
    return Models(
        student,
        random(VOCAB + 3, D_STUDENT, seed=30, dtype=dtype).requires_grad_(),
        make_norm(kind, D_STUDENT, 40, dtype),
        {layer: random(N, D_TEACHER, seed=10 + layer, dtype=dtype) for layer in range(1, 7)},
        random(VOCAB + 1, D_TEACHER, seed=31, dtype=dtype),
        make_norm(kind, D_TEACHER, 50, dtype).requires_grad_(False),
        targets,
    )


def make(key_layers=THREE, **options):
    config = FDDConfig(method="fdd", **{"temperature": TAU} | options)
    return make_method(config, VOCAB, key_layers, TOPS)


def run(method, models, tokens=slice(0, N), scale=1):
    """Loss and shares of the step's ``tokens``; the teacher emits all its layers, as with MTA's own key layers."""
    counts = StepCounts(len(LABELLED), N, 2, scale, 1, 10, Source.DATA)
    states = {layer: hidden[tokens] for layer, hidden in models.student.items()}
    targets = models.targets[tokens]
    bounds = torch.tensor([0, len(targets)])
    tapped = {layer: states[layer] for layer in method.key_layers.values()}
    teacher = Teacher(models)
    base = method.start(MicroStep(states[TOPS[0]], tapped, models.head, targets, bounds, (False,), counts, models.norm))
    with torch.no_grad():  # a hook of the teacher
        for layer, hidden in models.teacher.items():
            base.align(layer, hidden[tokens].clone(), teacher)
    return base.finish(models.teacher[TOPS[1]][tokens], teacher)


def normed(norm, state):
    """The norm of one token, written out."""
    if isinstance(norm, nn.LayerNorm):
        centred = state - state.mean()
        return centred / (centred.square().mean() + EPS).sqrt() * norm.weight + norm.bias
    return state / (state.square().mean() + EPS).sqrt() * norm.weight


def log_softmax(head, state, temperature=1.0):
    logits = torch.stack([(head[v] * state).sum() / temperature for v in range(VOCAB)])
    return logits - logits.exp().sum().log()


class BruteForce(NamedTuple):
    loss: Tensor
    fdd: Tensor
    kl: list[Tensor]
    """Token mean at each key layer."""
    derivative: list[Tensor]
    """From the second key layer on."""


def brute_force(method, models):
    """L_FDD as METHOD §8 writes it, and the divergence of the final layer: fkl mixed with the cross-entropy."""
    config, layers = method.config, list(method.key_layers.items())

    def states(teacher_layer, student_layer, t):
        theirs, ours = models.teacher[teacher_layer][t], models.student[student_layer][t]
        if config.final_norm and teacher_layer != TOPS[1]:
            theirs = normed(models.teacher_norm, theirs)
        if config.final_norm and student_layer != TOPS[0]:
            ours = normed(models.norm, ours)
        return theirs, ours

    kl, derivative = [], []
    for i, pair in enumerate(layers):
        values, changes = [], []
        for t in range(N):
            theirs, ours = states(*pair, t)
            log_p, log_q = (
                log_softmax(*x, method.temperature) for x in ((models.teacher_head, theirs), (models.head, ours))
            )
            values.append((log_p.exp() * (log_p - log_q)).sum())
            if i == 0:
                continue
            theirs_before, ours_before = states(*layers[i - 1], t)
            change = log_softmax(models.head, ours) - log_softmax(models.head, ours_before)
            their_change = log_softmax(models.teacher_head, theirs) - log_softmax(models.teacher_head, theirs_before)
            lengths = change.square().sum().sqrt() * their_change.square().sum().sqrt()
            changes.append(1 - (change * their_change).sum() / lengths)
        kl.append(sum(values) / N)
        derivative += [sum(changes) / N] if changes else []
    fdd = sum(kl) / len(layers)
    if derivative:
        fdd = fdd + config.derivative_weight * sum(derivative) / (len(layers) - 1)
    final = 0.0
    for t in LABELLED:
        log_p = log_softmax(models.teacher_head, models.teacher[TOPS[1]][t])
        log_q = log_softmax(models.head, models.student[TOPS[0]][t])
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        final = final + config.kd_ratio * divergence - (1 - config.kd_ratio) * log_q[models.targets[t]]
    return BruteForce(config.weight * fdd + final / len(LABELLED), fdd, kl, derivative)


def gradients(loss, trained, factor=1.0):
    """By name; zeros where the loss does not depend on it."""
    found = torch.autograd.grad(
        loss, list(trained.values()), torch.tensor(factor, dtype=loss.dtype), allow_unused=True, retain_graph=True
    )
    return {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(trained.items(), found, strict=True)
    }


def assert_gradients(got, want, **tolerance):
    for name, expected in want.items():
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(got[name].double(), expected, **tolerance, msg=message)


CASES = {
    "plain": {},
    "one key layer": {"key_layers": ONE},
    "one key layer, the top": {"key_layers": {6: 3}},
    "two key layers": {"key_layers": {2: 1, 6: 3}, "temperature": 5.0},
    "weighted": {"weight": 0.7, "derivative_weight": 2.5},
    "no derivative": {"derivative_weight": 0.0},
    "mixed divergence": {"kd_ratio": 0.6},
    "labels alone": {"divergence": "sft"},
    "normed": {"final_norm": True},
    "one normed": {"final_norm": True, "key_layers": ONE},
    "the teacher's top below the student's": {"final_norm": True, "key_layers": {3: 2, 5: 3}},
    "the student's top below the teacher's": {"final_norm": True, "key_layers": {4: 1, 6: 2}},
}


NORMED = [name for name, options in CASES.items() if "final_norm" in options]


@pytest.mark.parametrize(("case", "kind"), [(case, "rms") for case in CASES] + [(case, "layer") for case in NORMED])
def test_equals_loops_over_layers_and_tokens(case, kind):
    options = dict(CASES[case])
    key_layers = options.pop("key_layers", THREE)
    method, models = make(key_layers, **options), make_models(kind)
    if options.get("divergence") == "sft":
        expected = brute_force(make(key_layers, kd_ratio=0.0), models)
    else:
        expected = brute_force(method, models)
    loss, shares = run(method, models, scale=4)
    torch.testing.assert_close(loss.detach() / 4, expected.loss.detach(), **EXACT)
    torch.testing.assert_close(shares["base"], expected.loss.detach(), **EXACT)
    torch.testing.assert_close(shares["fdd"], expected.fdd.detach(), **EXACT)
    found = gradients(loss, models.trained(), 0.75)
    assert_gradients(found, gradients(expected.loss, models.trained(), 3.0), **EXACT)
    assert all(found[f"student layer {layer}"].any() for layer in {*key_layers.values(), TOPS[0]})
    uses_norm = bool(options.get("final_norm")) and set(key_layers.values()) != {TOPS[0]}
    assert {bool(grad.any()) for name, grad in found.items() if name.startswith("norm")} == {uses_norm}
    for layer, kl in zip(key_layers.values(), expected.kl, strict=True):
        torch.testing.assert_close(shares[f"fdd_kl/{layer}"], kl.detach(), **EXACT)
    first, *others = key_layers.values()
    assert float(shares[f"fdd_derivative/{first}"]) == 0
    for layer, derivative in zip(others, expected.derivative, strict=True):
        torch.testing.assert_close(shares[f"fdd_derivative/{layer}"], derivative.detach(), **EXACT)
    assert not any(share.requires_grad for share in shares.values())


@pytest.mark.parametrize("final_norm", [False, True])
def test_float32_follows(final_norm):
    method = make(final_norm=final_norm)
    single, double = make_models(dtype=torch.float32), make_models()
    with torch.no_grad():
        for name, value in double.trained().items():
            value.copy_(single.trained()[name])
        for layer, hidden in double.teacher.items():
            hidden.copy_(single.teacher[layer])
        double.teacher_head.copy_(single.teacher_head)
        double.teacher_norm.load_state_dict(single.teacher_norm.state_dict())
    expected = brute_force(method, double)
    loss, _ = run(method, single)
    tolerance = {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(loss.detach().double(), expected.loss.detach(), **tolerance)
    found = gradients(loss, single.trained())
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert_gradients(found, gradients(expected.loss, double.trained()), **tolerance)


def test_weight_zero_is_the_divergence_alone():
    models = make_models()
    loss, shares = run(make(weight=0.0), models)
    plain, _ = run(make_method(KDConfig(), VOCAB), models)
    torch.testing.assert_close(loss, plain, **EXACT)
    assert float(shares["fdd"]) == 0
    assert_gradients(gradients(loss, models.trained()), gradients(plain, models.trained()), **EXACT)


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 6])
def test_two_micro_batches_are_one(cut, final_norm):
    """Each loss is multiplied by the scale that DeepSpeed's mean divides by."""
    method, models = make(final_norm=final_norm, kd_ratio=0.5), make_models("layer")
    whole, whole_shares = run(method, models)
    parts = [run(method, models, tokens, scale=2) for tokens in (slice(0, cut), slice(cut, N))]
    loss = (parts[0][0] + parts[1][0]) / 2
    torch.testing.assert_close(loss, whole, **EXACT)
    for name, value in whole_shares.items():
        torch.testing.assert_close(parts[0][1][name] + parts[1][1][name], value, **EXACT)
    assert_gradients(gradients(loss, models.trained()), gradients(whole, models.trained()), **EXACT)


def test_a_micro_batch_without_labels():
    """Its tokens still follow the trajectory."""
    method, models = make(), make_models()
    loss, shares = run(method, models, slice(3, 4))
    assert float(shares["fdd"]) > 0
    torch.testing.assert_close(loss.detach(), shares["fdd"], **EXACT)


def test_a_frozen_head_gets_no_gradient():
    """As with LoRA; the states' gradients are the same."""
    method, models = make(), make_models()
    frozen = models._replace(head=models.head.detach())
    trained = {name: value for name, value in models.trained().items() if name.startswith("student")}
    want = gradients(run(method, models)[0], trained)
    got = gradients(run(method, frozen)[0], trained)
    assert all(torch.equal(got[name], want[name]) for name in trained)


@pytest.mark.parametrize(("given", "beside_mta", "temperature"), [(None, False, 5), (None, True, 2), (3, True, 3)])
def test_the_temperature_depends_on_mta(given, beside_mta, temperature):
    config = FDDConfig(method="fdd", temperature=given)
    method = make_method(config, VOCAB, THREE, TOPS, beside_mta=beside_mta)
    assert method.temperature == temperature and f"τ = {temperature}" in method.describe()


def test_what_the_engine_asks_of_the_method():
    method = make()
    assert method.key_layers == THREE and not method.uses_norm and not method.pairs
    assert make(final_norm=True).uses_norm
    assert method.source(1, 10, 0.0, buffer_full=True) is Source.DATA
    assert not FDDConfig(method="fdd").names_layers
    for own in ({"student_layers": (1, 2)}, {"num_layers": 2}, {"stride": 1}):
        assert FDDConfig(method="fdd", **own).names_layers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0}, "temperature: "),
        ({"weight": -1}, "weight: "),
        ({"num_layers": 0}, "num_layers: "),
        ({"beta": 0.2}, "beta is an option of jsd, not of fkl"),
        ({"lambda_dsa": 1}, "lambda_dsa: unknown key"),
    ],
)
def test_wrong_values_are_one_line(values, message):
    with pytest.raises(UsageError, match=message):
        validate({"method": "fdd"} | values, FDDConfig, where="run.yaml")
