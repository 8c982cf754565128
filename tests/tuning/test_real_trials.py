"""``mta-ds tune`` with real trials of the tiny pair on this machine's cores, and its resumption."""

from __future__ import annotations

import json

import pytest
from support import make_pair, run_command, write_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_trials_run_for_real_and_are_kept(pair, tmp_path) -> None:
    config = write_config(pair, tmp_path / "run", train__micro_batch_size=2)
    options = ("--trials", 2, "--gpus", 1, "--minutes", 8)
    done = run_command("tune", config, *options)
    folder = tmp_path / "run" / "tune"
    results = sorted((folder / "trials").glob("*/result.json"))
    trials = [json.loads(path.read_text()) for path in results]
    assert [trial["outcome"] for trial in trials] == ["ok", "ok"], done.stdout
    assert all(trial["seconds"] > 0 and trial["peak_bytes"] > 0 for trial in trials)
    assert all("agrees" in trial["note"] for trial in json.loads((folder / "tune.json").read_text())["trials"])
    assert not list((folder / "trials").glob("*/checkpoints"))
    assert "## Trials" in (folder / "tune.md").read_text(encoding="utf-8")
    before = [path.stat().st_mtime_ns for path in results]
    run_command("tune", config, *options)  # nothing is run again
    assert [path.stat().st_mtime_ns for path in results] == before
