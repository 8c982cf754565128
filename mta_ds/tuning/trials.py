"""Run plans for real, a few steps each, in processes of their own: running out of memory is a result, not an end.

A trial is ``mta-ds train`` on the run's own data, in ``tune/trials/<name>``: 8 steps, of which 4 to 8 are timed (ZeRO-3
knows its order of gathers after the second). What it found is kept in result.json, so that tune resumes after a kill;
a trial that failed or was too slow is run again, since its reason may be gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mta_ds.config import dump
from mta_ds.engine.config import RunConfig
from mta_ds.engine.pair import student_folder, teacher_folder
from mta_ds.files import write_atomic
from mta_ds.tuning.machine import Machine
from mta_ds.tuning.memory import CHECKPOINT_COPY, Plan
from mta_ds.tuning.plan_files import override, write_plan
from mta_ds.tuning.processes import library_bytes, run_ranks
from mta_ds.tuning.search import Candidate, Correction
from mta_ds.tuning.shapes import ModelShape

STEPS = 8
OK, OUT_OF_MEMORY, TOO_SLOW, FAILED, DIFFERS = "ok", "out of memory", "too slow", "failed", "differs"
_OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "OutOfMemoryError",
    "Cannot allocate memory",
    "DefaultCPUAllocator: can't allocate",
)
# the relative difference of gradient norms that another order of sums explains
_AGREE = {"float32": 1e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan, what was predicted of it, and what came."""

    plan: Plan
    predicted_seconds: float
    predicted_bytes: float
    outcome: str
    """ok, out of memory, too slow or failed; or it ran, and its gradient differs from the others'."""
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


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs trials of one configuration on one machine, below ``root``."""

    config: RunConfig
    student: ModelShape
    machine: Machine
    root: Path
    minutes: float
    steps: int = STEPS

    def run(self, candidates: Sequence[Candidate]) -> list[Trial]:
        """Every candidate's trial that has no result yet, one after another."""
        config = _without_cuts(self.config)
        baseline = library_bytes(self.machine)
        return [self._trial(config, candidate, baseline) for candidate in candidates]

    def _trial(self, config: RunConfig, candidate: Candidate, baseline: int) -> Trial:
        folder = self.root / self._name(config, candidate.plan)
        result = folder / "result.json"
        if result.is_file():
            kept = Trial.from_json(json.loads(result.read_text(encoding="utf-8")))
            predicted = (candidate.time.total, predicted_bytes(candidate, self.machine))  # by this version's model
            return dataclasses.replace(kept, predicted_seconds=predicted[0], predicted_bytes=predicted[1])
        shutil.rmtree(folder, ignore_errors=True)  # a trial that was killed begins anew
        folder.mkdir(parents=True)
        write_plan(candidate.plan, self.student, folder)
        trial_config = _config_of_trial(config, override(candidate.plan, folder), folder, self.steps)
        write_atomic(folder / "trial.yaml", dump(trial_config))
        command = ["train", str(folder / "trial.yaml")]
        code, log = run_ranks(command, self.machine, folder / "log.txt", 60 * self.minutes)
        trial = read_trial(candidate, self.machine, folder, code, log, baseline)
        for bulky in ("checkpoints", "export", "tensorboard"):
            shutil.rmtree(folder / bulky, ignore_errors=True)
        if trial.outcome in (OK, OUT_OF_MEMORY):
            write_atomic(result, json.dumps(trial.as_json(), indent=1))
        return trial

    def _name(self, config: RunConfig, plan: Plan) -> str:
        """Of a trial's folder: what another run, plan or machine would not have."""
        machine = self.machine
        where = [machine.name, machine.memory, machine.gpus_per_node, machine.num_nodes]
        identity = json.dumps([asdict(plan), config.training_hash(), where, self.steps], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]


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
    done = [trial for trial in trials if trial.outcome == OK]
    memory = [t.peak_bytes / t.predicted_bytes for t in done if t.peak_bytes and t.predicted_bytes]
    time = [t.seconds / t.predicted_seconds for t in done if t.seconds and t.predicted_seconds]
    return Correction(median(memory) if memory else 1.0, median(time) if time else 1.0)


def compare_norms(trials: Sequence[Trial], dtype: str) -> list[Trial]:
    """Tell the trials that differ: the same batch must give the same gradient norm, that of most trials (or the first).

    A plan whose gradient is another's is no choice, however fast.
    """
    done = [trial for trial in trials if trial.outcome == OK and trial.grad_norms]
    norms = [trial.grad_norms[0] for trial in done]

    def agree(a: float, b: float) -> bool:
        return abs(a - b) <= _AGREE[dtype] * max(abs(b), 1e-30)

    if not norms:
        return list(trials)
    norm = max(norms, key=lambda one: sum(agree(one, other) for other in norms))

    def judged(trial: Trial) -> Trial:
        if trial not in done:
            return trial
        own = trial.grad_norms[0]
        if agree(own, norm):
            return dataclasses.replace(trial, note=f"gradient norm {own:.4g} agrees")
        return dataclasses.replace(trial, outcome=DIFFERS, note=f"gradient norm {own:.4g}, others' {norm:.4g}")

    return [judged(trial) for trial in trials]


def predicted_bytes(candidate: Candidate, machine: Machine) -> float:
    """What a trial of the candidate should hold: on a CPU the host's memory as well, but no checkpoint's copy."""
    host = sum(size for name, size in candidate.memory.host.items() if name != CHECKPOINT_COPY)
    return candidate.memory.peak + (0 if machine.is_gpu else host)


def read_trial(
    candidate: Candidate, machine: Machine, folder: Path, code: int | None, log: str, baseline: int
) -> Trial:
    """What a trial's run folder and log say; ``code`` is None where its time was over."""
    trial = Trial(candidate.plan, candidate.time.total, predicted_bytes(candidate, machine), OK)
    if code != 0:
        said = [line.strip() for line in log.splitlines() if line.strip()]
        last = next((line for line in reversed(said) if "rror" in line), said[-1] if said else "said nothing")
        killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)
        oom = killed or any(word in log for word in _OUT_OF_MEMORY_WORDS)
        outcome = TOO_SLOW if code is None else OUT_OF_MEMORY if oom else FAILED
        return dataclasses.replace(trial, outcome=outcome, note=last[:200])
    perf, metrics = _rows(folder / "perf.jsonl"), _rows(folder / "metrics.jsonl")
    return dataclasses.replace(
        trial,
        seconds=median(row["seconds"] for row in perf[len(perf) // 2 - 1 :]),
        peak_bytes=max(row["peak_memory_bytes"] for row in perf) - baseline,
        grad_norms=tuple(row["grad_norm"] for row in metrics if "grad_norm" in row),
    )


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _config_of_trial(config: RunConfig, changes: dict[str, dict[str, Any]], folder: Path, steps: int) -> RunConfig:
    """The run, short and alone: no checkpoint in between, no validation unless the method lives by it."""
    train = changes["train"] | {
        **{"steps": steps, "epochs": None, "log_every": 1, "save_every": None, "validate_every": None},
        **{"asynchronous_saves": False, "max_minutes": None, "wandb_project": None},
    }
    data: dict[str, Any] = {} if config.loss.adapts else {"validation": []}
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
