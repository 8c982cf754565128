"""Records and span stores, their readers and writers in processes of their own, and a parser that is made in no time.

They are forked from a server that has imported everything and holds nothing. A fork of the process of the tests costs
as much memory as that has gathered by then, and it has threads.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mta_ds.spans import parse as module
from mta_ds.spans import rows as rows_module
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.spans.parser import Constituent, Parse, Sentence
from mta_ds.spans.store import SpanStore

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["mta_ds.spans.parse"])  # not this module: the server has no sys.path of ours


class RightBranching:
    """A small parser: every suffix of a sentence is a constituent. Takes no sentence over 40 words, no word "??"."""

    name = "right"

    def __init__(self, fingerprint: str = "f", delay: float = 0.0) -> None:
        self.fingerprint = fingerprint
        self.versions = {"right": "1"}
        self.delay = delay
        self.parsed: list[Sentence] = []

    def fits(self, sentence: Sentence) -> bool:
        return len(sentence.words) <= 40 and "??" not in sentence.words

    def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
        time.sleep(self.delay)
        self.parsed += sentences
        return [self._parse(len(sentence.words)) for sentence in sentences]

    @staticmethod
    def _parse(n: int) -> Parse:
        labels = ["S", *("VP" if i % 2 else "NP" for i in range(1, n))]
        return Parse(("X",) * n, tuple(Constituent(i, n, labels[i], n - i) for i in range(n)))


def num_words(path: Path, row: Mapping[str, str]) -> int:
    """Words of a row's response in the store, opened for it."""
    units = SpanStore.open(path).units(row["id"], "response", row["response"])
    assert units is not None
    return len(units.words)


def start_parse(config: ParseConfig, index: int | None, delay: float, killed_after: float | None = None) -> BaseProcess:
    """A task, with ``rows.FIELDS_AT_ONCE`` of this process; SIGKILL comes ``killed_after`` seconds later."""
    child = PROCESSES.Process(target=_run, args=(config, index, delay, killed_after, rows_module.FIELDS_AT_ONCE))
    child.start()
    return child


def start_until_rename(config: ParseConfig, number: int, before: bool) -> BaseProcess:
    """A task that SIGKILL ends just before, or just after, it puts its ``number``-th file in place."""
    child = PROCESSES.Process(target=_run_until_rename, args=(config, number, before))
    child.start()
    return child


def _run(config: ParseConfig, index: int | None, delay: float, killed_after: float | None, fields: int) -> None:
    """Kill from a thread, whatever the task does by then."""
    rows_module.FIELDS_AT_ONCE = fields
    module.load_parser = lambda spec, device: RightBranching(delay=delay)
    if killed_after is not None:
        threading.Timer(killed_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    parse(config.model_copy(update={"workers": 1}), index)
    os._exit(0)  # without waiting for the thread


def _run_until_rename(config: ParseConfig, number: int, before: bool) -> None:
    module.load_parser = lambda spec, device: RightBranching()
    rename, renamed = os.replace, 0

    def replace(*paths: Any) -> None:
        nonlocal renamed
        renamed += 1
        if before and renamed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)
        if renamed == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    parse(config.model_copy(update={"workers": 1}))
    os._exit(0)


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    """A JSONL file of rows, of which a string goes as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_records(n: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "instruction": f"Say {i}. Go, or stay!", "output": "A big cat. " * i} for i in range(n)]


def rows_of(store: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """By record and field."""
    table = pa.concat_tables(pq.read_table(part) for part in sorted(store.glob("*.parquet")))
    return {(row["record_id"], row["field"]): row for row in table.to_pylist()}


def parts_of(store: Path) -> dict[str, bytes]:
    """What the store's files hold."""
    return {p.name: p.read_bytes() for p in store.iterdir() if p.is_file() and not p.name.startswith(".")}
