"""What is submitted for a run, without Slurm; with it, see test_slurm.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ds.errors import UsageError, UserError
from mta_ds.launch.options import Given
from mta_ds.launch.pipeline import Plan, Submission, dry_run, find_script, make_plan, without_alive
from mta_ds.launch.scripts import sbatch_command
from mta_ds.launch.works import Work

GIVEN = Given(("train.lr=1", "@tune.yaml", "train.lr=2"), ("-p", "gpu"), {"parse": ("--mem=1G",), "train": ("-N2",)})


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
    with pytest.raises(
        UserError, match=r"no parse\.sbatch in my scripts; name the folder of the job scripts with --scripts"
    ):
        find_script("parse", Path("my scripts"))


def plan(tmp_path: Path, *works: Work, given: Given = GIVEN) -> Plan:
    for name, text in {"x/c d.yaml": "a: 1", "tune.yaml": "b: 2", "site.env": "c"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return make_plan(Path("my run"), works, Path("x/c d.yaml"), given, [tmp_path / "s.sbatch"] * len(works))


def test_a_job_reads_copies_of_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan(tmp_path, Work("parse", (1, 4), ("a", "b")), Work("train", None, ("c",)))
    home = tmp_path / "my run" / "slurm"
    config, override, site = made.copies
    assert [each.source for each in made.copies] == [
        tmp_path / "x/c d.yaml",
        tmp_path / "tune.yaml",
        tmp_path / "site.env",
    ]
    assert made.site == site and {each.path.parent for each in made.copies} == {home}
    job = made.jobs[0]
    assert job.arguments == (str(config.path), "train.lr=1", f"@{override.path}", "train.lr=2")
    assert job.log == f"{home}/logs/parse-%A_%a.log"
    assert job.options == ("-p", "gpu", "--mem=1G") and job.shards == (1, 4) and job.name == "mta-parse my run"


def test_a_dry_run_copies_what_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = plan(tmp_path, Work("train", None, ("c",)))
    commands = [line.split()[0].partition("=")[0] for line in dry_run(Path("my run"), made).splitlines()]
    assert commands == ["mkdir", "cp", "cp", "cp", "train"]
    for copy in made.copies:
        copy.keep()
    assert len(dry_run(Path("my run"), made).splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "log"),
    [
        (("-o", "my log-%j"), "{cwd}/my log-%j"),
        (("--output=/x/%x.log",), "/x/%x.log"),
        (("--output=a", "-D", "there"), "{cwd}/there/a"),
    ],
)
def test_where_the_user_has_the_log_is_remembered(
    options: tuple[str, ...], log: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = plan(tmp_path, Work("train", None, ("c",)), given=Given((), options)).jobs[0]
    assert job.log == log.format(cwd=tmp_path)
    assert [word for word in sbatch_command(job) if word.startswith(("-o", "--output"))] == [f"--output={job.log}"]


def test_an_option_that_breaks_a_stage_is_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    works = (Work("parse", (0,), ("a",)), Work("train", None, ("c",)))
    with pytest.raises(UsageError, match="--array: every task would be a whole train"):
        plan(tmp_path, *works, given=Given((), ("--array=0-3",)))
    assert plan(tmp_path, *works, given=Given((), (), {"parse": ("--array=0",)})).jobs[0].options == ("--array=0",)


def test_shards_that_wait_or_run_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works = [Work("parse", (0, 1), ("a", "b")), Work("generate", (0,), ("c",))]
    submitted = Submission(stage="parse", job_id="7", seconds=0, log="", command=(), shards=(0, 1), markers=("a", "b"))
    monkeypatch.setattr("mta_ds.launch.pipeline.alive", lambda _: [(submitted, (0,))])
    assert without_alive(tmp_path, works, alone=False) == [Work("parse", (1,), ("b",)), works[1]]
