"""Start local ranks of a command and stand or fall with them: ``mta-ds train CONFIG --nproc N`` without torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from mta_ds.errors import UserError

PARENT = "MTA_DS_LAUNCHER_PID"
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The environment of one local rank, in torchrun's names.

    Cores are divided between the ranks: on a CPU, ranks that each start a thread a core slow one another down several
    times. OpenMP threads wait passively for the same reason.
    """
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    defaults = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    ranks = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PARENT: str(os.getpid()),
    }
    return defaults | os.environ | ranks


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Run ``python -m mta_ds ARGUMENTS`` as ``num_ranks`` ranks on this machine and wait for them.

    The first rank that fails takes the others down within seconds. SIGTERM, SIGINT and SIGUSR1 are passed on. The ranks
    meet at MASTER_PORT if it is set, else at any free port.

    Returns:
        0 if every rank did, else the exit code of the rank that failed first (128 + n for signal n).
    """
    reserved = _reserve_port()
    port = reserved.getsockname()[1]
    command = [sys.executable, "-m", "mta_ds", *arguments]
    ranks = [
        subprocess.Popen(command, env=rank_environment(rank, num_ranks, port), start_new_session=True)
        for rank in range(num_ranks)
    ]

    def forward(number: int, _frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        return _wait(ranks)
    finally:
        reserved.close()
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def follow_parent(poll_seconds: float = 1.0) -> None:
    """In a rank of :func:`launch`: end with the launcher, also if that is killed and can forward nothing."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(poll_seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _wait(ranks: Sequence[subprocess.Popen[bytes]], grace_seconds: float = 10.0) -> int:
    """Wait for all; once one has failed, the others get ``grace_seconds`` to end by themselves, then SIGKILL."""
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in ranks):
        if not failed:
            failed = _first_failure(ranks)
            deadline = time.monotonic() + grace_seconds if failed else deadline
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    return failed or _first_failure(ranks)


def _first_failure(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    for process in ranks:
        code = process.poll()
        if code:
            return code if code > 0 else 128 - code
    return 0


def _reserve_port() -> socket.socket:
    """The port that the ranks will meet at, held so that nobody else gets it before rank 0 listens there, in seconds.

    Two sockets may be bound to one port while only one of them listens and both say that they share it.

    Raises:
        UserError: MASTER_PORT is taken.
    """
    wanted = os.environ.get("MASTER_PORT", "0")
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind(("127.0.0.1", int(wanted)))
    except OSError:
        raise UserError(f"MASTER_PORT {wanted}: something else listens there already; set it to a free port") from None
    return holder
