"""An end to restarts that bring nothing: each start of a batch job notes how far the run's checkpoints have come.

Slurm restarts a job for many reasons (time limit, preemption, a lost node) and would do so for ever where the job
itself brings the node down, or where no step and checkpoint fit between its start and its end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mta_ds.config import Section
from mta_ds.errors import UserError
from mta_ds.files import write_atomic


class _Starts(Section):
    """The steps that were saved at each start of one job, the first start first."""

    job_id: str
    steps: tuple[int, ...] = ()


def guard(run_dir: Path, job_id: str, restart: int, max_idle: int) -> None:
    """Note this start of a training job, unless the restarts before it were in vain.

    Args:
        restart: how often Slurm has restarted the job; 0 at its first start.
        max_idle: restarts in a row without a new checkpoint that are allowed.

    Raises:
        UserError: there were as many as that.
    """
    path = run_dir / "slurm" / "restarts.json"
    before = _read(path, job_id) if restart > 0 else ()
    steps = (*before, newest_step(run_dir))
    if idle_restarts(steps) >= max_idle:
        raise UserError(
            f"{run_dir}: job {job_id} was restarted {idle_restarts(steps)} times without a new checkpoint after step "
            f"{steps[-1]}; its log says why it ended. If a checkpoint came too late: a lower train.save_every, "
            "a longer --time, or an earlier --signal"
        )
    write_atomic(path, _Starts(job_id=job_id, steps=steps).model_dump_json() + "\n")


def idle_restarts(steps: Sequence[int]) -> int:
    """Restarts at the end of ``steps`` (saved at each start) that found no newer checkpoint than the start before."""
    idle = 0
    while idle + 1 < len(steps) and steps[-1 - idle] <= steps[-2 - idle]:
        idle += 1
    return idle


def newest_step(run_dir: Path) -> int:
    """Step of the newest checkpoint that is complete; 0 without one."""
    commits = (run_dir / "checkpoints").glob("step-*/COMMIT")
    return max((int(commit.parent.name.removeprefix("step-")) for commit in commits), default=0)


def _read(path: Path, job_id: str) -> tuple[int, ...]:
    """What the job's earlier starts noted; nothing where another job was the last, or the file is damaged."""
    try:
        starts = _Starts.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ()
    return starts.steps if starts.job_id == job_id else ()
