"""The stage: plan for two models at once, try the best few for real where there is a machine, write down the choice."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mta_ds.engine.config import RunConfig
from mta_ds.errors import UserError
from mta_ds.tuning.changes import explain_nothing_fits
from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.page import next_bottleneck, write_page
from mta_ds.tuning.plan_files import write_plan
from mta_ds.tuning.search import Candidate, Correction, Search, global_batch, search, with_global_batch
from mta_ds.tuning.shapes import Workload, workload
from mta_ds.tuning.trials import (
    OK,
    OUT_OF_MEMORY,
    Runner,
    Trial,
    choose_for_trial,
    compare_norms,
    fit,
    predicted_bytes,
)

_ROUNDS = 4  # of trials that all run out of memory


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How far to go."""

    trials: int = 3
    """Plans to run for real; 0 plans only."""
    minutes: float = 20
    """A trial's time."""
    global_batch: int | None = None
    """Samples of a step over all ranks; the YAML's micro-batch and accumulation on every rank unless given."""


def tune(config: RunConfig, machine: Machine, options: TuneOptions) -> str:
    """Plan a run on a machine and write ``<run_dir>/tune``; returns what to say.

    Raises:
        UserError: no plan fits, with the smallest change after which one would; or no trial ended well.
    """
    work = workload(config)
    if options.global_batch is not None:
        work = with_global_batch(work, options.global_batch, machine)
    folder = config.run_dir / "tune"
    found, correction = search(work, machine), Correction()
    if not found.fitting:
        write_page(folder, work, machine, found, [], correction)
        raise UserError(f"{explain_nothing_fits(work, machine, found)} (all plans: {folder / 'tune.md'})")
    trials: list[Trial] = []
    if options.trials:
        runner = Runner(config, work.student, machine, folder / "trials", options.minutes)
        trials = compare_norms(try_plans(runner, found.fitting, options.trials), config.train.dtype)
        correction = fit(trials)
        found = measured_first(search(work, machine, correction), trials)
    return _write(work, machine, found, trials, correction, folder)


def try_plans(runner: Runner, fitting: Sequence[Candidate], count: int) -> list[Trial]:
    """Run the fastest plans; where all ran out of memory, the fastest of those that need less, a few times."""
    trials: list[Trial] = []
    for _ in range(_ROUNDS):
        trials += runner.run(choose_for_trial(fitting, count))
        failed = [trial for trial in trials if trial.outcome == OUT_OF_MEMORY]
        tried = {trial.plan for trial in trials}
        fitting = [c for c in leaner(fitting, failed, runner.machine) if c.plan not in tried]
        if any(trial.outcome == OK for trial in trials) or not failed or not fitting:
            break
    return trials


def leaner(fitting: Sequence[Candidate], failed: Sequence[Trial], machine: Machine) -> list[Candidate]:
    """The plans that are predicted to need less than any that ran out of memory."""
    limit = min((trial.predicted_bytes for trial in failed), default=float("inf"))
    return [candidate for candidate in fitting if predicted_bytes(candidate, machine) < limit]


def measured_first(found: Search, trials: Sequence[Trial]) -> Search:
    """The fastest of the plans that have run before all others, whatever was predicted of them; none that has failed.

    Raises:
        UserError: every trial failed.
    """
    done = {trial.plan: trial.seconds for trial in trials if trial.outcome == OK and trial.seconds is not None}
    failed = {trial.plan for trial in trials} - set(done)
    if not done:
        raise UserError(f"every trial failed; the first: {trials[0].outcome}: {trials[0].note}")

    def has_run(candidate: Candidate) -> bool:
        return candidate.plan in done

    ran = [candidate._replace(reason=None) for candidate in (*found.fitting, *found.pruned) if has_run(candidate)]
    ran.sort(key=lambda candidate: done[candidate.plan])
    rest = [candidate for candidate in found.fitting if not has_run(candidate) and candidate.plan not in failed]
    pruned = [candidate for candidate in found.pruned if not has_run(candidate)]
    return Search([*ran, *rest], pruned)


def _write(
    work: Workload, machine: Machine, found: Search, trials: Sequence[Trial], correction: Correction, folder: Path
) -> str:
    chosen = found.fitting[0]
    written = write_plan(chosen.plan, work.student, folder)
    page = write_page(folder, work, machine, found, trials, correction)
    return "\n".join(
        [
            f"{len(found.fitting)} of {len(found.fitting) + len(found.pruned)} plans fit {machine.num_ranks} x "
            f"{machine.name}, {global_batch(work, machine)} samples a step",
            *([f"rates assumed: those of {machine.rates_of}"] if machine.rates_of else []),
            f"chosen: {chosen.plan.describe()}",
            f"predicted: {chosen.time.total:.2f} s a step, {chosen.memory.peak / GB:.1f} of "
            f"{machine.usable / GB:.1f} GB ({chosen.memory.peak_phase})",
            next_bottleneck(chosen),
            f"why, and what else was tried: {page}",
            f"use it: mta-ds train CONFIG {shlex.quote(f'@{written}')}",
        ]
    )
