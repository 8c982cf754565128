"""The parse stage: read records, parse every text field once, write one part of the span store a shard.

Shards need no coordination. A part counts when the JSON beside it is there, a store when its manifest is; both are
written last and by rename, so a task may be killed at any instruction and run again. Whoever finds all parts complete
merges: counts duplicates on disk and writes the manifest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, ConfigDict
from pydantic import Field as Setting

from mta_ds.config import Section, load, validate
from mta_ds.errors import UsageError, UserError
from mta_ds.files import atomic_path, fsync_file, sha256, write_atomic
from mta_ds.spans.identity import InputDigests, claim_store, read_identity
from mta_ds.spans.log import Progress, read_inputs, write_inputs
from mta_ds.spans.merge import complete_part, merge, missing_parts, reject_log
from mta_ds.spans.parser import best_device, load_parser
from mta_ds.spans.pool import Parsing, lean_memory, open_pool
from mta_ds.spans.records import Record, Reject, local_files, may_follow, read_records
from mta_ds.spans.rows import Field, Parsed, batches
from mta_ds.spans.segment import SEGMENTATION
from mta_ds.spans.store import (
    MAX_RECORD_BYTES,
    PARSER_KEY,
    ROWS_PER_GROUP,
    SCHEMA,
    SCHEMA_VERSION,
    Counts,
    Identity,
    Manifest,
    ParserInfo,
    Part,
    part_name,
)

# Words that are held until they are written: bounds memory whatever the texts' length.
_WORDS_PER_GROUP = 50_000


class ParseConfig(Section):
    """What is parsed, by which parser, into which store."""

    inputs: tuple[str, ...] = Setting(min_length=1)
    """Files, folders, globs or ``datasets`` names."""
    output: Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
    """The store's folder."""
    parser: str | None = None
    """A Benepar model's path (``fp32:`` before it: no bf16), ``spacy:MODEL`` or "none"; None: the bundled model."""
    num_shards: int = Setting(default=1, ge=1)
    max_reject_share: float = Setting(default=0.0, ge=0, le=1)
    """Share of bad rows above which the stage fails."""
    max_record_bytes: int = Setting(default=MAX_RECORD_BYTES, ge=1)
    """A longer record is a bad row."""
    workers: int | None = Setting(default=None, ge=1)
    """Processes that parse, one core each; as many as there are cores unless given. The store's bytes are the same."""


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
    _refuse_records_in_output(config)
    device = best_device(config.parser)
    with lean_memory():
        parser = load_parser(config.parser, device)
    digests = InputDigests(config.output)
    info = ParserInfo(name=parser.name, fingerprint=parser.fingerprint, versions=dict(parser.versions))
    identity = Identity(
        schema_version=SCHEMA_VERSION,
        segmentation=SEGMENTATION,
        parser=info,
        num_shards=config.num_shards,
        inputs=digests.fingerprint(config.inputs),
        max_record_bytes=config.max_record_bytes,
    )
    try:
        claim_store(config.output, identity)
        write_inputs(config.output, config.inputs)
        digests.write()
    except OSError as error:
        raise UserError(f"{config.output}: cannot write the span store: {error.strerror or error}") from None
    wanted = range(config.num_shards) if shard_index is None else (shard_index,)
    missing = [i for i in wanted if complete_part(config.output, i, config.num_shards) is None]
    with open_pool(parser, config.parser, config.workers, device) as pool:
        for index in missing:
            _parse_shard(config, pool, info, index)
    return merge(config.output, config.inputs, config.num_shards, config.max_reject_share)


def merge_only(config: ParseConfig) -> Manifest:
    """Write the manifest of a store whose parts are all there, without a parser.

    Raises:
        UserError: there is no store, it was made of other inputs, parts are missing, one is damaged, or too many rows
            are bad.
    """
    identity = read_identity(config.output)
    if InputDigests(config.output).fingerprint(config.inputs) != identity.inputs:
        raise UserError(f"{', '.join(config.inputs)}: not what {config.output} was parsed from, or no more as it was")
    manifest = merge(config.output, config.inputs, identity.num_shards, config.max_reject_share)
    if manifest is None:
        raise UserError(f"{config.output}: {missing_parts(config.output)}; nothing to merge yet")
    return manifest


def recorded_inputs(output: Path) -> list[str]:
    """The inputs that a store was parsed from, as its last task found them.

    Raises:
        UserError: the store does not say.
    """
    read_identity(output)
    if not (inputs := read_inputs(output)):
        raise UserError(f"{output}: its log does not say what it was parsed from; name that with --input")
    return inputs


def _refuse_records_in_output(config: ParseConfig) -> None:
    """A store is never input: records that a folder or glob finds where it is to be would not be read from then on."""
    output = config.output.resolve()
    for source in config.inputs:
        if os.path.isfile(os.path.expanduser(source)):
            continue  # named itself, it is read wherever it lies
        for folder in {file.parent for file in local_files(source)}:
            if folder.resolve().is_relative_to(output):
                raise UsageError(f"{config.output}: holds records of the input {source}; choose another output")


class _Overtaken(Exception):
    """Another task has finished the part meanwhile."""


def _parse_shard(config: ParseConfig, pool: Parsing, info: ParserInfo, index: int) -> None:
    name = part_name(index, config.num_shards)
    path = config.output / f"{name}.parquet"
    metadata = {"mta_ds.schema_version": str(SCHEMA_VERSION), PARSER_KEY: info.model_dump_json()}
    schema = SCHEMA.with_metadata(metadata)
    tally, starts = Counter[str](), list[int]()
    progress = Progress(config.output, index, config.num_shards)
    records = read_records(
        config.inputs, num_shards=config.num_shards, shard_index=index, max_bytes=config.max_record_bytes
    )
    try:
        with (
            reject_log(config.output / f"rejects-{name.removeprefix('part-')}.jsonl") as reject,
            atomic_path(path) as temporary,
        ):
            parsed = pool.map(batches(_fields(progress.read(records), reject, tally, starts)))
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for table in _row_groups(progress.done(parsed), tally):
                    writer.write_table(table.replace_schema_metadata(metadata))
            fsync_file(temporary)  # before the look, since it takes long
            if complete_part(config.output, index, config.num_shards) is not None:
                raise _Overtaken
        progress.write()
        part = Part(
            file=path.name,
            rows=tally["fields"],
            sha256=sha256(path),
            counts=Counts(**tally),
            record_starts=tuple(starts),
        )
        write_atomic(path.with_suffix(".json"), part.model_dump_json(indent=1) + "\n")
    except _Overtaken:
        return  # its bytes may be others, from another type of CPU, and its hash is told already
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    finally:
        progress.close()


def _fields(
    records: Iterator[Record | Reject], reject: Callable[[Reject], None], tally: Counter[str], starts: list[int]
) -> Iterator[Field]:
    """The records' fields, a row each; ``starts`` gets the rows that begin a record which their names do not tell."""
    row, before, last = 0, "", ""
    for record in records:
        if isinstance(record, Reject):
            tally["rejects"] += 1
            reject(record)
            continue
        tally["records"] += 1
        names = list(record.fields)
        if record.id == before and may_follow(last, names[0]):
            starts.append(row)
        row, before, last = row + len(names), record.id, names[-1]
        yield from (Field(record.id, name, text) for name, text in record.fields.items())


def _row_groups(parsed: Iterator[Parsed], tally: Counter[str]) -> Iterator[pa.Table]:
    """Tables of a row group each."""
    tables: list[pa.Table] = []
    num_rows = num_words = 0
    for table, counts in parsed:
        tally.update(counts)
        tables.append(table)
        num_rows += len(table)
        num_words += counts["words"]
        if num_rows >= ROWS_PER_GROUP or num_words >= _WORDS_PER_GROUP:
            yield pa.concat_tables(tables).combine_chunks()
            tables, num_rows, num_words = [], 0, 0
    if tables:
        yield pa.concat_tables(tables).combine_chunks()
