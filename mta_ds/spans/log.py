"""What differs between two runs that make the same store: where its inputs stood, and how fast the records went.

It lies in the store's folder ``log``; all other files are the same bytes whenever they are made, with one set of
packages on one type of CPU.

    log/inputs.json                  the inputs of the last run, paths from the root
    log/digests.json                 hashes of their files, see identity.py
    log/part-00000-of-00064.jsonl    records over time while that part was made
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mta_ds.files import write_atomic
from mta_ds.spans.records import Record, Reject, local_files
from mta_ds.spans.store import part_name

if TYPE_CHECKING:  # a reader of logs needs no parser
    from mta_ds.spans.rows import Parsed

FOLDER = "log"
_INPUTS = "inputs.json"
_MAX_SAMPLES = 512
_SECONDS_BETWEEN = 0.25  # at first; twice as long whenever there are too many samples


def write_inputs(store: Path, inputs: Sequence[str]) -> None:
    """Keep where the inputs stand, for who looks at the store later and from elsewhere."""
    placed = [os.path.abspath(Path(source).expanduser()) if local_files(source) else source for source in inputs]
    if placed != read_inputs(store):
        write_atomic(store / FOLDER / _INPUTS, json.dumps(placed, indent=1) + "\n")


def read_inputs(store: Path) -> list[str]:
    """The inputs of the last run that parsed into the store; empty where that is not known."""
    try:
        values = json.loads((store / FOLDER / _INPUTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


class Pace(NamedTuple):
    """How fast a shard was parsed."""

    shard: int
    times: list[float]
    """Unix time, in seconds, rising; the first is the shard's start."""
    records: list[int]
    """Rows of the input that were done by then, rejects with them."""

    @property
    def mean(self) -> float:
        """Records/s over the whole shard."""
        return self.records[-1] / max(1e-9, self.times[-1] - self.times[0])


def read_paces(store: Path, num_shards: int) -> list[Pace]:
    """The paces of all shards that have one; a log that is missing or damaged is no error."""
    paces = []
    for shard in range(num_shards):
        path = store / FOLDER / f"{part_name(shard, num_shards)}.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            pace = Pace(shard, [float(row["time"]) for row in rows], [int(row["records"]) for row in rows])
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if len(rows) > 1 and pace.times[-1] > pace.times[0]:
            paces.append(pace)
    return paces


class Progress:
    """Records and records/s of a shard: a bar on a terminal, a line every ten seconds in a batch log, a file."""

    def __init__(self, store: Path, shard: int, num_shards: int) -> None:
        self._path = store / FOLDER / f"{part_name(shard, num_shards)}.jsonl"
        self._name = f"shard {shard + 1}/{num_shards}"
        self._began = self._told = time.monotonic()
        self._done = 0
        self._fields_read = self._fields_done = 0
        self._ahead: deque[int] = deque()  # for each record that is not done, how many fields end with it
        self._between = _SECONDS_BETWEEN
        self._clock = time.time() - self._began  # what makes a Unix time of a monotonic one
        self._samples: list[tuple[float, int]] = [(self._now(), 0)]
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}: {task.completed} records, {task.fields[rate]:.0f}/s")
            self._bar = Progress(SpinnerColumn(), text, TimeElapsedColumn())
            self._task = self._bar.add_task(f"parse {self._name}", total=None, rate=0.0)
            self._bar.start()

    def read(self, records: Iterable[Record | Reject]) -> Iterator[Record | Reject]:
        """Pass the input on, and know which of its fields belong to which record."""
        for record in records:
            self._fields_read += len(record.fields) if isinstance(record, Record) else 0
            self._ahead.append(self._fields_read)
            yield record

    def done(self, parsed: Iterable[Parsed]) -> Iterator[Parsed]:
        """Pass the results on and count the records that are done with them."""
        for one in parsed:
            self._fields_done += len(one.table)
            self._advance()
            yield one

    def write(self) -> None:
        """Write the shard's file, when all of it is done."""
        self._advance()
        self._samples.append((self._now(), self._done))
        lines = [json.dumps({"time": round(when, 6), "records": records}) for when, records in self._samples]
        write_atomic(self._path, "\n".join(lines) + "\n")

    def close(self) -> None:
        """Stop the bar and say the last count."""
        if self._bar is not None:
            self._bar.stop()
        self._say()

    def _advance(self) -> None:
        while self._ahead and self._ahead[0] <= self._fields_done:
            self._ahead.popleft()
            self._done += 1
        self._sample()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate())
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self._say()

    def _sample(self) -> None:
        now = self._now()
        if now - self._samples[-1][0] < self._between:
            return
        self._samples.append((now, self._done))
        if len(self._samples) > _MAX_SAMPLES:
            self._samples = self._samples[::2]
            self._between *= 2

    def _now(self) -> float:
        return self._clock + time.monotonic()

    def _say(self) -> None:
        print(f"parse {self._name}: {self._done} records, {self._rate():.1f} records/s", file=sys.stderr, flush=True)

    def _rate(self) -> float:
        return self._done / max(1e-9, time.monotonic() - self._began)
