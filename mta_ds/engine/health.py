"""What is watched while a run trains: NaN and Inf, spikes of the loss, and that every rank is still moving."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mta_ds.data import Batch
from mta_ds.engine import distributed
from mta_ds.errors import UserError

_WINDOW = 64  # losses that a spike is measured against
_FEWEST = 16
_SECONDS_BETWEEN_BEATS = 1.0
_MOST_RECORDS = 4  # that a message names


class StepGuard:
    """Leaves out, or stops at, steps that would spoil the weights.

    The update itself is DeepSpeed's to refuse, and it does so where the norm of the gradient is no number: then no
    weight and no moment changes, on any rank. A spike is made into such a gradient.

    Args:
        non_finite: what to do with a NaN or Inf.
        spike_factor: how many times the median of the last losses is a spike; None: nothing is.
    """

    def __init__(self, non_finite: Literal["stop", "skip"], spike_factor: float | None) -> None:
        self._policy = non_finite
        self._factor = spike_factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._spiked = False
        self.skipped = 0
        """Steps that were left out so far."""

    def watch(self, loss: Tensor, shares: Mapping[str, Tensor]) -> Tensor:
        """The last micro-step's loss, on its way to backward; every rank must call it.

        Args:
            shares: this rank's metrics of the whole step.
        """
        self._spiked = False
        if self._factor is None:
            return loss
        total = float(distributed.all_reduce_sum(shares["loss"].detach().clone()))
        self._spiked = (
            math.isfinite(total)
            and len(self._losses) >= _FEWEST
            and total > self._factor * statistics.median(self._losses)
        )
        if math.isfinite(total) and not self._spiked:
            self._losses.append(total)
        return loss * math.inf if self._spiked else loss

    def judge(self, engine: Any, step: int, batches: Sequence[Batch], shares: dict[str, Tensor]) -> bool:
        """Whether the step was left out; takes the alarms out of ``shares``. Every rank must call it.

        Raises:
            UserError: there was a NaN or Inf, and the policy is to stop; on every rank.
        """
        alarms = {name: shares.pop(name) for name in list(shares) if name.startswith("non_finite/")}
        if not engine.optimizer.overflow:
            return False
        if self._policy == "stop" and not self._spiked:
            raise _stopped(step, batches, alarms, shares["loss"])
        self.skipped += 1
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {"losses": list(self._losses), "skipped": self.skipped}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's :meth:`state`."""
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self.skipped = state["skipped"]


def _stopped(step: int, batches: Sequence[Batch], alarms: Mapping[str, Tensor], loss: Tensor) -> UserError:
    states = [
        "the hidden state of layer {2} of the {1}".format(*name.split("/"))
        for name, value in alarms.items()
        if bool(value > 0)
    ]
    if not states and not bool(torch.isfinite(loss)):
        states = ["the loss"]
    records = [record for batch in batches for record in batch.record_ids]
    told = f"{', '.join(records[:_MOST_RECORDS])}{', ...' if len(records) > _MOST_RECORDS else ''}"
    everybody = distributed.gather_objects(f"{', '.join(states)}, rank {distributed.rank()}, records {told}")
    found = [mine for mine in everybody if not mine.startswith(",")]
    where = "; ".join(found[:_MOST_RECORDS]) if found else "a gradient alone"
    error = UserError(
        f"step {step}: NaN or Inf in {where}; no weight was changed: lower train.lr, take the records out, train in "
        "float32, or set train.non_finite: skip"
    )
    error.on_every_rank = True
    return error


class Heartbeat:
    """A file a rank that says where it is: who looks at a run that hangs sees which rank does not move, and in what.

    heartbeat/rank-00000.json     {"time": Unix seconds, "step": 12, "phase": "step", "host": ..., "pid": ...}
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "heartbeat" / f"rank-{distributed.rank():05d}.json"
        self._told = ("", 0.0)

    def beat(self, step: int, phase: str) -> None:
        """Say so, at most once a second within a phase; a disk that is full or slow stops nobody."""
        now = time.time()
        if phase == self._told[0] and now - self._told[1] < _SECONDS_BETWEEN_BEATS:
            return
        self._told = (phase, now)
        row = {"time": round(now, 3), "step": step, "phase": phase, "host": socket.gethostname(), "pid": os.getpid()}
        new = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(row), encoding="utf-8")
            new.replace(self._path)
