"""Stop a run early and resumably: by a signal that any one rank receives, or by its own time limit."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from mta_ds.engine import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopWatch:
    """Notes SIGTERM and SIGUSR1 and the time that has passed; all ranks agree on it at a step boundary.

    A signal handler may do little more than set a flag: it can come in the middle of a collective.

    Args:
        max_minutes: the run's own time limit; None: none.
        grace_seconds: from then on the process has this long to save and end. After that it ends all the same, with
            exit code 75 and the checkpoint before: what comes next is SIGKILL, or a node that is gone.
    """

    def __init__(self, max_minutes: float | None, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._grace: threading.Timer | None = None
        self._deadline = float("inf") if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signalled = False
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def agreed(self) -> bool:
        """Whether any rank wants to stop; every rank must ask at the same step."""
        mine = self._signalled or time.monotonic() > self._deadline
        stop = distributed.sum_counts([int(mine)])[0] > 0
        if stop:
            self._limit()
        return stop

    def close(self) -> None:
        """The run has ended: give the signals back to whoever had them."""
        if self._grace is not None:
            self._grace.cancel()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: object) -> None:
        self._signalled = True
        self._limit()

    def _limit(self) -> None:
        if self._grace is None:
            self._grace = threading.Timer(self._grace_seconds, self._give_up)
            self._grace.daemon = True
            self._grace.start()

    def _give_up(self) -> None:
        print(
            f"mta-ds: stopped without a new checkpoint: rank {distributed.rank()} was not done {self._grace_seconds:g} "
            "seconds after the signal (train.stop_grace_seconds)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(75)
