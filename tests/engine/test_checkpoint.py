"""Which checkpoint a run resumes from: the newest whose files are whole, of the same run."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mta_ds.engine import checkpoint
from mta_ds.engine.checkpoint import Progress
from mta_ds.errors import UserError


class Engine:
    """Writes and reads as DeepSpeed's engine does, one file."""

    def __init__(self) -> None:
        self.value = torch.zeros(3)
        self.module = torch.nn.Linear(1, 1)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        assert not save_latest and not exclude_frozen_parameters
        save_file({"value": self.value}, Path(folder) / tag / "model.safetensors")

    def load_checkpoint(self, folder: str, tag: str, load_module_strict: bool) -> tuple[str, dict]:
        assert load_module_strict
        return tag, {}


def save(folder: Path, step: int, keep_last: int = 2, **changes: object) -> None:
    values = {"step": step, "samples": 8 * step, "world_size": 1, "zero_stage": 3, "config_hash": "abc"} | changes
    engine = Engine()
    engine.value += step
    checkpoint.save(engine, folder, Progress(**values), keep_last)  # type: ignore[arg-type]


def find(folder: Path) -> tuple[Path, Progress] | None:
    return checkpoint.find_newest(folder, "abc", 3)


def test_the_newest_is_found_and_older_ones_go(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]
    found = find(tmp_path)
    assert found is not None
    assert asdict(found[1]) == {"step": 15, "samples": 120, "world_size": 1, "zero_stage": 3, "config_hash": "abc"}


@pytest.mark.parametrize("damage", ["flip", "remove", "truncate", "commit", "no commit"])
def test_a_damaged_one_is_named_and_skipped(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "step-00000002" / ("COMMIT" if "commit" in damage else "model.safetensors")
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config_hash": "other"}, "another configuration"),
        ({"world_size": 4}, "saved by 4 ranks under ZeRO-3, this run has 1 under ZeRO-3"),
        ({"zero_stage": 2}, "under ZeRO-2"),
    ],
)
def test_one_of_another_run_is_an_error(tmp_path: Path, changes: dict, words: str) -> None:
    save(tmp_path, 1, **changes)
    with pytest.raises(UserError, match=words):
        find(tmp_path)


def test_one_of_a_newer_format_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    commit = tmp_path / "step-00000001" / "COMMIT"
    commit.write_text(json.dumps(json.loads(commit.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="newer mta_ds"):
        find(tmp_path)


def test_random_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save(tmp_path, 1)
    expected = torch.rand(4)
    torch.manual_seed(8)
    found = find(tmp_path)
    assert found is not None
    checkpoint.load(Engine(), found[0])
    assert torch.equal(torch.rand(4), expected)
