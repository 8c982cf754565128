"""Start a command of ours on all ranks and end it in good time; how trials are run, apart from what they are."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mta_ds.errors import UserError
from mta_ds.launch.local import PARENT
from mta_ds.tuning.machine import Machine

GRACE_SECONDS = 30.0
# glibc 2.36 keeps the remainders of aligned blocks apart, in its caches of small ones; a freed block then never fits
# the next of its own size, and the heap grows by most of what lives in it. Without these caches remainders are merged.
_MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"}


def run_ranks(arguments: Sequence[str], machine: Machine, log: Path, seconds: float) -> tuple[int | None, str]:
    """Run ``mta-ds ARGUMENTS`` on all ranks; its exit code, None if time was over, and what it said.

    Raises:
        UserError: an allocation of several nodes, and no srun to reach them.
    """
    environment = rank_variables(machine) | os.environ
    command = [*_launcher(machine), sys.executable, "-m", "mta_ds", *arguments]
    if command[0] == sys.executable:
        command += ["--nproc", str(machine.num_ranks)]
        environment[PARENT] = str(os.getpid())  # should tune be killed, its trial ends too
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    return code, log.read_text(encoding="utf-8", errors="replace")


def rank_variables(machine: Machine) -> dict[str, str]:
    """What the environment of ranks holds beside the user's own."""
    return {} if machine.is_gpu else dict(_MALLOC)


@functools.cache
def library_bytes(machine: Machine) -> int:
    """What a rank on a CPU holds before it has a model: the imported libraries; 0 on a GPU.

    Its own high-water mark, not getrusage's, which begins with that of the process that started it.
    """
    if machine.is_gpu:
        return 0
    code = (
        "import mta_ds.engine.train\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    environment = rank_variables(machine) | os.environ
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return 1024 * int(done.stdout.split()[-1])


def end(process: subprocess.Popen[bytes], grace_seconds: float = GRACE_SECONDS) -> None:
    """Ask a process to end: srun and our launcher pass that on to their ranks. After a while kill its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _launcher(machine: Machine) -> list[str]:
    """srun where the allocation's tasks are the ranks; nothing where a launcher of our own starts them here."""
    if "SLURM_JOB_ID" not in os.environ:
        return []
    if shutil.which("srun") is not None:
        return ["srun", "--kill-on-bad-exit=1", f"--ntasks={machine.num_ranks}"]
    if machine.num_nodes > 1:
        raise UserError(
            "srun is not found: trials on several nodes are started with it, and a container as a rule has none; run "
            "tune outside the container, or with --plan-only"
        )
    return []
