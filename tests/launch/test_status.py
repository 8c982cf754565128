"""What is said of a run's jobs: rendered from values, and found out without Slurm where it has forgotten them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mta_ds.errors import UserError
from mta_ds.launch import status
from mta_ds.launch.pipeline import Submission, folder, read
from mta_ds.launch.slurm import Task, parse_sacct, parse_squeue
from mta_ds.launch.status import StageStatus


def submission(stage: str, job_id: str, shards: tuple[int, ...] | None, markers: list[Path], logs: Path) -> Submission:
    return Submission(
        stage=stage,
        job_id=job_id,
        seconds=1000.0,
        log=f"{logs}/{stage}-{'%A_%a' if shards is not None else '%j'}.log",
        command=("sbatch",),
        shards=shards,
        markers=tuple(map(str, markers)),
    )


def test_render() -> None:
    stages = [
        StageStatus("parse", ("12", "15"), {"COMPLETED": 3, "FAILED": 1}, (2,), ("task 2: FAILED: why (log)",)),
        StageStatus("train", ("14",), {"RUNNING": 1}, restarts=2),
        StageStatus("generate", ("16",), {"PENDING": 5}, (0, 1, 2, 3, 4), tuple(f"task {i}: waits" for i in range(5))),
    ]
    assert status.render(Path("runs/my run"), stages, "step 3  loss 1.5") == (
        "runs/my run\n"
        "parse     3 COMPLETED, 1 FAILED (jobs 12, 15)\n"
        "          missing shards: 2\n"
        "          task 2: FAILED: why (log)\n"
        "train     RUNNING (job 14, 2 restarts)\n"
        "generate  5 PENDING (job 16)\n"
        "          missing shards: 0-4\n"
        "          task 0: waits\n"
        "          task 1: waits\n"
        "          task 2: waits\n"
        "          and 2 more\n"
        "metrics   step 3  loss 1.5\n"
        "the command that submitted them submits again what is missing, and only that"
    )


def test_last_metrics_are_those_of_the_last_whole_training_step() -> None:
    text = (
        '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.23456789, "base": 1e-7, "dsa/4": 0.5}\n'
        '{"step": 2, "validation/loss": 3}\n{"step": 3, "lo'
    )
    assert status.last_metrics(text) == "step 2  loss 1.23457  base 1e-07"
    assert status.last_metrics("") is None


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("INFO: a\nmta-ds: error: x.jsonl:3: bad\nsrun: error: c1: task 0: Exited\n", "mta-ds: error: x.jsonl:3: bad"),
        ("Traceback\nZeroDivisionError: by zero\nsrun: error: c1\n", "ZeroDivisionError: by zero"),
        ("slurmstepd: error: killed\n\n", "slurmstepd: error: killed"),
        ("", None),
    ],
)
def test_telling_line(log: str, line: str | None) -> None:
    assert status.telling_line(log) == line


def test_squeue_is_read() -> None:
    text = "12|2|FAILED|NonZeroExitCode|0|\n12|N/A|PENDING|None|0|\n14|N/A|RUNNING|None|3|\n"
    assert parse_squeue(text) == {
        ("12", 2): Task("FAILED", "NonZeroExitCode"),
        ("12", None): Task("PENDING"),
        ("14", None): Task("RUNNING", restarts=3),
    }


def test_accounting_is_read_where_a_cluster_has_it() -> None:
    text = "12_0|COMPLETED\n12_3|CANCELLED by 1000\n13|NODE_FAIL\n14_[4-7]|PENDING\n"
    assert parse_sacct(text) == {
        ("12", 0): Task("COMPLETED"),
        ("12", 3): Task("CANCELLED"),
        ("13", None): Task("NODE_FAIL"),
    }


def test_the_newest_job_of_each_shard_counts_and_what_slurm_forgot_is_looked_up(tmp_path: Path) -> None:
    markers = [tmp_path / f"part-{i}.json" for i in range(3)]
    for marker in markers[:2]:
        marker.touch()
    first = submission("parse", "12", (0, 1, 2), markers, tmp_path)
    again = submission("parse", "15", (2,), markers[2:], tmp_path)
    (tmp_path / "parse-12_2.log").write_text("mta-ds: error: the first time\n")
    forgotten = status._stage_status("parse", [first], {})
    assert forgotten.states == {"COMPLETED": 2, "UNKNOWN": 1} and forgotten.missing == (2,)
    assert forgotten.reasons == (f"task 2: UNKNOWN: mta-ds: error: the first time ({tmp_path}/parse-12_2.log)",)
    running = status._stage_status("parse", [first, again], {("12", 2): Task("FAILED"), ("15", 2): Task("RUNNING")})
    assert running.states == {"COMPLETED": 2, "RUNNING": 1} and running.job_ids == ("12", "15")
    markers[2].touch()
    complete = status._stage_status("parse", [first, again], {})
    assert complete.states == {"COMPLETED": 3} and complete.missing == ()
    assert complete.reasons == ("no manifest: submitted again, it writes the manifest or says why not",)
    (tmp_path / "manifest.json").touch()
    assert status._stage_status("parse", [first, again], {}).reasons == ()


def test_a_job_that_failed_began_wherever_its_log_is(tmp_path: Path) -> None:
    def reason(log: str, state: str, why: str = "") -> str | None:
        job = submission("train", "12", None, [], tmp_path).model_copy(update={"log": f"{tmp_path}/{log}"})
        return status._reason(job, None, Task(state, why))

    (tmp_path / "a name-12.out").write_text("mta-ds: error: so\n")
    (tmp_path / "b name-12.out").touch()
    assert reason("a %x-%j.out", "FAILED") == f"FAILED: mta-ds: error: so ({tmp_path}/a name-12.out)"
    assert reason("%x-%j.out", "FAILED") == f"FAILED: its log is one of {tmp_path}/*-12.out"
    assert reason("%j", "FAILED") == f"FAILED: no log {tmp_path}/%j"
    assert reason("%j", "CANCELLED", "DependencyNeverSatisfied") == "never began: an earlier stage failed"


def test_what_was_there_before_a_job_is_not_its_work(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    newer = submission("train", "14", None, [export], tmp_path)
    assert status._stage_status("train", [newer], {}).states == {"COMPLETED": 1}
    older = newer.model_copy(update={"seconds": export.stat().st_mtime + 100})
    assert status._stage_status("train", [older], {}).states == {"UNKNOWN": 1}


def test_a_damaged_list_is_named(tmp_path: Path) -> None:
    folder(tmp_path).mkdir()
    (folder(tmp_path) / "jobs.json").write_text('{"submissions": [{}]}')
    with pytest.raises(UserError, match=r"jobs\.json: damaged"):
        read(tmp_path)
