"""The parse stage: read records, parse every text field once, write one part of the span store a shard.

Shards need no coordination. A part counts when the JSON beside it is there, a store when its manifest is; both are
written last and by rename, so a task may be killed at any instruction and run again. Whoever finds all parts complete
merges: counts duplicates on disk and writes the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from mta_ds.config import Section
from mta_ds.errors import UsageError, UserError
from mta_ds.files import atomic_path, sha256, write_atomic
from mta_ds.spans.parser import Parse, Parser, Sentence, load_parser
from mta_ds.spans.records import Record, Reject, input_files, read_records, text_hash
from mta_ds.spans.segment import Segment, segment, split_to_fit
from mta_ds.spans.store import (
    ROWS_PER_GROUP,
    SCHEMA,
    SCHEMA_VERSION,
    Counts,
    Manifest,
    ParserInfo,
    Part,
    check_part,
    part_name,
)

_CACHED_SENTENCES = 50_000


class ParseConfig(Section):
    """What is parsed, by which parser, into which store."""

    inputs: tuple[str, ...] = Field(min_length=1)
    """Files, folders, globs or ``datasets`` names."""
    output: Path
    """The store's folder."""
    parser: str | None = None
    """A Benepar model's path; the bundled model unless given; "none" for words without constituents."""
    num_shards: int = Field(default=1, ge=1)
    max_reject_share: float = Field(default=0.0, ge=0, le=1)
    """Share of bad rows above which the stage fails."""


class _Row(NamedTuple):
    """One field of one record on its way through the parser."""

    record_id: str
    field: str
    text: str
    parts: list[tuple[Segment, bool]]


def parse(config: ParseConfig, shard_index: int | None = None) -> Manifest | None:
    """Parse the shards that are missing, or only ``shard_index``; merge if that completes the store.

    Returns:
        The manifest, or None while other shards are missing.

    Raises:
        UserError: bad input; a store of other inputs, parser or shard count in ``output``; more bad rows than
            ``max_reject_share`` (the parts stay: a rerun that allows them only merges).
    """
    if shard_index is not None and not 0 <= shard_index < config.num_shards:
        raise UsageError(
            f"--shard-index {shard_index}: want 0 to {config.num_shards - 1} for {config.num_shards} shards"
        )
    parser = load_parser(config.parser)
    store = _claim_store(config, parser)
    for index in range(config.num_shards) if shard_index is None else (shard_index,):
        part = _complete_part(config.output, index, config.num_shards)
        if part is None:
            part = _parse_shard(config, parser, store, index)
    return merge(config)


def merge(config: ParseConfig) -> Manifest | None:
    """Write the manifest if all parts are there and the bad rows few enough; None while parts are missing."""
    parts = [_complete_part(config.output, i, config.num_shards) for i in range(config.num_shards)]
    complete = [part for part in parts if part is not None]
    if len(complete) < config.num_shards:
        return None
    identity = json.loads((config.output / "store.json").read_text(encoding="utf-8"))
    counts = sum((part.counts for part in complete), Counts())
    duplicates, conflicts = _find_duplicates(config.output, complete)
    counts = counts.model_copy(
        update={
            "records": counts.records - duplicates - len(conflicts),
            "duplicates": duplicates,
            "rejects": counts.rejects + len(conflicts),
        }
    )
    _write_rejects(config.output / "rejects-duplicates.jsonl", conflicts)
    _refuse_many_rejects(config, counts)
    if counts.records == 0:
        raise UserError(f"{', '.join(config.inputs)}: no records")
    manifest = Manifest(parts=tuple(complete), counts=counts, **identity)
    path = config.output / "manifest.json"
    text = manifest.model_dump_json(indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
    return manifest


def _claim_store(config: ParseConfig, parser: Parser) -> ParserInfo:
    """Write down what the store is made of, or check that it is the same as before."""
    info = ParserInfo(name=parser.name, fingerprint=parser.fingerprint, versions=dict(parser.versions))
    identity = {
        "schema_version": SCHEMA_VERSION,
        "parser": info.model_dump(),
        "num_shards": config.num_shards,
        "inputs": _fingerprint_inputs(config.inputs),
    }
    path = config.output / "store.json"
    if not path.is_file():
        try:
            write_atomic(path, json.dumps(identity, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{config.output}: cannot write the span store: {error.strerror}") from None
        return info
    before = json.loads(path.read_text(encoding="utf-8"))
    differences = {
        "schema_version": f"schema {before['schema_version']}",
        "num_shards": f"{before['num_shards']} shards",
        "inputs": "other inputs",
    }
    for key, what in differences.items():
        if before[key] != identity[key]:
            raise UserError(f"{config.output}: already holds a store of {what}; choose another output or remove it")
    if before["parser"]["fingerprint"] != info.fingerprint:
        raise UserError(
            f"{config.output}: already holds a store made by another parser ('{before['parser']['name']}', this is "
            f"'{info.name}'); choose another output or remove it"
        )
    return info


def _fingerprint_inputs(inputs: Iterable[str]) -> str:
    """Names and sizes of the input files, in order: what decides which record is whose."""
    seen = [[f"{f.name}:{f.stat().st_size}" for f in input_files(source)] or [source] for source in inputs]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _complete_part(output: Path, index: int, num_shards: int) -> Part | None:
    """The part if it is complete; UserError if it was and is damaged now."""
    sidecar = output / f"{part_name(index, num_shards)}.json"
    if not sidecar.is_file():
        return None
    try:
        part = Part.model_validate_json(sidecar.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError):
        sidecar.unlink()  # it says nothing about the part any more: make it again
        return None
    if not (output / part.file).is_file():
        sidecar.unlink()
        return None
    check_part(output, part, full=False)
    return part


def _parse_shard(config: ParseConfig, parser: Parser, info: ParserInfo, index: int) -> Part:
    name = part_name(index, config.num_shards)
    path = config.output / f"{name}.parquet"
    metadata = {"mta_ds.schema_version": str(SCHEMA_VERSION), "mta_ds.parser": info.model_dump_json()}
    schema = SCHEMA.with_metadata(metadata)
    rejects: list[Reject] = []
    tally: Counter[str] = Counter()
    progress = _Progress(f"shard {index + 1}/{config.num_shards}")
    sentences = _Sentences(parser)
    try:
        with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            records = read_records(config.inputs, num_shards=config.num_shards, shard_index=index)
            rows = _rows(records, parser, rejects, tally, progress)
            while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
                writer.write_table(_to_table(group, sentences, tally, schema))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    progress.close()
    tally["rejects"] = len(rejects)
    _write_rejects(config.output / f"rejects-{name.removeprefix('part-')}.jsonl", rejects)
    part = Part(file=path.name, rows=tally["fields"], sha256=sha256(path), counts=Counts(**tally))
    write_atomic(path.with_suffix(".json"), part.model_dump_json(indent=1) + "\n")
    return part


def _rows(
    records: Iterator[Record | Reject],
    parser: Parser,
    rejects: list[Reject],
    tally: Counter[str],
    progress: _Progress,
) -> Iterator[_Row]:
    """One row a field, its sentences cut to what the parser takes."""
    for record in records:
        progress.advance()
        if isinstance(record, Reject):
            rejects.append(record)
            continue
        tally["records"] += 1
        for field, text in record.fields.items():
            tally["fields"] += 1
            parts: list[tuple[Segment, bool]] = []
            for whole in segment(text):
                pieces = split_to_fit(whole, parser.fits)
                tally["split"] += len(pieces) > 1
                tally["unparsed"] += sum(not fits for _, fits in pieces)
                parts += pieces
            yield _Row(record.id, field, text, parts)


class _Sentences:
    """Parses each distinct sentence once, as far as a bounded memory of them reaches."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._known: OrderedDict[Sentence, Parse] = OrderedDict()

    def parse(self, sentences: list[Sentence]) -> list[Parse]:
        new = list(dict.fromkeys(s for s in sentences if s not in self._known))
        self._known.update(zip(new, self._parser.parse(new), strict=True))
        parses = [self._known[s] for s in sentences]
        while len(self._known) > _CACHED_SENTENCES:
            self._known.popitem(last=False)
        return parses


def _to_table(group: list[_Row], sentences: _Sentences, tally: Counter[str], schema: pa.Schema) -> pa.Table:
    """Parse a group of rows, across records, and lay them out by the store's schema."""
    parses = iter(sentences.parse([part.sentence for row in group for part, fits in row.parts if fits]))
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for row in group:
        words: list[dict[str, int]] = []
        tags: list[str] = []
        constituents: list[dict[str, Any]] = []
        bounds = [0]
        for part, fits in row.parts:
            found = next(parses) if fits else Parse(("",) * len(part.ranges), ())
            constituents += [
                {"start_word": c.start_word + bounds[-1], "end_word": c.end_word + bounds[-1]}
                | {"label": c.label, "height": c.height}
                for c in found.constituents
            ]
            words += [{"start": start, "end": end} for start, end in part.ranges]
            tags += found.tags
            bounds.append(len(words))
        values = (row.record_id, row.field, text_hash(row.text), len(row.text), bounds, words, tags, constituents)
        for name, value in zip(schema.names, values, strict=True):
            columns[name].append(value)
        tally.update(sentences=len(row.parts), words=len(words), constituents=len(constituents))
    return pa.Table.from_pydict(columns, schema=schema)


def _find_duplicates(output: Path, parts: list[Part]) -> tuple[int, list[Reject]]:
    """Records whose id came before: how many with equal content, and a reject for each with other content.

    On disk, so that memory stays flat over any corpus.
    """
    equal, conflicts = 0, []
    with tempfile.TemporaryDirectory(dir=output) as folder, closing(sqlite3.connect(Path(folder) / "ids")) as ids:
        ids.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, content BLOB) WITHOUT ROWID")
        for where, record_id, content in _contents(output, parts):
            if ids.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (record_id, content)).rowcount:
                continue
            (before,) = ids.execute("SELECT content FROM ids WHERE id = ?", (record_id,)).fetchone()
            if before == content:
                equal += 1
            else:
                conflicts.append(Reject(where, "duplicate id with other content", record_id))
    return equal, conflicts


def _contents(output: Path, parts: list[Part]) -> Iterator[tuple[str, str, bytes]]:
    """(part file, record id, hash of all fields) of every record in the parts."""
    columns = ["record_id", "field", "text_hash"]
    for part in parts:
        record_id, digest, fields = None, hashlib.sha256(), set()
        for batch in pq.ParquetFile(output / part.file).iter_batches(columns=columns):
            for row_id, field, text in zip(*(batch[c].to_pylist() for c in columns), strict=True):
                # a field that comes again is the next record under the same id
                if row_id != record_id or field in fields:
                    if record_id is not None:
                        yield part.file, record_id, digest.digest()
                    record_id, digest, fields = row_id, hashlib.sha256(), set()
                fields.add(field)
                digest.update(field.encode() + b"\0" + text)
        if record_id is not None:
            yield part.file, record_id, digest.digest()


def _write_rejects(path: Path, rejects: list[Reject]) -> None:
    """One JSON line a reject; no file where there is none."""
    if rejects:
        lines = [json.dumps(reject._asdict(), ensure_ascii=False) + "\n" for reject in rejects]
        write_atomic(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


def _refuse_many_rejects(config: ParseConfig, counts: Counts) -> None:
    total = counts.records + counts.rejects
    if counts.rejects <= config.max_reject_share * total:
        return
    rejects = [
        json.loads(line)
        for path in sorted(config.output.glob("rejects-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    reasons = Counter(reject["reason"].partition(":")[0] for reject in rejects)
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(4))
    raise UserError(
        f"{rejects[0]['where']}: {rejects[0]['reason']}; {counts.rejects} of {total} rows are bad ({listed}; see "
        f"{config.output}/rejects-*.jsonl); mend them, or allow them with --max-reject-share"
    )


class _Progress:
    """Records and records/s: a bar on a terminal, a line every ten seconds in a batch log."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._told = time.monotonic()
        self._count = 0
        self._bar: Any = None
        if sys.stderr.isatty():
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            text = TextColumn("{task.description}: {task.completed} records, {task.fields[rate]:.0f}/s")
            self._bar = Progress(SpinnerColumn(), text, TimeElapsedColumn())
            self._task = self._bar.add_task(f"parse {name}", total=None, rate=0.0)
            self._bar.start()

    def advance(self) -> None:
        self._count += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._count, rate=self._rate())
        elif time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            self._say()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._say()

    def _say(self) -> None:
        print(f"parse {self._name}: {self._count} records, {self._rate():.1f} records/s", file=sys.stderr, flush=True)

    def _rate(self) -> float:
        return self._count / max(1e-9, time.monotonic() - self._began)
