"""What ``mta-ds slurm status`` says: each stage's state, missing shards, why it waits or failed, the last metrics.

Slurm forgets a job some minutes after its end where it keeps no accounts; then what the job has made tells.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mta_ds.errors import UserError
from mta_ds.launch import slurm
from mta_ds.launch.options import STAGES
from mta_ds.launch.pipeline import Submission, read
from mta_ds.launch.scripts import array_ranges, log_glob

_TAIL_BYTES = 64 * 1024
_MAX_REASONS = 3
_BEFORE_BEGIN = ("BOOT_FAIL", "CANCELLED", "DEADLINE")
"""States of jobs that may not have begun."""


@dataclass(frozen=True)
class StageStatus:
    """What is to be said of a stage."""

    stage: str
    job_ids: tuple[str, ...]
    states: Mapping[str, int]
    """Number of tasks in each state; of a stage that is no array, one."""
    missing: tuple[int, ...] | None = None
    """Shards that are not complete; None for a stage without shards."""
    reasons: tuple[str, ...] = ()
    """Why tasks wait or have failed, a line each."""
    restarts: int = 0


def status(run_dir: Path) -> str:
    """State of each stage, missing shards, why something waits or failed, and the last metrics.

    Raises:
        UserError: nothing was submitted for this run.
    """
    submissions = read(run_dir)
    if not submissions:
        raise UserError(f"{run_dir}: no Slurm jobs; 'mta-ds slurm pipeline CONFIG' submits them")
    tasks = slurm.query([each.job_id for each in submissions])
    stages = [stage for stage in STAGES if any(each.stage == stage for each in submissions)]
    known = [_stage_status(stage, [each for each in submissions if each.stage == stage], tasks) for stage in stages]
    return render(run_dir, known, last_metrics(_tail(run_dir / "metrics.jsonl")))


def render(run_dir: Path, stages: Sequence[StageStatus], metrics: str | None) -> str:
    """The lines that :func:`status` prints."""
    lines = [str(run_dir)]
    for each in stages:
        states = ", ".join(
            state if len(each.states) == 1 and number == 1 else f"{number} {state}"
            for state, number in each.states.items()
        )
        jobs = f"job{'s' * (len(each.job_ids) != 1)} {', '.join(each.job_ids)}"
        restarts = f", {each.restarts} restart{'s' * (each.restarts != 1)}" if each.restarts else ""
        lines.append(f"{each.stage:<9} {states} ({jobs}{restarts})")
        if each.missing:
            lines.append(f"          missing shards: {array_ranges(each.missing)}")
        lines += [f"          {reason}" for reason in each.reasons[:_MAX_REASONS]]
        if len(each.reasons) > _MAX_REASONS:
            lines.append(f"          and {len(each.reasons) - _MAX_REASONS} more")
    if metrics is not None:
        lines.append(f"metrics   {metrics}")
    if any(state in slurm.FINISHED_BADLY for each in stages for state in each.states):
        lines.append("the command that submitted them submits again what is missing, and only that")
    return "\n".join(lines)


def last_metrics(text: str) -> str | None:
    """The newest training step in the end of a metrics.jsonl: its values that are not of one layer."""
    for line in reversed(text.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off, at the front by us or at the end by a kill
        if isinstance(row, dict) and "loss" in row:
            values = (f"{name} {value:.6g}" for name, value in row.items() if "/" not in name)
            return "  ".join(values)
    return None


def telling_line(text: str) -> str | None:
    """The line of a log's end that says best why a job ended: our own error, else the last of any program but Slurm."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("mta-ds: error:")]
    other = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    found = own or other or lines
    return found[-1] if found else None


def _stage_status(stage: str, submissions: Sequence[Submission], tasks: slurm.Tasks) -> StageStatus:
    states: Counter[str] = Counter()
    missing, reasons, restarts = [], [], 0
    newest = list(_newest(submissions))
    for each, shard, marker in newest:
        is_made = _is_made(marker, each)
        task = tasks.get((each.job_id, shard)) or slurm.Task("COMPLETED" if is_made else "UNKNOWN")
        states[task.state] += 1
        restarts = max(restarts, task.restarts)
        if shard is not None and not is_made:
            missing.append(shard)
        if (reason := _reason(each, shard, task)) is not None:
            reasons.append(reason)
    job_ids = tuple(dict.fromkeys(each.job_id for each, _, _ in newest))
    is_array = submissions[-1].shards is not None
    if is_array and set(states) == {"COMPLETED"} and not _has_manifest(submissions[-1]):
        reasons.append("no manifest: submitted again, it writes the manifest or says why not")
    return StageStatus(stage, job_ids, states, tuple(missing) if is_array else None, tuple(reasons), restarts)


def _newest(submissions: Sequence[Submission]) -> Iterator[tuple[Submission, int | None, str | None]]:
    """Each shard with the last job that was to make it, and its marker; the last job alone of what has no shards."""
    if submissions[-1].shards is None:
        marker = submissions[-1].markers[0] if submissions[-1].markers else None
        yield submissions[-1], None, marker
        return
    newest: dict[int, tuple[Submission, str]] = {}
    for each in submissions:
        newest |= {shard: (each, marker) for shard, marker in zip(each.shards or (), each.markers, strict=True)}
    for shard, (each, marker) in sorted(newest.items()):
        yield each, shard, marker


def _is_made(marker: str | None, submission: Submission) -> bool:
    """Whether what the job was to make is there, and not from before it; a shard was missing when it was submitted."""
    try:
        return marker is not None and (
            Path(marker).stat().st_mtime >= int(submission.seconds) or submission.shards is not None
        )
    except OSError:
        return False


def _has_manifest(submission: Submission) -> bool:
    """Whether a folder of shards is whole."""
    return Path(submission.markers[0]).with_name("manifest.json").is_file()


def _reason(submission: Submission, shard: int | None, task: slurm.Task) -> str | None:
    """Why a task waits, has failed, or may have: in Slurm's word and the log's."""
    name = "" if shard is None else f"task {shard}: "
    if task.state == "PENDING" and task.reason:
        return f"{name}waits: {task.reason}"
    if task.state not in slurm.FINISHED_BADLY and task.state != "UNKNOWN":
        return None
    pattern = log_glob(submission.log, submission.job_id, shard)
    logs = glob.glob(pattern)
    if len(logs) == 1:
        return f"{name}{task.state}: {telling_line(_tail(Path(logs[0]))) or 'it wrote nothing'} ({logs[0]})"
    if logs:  # the user's pattern has in it what Slurm alone knows
        return f"{name}{task.state}: its log is one of {pattern}"
    if task.state not in _BEFORE_BEGIN:
        return f"{name}{task.state}: no log {submission.log}"
    why = "an earlier stage failed" if task.reason.startswith("Dependency") else task.reason
    return f"{name}never began{f': {why}' if why else ''}"


def _tail(path: Path) -> str:
    """The end of a text file; empty without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""
