"""Processes that parse: units of work in, rows of the store's schema out, in order; for the stage and for rollouts.

Each worker owns a parser and one core. A worker ends when its pipe does, so none outlives a parent that was killed; no
other signal ends it, since those that a whole group or job is sent are its parent's to handle: a training that is told
to stop still needs its parses for the step that it is in.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Protocol

import pyarrow as pa
import torch

from mta_ds.errors import UserError
from mta_ds.spans.parser import Parser, load_parser
from mta_ds.spans.rows import Field, Parsed, parse_fields

# Units that a worker has at hand while it parses another: it never waits for the reader.
_AHEAD = 2
# Units that take less time than workers need to start.
_ALONE = {"cpu": 4, "cuda": 1}
_SECONDS_TO_END = 5.0
# Giving memory back takes a look at all of it.
_UNITS_A_TRIM = 8
# A thousand, as is usual, are half a GB; with these few it takes no longer.
_COMPILED_PRODUCTS = "32"
_OF_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's


class Parsing(Protocol):
    """What turns units of work into rows."""

    def map(self, units: Iterable[Sequence[Field]]) -> Iterator[Parsed]:
        """One result a unit, in their order; reads only a few units ahead of what is taken."""


@contextmanager
def open_pool(parser: Parser, spec: str | None, workers: int | None, device: str = "cpu") -> Iterator[Parsing]:
    """Parse in this process or in several; a few units never start any.

    Args:
        parser: what this process would parse with.
        spec: how a worker loads the same.
        workers: processes; None: one for each core that this process may use, or one for a GPU.
        device: where parsers run; this process' own is there already.
    """
    num_workers = workers or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)
    pool = _Lazy(parser, spec, num_workers, device)
    try:
        yield pool
    finally:
        pool.close()


class _Lazy:
    """This process' own parser for the first units, however many inputs they come from; then workers.

    One worker alone would be no faster than this process, unless it has a GPU: that works on while this one reads
    and writes.
    """

    def __init__(self, parser: Parser, spec: str | None, num_workers: int, device: str) -> None:
        self._own, self._spec, self._num_workers, self._device = UnitParser(parser), spec, num_workers, device
        self._alone = None if num_workers == 1 and device == "cpu" else _ALONE[device]
        self._pool: ParserPool | None = None

    def map(self, units: Iterable[Sequence[Field]]) -> Iterator[Parsed]:
        units = iter(units)
        for parsed in map(self._parse, islice(units, self._alone)):
            if self._alone is not None:
                self._alone -= 1
            yield parsed
        if self._alone is None or (first := next(units, None)) is None:
            return
        if self._pool is None:
            self._pool = ParserPool(self._spec, self._num_workers, self._device)
        yield from self._pool.map(chain([first], units))

    def _parse(self, fields: Sequence[Field]) -> Parsed:
        with _one_thread():
            return self._own(fields)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


class ParserPool:
    """Worker processes behind a queue with back-pressure.

    ``submit`` gives a ticket at once, or waits while all workers have enough to do; ``result`` waits for that ticket's
    rows. Tickets may be asked for in any order, once each.

    Raises (all methods):
        UserError: a worker was killed, or could not load the parser.
    """

    def __init__(self, spec: str | None, num_workers: int, device: str = "cpu", ahead: int = _AHEAD) -> None:
        """``ahead``: units that a worker may have before ``submit`` waits."""
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._open: set[int] = set()  # tickets whose rows somebody will ask for
        self._results: dict[int, Parsed] = {}
        self._next = 0
        self._most_waiting = 4 * ahead * num_workers
        atexit.register(self.close)  # or multiprocessing would wait for workers that its SIGTERM does not end
        # or the first worker's start would start it, which lifts the block of signals that a worker is to inherit
        resource_tracker.ensure_running()
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, spec, device), daemon=True)
            with _blocked(_OF_THE_PARENT):
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours, ahead))

    def submit(self, fields: Sequence[Field]) -> int:
        """Queue one unit of work."""
        while (worker := min(self._workers, key=lambda each: len(each.tickets))).is_full:
            self._receive()
        ticket, self._next = self._next, self._next + 1
        self._open.add(ticket)
        worker.send(ticket, list(fields))
        return ticket

    def result(self, ticket: int) -> Parsed:
        """The rows of a unit, once.

        Raises:
            ValueError: there is no such ticket, or its rows were taken before.
        """
        if ticket not in self._open:
            raise ValueError(f"ticket must be one whose rows are not taken yet: {ticket} is not")
        while ticket not in self._results:
            self._receive()
        self._open.remove(ticket)
        return self._results.pop(ticket)

    def map(self, units: Iterable[Sequence[Field]]) -> Iterator[Parsed]:
        """One result a unit, in their order."""
        tickets: deque[int] = deque()
        try:
            for fields in units:
                tickets.append(self.submit(fields))
                # a slow unit at the front holds back its successors' rows, not without end
                while tickets and (tickets[0] in self._results or len(tickets) > self._most_waiting):
                    yield self.result(tickets.popleft())
            while tickets:
                yield self.result(tickets.popleft())
        finally:  # what nobody takes any more
            for ticket in tickets:
                self._open.discard(ticket)
                self._results.pop(ticket, None)

    def close(self) -> None:
        """End all workers; what is not done is dropped."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []

    def __enter__(self) -> ParserPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> None:
        """Take what workers have sent; waits for one of them."""
        by_pipe = {worker.pipe: worker for worker in self._workers}
        for pipe in wait(list(by_pipe)):
            assert isinstance(pipe, Connection)
            ticket, parsed = by_pipe[pipe].receive()
            if ticket in self._open:
                self._results[ticket] = parsed


class UnitParser:
    """What a process does with its units: parse each, and now and then give back what the tensors of so many sizes have
    left in holes, so that memory stays flat.
    """

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._num_parsed = 0

    def __call__(self, fields: Sequence[Field]) -> Parsed:
        """One unit's rows."""
        parsed = parse_fields(fields, self._parser)
        self._num_parsed += 1
        if _trim is not None and self._num_parsed % _UNITS_A_TRIM == 0:
            _trim(0)
        return parsed


@contextmanager
def lean_memory() -> Iterator[None]:
    """Where a process loads its parser: it will keep little beside what it works on, however many batches come.

    Arrow uses the C library's memory as torch does, since of two pools each keeps what the other could use. And oneDNN
    keeps few of the products that it compiles, in bf16 one a shape; it asks how many when it makes its first.
    """
    pa.set_memory_pool(pa.system_memory_pool())
    ours = [name for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY") if name not in os.environ]
    os.environ.update(dict.fromkeys(ours, _COMPILED_PRODUCTS))
    try:
        yield
    finally:
        for name in ours:  # processes that this one starts may do other work
            del os.environ[name]


class _Worker:
    """One process, its pipe, and the tickets it has."""

    def __init__(self, process: multiprocessing.process.BaseProcess, pipe: Connection, ahead: int) -> None:
        self.process, self.pipe, self._ahead = process, pipe, ahead
        self.tickets: deque[int] = deque()

    @property
    def is_full(self) -> bool:
        return len(self.tickets) >= self._ahead

    def send(self, ticket: int, fields: list[Field]) -> None:
        self.tickets.append(ticket)
        with suppress(OSError):
            self.pipe.send(fields)
            return
        while True:  # it has ended: until what it said last, or else that it is gone, is raised
            self.receive()

    def receive(self) -> tuple[int, Parsed]:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a parser worker failed:\n{answer}")
        return self.tickets.popleft(), answer

    def _lost(self) -> UserError:
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        return UserError(
            f"a parser worker ended {how}; was it out of memory? Run the same command again, with fewer --workers"
        )


def _work(pipe: Connection, spec: str | None, device: str) -> None:
    """A worker: units from a thread that always reads, so that a parent never waits to hand one over."""
    torch.set_num_threads(1)
    units: SimpleQueue[list[Field] | None] = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, units), daemon=True).start()
    with suppress(OSError):  # nobody is there any more
        for answer in _answers(units, spec, device):
            pipe.send(answer)


def _answers(
    units: SimpleQueue[list[Field] | None], spec: str | None, device: str
) -> Iterator[Parsed | UserError | str]:
    """Every unit's rows, or last of all why there are none."""
    try:
        with lean_memory():
            parse = UnitParser(load_parser(spec, device))
        while (fields := units.get()) is not None:
            yield parse(fields)
    except UserError as error:
        yield error
    except Exception:
        yield traceback.format_exc()


def _read(pipe: Connection, units: SimpleQueue[list[Field] | None]) -> None:
    try:
        while True:
            units.put(pipe.recv())
    except (EOFError, OSError):
        units.put(None)


@contextmanager
def _blocked(signals: Iterable[signal.Signals]) -> Iterator[None]:
    """Hold signals back: this process' until the block ends, those of a process that it starts for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: products shared out over threads may differ in their last digit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
