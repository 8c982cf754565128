"""The tokenized data set: encoded once by one process into a memory-mapped Arrow file that every rank opens.

A rank then holds no data of its own, an example costs microseconds, and what was dropped is known before the first
step.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from mta_ds.config import Section
from mta_ds.data.collate import GRANULARITIES, IGNORED, Example
from mta_ds.data.encode import DataConfig, Dropped, encode_parts
from mta_ds.data.template import changed_fields, render
from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, sha256, write_atomic
from mta_ds.spans.records import Record, Reject, input_files, read_records
from mta_ds.spans.store import SpanStore

_FORMAT = 4  # raise it when encoding changes: older caches are then passed over
_ROWS_PER_BATCH = 1024
_LISTS = ("input_ids", "labels", *GRANULARITIES)
_SCHEMA = pa.schema(
    [
        ("record_id", pa.string()),
        ("prompt_length", pa.int32()),
        *((name, pa.list_(pa.int32())) for name in _LISTS),
    ]
)


class DatasetSummary(Section):
    """What a data set holds, and what was left out of it."""

    records: int = 0
    dropped: dict[str, int] = Field(default_factory=dict)
    """By reason."""
    with_spans: int = 0
    """Records with at least one word or phrase."""
    tokens: int = 0
    covered_tokens: int = 0
    """Tokens inside any span."""
    label_tokens: int = 0
    changed_fields: int = 0
    """Fields without spans because the chat template changed their text."""


class EncodedDataset:
    """Random access to encoded examples, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.summary = DatasetSummary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow"))).read_all()
        self._batches = [self._columns(batch) for batch in table.to_batches()]
        self._first = np.cumsum([0, *(len(batch["prompt_length"]) for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._first, index, side="right")) - 1
        batch, i = self._batches[at], index - int(self._first[at])
        lists = {name: batch[name][1][batch[name][0][i] : batch[name][0][i + 1]] for name in _LISTS}
        return Example(
            record_id=batch["record_id"][i].as_py(),
            input_ids=lists["input_ids"],
            labels=lists["labels"],
            spans={g: lists[g].reshape(-1, 2) for g in GRANULARITIES},
            prompt_length=int(batch["prompt_length"][i]),
        )

    @staticmethod
    def _columns(batch: pa.RecordBatch) -> dict[str, Any]:
        lists = {name: (batch[name].offsets.to_numpy(), batch[name].values.to_numpy()) for name in _LISTS}
        return {"record_id": batch["record_id"], "prompt_length": batch["prompt_length"].to_numpy()} | lists


def build_dataset(
    inputs: Sequence[str], config: DataConfig, tokenizer: Any, store: SpanStore | None, cache_dir: Path
) -> EncodedDataset:
    """Encode the records of ``inputs``, or open what an earlier call with the same content has encoded.

    Raises:
        UserError: a bad row, two records of one id, a store parsed from other text or without a record, no record
            left, or a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is a slow one, without character offsets; spans need a fast tokenizer")
    folder = cache_dir / f"examples-{_fingerprint(inputs, config, tokenizer, store)}"
    if not folder.is_dir():
        with atomic_folder(folder, keep_existing=True) as temporary:
            summary = _write(temporary / "examples.arrow", inputs, config, tokenizer, store)
            write_atomic(temporary / "summary.json", summary.model_dump_json(indent=1))
    return EncodedDataset(folder)


def _fingerprint(inputs: Sequence[str], config: DataConfig, tokenizer: Any, store: SpanStore | None) -> str:
    """Hash of everything that the examples depend on."""
    files = [[f"{file} {sha256(file)}" for file in _files(source)] or [source] for source in inputs]
    content = {
        "format": _FORMAT,
        "files": files,
        "config": config.model_dump(mode="json", exclude={"train", "validation", "spans"}),
        "tokenizer": [
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        ],
        "store": sha256(store.path / "manifest.json") if store else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _files(source: str) -> list[Path]:
    """The local files behind one input; empty for the name of a data set."""
    files = input_files(source)
    # a folder that ``datasets`` saved, as it is or with ":split"
    folders = [name for name in (source, source.rpartition(":")[0]) if name and Path(name).is_dir()]
    return files or [path for name in folders for path in sorted(Path(name).rglob("*")) if path.is_file()]


def _write(
    path: Path, inputs: Sequence[str], config: DataConfig, tokenizer: Any, store: SpanStore | None
) -> DatasetSummary:
    dropped: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    rows: list[Example] = []
    lookup = store.units if store else None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for record in _records(inputs):
            parts = render(record, config.template, tokenizer)
            example = encode_parts(record, parts, config, tokenizer, lookup)
            if isinstance(example, Dropped):
                dropped[example.reason] += 1
                continue
            _count(example, tally)
            tally["changed_fields"] += changed_fields(record, parts)
            rows.append(example)
            if len(rows) == _ROWS_PER_BATCH:
                writer.write_batch(_to_batch(rows))
                rows.clear()
        if rows:
            writer.write_batch(_to_batch(rows))
    if not tally["records"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "the input is empty"
        raise UserError(f"{', '.join(inputs)}: no records left to train or evaluate on ({reasons})")
    return DatasetSummary(dropped=dict(dropped), **tally)


def _records(inputs: Sequence[str]) -> Iterator[Record]:
    """The records; a bad row or an id with two contents is an error, an equal duplicate is skipped."""
    seen: dict[str, tuple[int, str]] = {}
    for record in read_records(inputs):
        if isinstance(record, Reject):
            raise UserError(f"{record.where}: {record.reason}; mend or remove the row")
        content = hash((*record.fields.items(), *record.roles))
        if record.id not in seen:
            seen[record.id] = (content, record.where)
            yield record
        elif seen[record.id][0] != content:
            first = seen[record.id][1]
            raise UserError(f"{record.where}: id {record.id} has other content at {first}; ids must be unique")


def _count(example: Example, tally: Counter[str]) -> None:
    ranges = np.concatenate([example.spans[g] for g in GRANULARITIES])
    change = np.zeros(len(example.input_ids) + 1, dtype=np.int64)
    np.add.at(change, ranges[:, 0], 1)
    np.add.at(change, ranges[:, 1], -1)
    tally.update(
        records=1,
        with_spans=int(len(ranges) > 0),
        tokens=len(example.input_ids),
        covered_tokens=int((change.cumsum() > 0).sum()),
        label_tokens=int((example.labels[1:] != IGNORED).sum()),
    )


def _to_batch(rows: Sequence[Example]) -> pa.RecordBatch:
    columns = {
        "input_ids": [e.input_ids for e in rows],
        "labels": [e.labels for e in rows],
        **{g: [e.spans[g].reshape(-1) for e in rows] for g in GRANULARITIES},
    }
    return pa.RecordBatch.from_arrays(
        [
            pa.array([e.record_id for e in rows]),
            pa.array([e.prompt_length for e in rows], pa.int32()),
            *(pa.array(columns[name], pa.list_(pa.int32())) for name in _LISTS),
        ],
        schema=_SCHEMA,
    )
