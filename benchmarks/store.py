"""The span store at scale: random lookups, and the parse stage's peak memory over a corpus ten times as large.

    python benchmarks/store.py                          # some five minutes on two cores
    python benchmarks/store.py --small --json rows.json # a smoke run, whose figures mean nothing

Lookups are of (record id, field) in random order, as a shuffled loader makes them, in one process of one thread, with
the text, whose hash is compared; their time is the processor's, page faults with it. The store's rows are the demo's,
parsed by the bundled parser, over and over under other ids. Peak memory is that of a process that parses by itself, and
of one with two workers, all three together, without mapped files; records of both corpora are made of the demo's
sentences and some words that are like no other, so that nothing that is remembered by word stays small for lack of
words.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
import time
from dataclasses import dataclass
from itertools import cycle, islice
from multiprocessing import active_children, get_context
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import Row, anonymous_peak_bytes, bounded, machine_row, options, pin_threads, report
from parse import documents, to_fields

from mta_ds.files import sha256
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.spans.parser import load_parser
from mta_ds.spans.pool import ParserPool
from mta_ds.spans.rows import parse_fields
from mta_ds.spans.segment import SEGMENTATION
from mta_ds.spans.store import SCHEMA, SCHEMA_VERSION, Counts, Manifest, ParserInfo, Part, SpanStore, part_name

SECONDS_A_MILLION = 30.0
GROWTH = 1.05
ROWS_A_PART = 50_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    rows: int
    lookups: int
    documents: int
    few_words: int  # records of the smaller corpus that gets words alone
    few_trees: int  # ... and of the one that gets trees
    workers: tuple[int, ...]


FULL = Sizes(rows=200_000, lookups=1_000_000, documents=200, few_words=3_000, few_trees=600, workers=(1, 2))
SMALL = Sizes(rows=500, lookups=2_000, documents=20, few_words=50, few_trees=8, workers=(1,))


def write_store(folder: Path, texts: list[str], num_rows: int) -> None:
    """A store of ``num_rows`` rows: those of ``texts`` again and again, as records "r0", "r1", ..."""
    parser = load_parser(None)
    table = parse_fields(to_fields(texts), parser).table
    repeated = pa.concat_tables([table] * -(-min(num_rows, ROWS_A_PART) // len(table)))
    folder.mkdir()
    parts = []
    num_parts = -(-num_rows // ROWS_A_PART)
    for number in range(num_parts):
        first = number * ROWS_A_PART
        last = min(num_rows, first + ROWS_A_PART)
        # a part begins with the first text, whatever number its first record has
        ids = pa.array([f"r{i}" for i in range(first, last)])
        rows = repeated.slice(0, last - first).set_column(0, "record_id", ids).cast(SCHEMA).combine_chunks()
        path = folder / f"{part_name(number, num_parts)}.parquet"
        pq.write_table(rows, path, compression="zstd", row_group_size=4096)
        parts.append(Part(file=path.name, rows=len(rows), sha256=sha256(path), counts=Counts(fields=len(rows))))
    info = ParserInfo(name=parser.name, fingerprint=parser.fingerprint, versions=dict(parser.versions))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        segmentation=SEGMENTATION,
        parser=info,
        num_shards=num_parts,
        inputs="",
        parts=tuple(parts),
        counts=Counts(records=num_rows, fields=num_rows),
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def lookup_rows(folder: Path, texts: list[str], sizes: Sizes) -> list[Row]:
    """Time random lookups in a store that was opened before, and its first opening."""
    write_store(folder, texts, sizes.rows)
    began = time.perf_counter()
    store = SpanStore.open(folder)
    opened = time.perf_counter() - began
    began = time.perf_counter()
    store = SpanStore.open(folder)
    reopened = time.perf_counter() - began
    chance = random.Random(0)
    wanted = [chance.randrange(sizes.rows) for _ in range(sizes.lookups)]
    num_words = 0
    gc.collect()
    began = time.process_time()
    for i in wanted:
        units = store.units(f"r{i}", "text", texts[i % ROWS_A_PART % len(texts)])
        assert units is not None
        num_words += len(units.words)
    taken = time.process_time() - began
    return [
        Row("rows in the store", float(sizes.rows)),
        Row("first opening, which builds the index", opened, "s"),
        Row("later openings", reopened * 1e3, "ms"),
        Row("words a row", num_words / sizes.lookups),
        bounded("10⁶ random lookups, one core", taken / sizes.lookups * 1e6, "<=", SECONDS_A_MILLION, "s"),
    ]


def write_corpus(path: Path, texts: list[str], num_records: int) -> None:
    """``num_records`` records, one text each, with a word of its own in every second one."""
    with open(path, "w", encoding="utf-8") as file:
        for i, text in enumerate(islice(cycle(texts), num_records)):
            own = f"Number {i * 7919:x} is here. " if i % 2 else ""
            file.write(json.dumps({"id": str(i), "text": own + text}) + "\n")


def _answer_peak(source: Path, output: Path, parser: str | None, workers: int, pipe: object) -> None:
    torch.set_num_threads(1)
    peaks: dict[int, int] = {}
    close = ParserPool.close

    def measured_close(pool: ParserPool) -> None:
        peaks.update({child.pid or 0: anonymous_peak_bytes(child.pid or 0) for child in active_children()})
        close(pool)

    with patch.object(ParserPool, "close", measured_close):
        parse(ParseConfig(inputs=(str(source),), output=output, parser=parser, workers=workers))
    peaks[os.getpid()] = anonymous_peak_bytes(os.getpid())
    pipe.send(sum(peaks.values()))  # type: ignore[attr-defined]


def peak_bytes(source: Path, output: Path, parser: str | None, workers: int) -> int:
    """Peak memory of a process of its own that parses ``source``, and of its workers if there are several."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer_peak, args=(source, output, parser, workers, theirs))
    process.start()
    theirs.close()
    peak = int(ours.recv())
    process.join()
    return peak


def memory_rows(
    folder: Path, texts: list[str], name: str, parser: str | None, num_records: int, workers: int
) -> list[Row]:
    """Peaks over a corpus and over one that is ten times as large."""
    peaks = []
    for number in (num_records, 10 * num_records):
        source = folder / f"{name}-{number}.jsonl"
        write_corpus(source, texts, number)
        peaks.append(peak_bytes(source, folder / f"{name}-{workers}-{number}", parser, workers))
    what = f"peak memory, {name}, " + ("one process" if workers == 1 else f"{workers} workers")
    return [
        Row(f"{what}, {num_records} records", peaks[0] / 1e6, "MB"),
        bounded(f"{what}, {10 * num_records} records / {num_records}", peaks[1] / peaks[0], "<=", GROWTH),
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--small", action="store_true", help="a smoke run")
    chosen = parser.parse_args()
    sizes = SMALL if chosen.small else FULL
    pin_threads(1)
    texts = documents(sizes.documents)
    rows = [machine_row(1)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows += lookup_rows(folder / "lookups", texts, sizes)
        for workers in sizes.workers:
            rows += memory_rows(folder, texts, "words alone", "none", sizes.few_words, workers)
            rows += memory_rows(folder, texts, "bundled parser", None, sizes.few_trees, workers)
    report("Span store", rows, chosen.json)


if __name__ == "__main__":
    main()
