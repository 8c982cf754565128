"""One process writes a run folder: rank 0 holds ``run_dir/.lock`` while it trains; a second run is refused.

A batch system may start a job again while the old one, cut off from it, still trains. The lock says whose it is, and
its holder touches it every few seconds. It is taken over

- at once where its process is known to be gone: on this machine, or because Slurm has restarted the same job;
- else once nobody has touched it for a while, by the clock of the file system, which alone all machines share.

Who finds the lock taken over ends at once. A lock that cannot be written (a full disk) stops nobody.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.files import process_space, process_start, write_atomic

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TOUCHES = 10.0
_STALE_SECONDS = 60.0
_PATIENCE_SECONDS = 10.0  # ranks of a killed launcher need some to end

Owner = dict[str, str | int]


@contextlib.contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Have the run folder for a while; every rank must call it.

    Raises:
        UserError: another run has it; on every rank.
    """
    lock = RunLock(run_dir)
    distributed.from_rank_zero(lock.take)
    try:
        yield
    finally:
        lock.release()


def owner_of_this_process(environment: Mapping[str, str]) -> Owner:
    """What tells this process from all others."""
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "machine": process_space() or uuid.uuid4().hex,  # else nobody's number means anything here
        "pid": os.getpid(),
        "start": process_start(os.getpid()) or "",
        "job": environment.get("SLURM_JOB_ID", ""),
        "restart": int(environment.get("SLURM_RESTART_COUNT", "0")),
    }


def is_gone(owner: Owner, mine: Owner) -> bool:
    """Whether an owner's process is known to have ended."""
    if owner.get("machine") == mine["machine"]:
        return process_start(int(owner["pid"])) != owner["start"]
    return mine["job"] != "" and owner.get("job") == mine["job"] and int(owner["restart"]) < int(mine["restart"])


class RunLock:
    """The lock of a run folder, this process' own once :meth:`take` has returned."""

    def __init__(
        self, run_dir: Path, stale_seconds: float = _STALE_SECONDS, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self._path = run_dir / ".lock"
        self._mine = owner_of_this_process(os.environ)
        self._stale_seconds = stale_seconds
        self._patience_seconds = patience_seconds
        self._released = threading.Event()

    def take(self) -> None:
        """Take it; a holder that may be about to end is waited for.

        Raises:
            UserError: somebody else holds it.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            logger.warning("%s: %s; nothing keeps a second run from this folder", self._path, error)
            return
        threading.Thread(target=self._keep, daemon=True).start()

    def release(self) -> None:
        """Give it up, if it is still this process'."""
        self._released.set()
        with contextlib.suppress(OSError):
            if self._read()[0].get("token") == self._mine["token"]:
                self._path.unlink()

    def touch(self) -> bool:
        """Say that the holder lives; False if that is not this process any more."""
        if self._read()[0].get("token") != self._mine["token"]:
            return False
        os.utime(self._path)
        return True

    def _take(self) -> None:
        deadline, first_touch = time.monotonic() + self._patience_seconds, None
        while not self._create():
            with contextlib.suppress(FileNotFoundError):  # given up meanwhile
                owner, touched = self._read()
                first_touch = first_touch or touched
                here = owner.get("machine") == self._mine["machine"]
                if is_gone(owner, self._mine) or (not here and self._now() - touched > self._stale_seconds):
                    # of two that come to this at once the first will find the other's words, and end
                    write_atomic(self._path, json.dumps(self._mine))
                    return
                if time.monotonic() > deadline if here else touched != first_touch:
                    raise self._refusal(owner)
            time.sleep(0.2)

    def _create(self) -> bool:
        """Write it, unless it is there."""
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._mine, file)
        except OSError:
            self._path.unlink()
            raise
        return True

    def _read(self) -> tuple[Owner, float]:
        """Its holder, empty where that is not written yet, and when it was last touched.

        Opened, since a network file system looks at the file anew then, and may not otherwise.
        """
        with open(self._path, "rb") as file:
            touched = os.fstat(file.fileno()).st_mtime
            content = file.read()
        with contextlib.suppress(ValueError):
            owner = json.loads(content)
            if isinstance(owner, dict) and owner.keys() == self._mine.keys():
                return owner, touched
        return {}, touched

    def _now(self) -> float:
        """The time by the clock that dates the lock."""
        with tempfile.TemporaryFile(dir=self._path.parent) as file:
            return os.fstat(file.fileno()).st_mtime

    def _keep(self) -> None:
        while not self._released.wait(_SECONDS_BETWEEN_TOUCHES):
            with contextlib.suppress(OSError):  # a disk that does not answer for a while stops nobody
                if not self.touch() and not self._released.is_set():
                    print(
                        f"mta-ds: error: {self._path}: another run has taken this folder over",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)

    def _refusal(self, owner: Owner) -> UserError:
        job = f", Slurm job {owner['job']}" if owner.get("job") else ""
        return UserError(
            f"{self._path.parent}: another run writes here (process {owner.get('pid')} on {owner.get('host')}{job}); "
            "stop that first, or choose another run_dir"
        )
