"""Argument vectors of sbatch, their quoting, and the job scripts themselves."""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mta_ds.errors import UsageError
from mta_ds.launch import scripts
from mta_ds.launch.copies import Copy
from mta_ds.launch.options import STAGES
from mta_ds.launch.scripts import Job

FOLDER = Path(__file__).parents[2] / "slurm"
NASTY = '/runs/it\'s "mine"; $(rm -rf *) `x` & 100%j'


def job(stage: str = "train", **changes: object) -> Job:
    values = {"script": Path("slurm/a b.sbatch"), "arguments": (NASTY,), "name": "a 'job'", "log": "/logs/x-%j.log"}
    return Job(stage=stage, **(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("indices", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 3], "0-3"), ([7, 2, 1, 5, 0, 2], "0-2,5,7")]
)
def test_array_ranges(indices: list[int], text: str) -> None:
    assert scripts.array_ranges(indices) == text


def test_a_command_is_a_list_in_which_the_users_options_come_last() -> None:
    command = scripts.sbatch_command(job(shards=(2, 5), options=("--array=2,5%1", "--job-name=b")), after="12")
    assert command == [
        *("sbatch", "--parsable", "--job-name=a 'job'", "--output=/logs/x-%j.log", "--array=2,5"),
        *("--dependency=afterok:12", "--kill-on-invalid-dep=yes", "--array=2,5%1", "--job-name=b"),
        *("slurm/a b.sbatch", NASTY),
    ]


@pytest.mark.parametrize("option", [("-d", "singleton"), ("--dependency=singleton",)])
def test_a_users_dependency_joins_the_pipelines(option: tuple[str, ...]) -> None:
    assert "--dependency=afterok:12,singleton" in (command := scripts.sbatch_command(job(options=option), after="12"))
    assert sum(word.startswith(("-d", "--dependency")) for word in command) == 1
    assert set(option) <= set(scripts.sbatch_command(job(options=option)))  # the first job's is the user's alone
    with pytest.raises(UsageError, match="one is enough"):
        scripts.sbatch_command(job(options=("-dafterok:1?afterok:2",)), after="12")


def test_what_a_dry_run_prints_is_what_would_be_run(tmp_path: Path) -> None:
    """bash itself reads the lines; a function in sbatch's place writes down its arguments and gives an id."""
    home = tmp_path / NASTY.replace("/", "-") / "slurm"
    (tmp_path / "a b.yaml").write_text("lr: 1")
    config = Copy(tmp_path / "a b.yaml", home / "a b-1.yaml", b"")
    site = Copy(Path("site.env"), home / "site-1.env", b"")
    jobs = [job("parse", shards=(0, 1)), job("check"), job("train", options=(f"--comment={NASTY}", "-d", NASTY, ""))]
    lines = scripts.shell_lines(jobs, site, [config], home / "logs")
    log = tmp_path / "calls"
    function = f'sbatch() {{ printf "%s\\0" "$MTA_DS_SITE" sbatch "$@" END >>{shlex.quote(str(log))}; echo 7"$#"; }}\n'
    subprocess.run(["bash", "-euc", function + "\n".join(lines)], check=True, cwd=tmp_path)
    assert config.path.read_text() == "lr: 1" and (home / "logs").is_dir()
    calls = [call.removesuffix("\0").split("\0") for call in log.read_text().split("END\0")[:-1]]
    after = None
    for each, call in zip(jobs, calls, strict=True):
        expected = scripts.sbatch_command(each, after)
        assert call == [str(site.path), *expected]
        after = f"7{len(expected) - 1}"


def find_log(pattern: str, job_id: str, task: int | None) -> list[str]:
    return glob.glob(scripts.log_glob(pattern, job_id, task))


def test_a_log_lies_where_sbatch_was_told_to_write_it(tmp_path: Path) -> None:
    folder = tmp_path / "a %j [b]*"
    folder.mkdir()
    pattern = scripts.log_pattern(folder, "parse", is_array=True)
    assert pattern == f"{tmp_path}/a %%j [b]*/parse-%A_%a.log"
    for name in ("parse-12_3.log", "parse-12_33.log", "train-12.log"):
        (folder / name).touch()
    assert find_log(pattern, "12", 3) == [f"{folder}/parse-12_3.log"]
    assert find_log(scripts.log_pattern(folder, "train", is_array=False), "12", None) == [f"{folder}/train-12.log"]
    with pytest.raises(UsageError, match="backslash"):
        scripts.log_pattern(Path("/a\\b"), "train", is_array=False)


def test_a_log_of_the_users_own_name_is_found(tmp_path: Path) -> None:
    for name in ("my job-0012.out", "x-13_4.out", "x-14_4.out"):
        (tmp_path / name).touch()
    assert find_log(scripts.log_pattern_of("%x-%4j.out", tmp_path), "12", None) == [f"{tmp_path}/my job-0012.out"]
    assert find_log(f"{tmp_path}/%j", "12", None) == []
    # a task's own number is known to Slurm alone
    assert len(find_log(scripts.log_pattern_of("x-%j_%a.out", tmp_path), "12", 4)) == 2


@pytest.mark.parametrize("stage", [*STAGES, "tune"])
def test_every_stage_has_a_script(stage: str) -> None:
    text = (FOLDER / f"{stage}.sbatch").read_text(encoding="utf-8")
    assert f'"${{MTA_DS[@]}}" {stage} ' in text and '"$@"' in text
    for option in ("--requeue", "--open-mode=append", "--output=", f"--job-name=mta-{stage}"):
        assert f"#SBATCH {option}" in text


def test_a_stage_of_one_task_has_one_whatever_the_job_has() -> None:
    """``--nodes=4`` is given to a whole pipeline, and four tasks would write one result."""
    for stage in set(STAGES) - {"train"}:
        assert f'srun --nodes=1 --ntasks=1 "${{MTA_DS[@]}}" {stage} ' in (FOLDER / f"{stage}.sbatch").read_text()


@pytest.mark.parametrize(("restarts", "code"), [(None, 0), ("5", 0), ("6", 1)])
@pytest.mark.parametrize("stage", ["parse", "generate", "check", "evaluate", "tune"])
def test_restarts_come_to_an_end(stage: str, restarts: str | None, code: int, tmp_path: Path) -> None:
    done = run_script(stage, tmp_path, {"SLURM_RESTART_COUNT": restarts} if restarts is not None else {})
    assert done.returncode == code
    if code:
        assert done.stderr == "mta-ds: error: job 7 was restarted more than 5 times; its log says why\n"


@pytest.mark.parametrize(
    ("text", "arguments", "seen"),
    [
        ("train:\n  steps: 3\n", ["a=b c"], ["train.stop_grace_seconds=540", "a=b c"]),
        ("train:\n  steps: 3 # stop_grace_seconds\n", [], ["train.stop_grace_seconds=540"]),
        ("train:\n  stop_grace_seconds: 30\n", ["a=b"], ["a=b"]),
        ("train: {stop_grace_seconds: 30}\n", [], []),
    ],
)
def test_a_rank_has_the_time_of_the_signal_to_save_unless_the_file_says_otherwise(
    text: str, arguments: list[str], seen: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "a run.yaml"
    config.write_text(text)
    done = run_script("train", tmp_path, {}, str(config), *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mta-ds.calls").read_text().split("END\n")[1].splitlines() == ["train", str(config), *seen]


def test_without_an_address_no_training_begins(tmp_path: Path) -> None:
    done = run_script("train", tmp_path, {"SLURMD_NODENAME": "unknown"}, "run.yaml")
    assert done.returncode == 1
    assert done.stderr == "mta-ds: error: scontrol knows no address of unknown; site.env may set MASTER_ADDR\n"


def test_a_requeue_is_told_of_when_it_has_succeeded(tmp_path: Path) -> None:
    fails = run_script("train", tmp_path, {"TRAIN_CODE": "75", "REQUEUE_CODE": "1"}, "run.yaml")
    assert fails.returncode == 1 and "requeued, to go on" not in fails.stdout
    assert "mta-ds: error: stopped early, and could not be requeued" in fails.stderr
    done = run_script("train", tmp_path, {"TRAIN_CODE": "75"}, "run.yaml")
    assert done.returncode == 75 and "requeued, to go on" in done.stdout


# programs that a job script calls; mta-ds writes its arguments down
PROGRAMS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "mta-ds": 'printf "%s\\n" "$@" END >>"$0.calls"; [[ $1 != train ]] || exit "${TRAIN_CODE:-0}"',
    "squeue": "echo RUNNING",
    "scontrol": '[[ $1 == show ]] || exit "${REQUEUE_CODE:-0}"; [[ $3 == unknown ]] || echo "NodeAddr=::1 A=b"',
}


def run_script(
    stage: str, folder: Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run a job script without Slurm."""
    for name, text in PROGRAMS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURMD_NODENAME": "c1", "SLURM_JOB_NUM_NODES": "1"}
    site = {"MTA_DS_SITE": str(FOLDER / "site.env"), "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", FOLDER / f"{stage}.sbatch", *arguments]
    return subprocess.run(
        command, env=os.environ | job | site | environment, capture_output=True, text=True, check=False
    )


def test_scripts_are_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    files = [*FOLDER.glob("*.sbatch"), FOLDER / "site.env"]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
