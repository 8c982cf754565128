"""Checkpoints of real engines: the newest whole one is found, a save that fails leaves all others and goes away."""

from __future__ import annotations

import errno
import json
import logging
import random
import shutil
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import train_step, weights_of

from mta_ds.engine import checkpoint, commit
from mta_ds.engine.checkpoint import Checkpoints
from mta_ds.engine.commit import Progress
from mta_ds.engine.setup import set_seed
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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_others_write_meanwhile_is_not_committed(engine, tmp_path: Path, asynchronous: bool) -> None:
    """Safetensors writes under a temporary name that is gone when all is written."""

    def save_more(folder: Path) -> list[str]:
        (folder / ".tmpAbC").write_text("another rank's")
        return save_state(folder)

    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(engine, progress(1), save_more)
    checkpoints.finish()
    (tmp_path / "step-00000001" / ".tmpAbC").unlink()
    assert find(tmp_path) is not None


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


def test_any_byte_of_commit_that_is_flipped_is_noticed(engine, tmp_path: Path) -> None:
    """All but the format itself: that may be a newer one's, and is refused."""
    save(engine, tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / "COMMIT"
    content = file.read_bytes()
    digit = content.index(b"4")
    assert content[:digit] == b'{\n "format": '
    for place in range(len(content)):
        bit = 0 if place == digit else place % 8
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        if place == digit:
            with pytest.raises(UserError, match=r"newer mta_ds \(format 5"):
                find(tmp_path)
            continue
        found, says_the_same = find(tmp_path), json.loads(content) == lenient(file.read_bytes())
        assert found is not None and found[1] == progress(2 if says_the_same else 1), place


def lenient(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_another_step_s_folder_is_damage(engine, tmp_path: Path, caplog) -> None:
    save(engine, tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
    found = find(tmp_path)
    assert (
        found is not None and found[1].step == 1 and "step-00000007 is damaged (COMMIT: it is of step 1)" in caplog.text
    )


def test_damage_to_all_is_no_fresh_start(engine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1, 2)
    for folder in tmp_path.iterdir():
        (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"no checkpoint is whole .step-00000002: state.json is another; step-00000001"):
        find(tmp_path)


def test_damaged_ones_do_not_count_as_kept(engine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003" / "state.json").unlink()
    assert find(tmp_path)[1].step == 2  # type: ignore[index]
    save(engine, tmp_path, 5, resumed_step=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000005"]
    save(engine, tmp_path, 6, resumed_step=5)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_old_ones_that_cannot_be_removed_take_nothing_from_the_new(engine, tmp_path: Path, monkeypatch, caplog) -> None:
    save(engine, tmp_path, 1, 2)
    remove = checkpoint._remove

    def refuse(folder: Path) -> None:
        if folder.name == "step-00000001":
            raise PermissionError("Operation not permitted")
        remove(folder)

    monkeypatch.setattr(checkpoint, "_remove", refuse)
    save(engine, tmp_path, 3)
    assert find(tmp_path)[1].step == 3 and "could not be removed: Operation not permitted" in caplog.text  # type: ignore[index]


def test_what_killed_saves_left_goes(engine, tmp_path: Path) -> None:
    save(engine, tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "COMMIT").unlink()
    (tmp_path / "notes").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["notes", "step-00000001"]


def test_a_stop_on_every_rank_finishes_the_save_under_way(engine, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    error = UserError("NaN")
    error.on_every_rank = True
    checkpoints.save(engine, progress(1))
    with pytest.raises(UserError, match="NaN"), checkpoints.finished_at_a_stop():
        raise error
    assert find(tmp_path) is not None


def test_all_is_durable_before_it_counts(engine, tmp_path: Path, monkeypatch) -> None:
    """Files, folders up to the run's, and the metrics of its steps."""
    root, done = tmp_path / "run" / "checkpoints", []
    sync_file, sync_folder, write = commit.fsync_file, checkpoint.fsync_directory, checkpoint.write_commit
    monkeypatch.setattr(commit, "fsync_file", lambda path: done.append(path) or sync_file(path))
    monkeypatch.setattr(checkpoint, "fsync_directory", lambda path: done.append(path) or sync_folder(path))
    monkeypatch.setattr(checkpoint, "write_commit", lambda *given: done.append("COMMIT") or write(*given))
    save(engine, root, 1, before_commit=lambda: done.append("metrics"))
    folder = root / "step-00000001"
    files = {folder / name for name in ("state.json", "shard-00000.safetensors", "rng-00000.safetensors")}
    assert done[-1] == "COMMIT" and set(done[:-1]) == files | {folder, root, root.parent, "metrics"}


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


@pytest.mark.parametrize("how", ["no room", "disk full", "more", "memory", "metrics"])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_leaves_the_others(engine, tmp_path: Path, monkeypatch, caplog, how, asynchronous) -> None:
    save(engine, tmp_path, 1, 2)
    room = []

    def full(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    def sync() -> None:
        if how == "metrics" and not room:
            full()

    checkpoints = Checkpoints(tmp_path, keep_last=1, asynchronous=asynchronous, before_commit=sync)

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        if how == "no room":
            usage = checkpoint.shutil.disk_usage(tmp_path)._replace(free=50)
            patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        elif how == "disk full":
            patch.setattr(checkpoint, "write_shard", full)
        elif how == "memory":
            patch.setattr(checkpoint, "copy_of" if asynchronous else "own_shard", full)
        checkpoints.save(engine, progress(3), full if how == "more" else None)
        checkpoints.finish()
    words = "0.000 GB are free" if how == "no room" else "No space left on device"
    assert "CHECKPOINT NOT SAVED" in caplog.text and words in caplog.text and "step-00000002" in caplog.text
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    room.append("again")
    checkpoints.save(engine, progress(4))
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
        ({"inputs": INPUTS | {"training records": "x"}}, "with other training records than there are now"),
        ({"inputs": {}}, "with other training records"),
        ({"inputs": INPUTS | {"spans": "s"}}, "with other spans than"),
        ({"batch_size": 12}, "12 sequences a step, this run has 8; choose micro_batch_size x .* = 12 on 1 rank"),
    ],
)
def test_one_of_another_run_is_an_error(engine, tmp_path: Path, changes: dict, words: str) -> None:
    Checkpoints(tmp_path).save(engine, progress(1, **changes))
    with pytest.raises(UserError, match=words):
        find(tmp_path)


@pytest.mark.parametrize(("number", "words"), [(99, "a newer mta_ds"), (1, "an older mta_ds")])
@pytest.mark.parametrize("lacks", ["nothing", "files", "sha256"])
def test_one_of_another_format_is_an_error(engine, tmp_path: Path, number: int, words: str, lacks: str) -> None:
    save(engine, tmp_path, 1)
    file = tmp_path / "step-00000001" / "COMMIT"
    content = json.loads(file.read_text()) | {"format": number}
    content.pop(lacks, None)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        find(tmp_path)


def draws() -> list[float]:
    return [torch.rand(()).item(), np.random.standard_normal(), np.random.random(), random.gauss(), random.random()]


@pytest.mark.parametrize("stage", [2, 3])
def test_weights_and_random_state_come_back(make_engine, tmp_path: Path, stage: int) -> None:
    engine, other = make_engine(stage), make_engine(stage, seed=5)
    train_step(engine, 0)
    set_seed(7)
    np.random.standard_normal()  # which leaves NumPy and Python with half of a pair
    random.gauss()
    save(engine, tmp_path, 1)
    expected = draws()
    set_seed(8)
    found = find(tmp_path)
    assert found is not None
    checkpoint.load(other, *found, seed=3)
    assert draws() == expected
    for name, weight in weights_of(engine).items():
        assert torch.equal(weights_of(other)[name], weight)


def test_ranks_that_cannot_have_the_same_batch_are_told_so() -> None:
    assert commit._same_batch(8, 3) == "a number of ranks that divides 8, which 3 does not"
    assert commit._same_batch(8, 2) == "micro_batch_size x gradient_accumulation_steps = 4 on 2 ranks"
