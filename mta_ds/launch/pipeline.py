"""Stages of a run as Slurm jobs: submit them with their dependencies, remember them, cancel them.

    <run_dir>/slurm/jobs.json               what was submitted, the last stages last
                    run-<hash>.yaml         the configuration as it was then, and each @FILE (see launch/copies.py)
                    site-<hash>.env         what the jobs read about the cluster (a copy)
                    logs/                   one a job, or a task of an array; restarts append
                    restarts.json           see launch/guard.py

A job needs no folder but this one, and what its configuration names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from mta_ds.config import Section
from mta_ds.errors import UserError
from mta_ds.files import write_atomic
from mta_ds.launch import slurm
from mta_ds.launch.copies import Copy, copy_of
from mta_ds.launch.options import CHDIR, OUTPUT, Given, refuse_useless, with_site
from mta_ds.launch.scripts import SITE, Job, log_pattern, log_pattern_of, sbatch_command, shell_lines
from mta_ds.launch.works import Work


class Submission(Section):
    """A job that was submitted."""

    stage: str
    job_id: str
    seconds: float
    """When, since the epoch."""
    log: str
    command: tuple[str, ...]
    shards: tuple[int, ...] | None
    markers: tuple[str, ...]


class _JobsFile(Section):
    submissions: tuple[Submission, ...] = ()


class RunFolder(Section):
    """The one thing that following a run needs of its YAML."""

    model_config = ConfigDict(extra="ignore")
    run_dir: Path


@dataclass(frozen=True)
class Plan:
    """Jobs, each of which begins when the one before it has succeeded, and what must lie in the run folder for them."""

    jobs: tuple[Job, ...]
    site: Copy
    """Of the ``site.env`` beside the scripts."""
    copies: tuple[Copy, ...]
    """Of all files that the jobs read."""


def find_script(stage: str, scripts: Path | None) -> Path:
    """The script of a stage: in ``scripts``, else in ./slurm, else in the project's own folder.

    Raises:
        UserError: there is none.
    """
    places = [scripts] if scripts is not None else [Path("slurm"), Path(__file__).parents[2] / "slurm"]
    for place in places:
        if (place / f"{stage}.sbatch").is_file():
            return (place / f"{stage}.sbatch").absolute()
    looked = " or ".join(str(place) for place in places)
    raise UserError(
        f"no {stage}.sbatch in {looked}; name the folder of the job scripts with --scripts: slurm/ of the project's "
        "sources, or your copy (an installed package has none)"
    )


def make_plan(run_dir: Path, works: Sequence[Work], config: Path, given: Given, scripts: Sequence[Path]) -> Plan:
    """The jobs that make ``works``, each by its script of ``scripts``; they read copies of what the user may edit.

    Raises:
        UserError: a file cannot be read, or a stage cannot have an option that the user gave.
    """
    home = folder(run_dir)
    site = copy_of(scripts[0].with_name("site.env"), home)
    copies = [copy_of(config, home)]
    arguments = [str(copies[0].path)]
    for override in given.overrides:
        if override.startswith("@"):
            copies.append(copy_of(Path(override[1:]), home))
            override = f"@{copies[-1].path}"
        arguments.append(override)
    jobs = [
        _make_job(work, run_dir, tuple(arguments), given.for_stage(work.stage), script)
        for work, script in zip(works, scripts, strict=True)
    ]
    return Plan(tuple(jobs), site, (*copies, site))


def _make_job(work: Work, run_dir: Path, arguments: tuple[str, ...], options: tuple[str, ...], script: Path) -> Job:
    """The job that makes ``work``; wherever the user has its log written."""
    is_array = work.shards is not None
    refuse_useless(options, work.stage, is_array)
    outputs, options = OUTPUT.take(options)
    if outputs:
        chosen, _ = CHDIR.take(options)
        log = log_pattern_of(outputs[-1], Path(*chosen[-1:]).absolute())
    else:
        log = log_pattern(folder(run_dir) / "logs", work.stage, is_array)
    return Job(
        stage=work.stage,
        script=script,
        arguments=arguments,
        name=f"mta-{work.stage} {run_dir.absolute().name}",
        log=log,
        options=with_site(options, SITE, os.environ.get("SBATCH_EXPORT")),
        shards=work.shards,
        markers=work.markers,
    )


def without_alive(run_dir: Path, works: Sequence[Work], alone: bool) -> list[Work]:
    """``works`` without the shards that wait or run already, and without what then has nothing to make.

    Args:
        alone: whether nothing at all of the run may wait or run.

    Raises:
        UserError: something waits or runs that must not be submitted twice.
    """
    left = []
    running = alive(run_dir)
    for each, _ in running:
        if alone or any(work.stage == each.stage and work.shards is None for work in works):
            raise UserError(
                f"{run_dir}: {each.stage} (job {each.job_id}) still waits or runs; 'mta-ds slurm status' says how it "
                "stands, 'mta-ds slurm cancel' ends it"
            )
    for work in works:
        if work.shards is None:
            left.append(work)
            continue
        busy = {task for each, tasks in running if each.stage == work.stage for task in tasks}
        pairs = [pair for pair in zip(work.shards, work.markers, strict=True) if pair[0] not in busy]
        if pairs:
            shards, markers = zip(*pairs, strict=True)
            left.append(Work(work.stage, shards, markers))
    return left


def folder(run_dir: Path) -> Path:
    """Where all that concerns a run's Slurm jobs lies."""
    return run_dir.absolute() / "slurm"


def dry_run(run_dir: Path, plan: Plan) -> str:
    """The commands that do what :func:`submit` does, a line each."""
    new = [copy for copy in plan.copies if not copy.path.exists()]
    return "\n".join(shell_lines(plan.jobs, plan.site, new, folder(run_dir) / "logs"))


def submit(run_dir: Path, plan: Plan) -> list[Submission]:
    """Write the plan's copies and submit its jobs, each after the one before.

    Raises:
        UserError: sbatch refuses one of them; those before it are cancelled again. Or the run folder cannot be written.
    """
    _keep_copies(folder(run_dir), plan)
    earlier = read(run_dir)
    made: list[Submission] = []
    for job in plan.jobs:
        try:
            made.append(_submit_job(job, made[-1].job_id if made else None, plan.site))
        except UserError as error:
            if made:
                slurm.cancel(each.job_id for each in made)
                _write(run_dir, earlier)
            raise type(error)(f"{job.stage}: {error}") from None
        _write(run_dir, [*earlier, *made])
    return made


def _keep_copies(home: Path, plan: Plan) -> None:
    try:
        (home / "logs").mkdir(parents=True, exist_ok=True)
        for copy in plan.copies:
            copy.keep()
    except OSError as error:
        raise UserError(f"{error.filename or home}: {error.strerror}") from None


def _submit_job(job: Job, after: str | None, site: Copy) -> Submission:
    command = sbatch_command(job, after)
    return Submission(
        stage=job.stage,
        job_id=slurm.submit(command, {SITE: str(site.path)}),
        seconds=time.time(),
        log=job.log,
        command=tuple(command),
        shards=job.shards,
        markers=job.markers,
    )


def read(run_dir: Path) -> list[Submission]:
    """All that was submitted for a run, in order.

    Raises:
        UserError: the list is damaged.
    """
    path = folder(run_dir) / "jobs.json"
    try:
        return list(_JobsFile.model_validate(json.loads(path.read_text(encoding="utf-8"))).submissions)
    except FileNotFoundError:
        return []
    except ValueError:
        raise UserError(f"{path}: damaged; remove it, and look for the run's jobs with squeue") from None


def alive(run_dir: Path) -> list[tuple[Submission, tuple[int, ...]]]:
    """Submissions that wait or run, each with its tasks that do (none for what is no array)."""
    submissions = read(run_dir)
    tasks = slurm.query([each.job_id for each in submissions])
    found = []
    for each in submissions:
        numbers = [number for (job, number), task in tasks.items() if job == each.job_id and task.is_alive]
        if numbers:
            found.append((each, tuple(number for number in numbers if number is not None)))
    return found


def cancel(run_dir: Path) -> list[str]:
    """Cancel whatever of a run waits or runs, last stages first; returns the jobs."""
    job_ids = [each.job_id for each, _ in reversed(alive(run_dir))]
    if job_ids:
        slurm.cancel(job_ids)
    return job_ids


def _write(run_dir: Path, submissions: Sequence[Submission]) -> None:
    text = _JobsFile(submissions=tuple(submissions)).model_dump_json(indent=1)
    write_atomic(folder(run_dir) / "jobs.json", text + "\n")
