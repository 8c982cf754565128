"""Stop a run early and resumably: by a signal that any one rank receives, or by its own time limit."""

from __future__ import annotations

import signal
import time

from mta_ds.engine import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopWatch:
    """Notes SIGTERM and SIGUSR1 and the time that has passed; all ranks agree on it at a step boundary.

    A signal handler may do nothing but set a flag: it can come in the middle of a collective.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self._deadline = float("inf") if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._signalled = False
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def agreed(self) -> bool:
        """Whether any rank wants to stop; every rank must ask at the same step."""
        mine = self._signalled or time.monotonic() > self._deadline
        return distributed.sum_counts([int(mine)])[0] > 0

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: object) -> None:
        self._signalled = True
