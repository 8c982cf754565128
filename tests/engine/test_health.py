"""NaN, Inf and spikes: what is left out, what stops a run and what is told then; heartbeats."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_cases import weights_of
from torch import nn

from mta_ds.engine.diagnose import non_finite_gradients, watched
from mta_ds.engine.health import Found, Heartbeat, StepGuard
from mta_ds.errors import UserError
from mta_ds.losses import Source

BATCH: Any = SimpleNamespace(record_ids=("a", "b"))
NOTHING = Found([""], [])


def one_step(guard: StepGuard, engine: Any, seed: int, loss: float, source: Source = Source.DATA) -> bool:
    """A step whose gradients are finite, and whose loss is said to be ``loss``; whether it was left out."""
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed)).to(next(engine.module.parameters()).dtype)
    value = engine(inputs).float().square().mean()
    value = value + (loss - value).detach()
    watched = guard.watch(BATCH, value, {})
    engine.backward(guard.watch_step(watched, value, source))
    engine.step()
    return guard.judge(engine, seed, lambda: NOTHING)


def test_a_spike_is_left_out(make_engine) -> None:
    guard, engine = StepGuard("stop", spike_factor=3.0), make_engine(3)
    assert not any(one_step(guard, engine, seed, 1.0) for seed in range(16))
    before = weights_of(engine)
    assert one_step(guard, engine, 16, 3.5) and guard.skipped == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
    assert not one_step(guard, engine, 17, 2.5)
    again = StepGuard("stop", spike_factor=3.0)
    again.load_state(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_loss_that_is_no_number_changes_no_weight_though_its_gradients_are_finite(make_engine, stage, dtype) -> None:
    guard, engine = StepGuard("skip", None), make_engine(stage, dtype)
    before = weights_of(engine)
    assert one_step(guard, engine, 0, float("nan")) and one_step(guard, engine, 1, float("inf"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
    assert not one_step(guard, engine, 2, 1.0) and guard.skipped == 2
    assert any(not torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
    with pytest.raises(UserError, match=r"step 3: NaN or Inf in the loss, rank 0, records a, b; no weight was changed"):
        one_step(StepGuard("stop", None), engine, 3, float("nan"))


def refused() -> Any:
    return SimpleNamespace(optimizer=SimpleNamespace(overflow=True))


def spiky(guard: StepGuard, loss: float, source: Source) -> bool:
    """Whether a loss is a spike."""
    value = torch.tensor(loss)
    return not bool(torch.isfinite(guard.watch_step(value, value, source)))


def test_a_level_that_stays_is_no_spike_and_each_source_has_its_own() -> None:
    guard = StepGuard("stop", spike_factor=2.0)
    assert not any(
        spiky(guard, loss, source) for _ in range(64) for loss, source in ((1, Source.DATA), (9, Source.STUDENT))
    )
    assert not spiky(guard, 9.0, Source.STUDENT)
    assert sum(spiky(guard, 5.0, Source.DATA) for _ in range(100)) == 32


def test_steps_are_not_left_out_without_end() -> None:
    guard = StepGuard("skip", None)
    for step in range(1, 21):
        assert guard.judge(refused(), step, lambda: pytest.fail("nobody asked")) and guard.skipped == step
    again = StepGuard("skip", None)
    again.load_state(json.loads(json.dumps(guard.state())))
    with pytest.raises(UserError, match="21 steps in a row, up to step 21: NaN or Inf in a gradient"):
        again.judge(refused(), 21, lambda: Found([], []))


def test_what_is_told_of_a_step() -> None:
    good, bad = (torch.tensor(value) for value in (1.0, float("nan")))
    rows = [
        (good, {}, Found(["", ""], ["b.weight", "c.weight"]), "the gradient of c.weight and of 1 more parameters;"),
        (bad, {}, Found(["", ""], []), "the loss, rank 0, records c, d;"),
        (
            bad,
            {"non_finite/teacher/6": good},
            Found(["", ""], []),
            "the hidden state of layer 6 of the teacher, rank 0",
        ),
        (bad, {}, Found(["", "the gradient of it"], []), "the gradient of it, rank 0, records c, d;"),
    ]
    for loss, alarms, found, told in rows:
        guard = StepGuard("stop", None)
        guard.watch(BATCH, good, {"dsa": good, "non_finite/teacher/6": 0 * good})
        metrics = {"dsa": good} | alarms
        guard.watch(SimpleNamespace(record_ids=("c", "d")), loss, metrics)
        assert list(metrics) == ["dsa"]
        with pytest.raises(UserError, match=f"step 7: NaN or Inf in {told}") as error:
            guard.judge(refused(), 7, lambda found=found: found)
        assert error.value.on_every_rank


class Poisoned(torch.autograd.Function):
    """The identity, whose gradient is Inf."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * torch.inf


def test_the_layer_where_it_begins_is_named() -> None:
    layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def run(between) -> list[str]:
        with watched({"student": layers}) as seen:
            hidden = layers[1](layers[0](torch.ones(2, 3)))
            layers[2](between(hidden)).sum().backward()
        return seen

    assert run(lambda hidden: hidden) == []
    assert run(Poisoned.apply)[0] == "the gradient of the hidden state of layer 2 of the student"
    assert run(lambda hidden: hidden / 0)[0] == "the hidden state of layer 3 of the student"
    assert not layers[0]._forward_hooks


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_whose_gradients_are_not_finite(make_engine, stage: int) -> None:
    engine = make_engine(stage)
    engine.backward(Poisoned.apply(engine(torch.ones(1, 5))).sum())
    assert non_finite_gradients(engine.module) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_heartbeats_of_ranks_that_are_no_more_go(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    folder.mkdir()
    for rank in (0, 1, 12):
        (folder / f"rank-{rank:05d}.json").write_text("{}")
    heartbeat = Heartbeat(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["rank-00000.json"]
    heartbeat.beat(3, "step")
    first = json.loads((folder / "rank-00000.json").read_text())
    assert (first["step"], first["phase"]) == (3, "step")
    heartbeat.beat(4, "step")  # within a second: not written
    assert json.loads((folder / "rank-00000.json").read_text()) == first
    heartbeat.beat(4, "rollouts")
    assert json.loads((folder / "rank-00000.json").read_text())["phase"] == "rollouts"
