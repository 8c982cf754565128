"""``mta-ds slurm`` as a user calls it, without Slurm; with it, see test_slurm.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from slurm_cluster import Command, write_run


def test_without_slurm_there_is_one_line(
    mta_ds: Command, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(pair, tmp_path, tmp_path / "run")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, err = mta_ds("slurm", "parse", config)
    assert code == 1 and err == (
        "mta-ds: error: parse: sbatch: not found; 'mta-ds slurm' is for the login node of a Slurm cluster\n"
    )
    code, out, _ = mta_ds("slurm", "parse", config, "--dry-run")
    assert code == 0 and "--array=0-3" in out
    code, _, err = mta_ds("slurm", "status", config)
    assert code == 1 and "no Slurm jobs" in err


@pytest.mark.parametrize(
    ("stage", "options", "stages", "words"),
    [
        ("generate", [], ["generate"], ["--array=0-7", "generate.sbatch"]),
        ("generate", ["generation.num_shards=3", "--array=1"], ["generate"], ["--array=0-2", "--array=1"]),
        ("evaluate", ["-p", "gpu"], ["evaluate"], ["-p gpu", "evaluate.sbatch"]),
        ("pipeline", ["parse=null"], ["check", "train", "evaluate"], ['--dependency=afterok:"$train"']),
        ("pipeline", ["train:-N2"], ["parse", "check", "train", "evaluate"], ["-N2"]),
        ("train", ["@OVERRIDE"], ["train"], ["a b-"]),
        ("evaluate", ["--exclusive", "@OVERRIDE"], ["evaluate"], ["a b-"]),
    ],
)
def test_dry_runs_need_no_slurm(
    mta_ds: Command, pair: Path, tmp_path: Path, stage: str, options: list[str], stages: list[str], words: list[str]
) -> None:
    config = write_run(pair, tmp_path, tmp_path / "run")
    (tmp_path / "a b.yaml").write_text("train: {lr: 0.5}")
    options = [option.replace("OVERRIDE", str(tmp_path / "a b.yaml")) for option in options]
    code, out, err = mta_ds("slurm", stage, config, *options, "--dry-run")
    assert code == 0, err
    commands = [line for line in out.splitlines() if not line.startswith(("mkdir ", "cp "))]
    assert [line.partition("=$(MTA_DS_SITE=")[0] for line in commands] == stages
    for word in words:
        assert sum(word in line for line in commands) == 1, out
    assert not (tmp_path / "run" / "slurm").exists()


def test_what_sbatch_says_of_a_job_that_it_takes_is_passed_on(
    mta_ds: Command, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(pair, tmp_path, tmp_path / "run")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: warning: short of hours' >&2\necho 12\n")
    sbatch.chmod(0o755)
    assert mta_ds("slurm", "parse", config)[1:] == ("parse: job 12, shards 0-3\n", "sbatch: warning: short of hours\n")
    sbatch.write_text("#!/bin/sh\necho 'slurm-wlm 22.05.8'\n")
    code, _, err = mta_ds("slurm", "train", config, f"run_dir={tmp_path}/other", "--version")
    assert code == 1 and "train: sbatch gave no number of a job: slurm-wlm 22.05.8" in err
