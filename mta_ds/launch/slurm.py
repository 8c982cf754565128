"""The only place that talks to Slurm: sbatch, squeue, sacct and scancel, called with argument lists.

What Slurm says against a call is passed on whole, as one :class:`UserError`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mta_ds.errors import UserError

# of squeue, each value ended by "|"; sacct has two of them
_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "Reason", "RestartCnt")
FINISHED_BADLY = frozenset(
    {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}
)
_ENDED = FINISHED_BADLY | {"COMPLETED"}


class Task(NamedTuple):
    """What Slurm knows of a job, or of one task of an array."""

    state: str
    """In Slurm's words: PENDING, RUNNING, COMPLETED, FAILED, ..."""
    reason: str = ""
    restarts: int = 0

    @property
    def is_alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in _ENDED


Tasks = Mapping[tuple[str, int | None], Task]
"""By job id and, of an array, task."""


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run an ``sbatch --parsable`` command with ``environment`` added to this process'; returns the job's id.

    What sbatch has to say of a job that it takes (a limit, a site's notice) goes to stderr.

    Raises:
        UserError: what sbatch said, where it took none.
    """
    done = _call(command, environment)
    if done.returncode != 0:
        raise UserError(f"{_said(done)}; options such as --partition, --account and --time may follow CONFIG")
    print(done.stderr, end="", file=sys.stderr)
    job_id = done.stdout.strip().partition(";")[0]  # behind ";" is the name of a cluster of a federation
    if not job_id.isdigit():
        raise UserError(f"sbatch gave no number of a job: {_said(done)}")
    return job_id


def query(job_ids: Sequence[str]) -> Tasks:
    """What Slurm knows of these jobs: squeue's memory of some minutes, and its accounting where there is one.

    Raises:
        UserError: Slurm does not answer.
    """
    if not job_ids:
        return {}
    jobs = f"--jobs={','.join(job_ids)}"
    columns = ",".join(f"{field}:|" for field in _FIELDS)
    queue = _call(["squeue", "--noheader", "--array", "--states=all", jobs, f"--Format={columns}"])
    # of a single job that it has forgotten squeue says this
    if queue.returncode != 0 and "Invalid job id" not in queue.stderr:
        raise UserError(_said(queue))
    found = parse_squeue(queue.stdout)
    if {job for job, _ in found} >= set(job_ids):
        return found
    columns = "JobID,State"
    accounting = _call(["sacct", "--noheader", "--parsable2", "--allocations", "--array", jobs, f"--format={columns}"])
    # without accounting (not every cluster has it) sacct fails, and nothing more is known
    return parse_sacct(accounting.stdout if accounting.returncode == 0 else "") | found


def cancel(job_ids: Iterable[str]) -> None:
    """Cancel jobs, with all tasks of an array.

    Raises:
        UserError: what scancel said.
    """
    done = _call(["scancel", *job_ids])
    if done.returncode != 0:
        raise UserError(_said(done))


def parse_squeue(text: str) -> dict[tuple[str, int | None], Task]:
    """Read squeue's lines of the five fields that :func:`query` asks for."""
    found = {}
    for line in text.splitlines():
        job, task, state, reason, restarts = line.split("|")[: len(_FIELDS)]
        found[job, int(task) if task.isdigit() else None] = Task(state, _plain(reason), int(restarts))
    return found


def parse_sacct(text: str) -> dict[tuple[str, int | None], Task]:
    """Read sacct's lines ``JobID|State``; a state may go on, as in "CANCELLED by 1000"."""
    found = {}
    for line in text.splitlines():
        name, state = line.split("|")[:2]
        job, _, task = name.partition("_")
        if task.isdigit() or not task:
            found[job, int(task) if task else None] = Task(state.partition(" ")[0])
    return found


def _plain(reason: str) -> str:
    return "" if reason in ("None", "N/A") else reason


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=os.environ | (environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; 'mta-ds slurm' is for the login node of a Slurm cluster") from None


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """All that a command wrote to stderr, on one line."""
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return "; ".join(lines) or f"{done.args[0]} failed with code {done.returncode}"
