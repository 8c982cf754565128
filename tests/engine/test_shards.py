"""Shards of a real engine come back exactly; files are read whatever the cut was; a damaged step changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from engine_cases import train_step, weights_of

from mta_ds.engine.health import Found, StepGuard
from mta_ds.engine.shards import (
    MOMENTS,
    WEIGHT,
    Piece,
    Shard,
    ShardFiles,
    copy_of,
    own_shard,
    restore_shard,
    write_shard,
)
from mta_ds.errors import UserError

STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@STAGES
@DTYPES
def test_a_shard_comes_back_exactly_and_training_goes_on_as_it_would(tmp_path: Path, make_engine, stage, dtype) -> None:
    engine, other = make_engine(stage, dtype), make_engine(stage, dtype, seed=9)
    for seed in range(3):
        train_step(engine, seed)
    shard = own_shard(engine)
    assert shard.steps == 3 and set(shard.pieces["0.weight"].values) == {WEIGHT, *MOMENTS}
    assert sum(len(piece.values[WEIGHT]) for piece in shard.pieces.values()) == 5 * 7 + 7 + 7 * 3 + 3
    write_shard(shard, tmp_path / "shard")
    restore_shard(other, ShardFiles([tmp_path / "shard"]))
    assert_same(weights_of(other), weights_of(engine))
    for seed in range(3, 6):
        assert torch.equal(train_step(other, seed), train_step(engine, seed))
    assert_same(weights_of(other), weights_of(engine))
    for name, piece in own_shard(other).pieces.items():
        assert_same(piece.values, own_shard(engine).pieces[name].values)


@pytest.mark.parametrize(("saved", "resumed"), [(3, 1), (1, 3), (2, 3)])
def test_another_stage_goes_on_from_it(tmp_path: Path, make_engine, saved, resumed) -> None:
    engine, other = make_engine(saved), make_engine(resumed, seed=9)
    for seed in range(2):
        train_step(engine, seed)
    write_shard(own_shard(engine), tmp_path / "shard")
    restore_shard(other, ShardFiles([tmp_path / "shard"]))
    assert_same(weights_of(other), weights_of(engine))
    for seed in range(2, 5):
        torch.testing.assert_close(train_step(other, seed), train_step(engine, seed), rtol=1e-6, atol=1e-7)


def test_before_any_step_there_are_weights_alone(tmp_path: Path, make_engine) -> None:
    engine, other = make_engine(3), make_engine(3, seed=9)
    write_shard(own_shard(engine), tmp_path / "shard")
    restore_shard(other, ShardFiles([tmp_path / "shard"]))
    assert own_shard(other).steps == 0
    assert torch.equal(train_step(other, 0), train_step(engine, 0))
    assert_same(weights_of(other), weights_of(engine))


def test_a_copy_does_not_change_with_the_weights(make_engine) -> None:
    engine = make_engine(3)
    train_step(engine, 0)
    copy = copy_of(own_shard(engine))
    before = copy.pieces["0.weight"].values["exp_avg"].clone()
    train_step(engine, 1)
    assert torch.equal(copy.pieces["0.weight"].values["exp_avg"], before)
    assert not torch.equal(own_shard(engine).pieces["0.weight"].values["exp_avg"], before)


def cut(size: int, bounds: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *bounds], [*bounds, size], strict=True))


def test_any_cut_is_read_from_any_other(tmp_path: Path) -> None:
    whole = {"a": torch.arange(23.0), "b": 100 + torch.arange(5.0)}
    runs = {"a": cut(23, [4, 17]), "b": cut(5, [1, 1])}
    for rank in range(3):
        pieces = {}
        for name, values in whole.items():
            start, end = runs[name][rank]
            if start < end:
                pieces[name] = Piece(start, len(values), {WEIGHT: values[start:end]})
        write_shard(Shard(pieces, 7), tmp_path / f"{rank}")
    for order in ([0, 1, 2], [2, 0, 1]):
        files = ShardFiles([tmp_path / f"{rank}" for rank in order])
        assert files.steps == 7
        for name, values in whole.items():
            for start, end in [*cut(len(values), [2, 3]), (0, len(values))]:
                out = torch.full((end - start,), torch.nan)
                files.read(WEIGHT, name, start, out, len(values))
                assert torch.equal(out, values[start:end])
    with pytest.raises(UserError, match="a has 23 elements there, 24 in this model"):
        ShardFiles([tmp_path / "0"]).read(WEIGHT, "a", 0, torch.empty(2), 24)
    with pytest.raises(UserError, match="it holds no weight of a from element 4"):
        ShardFiles([tmp_path / "0"]).read(WEIGHT, "a", 2, torch.empty(4), 23)
    with pytest.raises(UserError, match="it holds no weight of c"):
        ShardFiles([tmp_path / "0"]).read(WEIGHT, "c", 0, torch.empty(4), 4)


@STAGES
@DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_with_nan_or_inf_changes_nothing(make_engine, stage, dtype, bad) -> None:
    engine, twin = make_engine(stage, dtype), make_engine(stage, dtype)
    for each in (engine, twin):
        train_step(each, 0)
    before = weights_of(engine)
    train_step(engine, 1, factor=bad)
    assert engine.optimizer.overflow and StepGuard("skip", None).judge(engine, 1, lambda: Found([], []))
    assert_same(weights_of(engine), before)
    assert own_shard(engine).steps == 1
    assert torch.equal(train_step(engine, 2), train_step(twin, 2))
    assert not engine.optimizer.overflow
    assert_same(weights_of(engine), weights_of(twin))
