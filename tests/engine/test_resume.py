"""A run that is killed, stopped, or resumed by other ranks under another stage ends as one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from support import CPU_TEST, assert_same_run, broken_teacher, read_metrics, run_command, train, write_config
from transformers import AutoModelForCausalLM


def kill_a_rank(path: Path, rows: int) -> int:
    """Start two ranks, SIGKILL one once metrics.jsonl has so many rows; the launcher's exit code."""
    command = [sys.executable, "-m", "mta_ds", "train", str(path), "--nproc", "2"]
    launcher = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    metrics = path.parent / "metrics.jsonl"
    while launcher.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= rows:
            children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
        time.sleep(0.02)
    return launcher.wait()


def test_a_killed_and_a_stopped_run_end_as_one_that_was_not(pair: Path, tmp_path: Path) -> None:
    options = {"train__micro_batch_size": 2, "train__save_every": 2, "train__steps": 20}
    undisturbed = train(pair, tmp_path / "a", 2, **options)
    path = write_config(pair, tmp_path / "b", **options)
    assert kill_a_rank(path, rows=6) == 128 + signal.SIGKILL
    stopped = run_command("train", path, "train.max_minutes=1e-9", "--nproc", 2, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert run_command("train", path, "--nproc", 2).returncode == 0
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "export")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, undisturbed[1][name]), name


def test_a_stopped_run_in_bf16_ends_as_one_that_was_not(pair: Path, tmp_path: Path) -> None:
    options = {"train__dtype": "bfloat16", "train__steps": 4}
    undisturbed = train(pair, tmp_path / "a", 1, **options)
    losses = [row["loss"] for row in undisturbed[0] if "loss" in row]
    assert losses[-1] < losses[0] and all(w.dtype == torch.bfloat16 for w in undisturbed[1].values())
    path = write_config(pair, tmp_path / "b", **options)
    assert run_command("train", path, "train.max_minutes=1e-9", "--nproc", 1, check=False).returncode == 75
    assert_same_run(train(pair, tmp_path / "b", 1, **options), undisturbed, tolerance=0)
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


def test_other_ranks_and_stages_go_on_with_it(pair: Path, tmp_path: Path) -> None:
    """2 ranks under ZeRO-3, one under ZeRO-2 in micro-steps, 2 under ZeRO-1: a step each; one again: the rest."""
    undisturbed = train(pair, tmp_path / "a", 1, train__steps=6)
    path = write_config(pair, tmp_path / "b", train__steps=6)
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


def test_a_step_that_is_not_finite_is_left_out_and_counted(pair: Path, tmp_path: Path) -> None:
    """Every step: the teacher is broken."""
    teacher = broken_teacher(pair, tmp_path / "teacher")
    options = {"teacher__path": str(teacher), "train__non_finite": "skip", "train__steps": 2, "train__dtype": "float32"}
    metrics, weights = train(pair, tmp_path / "run", 1, **options)
    rows = [row for row in metrics if "lr" in row]
    assert [row["skipped_steps"] for row in rows] == [1, 2] and not any("loss" in row for row in rows)
    for name, weight in AutoModelForCausalLM.from_pretrained(pair / "student").state_dict().items():
        assert torch.equal(weight, weights[name]), name
