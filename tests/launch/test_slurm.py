"""Jobs on a real Slurm of two nodes: a pipeline with a killed task, a failing one, a disturbed training, refusals."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from slurm_cluster import (
    STEPS,
    Cluster,
    Command,
    freeze_after,
    listed_pids,
    minutes_so_far,
    start_again,
    wait_for,
    write_run,
)
from support import read_metrics

from mta_ds.launch import pipeline
from mta_ds.launch.guard import newest_step

SCRIPTS = Path(__file__).parents[2] / "slurm"
# what the scripts ask of a cluster's nodes, cut down to these; a name that a shell would take apart
SMALL = ("--cpus-per-task=1", "--ntasks-per-node=1", "--gpus-per-node=0", '--job-name=it\'s "a" $(job)')
# of these check and evaluate use one, with one task
TWO_NODES = ("train:--nodes=2", "check:--nodes=2", "evaluate:--nodes=2")

# most of a test is the start of Python in jobs, on a machine that may do other things meanwhile
pytestmark = pytest.mark.timeout(1800)


class Finished(NamedTuple):
    """A pipeline that came to its end, the second time it was submitted."""

    run_dir: Path
    config: Path
    first: dict[str, str]
    """States of the first attempt's jobs and tasks: ``parse_0``, ..., ``check``, ..."""
    told: str
    """What status said after it."""
    dry: str
    """What --dry-run said before the second attempt."""
    states: dict[str, str]
    """Of the second attempt."""


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name a shell would take apart."""
    folder = tmp_path_factory.mktemp("runs") / 'it\'s "mine"; $(x) 100%j'
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def finished(cluster: Cluster, mta_ds: Command, pair: Path, root: Path) -> Finished:
    """A pipeline of which a task of the parse was killed, and which was then submitted again."""
    run_dir = root / "run a"
    config = write_run(pair, root, run_dir)
    assert mta_ds("slurm", "pipeline", config, *SMALL, *TWO_NODES)[0] == 0
    first = ids(run_dir)
    task = f"{first['parse']}_2"
    wait_for(lambda: f"{task}.0" in cluster.steps(), f"a step of {task}", cluster.root)
    cluster.kill(task)
    states = states_by_stage(cluster, first)
    told = mta_ds("slurm", "status", config)[1]
    dry = mta_ds("slurm", "pipeline", config, *SMALL, *TWO_NODES, "--dry-run")[1]
    assert mta_ds("slurm", "pipeline", config, *SMALL, *TWO_NODES)[0] == 0
    return Finished(run_dir, config, states, told, dry, states_by_stage(cluster, ids(run_dir)))


def ids(run_dir: Path) -> dict[str, str]:
    """The last job of each stage."""
    return {each.stage: each.job_id for each in pipeline.read(run_dir)}


def states_by_stage(cluster: Cluster, jobs: dict[str, str]) -> dict[str, str]:
    """Wait for the jobs; their states and their tasks' by stage instead of number."""
    stages = {job_id: stage for stage, job_id in jobs.items()}
    ended = cluster.wait(*stages)
    return {name.replace(name.partition("_")[0], stages[name.partition("_")[0]], 1): ended[name] for name in ended}


def test_a_process_to_kill_is_one_that_runs() -> None:
    listing = "PID   JOBID STEPID LOCALID GLOBALID\n-1    7     0      0       0\n4711  7     0      -       -\n"
    assert listed_pids(listing) == [4711]
    assert listed_pids("") == []


def test_a_killed_task_stops_the_rest_and_status_says_so(finished: Finished) -> None:
    parses = {f"parse_{i}": "FAILED" if i == 2 else "COMPLETED" for i in range(4)}
    assert finished.first == parses | dict.fromkeys(("check", "train", "evaluate"), "CANCELLED")
    for words in ("3 COMPLETED, 1 FAILED", "missing shards: 2\n", "task 2: FAILED: ", "an earlier stage failed"):
        assert words in finished.told, finished.told


def test_the_same_command_submits_only_what_is_missing(finished: Finished, pair: Path, mta_ds: Command) -> None:
    assert finished.states == dict.fromkeys(("parse_2", "check", "train", "evaluate"), "COMPLETED")
    parses = [each for each in pipeline.read(finished.run_dir) if each.stage == "parse"]
    assert [each.shards for each in parses] == [(0, 1, 2, 3), (2,)]
    assert "--array=2" in parses[1].command
    assert len(read_metrics(finished.run_dir)) >= STEPS
    assert (finished.run_dir / "evaluation" / "after.json").is_file()
    store, whole = (
        json.loads((folder / "manifest.json").read_text())
        for folder in (finished.run_dir.parent / "spans", pair / "spans")
    )
    assert store["counts"] == whole["counts"] and len(store["parts"]) == 4
    told = mta_ds("slurm", "status", finished.run_dir)[1]
    assert mta_ds("slurm", "pipeline", finished.config, *SMALL)[1].endswith("nothing to submit\n")
    assert "parse     4 COMPLETED" in told and "train     COMPLETED" in told and f"step {STEPS}  " in told, told


def test_a_dry_run_prints_what_is_then_run(finished: Finished) -> None:
    commands = [each.command for each in pipeline.read(finished.run_dir)[4:]]
    folder, *lines = finished.dry.splitlines()  # the copies were there already
    assert shlex.split(folder) == ["mkdir", "-p", str(finished.run_dir / "slurm" / "logs")]
    assert len(commands) == len(lines) == 4
    for line, command in zip(lines, commands, strict=True):
        stage, _, rest = line.removesuffix(")").partition("=$(")
        words = [word for word in shlex.split(rest) if not word.startswith(("MTA_DS_SITE=", "--dependency="))]
        assert words == [word for word in command if not word.startswith("--dependency=")], stage


def test_logs_lie_in_the_run_folder(finished: Finished) -> None:
    logs = finished.run_dir / "slurm" / "logs"
    jobs = ids(finished.run_dir)
    for name in (f"parse-{jobs['parse']}_2", *(f"{stage}-{jobs[stage]}" for stage in ("check", "train", "evaluate"))):
        assert (logs / f"{name}.log").is_file(), sorted(logs.iterdir())
    assert (logs / f"check-{jobs['check']}.log").read_text().count("student ← teacher") == 1


def test_requeued_and_at_its_time_limit_a_training_ends_as_if_undisturbed(
    cluster: Cluster, mta_ds: Command, pair: Path, root: Path, finished: Finished
) -> None:
    run_dir = root / "run b"
    config = write_run(pair, root, run_dir)
    submitted = mta_ds("slurm", "train", config, *SMALL, "--nodes=2", "--time=60", "--signal=B:USR1@90")
    assert submitted[0] == 0, submitted
    job = ids(run_dir)["train"]
    log = run_dir / "slurm" / "logs" / f"train-{job}.log"

    # Ranks that stand still after the first steps let Slurm's own clock run; it looks every half minute.
    freeze_after(cluster, run_dir, job, step=2)
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes_so_far(cluster, job) + 1}")
    wait_for(lambda: "told to stop" in log.read_text(), "the signal of the time limit", cluster.root)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # no race against the end itself
    cluster.run("scancel", "--signal=CONT", job)
    start_again(cluster, job, 1)
    saved = newest_step(run_dir)
    assert 2 <= saved < STEPS - 4

    freeze_after(cluster, run_dir, job, step=saved + 5)  # and so after another checkpoint
    assert saved < newest_step(run_dir) < STEPS
    cluster.run("scontrol", "requeue", job)
    start_again(cluster, job, 2)

    assert cluster.wait(job) == {job: "COMPLETED"}
    told = mta_ds("slurm", "status", config)[1]
    assert f"train     COMPLETED (job {job}, 2 restarts)" in told, told
    assert "stop_grace_seconds: 540" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "metrics.jsonl").read_bytes() == (finished.run_dir / "metrics.jsonl").read_bytes()
    weights, expected = (load_file(each / "export" / "model.safetensors") for each in (run_dir, finished.run_dir))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_a_failing_stage_stops_the_rest_and_status_says_why(
    cluster: Cluster, mta_ds: Command, pair: Path, tmp_path: Path
) -> None:
    records = tmp_path / "bad.jsonl"
    records.write_text('{"prompt": "a", "response": "b"}\n{"prompt":\n')
    parse = {"inputs": [str(records)], "output": str(tmp_path / "spans"), "parser": "none"}
    config = write_run(pair, tmp_path, tmp_path / "run", parse=parse)
    assert mta_ds("slurm", "pipeline", config, *SMALL)[0] == 0
    states = states_by_stage(cluster, ids(tmp_path / "run"))
    assert states == {"parse_0": "FAILED"} | dict.fromkeys(("check", "train", "evaluate"), "CANCELLED")
    told = mta_ds("slurm", "status", config)[1]
    assert f"task 0: FAILED: mta-ds: error: {records}:2: " in told, told


def test_cancelled_stays_cancelled(cluster: Cluster, mta_ds: Command, pair: Path, tmp_path: Path) -> None:
    """A job that is cancelled while its ranks run is told to stop, too, and must not requeue itself."""
    config = write_run(pair, tmp_path, tmp_path / "run", mta=None, data__spans=None)
    assert mta_ds("slurm", "train", config, *SMALL)[0] == 0
    job = ids(tmp_path / "run")["train"]
    wait_for(lambda: f"{job}.0" in cluster.steps(), "its step", cluster.root)
    code, _, err = mta_ds("slurm", "train", config, *SMALL)
    assert code == 1 and f"train (job {job}) still waits or runs" in err
    assert mta_ds("slurm", "cancel", tmp_path / "run")[1] == f"cancelled {job}\n"
    assert cluster.wait(job) == {job: "CANCELLED"}
    assert mta_ds("slurm", "cancel", config)[1] == "nothing waits or runs\n"


def test_restarts_without_progress_come_to_an_end(
    cluster: Cluster, mta_ds: Command, pair: Path, tmp_path: Path
) -> None:
    """The site's hook starts ranks that stop at once, as under a time limit that is too short for a step.

    The job begins with an empty environment: what it needs is in site.env, and reaches the ranks.
    """
    config = write_run(pair, tmp_path, tmp_path / "run")
    shutil.copytree(SCRIPTS, tmp_path / "my scripts")
    with open(tmp_path / "my scripts" / "site.env", "a") as site:
        for name in ("PATH", "SLURM_CONF"):
            site.write(f"\nexport {name}={shlex.quote(os.environ[name])}")
        site.write('\nstop() { [[ $1 == slurm ]] && exec mta-ds "$@"; exit 75; }\nexport -f stop\n')
        site.write("MTA_DS=(bash -c 'stop \"$@\"' stop)\n")
    options = (*SMALL, "--nodes=2", "--export=NONE", "--scripts", tmp_path / "my scripts")
    assert mta_ds("slurm", "train", config, *options)[0] == 0
    job = ids(tmp_path / "run")["train"]
    for restart in (1, 2):
        start_again(cluster, job, restart)
    start_again(cluster, job, 3, begun=("RUNNING", "FAILED"))
    assert cluster.wait(job) == {job: "FAILED"}
    assert (
        f"job {job} was restarted 3 times without a new checkpoint after step 0" in mta_ds("slurm", "status", config)[1]
    )


def test_tune_tries_its_plans_on_the_allocation(cluster: Cluster, pair: Path, root: Path, tmp_path: Path) -> None:
    log = tmp_path / "tune.log"  # sbatch itself would read the %j in the run's folder
    run_dir = root / "run c"
    config = write_run(pair, root, run_dir, mta=None, data__spans=None, parse=None)
    script = (
        "sbatch",
        "--parsable",
        *SMALL,
        "--nodes=2",
        f"--output={log}",
        str(SCRIPTS / "tune.sbatch"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTA_DS_SITE", str(SCRIPTS / "site.env"))
        job = cluster.run(*script, str(config), "--trials=1", "--gpus=1").strip()
    assert cluster.wait(job) == {job: "COMPLETED"}, log.read_text()
    (result,) = (run_dir / "tune" / "trials").glob("*/result.json")
    trial = json.loads(result.read_text())
    assert trial["outcome"] == "ok" and len(trial["grad_norms"]) == 8, trial
    assert json.loads((result.parent / "environment.json").read_text())["world_size"] == 2
    assert "2 x cpu" in log.read_text()


def test_tasks_on_their_way_are_left_alone(cluster: Cluster, mta_ds: Command, pair: Path, tmp_path: Path) -> None:
    config = write_run(pair, tmp_path, tmp_path / "run")
    later = (*SMALL, "--begin=now+1hour")
    for number, (change, said) in enumerate(
        [
            ("parse.num_shards=3", "shards 0-2"),
            ("parse.num_shards=3", "on its way"),
            ("parse.num_shards=5", "shards 3-4"),
        ]
    ):
        code, out, err = mta_ds("slurm", "parse", config, change, *later)
        assert code == 0 and said in out, (number, out, err)
    # Slurm has a reason once it has looked at a job
    wait_for(lambda: "waits: BeginTime" in mta_ds("slurm", "status", config)[1], "a reason", cluster.root)
    told = mta_ds("slurm", "status", config)[1]
    assert "5 PENDING" in told and "missing shards: 0-4" in told, told
    code, _, err = mta_ds("slurm", "pipeline", config, *later)
    assert code == 1 and "still waits or runs" in err
    mta_ds("slurm", "cancel", config)
    assert "5 CANCELLED" in mta_ds("slurm", "status", config)[1]


def test_what_sbatch_refuses_is_said_whole_and_leaves_nothing(
    cluster: Cluster, mta_ds: Command, pair: Path, tmp_path: Path
) -> None:
    config = write_run(pair, tmp_path, tmp_path / "run")
    code, _, err = mta_ds("slurm", "pipeline", config, *SMALL, "--begin=now+1hour", "train:--partition=no where")
    assert code == 1 and len(err.splitlines()) == 1
    for words in (
        "mta-ds: error: train: sbatch: error: invalid partition specified: no where; ",
        "sbatch: error: Batch job submission failed: Invalid partition name specified; ",
        "--partition, --account",
    ):
        assert words in err, err
    assert pipeline.read(tmp_path / "run") == []
    assert cluster.run("squeue", "--noheader") == ""
