"""What is submitted to Slurm, as values: argument vectors of ``sbatch``, and the same as lines for a shell.

Nothing here talks to Slurm or touches a file, and no value of a user ever becomes part of a shell's program: a command
is a list of arguments, and the lines that ``--dry-run`` prints are quoted.
"""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mta_ds.errors import UsageError
from mta_ds.launch.copies import Copy
from mta_ds.launch.options import DEPENDENCY

SITE = "MTA_DS_SITE"
"""Environment variable that tells a job where its ``site.env`` lies."""


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


def log_pattern_of(given: str, folder: Path) -> str:
    """The pattern of a log that the user chose, read from ``folder`` where it is relative."""
    return given if given.startswith("/") else f"{str(folder).replace('%', '%%')}/{given}"


def log_glob(pattern: str, job_id: str, task: int | None) -> str:
    """The log of one job, or of one task of an array, as a pattern for :func:`glob.glob`.

    What sbatch alone knows (a name, a node; of a task, its own number) may be anything.
    """
    values = {"%": "%", "A": job_id}
    values |= {"j": job_id} if task is None else {"a": str(task)}
    words = re.split(r"%(\d*)([a-zA-Z%])", pattern)
    found = [glob.escape(words[0])]
    for width, letter, text in zip(words[1::3], words[2::3], words[3::3], strict=True):
        found += [values[letter].zfill(int(width or 0)) if letter in values else "*", glob.escape(text)]
    return "".join(found)


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
    options = job.options
    if job.shards is not None:
        command.append(f"--array={array_ranges(job.shards)}")
    if after is not None:
        theirs, options = DEPENDENCY.take(options)
        command += [_dependency(after, theirs), "--kill-on-invalid-dep=yes"]
    # an option that is given twice counts as it stands last: the user's
    return [*command, *options, str(job.script), *job.arguments]


def _dependency(after: str, theirs: Sequence[str]) -> str:
    """What a job waits for: the stage before it, and what the user says besides."""
    if theirs and "?" in theirs[-1]:
        raise UsageError(
            f"--dependency={theirs[-1]}: sbatch cannot join conditions of which one is enough (?) to the stage before"
        )
    return ",".join((f"--dependency=afterok:{after}", *theirs[-1:]))


def shell_lines(jobs: Sequence[Job], site: Copy, copies: Sequence[Copy], logs: Path) -> list[str]:
    """What submits ``jobs``, for a POSIX shell; each command keeps its job's id for the next.

    Args:
        site: the ``site.env`` that the jobs read.
        copies: files that must be copied first.
        logs: folder that must be there.
    """
    lines = [shlex.join(["mkdir", "-p", str(logs)])]
    lines += [shlex.join(["cp", str(copy.source), str(copy.path)]) for copy in copies]
    after: str | None = None
    for job in jobs:
        words = (_quote(word, f"--dependency=afterok:{after}") for word in sbatch_command(job, after))
        lines.append(f"{job.stage}=$({SITE}={shlex.quote(str(site.path))} {' '.join(words)})")
        after = f'"${job.stage}"'
    return lines


def _quote(word: str, open_prefix: str) -> str:
    """``word`` for a shell, except that it reads the variable in ``open_prefix`` if the word begins with that."""
    if not word.startswith(open_prefix):
        return shlex.quote(word)
    rest = word.removeprefix(open_prefix)
    return open_prefix + (shlex.quote(rest) if rest else "")
