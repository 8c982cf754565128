"""An end to restarts that bring nothing: each start of a batch job notes how far the run has come on disk.

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
    """What :func:`progress` was at each start of one job, the first start first."""

    job_id: str
    progress: tuple[int, ...] = ()


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
    starts = (*before, progress(run_dir))
    if (idle := idle_restarts(starts)) >= max_idle:
        raise UserError(
            f"{run_dir}: job {job_id} was restarted {idle} times without a new checkpoint after step "
            f"{newest_step(run_dir)}; its log says why it ended. If a checkpoint came too late: a lower "
            "train.save_every, a longer --time, or an earlier --signal"
        )
    write_atomic(path, _Starts(job_id=job_id, progress=starts).model_dump_json() + "\n")


def idle_restarts(starts: Sequence[int]) -> int:
    """Restarts at the end of ``starts`` (the progress at each) that found no more than the start before."""
    idle = 0
    while idle + 1 < len(starts) and starts[-1 - idle] <= starts[-2 - idle]:
        idle += 1
    return idle


def progress(run_dir: Path) -> int:
    """Grows with every step that is saved, and every part of an epoch's text, for which there may be many starts."""
    return newest_step(run_dir) + sum(1 for _ in (run_dir / "epochs").glob("**/part-*.json"))


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
    return starts.progress if starts.job_id == job_id else ()
