"""The small parts of the engine: schedule, logs, steps, ranks from Slurm, stop signals."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import broken_teacher, run_command, write_config
from torch import nn

from mta_ds.config import load
from mta_ds.data import build_dataset
from mta_ds.engine import RunConfig, TrainConfig, distributed
from mta_ds.engine.health import Heartbeat
from mta_ds.engine.metrics import MetricsLog
from mta_ds.engine.pair import student_folder
from mta_ds.engine.setup import number_of_steps, switch_dropout_off
from mta_ds.engine.stopping import Stopped, StopWatch
from mta_ds.engine.train import is_due, schedule_factor
from mta_ds.engine.validation import rank_batches, validate_run
from mta_ds.launch.local import rank_environment
from mta_ds.models import load_pretrained, load_tokenizer


def test_schedule_warms_up_and_follows_a_cosine() -> None:
    train = TrainConfig(steps=14, warmup_steps=4, min_lr_ratio=0.1)
    factors = [schedule_factor(step, 14, train) for step in range(1, 15)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[9] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a > b for a, b in itertools.pairwise(factors[4:])) and factors[-1] > 0.1
    constant = TrainConfig(steps=9, schedule="constant")
    assert {schedule_factor(step, 9, constant) for step in range(1, 10)} == {1.0}


def test_number_of_steps() -> None:
    assert number_of_steps(TrainConfig(steps=7), 100, 8) == 7
    epochs = TrainConfig(epochs=2, micro_batch_size=4, gradient_accumulation_steps=2)
    assert number_of_steps(epochs, 100, 1) == 25
    assert number_of_steps(epochs, 100, 4) == 6
    assert number_of_steps(epochs, 1, 64) == 1


def test_what_is_due() -> None:
    assert [s for s in range(1, 8) if is_due(s, 3, 7)] == [3, 6, 7]
    assert [s for s in range(1, 8) if is_due(s, None, 7)] == [7]


def test_a_resumed_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        log.write(step, {"loss": step / 4}, {"seconds": 0.5})
        if step == 3:  # comes again: the checkpoint is from before it
            log.write(step, {"validation/loss": 1.0}, {})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(tmp_path, 3)
    log.write(4, {"loss": 9.0}, {})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 9.0)]
    assert len((tmp_path / "perf.jsonl").read_text().splitlines()) == 3


def test_a_run_that_died_before_its_first_checkpoint_is_logged_anew(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path, 0)
        log.write(0, {"validation/loss": 2.0}, {})
        log.write(1, {"loss": 1.0}, {"seconds": 1.0})
        log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]


def test_what_weights_and_biases_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    run = SimpleNamespace(log=lambda values, step: told.append((values, step)), finish=lambda: told.append("end"))
    stub = SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for start in (0, 1):  # a resumed run of the folder is the same run there
        log = MetricsLog(tmp_path, start, "mine")
        log.write(start + 1, {"loss": 0.5, "bad": float("nan")}, {"seconds": 2.0})
        log.close()
    options = told[0]
    assert isinstance(options, dict) and (options["project"], options["resume"]) == ("mine", "allow")
    values = {"loss": 0.5, "perf/seconds": 2.0}
    assert told == [options, (values, 1), "end", options, (values, 2), "end"]


def test_weights_and_biases_itself_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLog(tmp_path, 0, "mine")
    log.write(1, {"loss": 0.5}, {"seconds": 2.0})
    log.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_dropout_goes_from_modules_and_attributes() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention_dropout = 0.3
            self.drop = nn.Dropout(0.2)

    block = Block()
    switch_dropout_off(block)
    assert block.attention_dropout == 0.0 and block.drop.p == 0.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_step(number: signal.Signals) -> None:
    with StopWatch(None, grace_seconds=60) as watch:
        watch.check()
        assert not watch.agreed()
        os.kill(os.getpid(), number)
        assert watch.agreed() and watch.signalled()
        with pytest.raises(Stopped):
            watch.check()


def test_time_limit_counts_from_the_start_of_the_process() -> None:
    """But while there is no step to save, time alone stops nothing: a run must get on."""
    code = (
        "import sys, time; time.sleep(0.5); from mta_ds.engine.stopping import Stopped, StopWatch\n"
        "with StopWatch(float(sys.argv[1]), 60) as watch: print(watch.agreed(), watch.signalled())"
    )
    for minutes, told in (("0.005", "True False"), ("5", "False False")):
        done = subprocess.run([sys.executable, "-c", code, minutes], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == told, done.stderr


def test_a_stop_that_takes_too_long_ends_all_the_same() -> None:
    """A process that hangs in C, as in a collective whose other ranks are gone: no Python handler runs there."""
    code = """
import ctypes, os, signal, threading
from mta_ds.engine.stopping import Stopped, StopWatch
with StopWatch(None, 0.2):
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    mutex, libc = (ctypes.c_char * 64)(), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75 and "train.stop_grace_seconds" in done.stderr


def test_ranks_from_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[03-04]" ] && echo node03 && echo node04\n')
    scontrol.chmod(0o755)
    monkeypatch.setattr(os, "environ", {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    os.environ |= {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "40123"}
    os.environ["SLURM_JOB_NODELIST"] = "node[03-04]"
    distributed._complete_environment()
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node03", "MASTER_PORT": "20123"}
    assert {name: os.environ[name] for name in expected} == expected


def test_ranks_that_disagree_say_so(pair: Path, tmp_path: Path) -> None:
    """Also where a build of DeepSpeed's was killed and has left its lock, at which another build waits for ever."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    path = write_config(pair, tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "mta_ds", "train", str(path), f"train.lr={1e-4 * (1 + rank)}"],
            env=rank_environment(rank, 2, port)
            | {"MTA_DS_LAUNCHER_PID": str(os.getpid()), "TORCH_EXTENSIONS_DIR": str(lock.parents[1])},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert "mta-ds: error: rank 1 has another configuration than rank 0" in told[0] and "error" not in told[1]


def test_a_taken_port_is_one_line(pair: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment = rank_environment(0, 2, port) | {"MTA_DS_LAUNCHER_PID": str(os.getpid())}
        done = run_command("train", write_config(pair, tmp_path), check=False, extra=environment)
    assert done.returncode == 1 and f"mta-ds: error: MASTER_PORT {port}: something else listens" in done.stderr


def test_a_launchers_environment_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = rank_environment(1, 2, 4567)
    monkeypatch.setattr(os, "environ", ours | {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})
    distributed._complete_environment()
    assert {k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "MASTER_PORT")} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_PORT": "4567",
    }


@pytest.mark.parametrize(("num", "world_size", "size"), [(5, 2, 2), (1, 3, 4), (6, 3, 2), (7, 1, 3)])
def test_validation_batches_count_every_record_once(num: int, world_size: int, size: int) -> None:
    import numpy as np

    from mta_ds.data import Example

    none = {g: np.zeros((0, 2), np.int32) for g in ("word", "phrase")}
    ids = [np.arange(3, dtype=np.int32) + i for i in range(num)]
    examples = [Example(str(i), ids[i], ids[i].copy(), none, 1) for i in range(num)]
    per_rank = [list(rank_batches(examples, size, 0, rank, world_size)) for rank in range(world_size)]  # type: ignore[arg-type]
    assert len({len(batches) for batches in per_rank}) == 1
    counted = [batch.counts.tokens for batches in per_rank for batch in batches]
    assert sum(counted) == 2 * num
    seen = [
        record
        for batches in per_rank
        for batch in batches
        for record, row in zip(batch.record_ids, range(len(batch.record_ids)), strict=True)
        if (batch.targets[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]] != -100).any()
    ]
    assert sorted(seen) == sorted(str(i) for i in range(num))
    assert all(torch.isfinite(b.valid.float()).all() for batches in per_rank for b in batches)


def test_a_validation_that_is_stopped_leaves_nothing(pair: Path, tmp_path: Path) -> None:
    config = load(write_config(pair, tmp_path, train__micro_batch_size=2), RunConfig)
    tokenizer = load_tokenizer(pair / "student")
    heldout = build_dataset(config.data.validation, config.data, tokenizer, None, tmp_path / "cache")
    told: list[str] = []

    class Engine:
        def __call__(self, *_: object) -> dict[str, torch.Tensor]:
            told.append("batch")
            return {"cross_entropy": torch.tensor(2.0), "count": torch.tensor(1)}

        def eval(self) -> None:
            told.append("eval")

        def train(self) -> None:
            told.append("train")

    method = SimpleNamespace(after_validation=lambda loss: told.append(f"loss {loss}"))
    run: Any = SimpleNamespace(
        validation=heldout,
        config=config,
        pair=SimpleNamespace(tokenizer=tokenizer),
        engine=Engine(),
        teacher=None,
        method=method,
    )
    heartbeat = Heartbeat(tmp_path)
    assert not validate_run(run, 7, None, heartbeat, lambda: told.count("batch") == 2)
    assert told == ["eval", "batch", "batch", "train"]
    assert json.loads((tmp_path / "heartbeat" / "rank-00000.json").read_text())["phase"] == "validate"
    assert validate_run(run, 7, None, heartbeat, lambda: False)
    assert told[4:] == ["eval", "batch", "batch", "batch", "train", "loss 2.0"]


def test_student_from_a_config_or_from_the_teachers_layers(pair: Path, tmp_path: Path) -> None:
    for source in ({"config": str(pair / "student" / "config.json")}, {"teacher_layers": 2}):
        run_dir = tmp_path / next(iter(source))
        config = load(write_config(pair, run_dir, student=source), RunConfig)
        folder = student_folder(config, pair / "teacher")
        assert folder == run_dir / "student_init"
        model = load_pretrained(folder, "float32")
        assert model.config.num_hidden_layers == 3
        assert load_tokenizer(folder).get_vocab() == load_tokenizer(pair / "teacher").get_vocab()
        before = (folder / "model.safetensors").stat().st_mtime_ns
        student_folder(config, pair / "teacher")
        assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ({"teacher_layers": 2}, {"teacher_layers": 3}),
        ({"teacher_layers": [0, 1, 5]}, {"teacher_layers": [0, 2, 5]}),
        ({"config": "student"}, {"config": "teacher"}),
        ({"config": "student"}, {"config": "student", "seed": 1}),
    ],
)
def test_a_student_of_other_layers_config_or_seed_is_made_anew(pair: Path, tmp_path: Path, source, other) -> None:
    kept = []
    for given in (source, other):
        where = {"config": str(pair / given["config"] / "config.json")} if "config" in given else given
        config = load(write_config(pair, tmp_path, student=where, train__seed=given.get("seed", 0)), RunConfig)
        kept.append(load_file(student_folder(config, pair / "teacher") / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert len(kept[0]) != len(kept[1]) or not torch.equal(kept[0][name], kept[1][name])


def test_a_student_of_another_teacher_is_made_anew(pair: Path, tmp_path: Path) -> None:
    config = load(write_config(pair, tmp_path, student={"teacher_layers": 1}), RunConfig)
    student_folder(config, pair / "teacher")
    folder = student_folder(config, broken_teacher(pair, tmp_path / "other"))
    assert load_file(folder / "model.safetensors")["model.layers.4.mlp.down_proj.weight"].isnan().any()
