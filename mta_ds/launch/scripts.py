"""What is submitted to Slurm, as values: argument vectors of ``sbatch``, and the same as lines for a shell.

Nothing here talks to Slurm or touches a file, and no value of a user ever becomes part of a shell's program: a command
is a list of arguments, and the lines that ``--dry-run`` prints are quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mta_ds.errors import UsageError

PIPELINE = ("parse", "check", "train", "evaluate")
"""Stages of a pipeline, each of which begins when the one before it has succeeded."""
STAGES = (*PIPELINE, "generate")
SITE = "MTA_DS_SITE"
"""Environment variable that tells a job where its ``site.env`` lies."""

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_FOR_STAGE = re.compile(rf"({'|'.join(STAGES)}):(-.*)", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """What stands behind CONFIG on the command line."""

    overrides: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """Of sbatch, for every stage."""
    stage_options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of sbatch, for one stage."""

    def for_stage(self, stage: str) -> tuple[str, ...]:
        """All options of sbatch for ``stage``; its own come last, which makes sbatch prefer them."""
        return self.options + self.stage_options.get(stage, ())


def split_arguments(arguments: Iterable[str], stages: Sequence[str]) -> Given:
    """Tell ``section.key=value`` from sbatch's options, which begin with "-", or with "STAGE:-" if for one stage only.

    What follows an option and looks like no override is the option's value, as in ``-p gpu``.

    Args:
        stages: those that are submitted.

    Raises:
        UsageError: an argument is neither, or is for a stage that is not submitted.
    """
    overrides: list[str] = []
    options: dict[str | None, list[str]] = {}
    last: list[str] | None = None
    for argument in arguments:
        named = _FOR_STAGE.fullmatch(argument)
        if named is not None or argument.startswith("-"):
            stage, option = (named[1], named[2]) if named is not None else (None, argument)
            if stage is not None and stage not in stages:
                raise UsageError(f"'{argument}': {stage} is not submitted here, only {', '.join(stages)}")
            last = options.setdefault(stage, [])
            last.append(option)
        elif _OVERRIDE.match(argument):
            overrides.append(argument)
            last = None
        elif last is not None:
            last.append(argument)
            last = None
        else:
            raise UsageError(f"'{argument}': neither an override (section.key=value) nor an option of sbatch (--...)")
    common = tuple(options.pop(None, ()))
    return Given(tuple(overrides), common, {str(stage): tuple(given) for stage, given in options.items()})


@dataclass(frozen=True)
class Job:
    """One stage, ready to be submitted."""

    stage: str
    script: Path
    arguments: tuple[str, ...]
    """Of the script, and so of ``mta-ds STAGE``: CONFIG and overrides."""
    name: str
    log: str
    """Pattern of the log's path, in sbatch's syntax; see :func:`log_pattern`."""
    options: tuple[str, ...] = ()
    """Of sbatch, as the user gave them."""
    shards: tuple[int, ...] | None = None
    """Tasks of a job array; None for a stage that is no array."""
    markers: tuple[str, ...] = ()
    """Files that are there once a shard is complete, in the order of ``shards``; or the one of the stage."""


def log_pattern(folder: Path, stage: str, is_array: bool) -> str:
    """Where a job's log goes: ``STAGE-<job>.log``, for an array ``STAGE-<array>_<task>.log``.

    Raises:
        UsageError: sbatch has no way to say a path with a backslash in it.
    """
    if "\\" in str(folder):
        raise UsageError(f"run_dir: {folder}: sbatch cannot write a log below a name with a backslash; rename it")
    return f"{str(folder).replace('%', '%%')}/{stage}-{'%A_%a' if is_array else '%j'}.log"


def log_path(pattern: str, job_id: str, task: int | None) -> Path:
    """The log of one job, or of one task of an array."""
    values = {"%%": "%", "%j": job_id, "%A": job_id, "%a": str(task)}
    return Path(re.sub("%[%jAa]", lambda found: values[found[0]], pattern))


def array_ranges(indices: Iterable[int]) -> str:
    """Indices as ``sbatch --array`` has them: 0-3,7."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def sbatch_command(job: Job, after: str | None = None) -> list[str]:
    """The argument vector that submits ``job``.

    Args:
        after: job that must succeed first; if it does not, this one goes too instead of waiting for ever.
    """
    command = ["sbatch", "--parsable", f"--job-name={job.name}", f"--output={job.log}"]
    if job.shards is not None:
        command.append(f"--array={array_ranges(job.shards)}")
    if after is not None:
        command += [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    # an option that is given twice counts as it stands last: the user's
    return [*command, *job.options, str(job.script), *job.arguments]


def shell_lines(jobs: Sequence[Job], site: Path) -> list[str]:
    """The commands that submit ``jobs``, for a POSIX shell; each keeps its job's id for the next."""
    lines = []
    after: str | None = None
    for job in jobs:
        dependency = f"--dependency=afterok:{after}"
        words = [word if word == dependency else shlex.quote(word) for word in sbatch_command(job, after)]
        lines.append(f"{job.stage}=$({SITE}={shlex.quote(str(site))} {' '.join(words)})")
        after = f'"${job.stage}"'
    return lines
