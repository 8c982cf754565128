"""A run that is killed, stopped, or resumed by other ranks under another stage ends as one that was left alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_cases import fill, small_disk
from safetensors.torch import load_file, save_file
from support import CPU_TEST, assert_same_run, broken_teacher, read_metrics, run_command, train, write_config
from transformers import AutoModelForCausalLM

from mta_ds.engine.commit import check_whole, is_committed, step_folders

OPTIONS = {"train__micro_batch_size": 2, "train__save_every": 2, "train__steps": 20}


@pytest.fixture(scope="module")
def undisturbed(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Folder and weights of two ranks that were left alone."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    return run_dir, train(pair, run_dir, 2, **OPTIONS)[1]


def start(path: Path, **options: Any) -> subprocess.Popen[str]:
    """Two ranks under our launcher."""
    command = [sys.executable, "-m", "mta_ds", "train", str(path), "--nproc", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


def kill_when(path: Path, is_time: Callable[[Path], bool], rank: int) -> int:
    """Start two ranks, SIGKILL one while something is so; the launcher's exit code."""
    launcher = start(path, stderr=subprocess.DEVNULL)
    while launcher.poll() is None:
        if is_time(path.parent):
            pids = ranks_of(launcher)
            signal_all(pids, signal.SIGSTOP)
            if is_time(path.parent):  # still: nobody moves any more
                os.kill(pids[rank], signal.SIGKILL)
                signal_all([pid for pid in pids if pid != pids[rank]], signal.SIGCONT)
                break
            signal_all(pids, signal.SIGCONT)
        time.sleep(0.001)
    code = launcher.wait()
    assert_all_whole(path.parent)
    return code


def num_rows(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def inside_a_save(run_dir: Path) -> bool:
    """Whether a checkpoint is partly written, and an earlier one is there."""
    folders = step_folders(run_dir / "checkpoints")
    unfinished = [folder for folder in folders if not is_committed(folder)]
    return len(folders) > len(unfinished) > 0 and any(unfinished[0].glob("*shard*"))


def assert_all_whole(run_dir: Path) -> None:
    """Each checkpoint with a COMMIT is what COMMIT says."""
    for folder in step_folders(run_dir / "checkpoints"):
        if is_committed(folder):
            check_whole(folder)


def assert_ended_as(run_dir: Path, undisturbed: tuple[Path, dict[str, torch.Tensor]]) -> None:
    """Bit for bit."""
    assert (run_dir / "metrics.jsonl").read_bytes() == (undisturbed[0] / "metrics.jsonl").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, undisturbed[1][name]), name
    assert_all_whole(run_dir)


def test_a_killed_and_a_stopped_run_end_as_one_that_was_not(pair: Path, undisturbed, tmp_path: Path) -> None:
    path = write_config(pair, tmp_path, **OPTIONS)
    assert kill_when(path, lambda run_dir: num_rows(run_dir) >= 6, rank=1) == 128 + signal.SIGKILL
    assert kill_when(path, inside_a_save, rank=0) == 128 + signal.SIGKILL
    left = [folder for folder in step_folders(tmp_path / "checkpoints") if not is_committed(folder)]
    stopped = run_command("train", path, "train.max_minutes=1e-9", "--nproc", 2, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert left and not any(folder.exists() and not is_committed(folder) for folder in left)
    assert run_command("train", path, "--nproc", 2).returncode == 0
    assert_ended_as(tmp_path, undisturbed)
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 4 and [start["step"] for start in starts] == sorted(start["step"] for start in starts)
    assert not (tmp_path / ".lock").exists()


def test_a_run_in_bf16_killed_inside_a_save_ends_as_one_that_was_not(pair: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"train__dtype": "bfloat16", "train__steps": 8, "train__save_every": 1}
    weights = train(pair, tmp_path / "a", 2, **options)[1]
    path = write_config(pair, tmp_path / "b", **options)
    assert kill_when(path, inside_a_save, rank=1) == 128 + signal.SIGKILL
    run_command("train", path, "--nproc", 2)
    assert_ended_as(tmp_path / "b", (tmp_path / "a", weights))


def test_a_disk_that_is_full_for_a_while_changes_nothing(pair: Path, undisturbed, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=16), open(tmp_path / "errors", "w") as told:
        run_dir = tmp_path / "disk" / "run"
        launcher = start(write_config(pair, run_dir, **OPTIONS), stdout=subprocess.PIPE, stderr=told)
        try:
            fill_between(launcher, run_dir, 3, 16)  # long enough for every log to want another page
            assert launcher.wait() == 0, (tmp_path / "errors").read_text()
        finally:
            launcher.kill()
        assert_ended_as(run_dir, undisturbed)
    errors = (tmp_path / "errors").read_text()
    assert "CHECKPOINT NOT SAVED" in errors and "LOG NOT WRITTEN" in errors and "Traceback" not in errors


def fill_between(launcher: subprocess.Popen[str], run_dir: Path, first: int, last: int) -> None:
    """Leave a run's disk no room from one step to another, and follow it to its end."""
    filler = None
    assert launcher.stdout is not None
    for line in launcher.stdout:
        match = re.match(r"step (\d+)/", line)
        step = int(match[1]) if match else 0
        if filler is None and step >= first:
            pids = ranks_of(launcher)
            signal_all(pids, signal.SIGSTOP)
            # what a checkpoint has of the disk comes free again when it fails, and would be room for the logs
            if all(is_committed(folder) for folder in step_folders(run_dir / "checkpoints")):
                filler = fill(run_dir)
            signal_all(pids, signal.SIGCONT)
        elif step == last and filler is not None:
            filler.unlink()


def test_a_stopped_run_in_bf16_ends_as_one_that_was_not(pair: Path, tmp_path: Path) -> None:
    # stopped before the validation of step 1, which comes again; as does the one that its checkpoint is from before
    options = {"train__dtype": "bfloat16", "train__steps": 4, "train__validate_every": 1}
    undisturbed = train(pair, tmp_path / "a", 1, **options)
    losses = [row["loss"] for row in undisturbed[0] if "loss" in row]
    assert losses[-1] < losses[0] and all(w.dtype == torch.bfloat16 for w in undisturbed[1].values())
    path = write_config(pair, tmp_path / "b", **options)
    assert run_command("train", path, "train.max_minutes=1e-9", "--nproc", 1, check=False).returncode == 75
    assert_same_run(train(pair, tmp_path / "b", 1, **options), undisturbed, tolerance=0)
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


def test_other_ranks_and_stages_go_on_with_it(pair: Path, tmp_path: Path) -> None:
    """2 ranks under ZeRO-3, one under ZeRO-2 in micro-steps, 2 under ZeRO-1: a step each; one again: ten steps."""
    models = shutil.copytree(pair / "teacher", tmp_path / "teacher")
    options = {"train__steps": 13, "teacher__path": str(models)}
    undisturbed = train(pair, tmp_path / "a", 1, **options)
    path = write_config(pair, tmp_path / "b", **options)
    for nproc, stage, micro, accumulation in ((2, 3, 2, 1), (1, 2, 1, 4), (2, 1, 1, 2)):
        zero = json.loads(CPU_TEST.read_text()) if stage == 3 else {"zero_optimization": {"stage": stage}}
        config = tmp_path / "zero.json"
        config.write_text(json.dumps(zero))
        batch = f"train.micro_batch_size={micro}", f"train.gradient_accumulation_steps={accumulation}"
        options = *batch, f"student.deepspeed={config}", "train.max_minutes=1e-9"
        assert run_command("train", path, *options, "--nproc", nproc, check=False).returncode == 75
    run_command("train", path, "--nproc", 1)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "export").state_dict()
    assert_same_run((read_metrics(tmp_path / "b"), weights), undisturbed)
    shapes = [json.loads(commit.read_text()) for commit in (tmp_path / "b" / "checkpoints").glob("*/COMMIT")]
    assert shapes and all(shape["batch_size"] == 4 for shape in shapes)
    refused = run_command("train", path, "train.micro_batch_size=3", "train.steps=7", check=False)
    assert refused.returncode == 1 and refused.stderr.count("mta-ds: error") == 1
    other = {name: 1.01 * weight for name, weight in load_file(models / "model.safetensors").items()}
    save_file(other, models / "model.safetensors", metadata={"format": "pt"})
    refused = run_command("train", path, check=False)
    assert refused.returncode == 1 and "saved with other weights or configuration of the teacher" in refused.stderr


def test_a_step_that_is_not_finite_is_left_out_and_counted(pair: Path, tmp_path: Path) -> None:
    """Every step: the teacher is broken."""
    teacher = broken_teacher(pair, tmp_path / "teacher")
    options = {"teacher__path": str(teacher), "train__non_finite": "skip", "train__steps": 2, "train__dtype": "float32"}
    metrics, weights = train(pair, tmp_path / "run", 1, **options)
    rows = [row for row in metrics if "lr" in row]
    assert [row["skipped_steps"] for row in rows] == [1, 2] and not any("loss" in row for row in rows)
    for name, weight in AutoModelForCausalLM.from_pretrained(pair / "student").state_dict().items():
        assert torch.equal(weight, weights[name]), name
