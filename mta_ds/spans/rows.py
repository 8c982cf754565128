"""Fields to rows of the span store: segment, parse across records, lay out; the same for a corpus and for rollouts.

A batch of fields is one unit of work: what comes out of it depends on nothing but its texts and the parser, neither on
the batches before it nor on the process that works on it. So a store's bytes are the same however many work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mta_ds.spans.parser import Constituent, Parse, Parser
from mta_ds.spans.records import text_hash
from mta_ds.spans.segment import Segment, segment, split_to_fit
from mta_ds.spans.store import SCHEMA, Units

# One unit of work: enough sentences for full encoder batches, few enough to be held by every worker.
FIELDS_AT_ONCE = 256
CHARS_AT_ONCE = 32_000


class Field(NamedTuple):
    """One text of one record."""

    record_id: str
    name: str
    text: str


class Parsed(NamedTuple):
    """Rows of the store's schema, one a field, and what was counted on the way."""

    table: pa.Table
    counts: dict[str, int]

    def units(self) -> Iterator[Units]:
        """The rows as a store's reader gives them, one a field."""
        for row in self.table.to_pylist():
            words = [(word["start"], word["end"]) for word in row["words"]]
            ranges = [(c["start_word"], c["end_word"], c["height"]) for c in row["constituents"]]
            yield Units(
                text_hash=row["text_hash"],
                num_chars=row["num_chars"],
                sentences=np.array(row["sentences"], dtype=np.int32),
                words=np.array(words, dtype=np.int32).reshape(-1, 2),
                tags=row["tags"],
                constituents=np.array(ranges, dtype=np.int32).reshape(-1, 3),
                labels=[c["label"] for c in row["constituents"]],
            )


def batches(fields: Iterable[Field]) -> Iterator[list[Field]]:
    """Cut a stream of fields into units of work, at places that only the texts decide."""
    batch: list[Field] = []
    num_chars = 0
    for field in fields:
        batch.append(field)
        num_chars += len(field.text)
        if len(batch) == FIELDS_AT_ONCE or num_chars >= CHARS_AT_ONCE:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def parse_fields(fields: Sequence[Field], parser: Parser) -> Parsed:
    """Parse a batch of fields; each distinct sentence of it once.

    A memory of sentences beyond the batch would save little and cost determinism: a sentence's scores depend, in their
    last digits, on the sentences that it shares an encoder batch with.
    """
    counts: Counter[str] = Counter(fields=len(fields))
    rows = [list(_parts(field.text, parser, counts)) for field in fields]
    sentences = list(dict.fromkeys(part.sentence for row in rows for part, fits in row if fits))
    known = dict(zip(sentences, parser.parse(sentences), strict=True))
    columns = _Columns()
    for row in rows:
        columns.add((part, known[part.sentence] if fits else Parse(("",) * len(part.ranges), ())) for part, fits in row)
    counts.update(sentences=sum(map(len, rows)), words=len(columns.words), constituents=len(columns.constituents))
    arrays = {
        "record_id": pa.array([field.record_id for field in fields], pa.string()),
        "field": pa.array([field.name for field in fields], pa.string()),
        "text_hash": pa.array([text_hash(field.text) for field in fields], pa.binary(16)),
        "num_chars": pa.array([len(field.text) for field in fields], pa.int32()),
        **columns.arrays(),
    }
    return Parsed(pa.Table.from_arrays([arrays[name] for name in SCHEMA.names], schema=SCHEMA), dict(counts))


def _parts(text: str, parser: Parser, counts: Counter[str]) -> Iterator[tuple[Segment, bool]]:
    """A text's sentences cut to what the parser takes, and whether it takes each."""
    for whole in segment(text):
        pieces = split_to_fit(whole, parser.fits)
        counts["split"] += len(pieces) > 1
        counts["unparsed"] += sum(not fits for _, fits in pieces)
        yield from pieces


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
            # a new tuple is made in a fraction of the time that one's ``_replace`` takes
            self.constituents += (
                [Constituent(c.start_word + base, c.end_word + base, c.label, c.height) for c in found.constituents]
                if base
                else found.constituents
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
        # column by column: unpacking thousands of rows into one zip takes ten times as long
        columns = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(fields)]
        return pa.StructArray.from_arrays(columns, fields=fields)
