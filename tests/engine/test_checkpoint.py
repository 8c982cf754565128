"""Checkpoints of real engines: the newest whole one is found, a save that fails leaves all others and goes away."""

from __future__ import annotations

import errno
import json
import logging
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import train_step, weights_of

from mta_ds.engine import checkpoint, commit
from mta_ds.engine.checkpoint import Checkpoints
from mta_ds.engine.commit import Progress
from mta_ds.errors import UserError


INPUTS = {"training records": "r", "weights of the teacher": "t"}


@pytest.fixture(scope="module")
def engine(one_rank_group: None) -> Any:
    """Has made one step; these tests do not change it."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    made = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)[0]
    made.backward(made(torch.ones(1, 4)).sum())
    made.step()
    return made


def progress(step: int, **changes: object) -> Progress:
    values = {
        "step": step,
        "samples": 8 * step,
        "batch_size": 8,
        "world_size": 1,
        "zero_stage": 2,
        "config_hash": "abc",
        "inputs": INPUTS,
    }
    return Progress(**values | changes)  # type: ignore[arg-type]


def save(engine: Any, root: Path, *steps: int, **options: Any) -> None:
    checkpoints = Checkpoints(root, **options)
    for step in steps:
        checkpoints.save(engine, progress(step), save_state)
    checkpoints.finish()
    for folder in commit.step_folders(root):
        assert commit.is_committed(folder)


def save_state(folder: Path) -> list[str]:
    (folder / "state.json").write_text("{}")
    return ["state.json"]


def find(root: Path) -> tuple[Path, Progress] | None:
    return commit.find_newest(root, "abc", 8, INPUTS)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_is_found_and_older_ones_go(engine, tmp_path: Path, asynchronous: bool) -> None:
    assert find(tmp_path) is None
    save(engine, tmp_path, 5, 10, 15, asynchronous=asynchronous)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    found = find(tmp_path)
    assert found is not None and asdict(found[1]) == asdict(progress(15))
    assert names(found[0]) == ["COMMIT", "rng-00000.safetensors", "shard-00000.safetensors", "state.json"]


def test_some_stay_for_ever(engine, tmp_path: Path) -> None:
    save(engine, tmp_path, *range(2, 15, 2), keep_last=1, keep_every=4)
    assert [int(name[5:]) for name in names(tmp_path)] == [4, 8, 12, 14]


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate", "commit", "no commit"])
def test_a_damaged_one_is_named_and_skipped(engine, tmp_path: Path, damage: str, caplog) -> None:
    save(engine, tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / ("COMMIT" if "commit" in damage else "shard-00000.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "truncate":
        content = content[:-4]
    elif damage == "commit":
        content = bytearray(b"{half")
    file.write_bytes(content)
    if damage in ("remove", "no commit"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        found = find(tmp_path)
    assert found is not None and found[1].step == 1
    assert ("step-00000002" in caplog.text) == (damage != "no commit")


def test_a_damaged_one_is_replaced_and_never_counted(engine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1, 2, 4)
    for step in (2, 4):
        (tmp_path / f"step-0000000{step}" / "shard-00000.safetensors").write_bytes(b"")
    save(engine, tmp_path, 3, keep_last=1, resumed_step=1)  # the run goes on from before them
    found = find(tmp_path)
    assert found is not None and found[1].step == 3
    save(engine, tmp_path, 4, keep_last=1, resumed_step=3)
    found = find(tmp_path)
    assert found is not None and found[1].step == 4 and names(tmp_path) == ["step-00000004"]


@pytest.mark.parametrize("how", ["no room", "disk full", "more"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_the_others(engine, tmp_path: Path, monkeypatch, caplog, how, asynchronous) -> None:
    save(engine, tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path, keep_last=1, asynchronous=asynchronous)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        if how == "no room":
            usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=50)
            patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        elif how == "disk full":
            patch.setattr(checkpoint, "write_shard", full)
        checkpoints.save(engine, progress(3), full if how == "more" else None)
        checkpoints.finish()
    words = "0.000 GB are free" if how == "no room" else "No space left on device"
    assert "CHECKPOINT NOT SAVED" in caplog.text and words in caplog.text and "step-00000002" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    checkpoints.save(engine, progress(4))  # there is room again
    checkpoints.finish()
    assert names(tmp_path) == ["step-00000004"]


def test_it_is_committed_once_it_is_written(engine, tmp_path: Path, monkeypatch) -> None:
    go_on, write = threading.Event(), checkpoint.write_shard
    monkeypatch.setattr(checkpoint, "write_shard", lambda *arguments: go_on.wait(60) and write(*arguments))
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(engine, progress(1))
    checkpoints.poll()
    assert find(tmp_path) is None
    go_on.set()
    while find(tmp_path) is None:
        checkpoints.poll()
    assert find(tmp_path) is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config_hash": "other"}, "another configuration"),
        ({"batch_size": 12}, "12 sequences a step, this run has 8; choose micro_batch_size x .* = 12"),
    ],
)
def test_one_of_another_run_is_an_error(engine, tmp_path: Path, changes: dict, words: str) -> None:
    Checkpoints(tmp_path).save(engine, progress(1, **changes))
    with pytest.raises(UserError, match=words):
        find(tmp_path)


@pytest.mark.parametrize(("number", "words"), [(99, "a newer mta_ds"), (1, "an older mta_ds")])
def test_one_of_another_format_is_an_error(engine, tmp_path: Path, number: int, words: str) -> None:
    save(engine, tmp_path, 1)
    commit = tmp_path / "step-00000001" / "COMMIT"
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"format": number}))
    with pytest.raises(UserError, match=words):
        find(tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_and_random_state_come_back(make_engine, tmp_path: Path, stage: int) -> None:
    engine, other = make_engine(stage), make_engine(stage, seed=5)
    train_step(engine, 0)
    torch.manual_seed(7)
    save(engine, tmp_path, 1)
    expected = torch.rand(4)
    torch.manual_seed(8)
    found = find(tmp_path)
    assert found is not None
    checkpoint.load(other, *found, seed=3)
    assert torch.equal(torch.rand(4), expected)
    for name, weight in weights_of(engine).items():
        assert torch.equal(weights_of(other)[name], weight)
