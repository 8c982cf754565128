"""The stage: plan for two models at once, try the best few for real where there is a machine, write down the choice."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from mta_ds.engine.config import RunConfig
from mta_ds.errors import UserError
from mta_ds.tuning.machine import GB, Machine
from mta_ds.tuning.page import next_bottleneck, write_page
from mta_ds.tuning.plan_files import write_plan
from mta_ds.tuning.search import Correction, Search, explain_nothing_fits, global_batch, search, with_global_batch
from mta_ds.tuning.shapes import Workload, workload
from mta_ds.tuning.trials import Trial, choose_for_trial, fit, run_trials


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
        candidates = choose_for_trial(found.fitting, options.trials)
        trials = run_trials(config, work.student, candidates, machine, folder / "trials", options.minutes)
        correction = fit(trials)
        found = measured_first(search(work, machine, correction), trials)
    return _write(work, machine, found, trials, correction, folder)


def measured_first(found: Search, trials: list[Trial]) -> Search:
    """The plans that fit, the fastest of those that have been run before all others; none that has failed.

    Raises:
        UserError: every trial failed.
    """
    done = {trial.plan: trial.seconds for trial in trials if trial.outcome == "ok" and trial.seconds is not None}
    failed = {trial.plan for trial in trials} - set(done)
    if not done:
        raise UserError(f"every trial failed; the first: {trials[0].outcome}: {trials[0].note}")
    fitting = [candidate for candidate in found.fitting if candidate.plan not in failed]
    fitting.sort(key=lambda c: (c.plan not in done, done.get(c.plan) or c.time.total))
    return found._replace(fitting=fitting)


def _write(
    work: Workload, machine: Machine, found: Search, trials: list[Trial], correction: Correction, folder: Path
) -> str:
    if not found.fitting:
        raise UserError(f"after the trials no plan fits: {explain_nothing_fits(work, machine, found)}")
    chosen = found.fitting[0]
    written = write_plan(chosen.plan, work.student, folder)
    page = write_page(folder, work, machine, found, trials, correction)
    return "\n".join(
        [
            f"{len(found.fitting)} of {len(found.fitting) + len(found.pruned)} plans fit {machine.num_ranks} x "
            f"{machine.name}, {global_batch(work, machine)} samples a step",
            f"chosen: {chosen.plan.describe()}",
            f"predicted: {chosen.time.total:.2f} s a step, {correction.memory * chosen.memory.peak / GB:.1f} of "
            f"{machine.usable / GB:.1f} GB ({chosen.memory.peak_phase})",
            next_bottleneck(chosen),
            f"why, and what else was tried: {page}",
            f"use it: mta-ds train CONFIG {shlex.quote(f'@{written}')}",
        ]
    )
