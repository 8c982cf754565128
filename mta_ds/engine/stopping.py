"""Stop a run early and resumably: by a signal that any one rank receives, or by its own time limit."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from mta_ds.engine import distributed

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_TIME_IS_UP = b"\0"  # in the place of a signal's number


class Stopped(Exception):
    """A signal has come before there was anything to save."""


class StopWatch:
    """Notes SIGTERM and SIGUSR1 and the time since the process started; all ranks agree on it at a step boundary.

    A signal handler may do little more than set a flag: it can come in the middle of a collective. It does not even run
    while the main thread is in one, so a thread of its own sees to the grace: Python's C handler writes to its socket.

    Args:
        max_minutes: the run's own time limit; None: none.
        grace_seconds: from then on the process has this long to save and end. After that it ends all the same, with
            exit code 75 and the checkpoint before: what comes next is SIGKILL, or a node that is gone.
    """

    def __init__(self, max_minutes: float | None, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._deadline = float("inf") if max_minutes is None else time.monotonic() + 60 * max_minutes - _age()
        self._signalled = False
        self._ended = threading.Event()
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        threading.Thread(target=self._see_to_the_grace, daemon=True).start()

    def __enter__(self) -> StopWatch:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        """The run has ended: give the signals back to whoever had them."""
        self._ended.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._told.close()

    def signalled(self) -> bool:
        """Whether any rank was told to stop; every rank must ask at the same moment."""
        return self._agree(self._signalled)

    def agreed(self) -> bool:
        """The same, or its time is up: asked once there is a new step to save, or a run would never get on."""
        return self._agree(self._signalled or time.monotonic() > self._deadline)

    def check(self) -> None:
        """Raise :class:`Stopped` on every rank if any rank was told to stop; every rank must call it."""
        if self.signalled():
            raise Stopped

    def _agree(self, mine: bool) -> bool:
        stop = distributed.sum_counts([int(mine)])[0] > 0
        if stop:
            self._told.send(_TIME_IS_UP)
        return stop

    def _note(self, _number: int, _frame: object) -> None:
        self._signalled = True

    def _see_to_the_grace(self) -> None:
        """Wait for the first word of a stop, then for the end of the run, not without end."""
        with self._heard:
            while word := self._heard.recv(1):
                if (word == _TIME_IS_UP or word[0] in _SIGNALS) and not self._ended.wait(self._grace_seconds):
                    self._give_up()

    def _give_up(self) -> None:
        print(
            f"mta-ds: stopped without a new checkpoint: rank {distributed.rank()} was not done {self._grace_seconds:g} "
            "seconds after the signal (train.stop_grace_seconds)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(75)


def _age() -> float:
    """Seconds since this process began: the time limit holds for what it imports and loads, too."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
