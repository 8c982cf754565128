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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mta_ds.data import Batch
from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.losses import Source

_WINDOW = 64  # losses that a spike is measured against
_FEWEST = 16
_SECONDS_BETWEEN_BEATS = 1.0
_MOST_IN_A_ROW = 20  # steps left out for a NaN or Inf: more are no accident
_MOST_RANKS = 4  # that a message names


class Seen(NamedTuple):
    """What is kept of a micro-batch until its step is judged; nothing waits for the device."""

    record_ids: Sequence[str]
    loss: Tensor
    alarms: dict[str, Tensor]
    """By "non_finite/MODEL/LAYER", above 0 if that state has a NaN or Inf."""


class Found(NamedTuple):
    """What running a step again has shown."""

    states: list[str]
    """In words, by this rank's micro-batches: the first state or gradient that is not finite; empty where none is."""
    parameters: list[str]
    """Whose gradients, summed over ranks, are not finite; equal on every rank."""


class StepGuard:
    """Leaves out, or stops at, steps that would spoil the weights.

    The update itself is DeepSpeed's to refuse, and it does so where the norm of the gradient is no number: then no
    weight and no moment changes, on any rank. A spike is made into such a gradient, and so is a loss that is no number.

    Args:
        non_finite: what to do with a NaN or Inf.
        spike_factor: how many times the median of the last losses from the same source is a spike; None: nothing is.
    """

    def __init__(self, non_finite: Literal["stop", "skip"], spike_factor: float | None) -> None:
        self._policy = non_finite
        self._factor = spike_factor
        self._losses: dict[str, deque[float]] = {}
        self._seen: list[Seen] = []
        self._spiked = False
        self._in_a_row = 0
        self.skipped = 0
        """Steps that were left out so far."""

    def watch(self, batch: Batch, loss: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        """A micro-batch's loss, on its way to backward; takes the alarms out of its ``metrics``."""
        alarms = {name: metrics.pop(name) for name in list(metrics) if name.startswith("non_finite/")}
        self._seen.append(Seen(batch.record_ids, loss.detach(), alarms))
        return loss * (1 + 0 * loss.detach())  # by exactly 1, or by NaN

    def watch_step(self, loss: Tensor, total: Tensor, source: Source) -> Tensor:
        """The last micro-batch's loss, made a gradient to refuse if the step is a spike; every rank must call it.

        Spikes are remembered like all losses: one moves no median, and a level that stays is soon no spike any more.

        Args:
            total: this rank's share of the whole step's loss.
        """
        if self._factor is None:
            return loss
        value = float(distributed.all_reduce_sum(total.detach().clone()))
        losses = self._losses.setdefault(source.value, deque(maxlen=_WINDOW))
        self._spiked = (
            len(losses) >= _FEWEST and math.isfinite(value) and value > self._factor * statistics.median(losses)
        )
        if math.isfinite(value):
            losses.append(value)
        return loss * math.inf if self._spiked else loss

    def judge(self, engine: Any, step: int, find: Callable[[], Found]) -> bool:
        """Whether the step was left out; every rank must call it.

        Args:
            find: runs the step again to see where a NaN or Inf comes from; called on every rank or on none.

        Raises:
            UserError: there was a NaN or Inf, and the policy is to stop, or it does not end; on every rank.
        """
        seen, self._seen = self._seen, []
        spiked, self._spiked = self._spiked, False
        if not engine.optimizer.overflow:
            self._in_a_row = 0
            return False
        self.skipped += 1
        if not spiked:
            self._in_a_row += 1
            if self._policy == "stop" or self._in_a_row > _MOST_IN_A_ROW:
                raise _stopped(step, self._in_a_row, seen, find())
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        losses = {source: list(values) for source, values in self._losses.items()}
        return {"losses": losses, "skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's :meth:`state`."""
        self._losses = {source: deque(values, maxlen=_WINDOW) for source, values in state["losses"].items()}
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]


def _stopped(step: int, in_a_row: int, seen: Sequence[Seen], found: Found) -> UserError:
    told = [
        f"{where}, rank {distributed.rank()}, records {', '.join(batch.record_ids)}"
        for batch, state in zip(seen, found.states, strict=True)
        if (where := state or _where(batch))
    ]
    everybody = [mine for rank in distributed.gather_objects(told[:1]) for mine in rank]
    if not everybody:
        others = f" and of {len(found.parameters) - 1} more parameters" if len(found.parameters) > 1 else ""
        everybody = [f"the gradient of {found.parameters[-1]}{others}" if found.parameters else "a gradient"]
    steps = f"step {step}" if in_a_row == 1 else f"{in_a_row} steps in a row, up to step {step}"
    return UserError(
        f"{steps}: NaN or Inf in {'; '.join(everybody[:_MOST_RANKS])}; no weight was changed: lower train.lr, take the "
        "records out, train in float32, or set train.non_finite: skip",
        on_every_rank=True,
    )


def _where(batch: Seen) -> str:
    """What the step itself has shown of a micro-batch, where running it again has shown nothing."""
    for name, value in batch.alarms.items():
        if bool(value > 0):
            return "the hidden state of layer {2} of the {1}".format(*name.split("/"))
    return "" if bool(torch.isfinite(batch.loss)) else "the loss"


class Heartbeat:
    """A file a rank that says where it is: who looks at a run that hangs sees which rank does not move, and in what.

    heartbeat/rank-00000.json     {"time": Unix seconds, "step": 12, "phase": "step", "host": ..., "pid": ...}
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "heartbeat" / f"rank-{distributed.rank():05d}.json"
        self._told = ("", 0.0)
        if distributed.rank() == 0:
            self._remove_others()

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

    def _remove_others(self) -> None:
        """The files of ranks that this run had once: nobody would ever see them move."""
        for path in self._path.parent.glob("rank-*.json"):
            with contextlib.suppress(OSError, ValueError):
                if int(path.stem.removeprefix("rank-")) >= distributed.world_size():
                    path.unlink()
