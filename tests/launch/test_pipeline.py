"""What is submitted for a run, without Slurm; with it, see test_slurm.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ds.errors import UserError
from mta_ds.launch.pipeline import Work, find_script, make_job, without_alive
from mta_ds.launch.scripts import Given


def test_scripts_are_looked_for_where_named_then_here_then_in_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_script("train", None) == Path(__file__).parents[2] / "slurm" / "train.sbatch"
    for folder in ("slurm", "my scripts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.sbatch").touch()
    assert find_script("train", None) == tmp_path / "slurm" / "train.sbatch"
    assert find_script("train", Path("my scripts")) == tmp_path / "my scripts" / "train.sbatch"
    with pytest.raises(UserError, match=r"no parse\.sbatch in my scripts; name the folder"):
        find_script("parse", Path("my scripts"))


def test_a_job_reads_the_copy_of_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = Given(("train.lr=1",), ("-p", "gpu"), {"parse": ("--mem=1G",), "train": ("-N2",)})
    job = make_job(Work("parse", (1, 4), ("a", "b")), Path("my run"), Path("x/c d.yaml"), given, Path("s"))
    home = tmp_path / "my run" / "slurm"
    assert job.arguments == (f"{home}/c d.yaml", "train.lr=1")
    assert job.log == f"{home}/logs/parse-%A_%a.log"
    assert job.options == ("-p", "gpu", "--mem=1G") and job.shards == (1, 4) and job.name == "mta-parse my run"


def test_a_stage_without_missing_shards_is_left_out(tmp_path: Path) -> None:
    works = [Work("parse", (), ()), Work("train", None, ("export",))]
    assert without_alive(tmp_path, works, alone=True) == works[1:]
