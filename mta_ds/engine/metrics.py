"""What a run writes down: metrics.jsonl (deterministic values only), perf.jsonl (time, memory) and TensorBoard."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch.utils.tensorboard.summary import scalar

from mta_ds.errors import UserError, printable
from mta_ds.files import Appender

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends one row a step to the run folder's logs: a killed job leaves whole lines, a full disk stops nobody.

    Two files because only one may differ between a run and its exact repetition: metrics.jsonl is equal byte for byte
    when an interrupted run is resumed, perf.jsonl is not.
    """

    def __init__(self, run_dir: Path, resume_step: int, wandb_project: str | None = None) -> None:
        # a run without a checkpoint begins anew, with the validation before its first step
        kept = resume_step if resume_step > 0 else -1
        metrics, perf = run_dir / "metrics.jsonl", run_dir / "perf.jsonl"
        self._metrics = Appender(metrics, size_until(metrics, kept))
        self._perf = Appender(perf, size_until(perf, kept))
        self._board = Board(run_dir / "tensorboard", kept + 1)
        self._wandb: Any = None
        if wandb_project is not None:
            self._to_wandb(lambda _: _open_wandb(wandb_project, run_dir))

    def write(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Log one optimizer step's values; of a step that was left out, those that are numbers."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for file, row in ((self._metrics, metrics), (self._perf, perf)):
            if row:
                file.add((json.dumps({"step": step} | row) + "\n").encode())
        values = metrics | {f"perf/{name}": value for name, value in perf.items()}
        self._board.add(step, values)
        if self._wandb is not None:
            self._to_wandb(lambda run: run.log(values, step=step))

    def sync(self) -> None:
        """Make the metrics so far durable: a checkpoint that outlives its rows would go on behind a gap.

        Raises:
            OSError: the disk is full, or worse.
        """
        self._metrics.sync()

    def announce(self, step: int, num_steps: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """One line for whoever watches the job."""
        self.say(
            f"step {step}/{num_steps}  loss {metrics['loss']:.4f}  base {metrics['base']:.4f}  "
            f"dsa {metrics.get('dsa', 0.0):.4f}  hid {metrics.get('hid', 0.0):.4f}  "
            f"{perf['seconds']:.2f} s  {perf['tokens_per_second']:.0f} tokens/s"
        )

    def say(self, line: str) -> None:
        """Print a line at once, also into a batch log, if its disk has room."""
        with contextlib.suppress(OSError):
            print(line, flush=True)

    def close(self) -> None:
        """Make all durable and close."""
        self._metrics.close()
        self._perf.close()
        self._board.close()
        if self._wandb is not None:
            self._to_wandb(lambda run: run.finish())

    def _to_wandb(self, call: Callable[[Any], Any]) -> None:
        """A service that fails is told of once, and then left alone: it must not end a run."""
        try:
            self._wandb = call(self._wandb) or self._wandb
        except Exception as error:
            self._wandb = None
            logger.warning("Weights & Biases: %s; the run goes on without it", printable(str(error)))


class Board:
    """TensorBoard's file of events, by its own record format.

    Its own writer hands records to a thread, which a full disk ends.

    Args:
        purge_step: from it on, what earlier files of the folder hold is not shown.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._file = Appender(folder / name)
        start = SessionLog(status=SessionLog.START)
        self._file.add(_record(file_version="brain.Event:2") + _record(step=purge_step, session_log=start))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """A point on each value's curve."""
        summaries = [scalar(name, value) for name, value in values.items()]  # type: ignore[no-untyped-call]
        self._file.add(b"".join(_record(step=step, summary=summary) for summary in summaries))

    def close(self) -> None:
        """Make it durable."""
        self._file.close()


def _record(**event: Any) -> bytes:
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **event).SerializeToString())
    return record.getvalue()


def insist_on_wandb() -> None:
    """Raise UserError if Weights & Biases' library is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise UserError("train.wandb_project: wandb is not installed; 'pip install wandb', or remove the key")


def _open_wandb(project: str, run_dir: Path) -> Any:
    """A run of Weights & Biases that a resumed run of this folder goes on with."""
    import wandb  # type: ignore[import-not-found]  # not ours to install

    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    return wandb.init(project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir))


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # not getrusage: a process starts with the peak of the one that started it
    with open("/proc/self/status", encoding="ascii") as status:
        (kilobytes,) = (line.split()[1] for line in status if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024


def size_until(path: Path, last_step: float) -> int:
    """Bytes of a log up to the end of ``last_step``, before its validation, which a resumed run makes again."""
    size = end = 0
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                end += len(line)
                if line.endswith(b"\n") and _position(line) <= (last_step, False):
                    size = end
    return size


def _position(line: bytes) -> tuple[float, bool]:
    """A row's step, and whether it is of the validation after it."""
    try:
        row: Any = json.loads(line)
        return float(row["step"]), "validation/loss" in row
    except (ValueError, KeyError, TypeError):
        return float("inf"), False
