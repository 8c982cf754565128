"""Run plans for real, a few steps each, in processes of their own: running out of memory is a result, not an end.

A trial is ``mta-ds train`` on the run's own data, in ``tune/trials/<name>``: 8 steps, of which 4 to 8 are timed (ZeRO-3
knows its order of gathers after the second). What it found is kept in result.json, so that tune resumes after a kill.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mta_ds.config import dump
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import student_folder, teacher_folder
from mta_ds.files import write_atomic
from mta_ds.launch.local import PARENT
from mta_ds.losses import DistiLLMConfig
from mta_ds.tuning.machine import Machine
from mta_ds.tuning.memory import CHECKPOINT_COPY, Plan
from mta_ds.tuning.plan_files import override, write_plan
from mta_ds.tuning.search import Candidate, Correction
from mta_ds.tuning.shapes import ModelShape

STEPS = 8
_TIMED = range(4, STEPS + 1)
_OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError", "Cannot allocate memory", "DefaultCPUAllocator: can't allocate")
# the relative difference of gradient norms that another order of sums explains
_AGREE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan, what was predicted of it, and what came."""

    plan: Plan
    predicted_seconds: float
    predicted_bytes: float
    outcome: str
    """ok, out of memory, too slow or failed."""
    note: str = ""
    seconds: float | None = None
    """Median of the timed steps."""
    peak_bytes: float | None = None
    """Of rank 0; on a CPU above what the imported libraries take."""
    grad_norms: tuple[float, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Trial:
        return cls(**(values | {"plan": Plan(**values["plan"]), "grad_norms": tuple(values["grad_norms"])}))


def run_trials(
    config: RunConfig,
    student: ModelShape,
    candidates: Sequence[Candidate],
    machine: Machine,
    root: Path,
    minutes: float,
) -> list[Trial]:
    """Run every candidate's trial that has no result yet, one after another; returns all, norms compared."""
    config = _without_cuts(config)
    baseline = 0 if machine.is_gpu else _library_bytes()
    trials = [_trial(config, student, candidate, machine, root, minutes, baseline) for candidate in candidates]
    return compare_norms(trials, config.train.dtype)


def choose_for_trial(fitting: Sequence[Candidate], count: int) -> list[Candidate]:
    """The fastest plans, one for each placement and micro-batch: buckets alone hardly tell two apart."""
    chosen: dict[Plan, Candidate] = {}
    for candidate in fitting:
        if len(chosen) == count:
            break
        key = dataclasses.replace(candidate.plan, reduce_bucket_size=0, prefetch_bucket_size=0)
        chosen.setdefault(key, candidate)
    return list(chosen.values())


def fit(trials: Sequence[Trial]) -> Correction:
    """Factors on predictions: the median of measured over predicted; 1 where nothing was measured."""
    done = [trial for trial in trials if trial.outcome == "ok"]
    memory = [t.peak_bytes / t.predicted_bytes for t in done if t.peak_bytes and t.predicted_bytes]
    time = [t.seconds / t.predicted_seconds for t in done if t.seconds and t.predicted_seconds]
    return Correction(median(memory) if memory else 1.0, median(time) if time else 1.0)


def compare_norms(trials: Sequence[Trial], dtype: str) -> list[Trial]:
    """Note where a plan's first gradient norm is not the first trial's: the same batch must give the same gradient."""
    done = [trial for trial in trials if trial.outcome == "ok" and trial.grad_norms]
    if not done:
        return list(trials)
    norm = done[0].grad_norms[0]

    def judged(trial: Trial) -> Trial:
        if trial not in done:
            return trial
        off = abs(trial.grad_norms[0] - norm) / max(norm, 1e-30)
        word = "agrees" if off <= _AGREE[dtype] else "DIFFERS"
        return dataclasses.replace(trial, note=f"gradient norm {trial.grad_norms[0]:.4g} {word}")

    return [judged(trial) for trial in trials]


def _trial(
    config: RunConfig,
    student: ModelShape,
    candidate: Candidate,
    machine: Machine,
    root: Path,
    minutes: float,
    baseline: int,
) -> Trial:
    identity = json.dumps([asdict(candidate.plan), config.training_hash(), machine.num_ranks], sort_keys=True)
    folder = root / hashlib.sha256(identity.encode()).hexdigest()[:12]
    result = folder / "result.json"
    if result.is_file():
        return Trial.from_json(json.loads(result.read_text(encoding="utf-8")))
    shutil.rmtree(folder, ignore_errors=True)  # a trial that was killed begins anew
    folder.mkdir(parents=True)
    write_plan(candidate.plan, student, folder)
    trial_config = _config_of_trial(config, override(candidate.plan, folder), folder)
    write_atomic(folder / "trial.yaml", dump(trial_config))
    code, log = _run(["train", str(folder / "trial.yaml")], machine, folder, 60 * minutes)
    trial = read_trial(candidate, machine, folder, code, log, baseline)
    for bulky in ("checkpoints", "export", "tensorboard"):
        shutil.rmtree(folder / bulky, ignore_errors=True)
    write_atomic(result, json.dumps(trial.as_json(), indent=1))
    return trial


def read_trial(
    candidate: Candidate, machine: Machine, folder: Path, code: int | None, log: str, baseline: int
) -> Trial:
    """What a trial's run folder and log say; ``code`` is None where its time was over."""
    host = sum(size for name, size in candidate.memory.host.items() if name != CHECKPOINT_COPY)  # a trial makes none
    predicted = candidate.memory.peak + (0 if machine.is_gpu else host)
    trial = Trial(candidate.plan, candidate.time.total, predicted, "ok")
    if code != 0:
        said = [line.strip() for line in log.splitlines() if line.strip()]
        last = next((line for line in reversed(said) if "rror" in line), said[-1] if said else "said nothing")
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        oom = killed or any(word in log for word in _OUT_OF_MEMORY)
        outcome = "too slow" if code is None else "out of memory" if oom else "failed"
        return dataclasses.replace(trial, outcome=outcome, note=last[:200])
    perf, metrics = _rows(folder / "perf.jsonl"), _rows(folder / "metrics.jsonl")
    return dataclasses.replace(
        trial,
        seconds=median(row["seconds"] for row in perf if row["step"] in _TIMED),
        peak_bytes=max(row["peak_memory_bytes"] for row in perf) - baseline,
        grad_norms=tuple(row["grad_norm"] for row in metrics if "grad_norm" in row),
    )


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _config_of_trial(config: RunConfig, changes: dict[str, dict[str, Any]], folder: Path) -> RunConfig:
    """The run, short and alone: no checkpoint in between, no validation unless the method lives by it."""
    train = changes["train"] | {
        **{"steps": STEPS, "epochs": None, "log_every": 1, "save_every": None, "validate_every": None},
        **{"asynchronous_saves": False, "max_minutes": None, "wandb_project": None},
    }
    data: dict[str, Any] = {} if isinstance(config.loss, DistiLLMConfig) else {"validation": []}
    values = config.model_dump(mode="json") | {"run_dir": str(folder)}
    for section, update in {**changes, "train": train, "data": data}.items():
        values[section] = values[section] | update
    return RunConfig.model_validate(values)


def _without_cuts(config: RunConfig) -> RunConfig:
    """A student that is cut or drawn at random, and an adapter that is merged, are made once, for all trials."""
    teacher = teacher_folder(config)
    student = student_folder(config, teacher)
    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update={"path": str(teacher), "adapter": None}),
            "student": config.student.model_copy(update={"path": str(student), "config": None, "teacher_layers": None}),
        }
    )


def _run(arguments: list[str], machine: Machine, folder: Path, seconds: float) -> tuple[int | None, str]:
    """Run a command of ours on all ranks, in a process group of its own; its exit code, None if time was over."""
    command, environment = [sys.executable, "-m", "mta_ds", *arguments], dict(os.environ)
    if "SLURM_JOB_ID" in os.environ:  # the allocation's tasks are the ranks
        command = ["srun", "--kill-on-bad-exit=1", f"--ntasks={machine.num_ranks}", *command]
    else:
        command += ["--nproc", str(machine.num_ranks)]
        environment[PARENT] = str(os.getpid())  # should tune be killed, its trial ends too
    log = folder / "log.txt"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the ranks follow their launcher
            process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


def _library_bytes() -> int:
    """What a rank holds before it has a model: the imported libraries."""
    code = "import mta_ds.engine.train; from mta_ds.engine.metrics import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])
