"""The parse stage: read records, parse every text field once, write one part of the span store a shard.

Shards need no coordination. A part counts when the JSON beside it is there, a store when its manifest is; both are
written last and by rename, so a task may be killed at any instruction and run again. Whoever finds all parts complete
merges: counts duplicates on disk and writes the manifest.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field

from mta_ds.config import Section, load, validate
from mta_ds.errors import UsageError, UserError
from mta_ds.files import atomic_path, sha256, write_atomic
from mta_ds.spans.merge import complete_part, merge, reject_log
from mta_ds.spans.parser import Constituent, Parse, Parser, Sentence, load_parser
from mta_ds.spans.records import Record, Reject, input_files, read_records, text_hash
from mta_ds.spans.segment import Segment, segment, split_to_fit
from mta_ds.spans.store import ROWS_PER_GROUP, SCHEMA, SCHEMA_VERSION, Counts, Manifest, ParserInfo, Part, part_name

# What goes through the parser at once, and what is held until it is written: bounds memory whatever the texts' length.
_ROWS_AT_ONCE = 512
_WORDS_AT_ONCE = 20_000
_WORDS_PER_GROUP = 250_000
_CACHED_SENTENCES = 10_000


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


class _File(Section):
    """The part of a run's YAML that this stage reads."""

    model_config = ConfigDict(extra="ignore")
    parse: ParseConfig


def resolve_config(path: Path | None, overrides: Sequence[str], options: Mapping[str, Any]) -> ParseConfig:
    """The stage's configuration: a YAML's section ``parse``, if a file is named, and the command's own options over it.

    Raises:
        UsageError: a key or value is wrong, or inputs or output are missing.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if path is None:
        return validate(given, ParseConfig, where="mta-ds parse")
    base = load(path, _File, overrides).parse
    return validate(base.model_dump() | given, ParseConfig, where=str(path))


class _Row(NamedTuple):
    """One field of one record on its way through the parser."""

    record_id: str
    field: str
    text: str
    parts: list[tuple[Segment, bool]]
    """Its sentences in order, and whether the parser takes each."""

    @property
    def num_words(self) -> int:
        return sum(len(part.ranges) for part, _ in self.parts)


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
    _refuse_output_in_input(config)
    parser = load_parser(config.parser)
    info = ParserInfo(name=parser.name, fingerprint=parser.fingerprint, versions=dict(parser.versions))
    _claim_store(config, info)
    for index in range(config.num_shards) if shard_index is None else (shard_index,):
        if complete_part(config.output, index, config.num_shards) is None:
            _parse_shard(config, parser, info, index)
    return merge(config.output, config.inputs, config.num_shards, config.max_reject_share)


def _refuse_output_in_input(config: ParseConfig) -> None:
    for source in config.inputs:
        if Path(source).is_dir() and config.output.resolve().is_relative_to(Path(source).resolve()):
            raise UsageError(f"{config.output}: lies in the input folder {source}, and would be read as records")


def _claim_store(config: ParseConfig, parser: ParserInfo) -> None:
    """Write down what the store is made of, or check that it is the same as before."""
    identity = {
        "schema_version": SCHEMA_VERSION,
        "parser": parser.model_dump(),
        "num_shards": config.num_shards,
        "inputs": _fingerprint_inputs(config.inputs),
    }
    path = config.output / "store.json"
    if not path.is_file():
        try:
            write_atomic(path, json.dumps(identity, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{config.output}: cannot write the span store: {error.strerror}") from None
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        other = {
            f"schema {before['schema_version']}": before["schema_version"] != SCHEMA_VERSION,
            f"{before['num_shards']} shards": before["num_shards"] != config.num_shards,
            "other inputs": before["inputs"] != identity["inputs"],
            f"another parser ('{before['parser']['name']}', this is '{parser.name}')": before["parser"]["fingerprint"]
            != parser.fingerprint,
        }
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; remove the folder and parse again") from None
    for what, differs in other.items():
        if differs:
            raise UserError(f"{config.output}: already holds a store of {what}; choose another output or remove it")


def _fingerprint_inputs(inputs: Iterable[str]) -> str:
    """Names and content of the input files, in order: what decides which record is in which part.

    Every task reads all of its input anyway; hashing costs less than that.
    """
    seen: list[list[str]] = []
    for source in inputs:
        files = input_files(source)
        if not files and Path(source).is_dir():  # saved by ``datasets``
            files = sorted(path for path in Path(source).rglob("*") if path.is_file())
        seen.append([f"{file.name}:{sha256(file)}" for file in files] or [source])
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _parse_shard(config: ParseConfig, parser: Parser, info: ParserInfo, index: int) -> None:
    name = part_name(index, config.num_shards)
    path = config.output / f"{name}.parquet"
    metadata = {"mta_ds.schema_version": str(SCHEMA_VERSION), "mta_ds.parser": info.model_dump_json()}
    schema = SCHEMA.with_metadata(metadata)
    tally: Counter[str] = Counter()
    progress = _Progress(f"shard {index + 1}/{config.num_shards}")
    records = read_records(config.inputs, num_shards=config.num_shards, shard_index=index)
    try:
        with (
            reject_log(config.output / f"rejects-{name.removeprefix('part-')}.jsonl") as reject,
            atomic_path(path) as temporary,
            pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        ):
            rows = _rows(progress.count(records), parser, reject, tally)
            for table in _row_groups(rows, _Sentences(parser), tally, schema):
                writer.write_table(table)
        part = Part(file=path.name, rows=tally["fields"], sha256=sha256(path), counts=Counts(**tally))
        write_atomic(path.with_suffix(".json"), part.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        progress.close()


def _rows(
    records: Iterator[Record | Reject], parser: Parser, reject: Callable[[Reject], None], tally: Counter[str]
) -> Iterator[_Row]:
    """One row a field, its sentences cut to what the parser takes."""
    for record in records:
        if isinstance(record, Reject):
            tally["rejects"] += 1
            reject(record)
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


def _row_groups(
    rows: Iterator[_Row], sentences: _Sentences, tally: Counter[str], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Tables of a row group each, parsed in smaller batches."""
    tables: list[pa.Table] = []
    num_rows = num_words = 0
    for batch in _batches(rows):
        tables.append(_to_table(batch, sentences, tally, schema))
        num_rows += len(batch)
        num_words += sum(row.num_words for row in batch)
        if num_rows >= ROWS_PER_GROUP or num_words >= _WORDS_PER_GROUP:
            yield pa.concat_tables(tables).combine_chunks()
            tables, num_rows, num_words = [], 0, 0
    if tables:
        yield pa.concat_tables(tables).combine_chunks()


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    batch: list[_Row] = []
    num_words = 0
    for row in rows:
        batch.append(row)
        num_words += row.num_words
        if len(batch) == _ROWS_AT_ONCE or num_words >= _WORDS_AT_ONCE:
            yield batch
            batch, num_words = [], 0
    if batch:
        yield batch


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


class _Columns:
    """The store's list columns, flat, as they grow row by row."""

    def __init__(self) -> None:
        self.offsets: dict[str, list[int]] = {name: [0] for name in ("sentences", "words", "constituents")}
        self.bounds: list[int] = []
        self.words: list[tuple[int, int]] = []
        self.tags: list[str] = []
        self.constituents: list[Constituent] = []

    def add(self, parts: Iterable[tuple[Segment, Parse]]) -> None:
        """Append one row; word numbers of sentences become word numbers of the field."""
        first_word = len(self.words)
        self.bounds.append(0)
        for part, found in parts:
            base = len(self.words) - first_word
            self.constituents += (
                c._replace(start_word=c.start_word + base, end_word=c.end_word + base) if base else c
                for c in found.constituents
            )
            self.words += part.ranges
            self.tags += found.tags
            self.bounds.append(len(self.words) - first_word)
        self.offsets["sentences"].append(len(self.bounds))
        self.offsets["words"].append(len(self.words))
        self.offsets["constituents"].append(len(self.constituents))

    def arrays(self) -> dict[str, pa.Array]:
        """The columns by name, in the schema's types."""
        return {
            "sentences": self._lists("sentences", pa.array(self.bounds, pa.int32())),
            "words": self._lists("words", self._structs("words", self.words)),
            "tags": self._lists("words", pa.array(self.tags, pa.string())),
            "constituents": self._lists("constituents", self._structs("constituents", self.constituents)),
        }

    def _lists(self, offsets: str, values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(self.offsets[offsets], pa.int32()), values)

    @staticmethod
    def _structs(name: str, rows: Sequence[tuple[Any, ...]]) -> pa.Array:
        fields = list(SCHEMA.field(name).type.value_type)
        columns = zip(*rows, strict=True) if rows else ((),) * len(fields)
        return pa.StructArray.from_arrays(
            [pa.array(column, field.type) for column, field in zip(columns, fields, strict=True)], fields=fields
        )


def _to_table(batch: list[_Row], sentences: _Sentences, tally: Counter[str], schema: pa.Schema) -> pa.Table:
    """Parse a batch of rows, across records, and lay them out by the store's schema."""
    parses = iter(sentences.parse([part.sentence for row in batch for part, fits in row.parts if fits]))
    columns = _Columns()
    for row in batch:
        columns.add((part, next(parses) if fits else Parse(("",) * len(part.ranges), ())) for part, fits in row.parts)
    tally.update(
        sentences=sum(len(row.parts) for row in batch),
        words=len(columns.words),
        constituents=len(columns.constituents),
    )
    arrays = {
        "record_id": pa.array([row.record_id for row in batch], pa.string()),
        "field": pa.array([row.field for row in batch], pa.string()),
        "text_hash": pa.array([text_hash(row.text) for row in batch], pa.binary(16)),
        "num_chars": pa.array([len(row.text) for row in batch], pa.int32()),
        **columns.arrays(),
    }
    return pa.Table.from_arrays([arrays[name] for name in schema.names], schema=schema)


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

    def count(self, records: Iterable[Record | Reject]) -> Iterator[Record | Reject]:
        """Pass the records on and count them."""
        for record in records:
            yield record
            self._advance()

    def _advance(self) -> None:
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
