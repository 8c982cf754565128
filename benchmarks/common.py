"""What the benchmarks share: contestants in processes of their own, measured in turns; rows, their table and JSON.

A contestant is a function that builds its inputs and returns the work to measure. Each lives in a process of its own,
and all run one after the other in every round, so that a machine that slows down slows them all. Times are medians of
the rounds after a warm-up; a ratio is the median of the rounds' ratios. Memory is measured in another process each.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from mta_ds.ops.products import has_fast_bfloat16

Work = Callable[[], object]
M_MMAP_THRESHOLD = -3  # glibc's number of the option: larger blocks are mapped, and unmapped when freed


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; ``bound`` and ``holds`` are None where nothing is promised."""

    name: str
    value: float | str
    unit: str = ""
    bound: str | None = None
    holds: bool | None = None


def bounded(name: str, value: float, relation: Literal["<=", ">="], bound: float | None, unit: str = "×") -> Row:
    """A figure with a promise, or a plain one where ``bound`` is None."""
    if bound is None:
        return Row(name, value, unit)
    return Row(name, value, unit, f"{relation} {bound:.3g}", value <= bound if relation == "<=" else value >= bound)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one contestant needed."""

    seconds: list[float]
    """One entry a round."""
    extra_bytes: int
    """Peak memory of one call over what the process held before it."""

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def time_ratio(a: Measured, b: Measured) -> float:
    """How many times as long ``a`` takes as ``b``."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def measure(contestants: Mapping[str, tuple[Any, ...]], rounds: int) -> dict[str, Measured]:
    """Measure all contestants in turns, each second round in the opposite order.

    Args:
        contestants: name -> (function, its arguments ...); the function returns the work.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        pipes = {name: stack.enter_context(_process(_answer_times, *each)) for name, each in contestants.items()}
        for measured in range(rounds + 1):
            # there and back: what went before slows a process, and must not always be the same one
            for name in list(pipes)[:: 1 if measured % 2 else -1]:
                pipe = pipes[name]
                pipe.send("again")
                answer = _receive(name, pipe)
                if measured:  # the first round is the warm-up
                    seconds[name].append(answer)
    extra_bytes = {}
    for name, each in contestants.items():
        with _process(_answer_memory, *each) as pipe:
            extra_bytes[name] = int(_receive(name, pipe))
    return {name: Measured(seconds[name], extra_bytes[name]) for name in contestants}


@contextmanager
def _process(answer: Callable[..., None], make: Callable[..., Work], *arguments: Any) -> Iterator[Connection]:
    """A process that runs ``answer(pipe, make, arguments)``; killed when the block ends."""
    # forked from a server that has imported everything and run nothing: no process pays for imports, none has threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mta_ds.losses", "rich.table"])
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _receive(name: str, pipe: Connection) -> float:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise SystemExit(f"{name}: the process ended without an answer (out of memory?)") from None
    if isinstance(answer, str):
        raise SystemExit(f"{name}: {answer}")
    return float(answer)


def _answer_times(pipe: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """Build the work, then answer each request with the seconds of a call; a failure with its traceback.

    A call follows another at once, as it does in training: the first after others had the machine finds cold caches
    and sleeping threads, and is not counted.
    """
    try:
        work = make(*arguments)
        while pipe.recv():
            work()
            began = time.perf_counter()
            work()
            pipe.send(time.perf_counter() - began)
    except (EOFError, ConnectionError):
        return
    except Exception:
        pipe.send(traceback.format_exc())


def _answer_memory(pipe: Connection, make: Callable[..., Work], arguments: tuple[Any, ...]) -> None:
    """Send the peak of a second call over what the process holds after a first, which makes libraries' own buffers.

    Large blocks are mapped from the start, and so unmapped as soon as they are freed: what glibc keeps of freed memory
    would hide what a call needs, or seem to be needed.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        work = make(*arguments)
        work()
        gc.collect()
        libc.malloc_trim(0)
        before = reset_peak()
        work()
        pipe.send(peak_bytes() - before)
    except Exception:
        pipe.send(traceback.format_exc())


def reset_peak(pid: int | str = "self") -> int:
    """Start a new high-water mark of a process; returns the memory that it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return _status_bytes(pid, "VmRSS")


def peak_bytes(pid: int | str = "self") -> int:
    """High-water mark of a process since its last reset."""
    return _status_bytes(pid, "VmHWM")


def anonymous_peak_bytes(pid: int) -> int:
    """The same without mapped files, which are no copy: what is mapped now counts as mapped at the peak."""
    return peak_bytes(pid) - _status_bytes(pid, "RssFile") - _status_bytes(pid, "RssShmem")


def _status_bytes(pid: int | str, key: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{pid}/status has no {key}")


def options(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every process; default: one a core")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that are measured")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def pin_threads(threads: int) -> None:
    """For this process and those it starts; threads that spin while they wait would slow everything else."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    torch.set_num_threads(threads)


def machine_row(threads: int) -> Row:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    bfloat16 = "fast bf16 products" if has_fast_bfloat16() else "no fast bf16 products"
    cores = f"{os.cpu_count()} cores, {threads} threads"
    return Row("machine", f"{model}, {cores}, {bfloat16}, torch {torch.__version__}")


def report(title: str, rows: list[Row], file: Path | None) -> None:
    """Print the table and write the JSON."""
    table = Table(title=title, title_justify="left")
    for column in ("what", "value", "bound", "holds"):
        table.add_column(column)
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g} {row.unit}"
        holds = "" if row.holds is None else "yes" if row.holds else "NO"
        table.add_row(row.name, value, row.bound or "", holds)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    if file is not None:
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n")
