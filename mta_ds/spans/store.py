"""The span store: a folder of Parquet parts and a manifest; written once, read by record id and field in O(1).

    part-00000-of-00064.parquet    one row a (record, field): words, tags, sentences, all constituents
    part-00000-of-00064.json       its rows, counts and SHA-256, written after it: the part is complete
    rejects-00000-of-00064.jsonl   rows of the input that were no records
    rejects-duplicates.jsonl       records whose id another record has, with other content
    store.json                     what the store is made of, written first: inputs, parser, number of shards
    manifest.json                  written last: the store is complete
    log/                           where the inputs stood and how fast they went, see log.py

Parquet cannot serve random rows (a whole row group is decoded for each), so the first reader makes an uncompressed,
memory-mapped Arrow copy with an index, which all later readers share.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mta_ds.config import Section
from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, sha256
from mta_ds.spans.records import text_hash as hash_text

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 4 << 20
"""Of a record, unless a run says otherwise."""
PARSER_KEY = b"mta_ds.parser"
"""In a part's metadata: which parser made it."""
ROWS_PER_GROUP = 4096

SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("field", pa.string()),
        ("text_hash", pa.binary(16)),
        ("num_chars", pa.int32()),
        ("sentences", pa.list_(pa.int32())),
        ("words", pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))),
        ("tags", pa.list_(pa.string())),
        (
            "constituents",
            pa.list_(
                pa.struct(
                    [
                        ("start_word", pa.int32()),
                        ("end_word", pa.int32()),
                        ("label", pa.string()),
                        ("height", pa.int32()),
                    ]
                )
            ),
        ),
    ]
)


class ParserInfo(Section):
    """Which parser made a store."""

    name: str
    fingerprint: str
    versions: dict[str, str]


class Counts(Section):
    """What a part, or the whole store, holds; records that came twice count once in the store's ``records``, but their
    rows stay in the parts and in the other counts."""

    records: int = 0
    fields: int = 0
    sentences: int = 0
    words: int = 0
    constituents: int = 0
    split: int = 0
    """Sentences too long for the parser, which were cut."""
    unparsed: int = 0
    """Runs of words that the parser does not take: words without constituents."""
    rejects: int = 0
    duplicates: int = 0
    """Records that came again with the same id and content."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


class Part(Section):
    """One complete part."""

    file: str
    rows: int
    sha256: str
    counts: Counts
    record_starts: tuple[int, ...] = ()
    """Rows that begin a record where the row before, of the same id, could belong to it as well."""


class Identity(Section):
    """What a store is made of."""

    schema_version: int
    segmentation: int
    """Version of the rules that cut texts into sentences and words."""
    parser: ParserInfo
    num_shards: int
    inputs: str
    """Fingerprint of the inputs' names and content."""
    max_record_bytes: int = MAX_RECORD_BYTES
    """Longer records were rejected."""


class Manifest(Identity):
    """A complete store."""

    parts: tuple[Part, ...]
    counts: Counts


@dataclass(frozen=True, slots=True)
class Units:
    """All words and constituents of one field, as character and word ranges."""

    text_hash: bytes
    num_chars: int
    sentences: np.ndarray
    """int32 [S + 1], word index bounds."""
    words: np.ndarray
    """int32 [W, 2], character ranges."""
    tags: list[str]
    constituents: np.ndarray
    """int32 [C, 3]: start word, end word, height; sorted by (start, -end) within each sentence."""
    labels: list[str]


def part_name(shard_index: int, num_shards: int) -> str:
    """File name of a part, without its suffix."""
    return f"part-{shard_index:05d}-of-{num_shards:05d}"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a complete store.

    Raises:
        UserError: no such folder, an unfinished parse, a damaged manifest, or another schema version.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such span store; 'mta-ds parse' makes one")
    file = path / "manifest.json"
    if not file.is_file():
        raise UserError(
            f"{path}: not a complete span store, it has no manifest.json; 'mta-ds parse' makes what is missing, "
            f"'mta-ds parse --status --output {path}' says what that is"
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {version}, this mta_ds reads {SCHEMA_VERSION}; parse again")
        return Manifest.model_validate(values)
    except (ValueError, AttributeError, ValidationError) as error:
        raise UserError(f"{file}: damaged: {str(error).splitlines()[0]}; run 'mta-ds parse' again") from None


def check_part(path: Path, part: Part, full: bool) -> None:
    """Raise UserError if a part is missing or damaged; ``full`` compares its hash, else its row count."""
    file = path / part.file
    advice = "remove it and run 'mta-ds parse' again, which makes only this part"
    if not file.is_file():
        raise UserError(f"{file}: part is missing; run 'mta-ds parse' again, which makes only this part")
    try:
        rows = pq.ParquetFile(file).metadata.num_rows
    except (OSError, pa.ArrowException):
        raise UserError(f"{file}: part is damaged (no Parquet); {advice}") from None
    if rows != part.rows or (full and sha256(file) != part.sha256):
        raise UserError(f"{file}: part is damaged (it differs from the manifest); {advice}")


def read_batches(part: Path, num_rows: int, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Up to ``num_rows`` rows of a part at a time, never of two row groups: those end after so many words, whatever the
    length of a row, and one batch filled from several would hold as many words more.
    """
    with pq.ParquetFile(part) as file:
        for group in range(file.num_row_groups):
            yield from file.iter_batches(num_rows, row_groups=[group], columns=columns)


class SpanStore:
    """Random access to a complete store; cheap to open, shared by processes through the page cache."""

    def __init__(self, path: Path, manifest: Manifest, cache: Path) -> None:
        self.path = path
        self.manifest = manifest
        table = pa.ipc.open_file(pa.memory_map(str(cache / "rows.arrow"))).read_all()
        names = json.loads((cache / "names.json").read_text(encoding="utf-8"))
        self._labels = np.array(names["labels"], dtype=object)
        self._tags = np.array(names["tags"], dtype=object)
        self._batches = table.to_batches()
        self._first_row = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        # plain views: a lookup through NumPy's memmap class costs several times as much
        self._keys = np.asarray(np.load(cache / "keys.npy", mmap_mode="r"))
        self._rows = np.asarray(np.load(cache / "rows.npy", mmap_mode="r"))
        self._columns = lru_cache(maxsize=None)(self._load_columns)

    @classmethod
    def open(cls, path: Path, verify: bool = False) -> SpanStore:
        """Open the store in ``path``; ``verify`` compares every part with its SHA-256.

        The first reader of a store also does that while it builds the index.

        Raises:
            UserError: the store is missing, unfinished or damaged; one line that names the file.
        """
        path = Path(os.path.expanduser(path))
        manifest = read_manifest(path)
        cache = _cache_folder(path)
        fresh = not cache.is_dir()
        for part in manifest.parts:
            check_part(path, part, full=verify or fresh)
        if fresh:
            _build_cache(path, manifest, cache)
        try:
            return cls(path, manifest, cache)
        except (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{cache}: the span store's index is damaged ({reason}); remove this folder") from None

    def __len__(self) -> int:
        return len(self._rows)

    def units(self, record_id: str, field: str, text: str) -> Units | None:
        """Units of one field; None if the store has no such record or field.

        Raises:
            UserError: the store was parsed from another text under this id.
        """
        key, wanted = _key(record_id, field), hash_text(text)
        other_text = False
        at = int(self._keys.searchsorted(key))
        while at < len(self._keys) and self._keys[at] == key:
            found = self._units_at(int(self._rows[at]), record_id, field)
            if found is not None and found.text_hash == wanted:
                return found
            other_text |= found is not None
            at += 1
        if other_text:
            raise UserError(
                f"record {record_id}: its field '{field}' is not the text that {self.path} was parsed from; "
                "parse these records into a store of their own"
            )
        return None

    def _units_at(self, row: int, record_id: str, field: str) -> Units | None:
        batch = bisect_right(self._first_row, row) - 1
        columns, i = self._columns(batch), row - self._first_row[batch]
        if columns["record_id"][i].as_py() != record_id or columns["field"][i].as_py() != field:
            return None  # two keys of one hash
        lists = {name: values[bounds[i] : bounds[i + 1]] for name, (bounds, values) in columns["lists"].items()}
        return Units(
            text_hash=columns["text_hash"][i].as_py(),
            num_chars=int(columns["num_chars"][i]),
            sentences=lists["sentences"],
            words=lists["words"].reshape(-1, 2),
            tags=self._tags[lists["tags"]].tolist(),
            constituents=lists["constituents"].reshape(-1, 3),
            labels=self._labels[lists["labels"]].tolist(),
        )

    def _load_columns(self, batch: int) -> dict[str, Any]:
        """A batch's columns; lists as (bounds, values) in NumPy, without a copy."""
        rows = self._batches[batch]
        lists = ("sentences", "words", "tags", "constituents", "labels")
        return {
            "record_id": rows["record_id"],
            "field": rows["field"],
            "text_hash": rows["text_hash"],
            "num_chars": rows["num_chars"].to_numpy(),
            "lists": {name: (rows[name].offsets.to_numpy(), rows[name].values.to_numpy()) for name in lists},
        }


_CACHE_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("field", pa.string()),
        ("text_hash", pa.binary(16)),
        ("num_chars", pa.int32()),
        *((name, pa.list_(pa.int32())) for name in ("sentences", "words", "tags", "constituents", "labels")),
    ]
)


def _cache_folder(path: Path) -> Path:
    """Where the reader's copy lies: in the store, or in the user's cache where the store is read-only."""
    name = f"cache-{sha256(path / 'manifest.json')[:16]}"
    if (path / name).is_dir() or os.access(path, os.W_OK):
        return path / name
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "mta_ds" / name


def _build_cache(path: Path, manifest: Manifest, cache: Path) -> None:
    """Build the reader's copy and put it in its place whole; of processes that do so at once the first wins."""
    try:
        with atomic_folder(cache, keep_existing=True) as folder:
            _write_cache(path, manifest, folder)
    except OSError as error:
        raise UserError(f"{cache}: cannot write the span store's index: {error.strerror or error}") from None


def _write_cache(path: Path, manifest: Manifest, folder: Path) -> None:
    labels, tags = _Names(), _Names()
    keys: list[np.ndarray] = []
    with open(folder / "rows.arrow", "wb") as sink, pa.ipc.new_file(sink, _CACHE_SCHEMA) as writer:
        for batch in _part_batches(path, manifest):
            writer.write_batch(_flatten(batch, labels, tags))
            pairs = zip(batch["record_id"].to_pylist(), batch["field"].to_pylist(), strict=True)
            keys.append(np.array([_key(*pair) for pair in pairs], dtype=np.uint64))
    every = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    order = np.argsort(every, kind="stable")
    np.save(folder / "keys.npy", every[order])
    np.save(folder / "rows.npy", order)
    (folder / "names.json").write_text(json.dumps({"labels": labels.names, "tags": tags.names}), encoding="utf-8")


def _part_batches(path: Path, manifest: Manifest) -> Iterator[pa.RecordBatch]:
    for part in manifest.parts:
        yield from read_batches(path / part.file, ROWS_PER_GROUP)


class _Names:
    """Strings as small numbers."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._codes: dict[str, int] = {}

    def codes(self, values: pa.Array) -> np.ndarray:
        encoded = values.dictionary_encode()
        for name in encoded.dictionary.to_pylist():
            if name not in self._codes:
                self._codes[name] = len(self.names)
                self.names.append(name)
        mapping = np.array([self._codes[n] for n in encoded.dictionary.to_pylist()], dtype=np.int32)
        return mapping[encoded.indices.to_numpy(zero_copy_only=False)] if len(mapping) else np.zeros(0, np.int32)


def _flatten(batch: pa.RecordBatch, labels: _Names, tags: _Names) -> pa.RecordBatch:
    """Structs and strings of a batch as int32 lists."""
    words, constituents, tag_lists = batch["words"], batch["constituents"], batch["tags"]
    units = constituents.flatten()

    def lists(like: pa.ListArray, columns: list[np.ndarray]) -> pa.ListArray:
        values = np.stack(columns, axis=1).reshape(-1).astype(np.int32)
        offsets = like.offsets.to_numpy() - like.offsets[0].as_py()
        return pa.ListArray.from_arrays(pa.array(offsets * len(columns), pa.int32()), pa.array(values))

    flat_words = words.flatten()
    return pa.RecordBatch.from_arrays(
        [
            *(batch[name] for name in ("record_id", "field", "text_hash", "num_chars")),
            batch["sentences"],
            lists(words, [flat_words.field(name).to_numpy() for name in ("start", "end")]),
            lists(tag_lists, [tags.codes(tag_lists.flatten())]),
            lists(constituents, [units.field(name).to_numpy() for name in ("start_word", "end_word", "height")]),
            lists(constituents, [labels.codes(units.field("label"))]),
        ],
        schema=_CACHE_SCHEMA,
    )


def _key(record_id: str, field: str) -> np.uint64:
    return np.uint64(int.from_bytes(hash_text(f"{record_id}\0{field}")[:8], "little"))
