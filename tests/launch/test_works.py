"""What is complete is not submitted again, and nothing else is left out."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mta_ds.launch.options import PIPELINE
from mta_ds.launch.works import RunSettings, Shards, Work, missing_works

SETTINGS = RunSettings(training_hash="abc", evaluation={"seeds": [1]})


def finish(run_dir: Path) -> None:
    """Leave what a training and an evaluation leave."""
    for name, content in {
        "environment.json": {"training_hash": "abc"},
        "heartbeat/rank-00000.json": {"phase": "end", "step": 3},
        "evaluation/after.json": {"settings": {"evaluation": {"seeds": [1]}}},
    }.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(json.dumps(content))
    (run_dir / "export").mkdir()
    os.utime(run_dir / "export", (1, 1))


def stages(run_dir: Path, settings: RunSettings = SETTINGS) -> list[str]:
    return [work.stage for work in missing_works(PIPELINE, run_dir, settings)]


def test_a_run_that_is_complete_has_no_work_left(tmp_path: Path) -> None:
    assert stages(tmp_path) == ["check", "train", "evaluate"]
    finish(tmp_path)
    assert stages(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("environment.json", '{"training_hash": "of other settings"}'),
        ("environment.json", '{"training_ha'),
        ("heartbeat/rank-00000.json", '{"phase": "stopped"}'),
    ],
)
def test_a_training_that_has_not_ended_under_these_settings_is_submitted(
    tmp_path: Path, name: str, content: str
) -> None:
    finish(tmp_path)
    (tmp_path / name).write_text(content)
    assert stages(tmp_path) == ["check", "train", "evaluate"]


def test_an_evaluation_of_an_older_export_or_of_other_settings_is_submitted(tmp_path: Path) -> None:
    finish(tmp_path)
    assert stages(tmp_path, RunSettings(training_hash="abc", evaluation={"seeds": [2]})) == ["evaluate"]
    os.utime(tmp_path / "export")
    os.utime(tmp_path / "evaluation" / "after.json", (1, 1))
    assert stages(tmp_path) == ["evaluate"]
    (tmp_path / "evaluation" / "after.json").unlink()
    assert stages(tmp_path) == ["evaluate"]


def test_missing_shards_and_a_missing_manifest_are_work(tmp_path: Path) -> None:
    def complete(folder: Path, index: int, _number: int) -> object | None:
        return True if (folder / f"part-{index}.json").exists() else None

    def works() -> list[Work]:
        shards = Shards(tmp_path, 3, lambda index, _number: f"part-{index}", complete)
        return missing_works(("parse",), tmp_path, RunSettings({"parse": shards}))

    (tmp_path / "part-1.json").touch()
    assert works() == [Work("parse", (0, 2), (f"{tmp_path}/part-0.json", f"{tmp_path}/part-2.json"))]
    for index in (0, 2):
        (tmp_path / f"part-{index}.json").touch()
    assert works() == [Work("parse", (0,), (f"{tmp_path}/part-0.json",))]
    (tmp_path / "manifest.json").touch()
    assert works() == []
