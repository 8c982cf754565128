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
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from mta_ds.config import Section
from mta_ds.data.collate import GRANULARITIES, IGNORED, Example
from mta_ds.data.encode import DataConfig, Dropped, Lookup, encode_parts, encode_question
from mta_ds.data.template import Half, changed_fields, render
from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, sha256, write_atomic
from mta_ds.spans.records import Record, Reject, local_files, read_records
from mta_ds.spans.store import SpanStore

Kind = Literal["responses", "pairs", "prompts"]
"""What of a record is encoded: a response with its prompt, both of a preference, or a prompt alone."""

_FORMAT = 6  # raise it when encoding changes: older caches are then passed over
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
    group: int = 1
    """Examples of a record: 2 where it is a pair (chosen, then rejected)."""
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
    """Random access to encoded examples, memory-mapped; those of a record follow one another."""

    def __init__(self, folder: Path) -> None:
        self.key = folder.name
        """What the set was made of, in a word: records, store, tokenizer and settings."""
        self.summary = DatasetSummary.model_validate_json((folder / "summary.json").read_text(encoding="utf-8"))
        table = pa.ipc.open_file(pa.memory_map(str(folder / "examples.arrow"))).read_all()
        self._batches = [self._columns(batch) for batch in table.to_batches()]
        self._first = np.cumsum([0, *(len(batch["prompt_length"]) for batch in self._batches)])

    @property
    def group(self) -> int:
        """Examples of a record: with pairs record i has its chosen half at 2i and its rejected one at 2i + 1."""
        return self.summary.group

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [len]."""
        return np.concatenate([np.diff(batch["input_ids"][0]) for batch in self._batches])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each example's prompt, 0 where it has none, int32 [len]."""
        return np.concatenate([batch["prompt_length"] for batch in self._batches])

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
            is_rejected=index % self.group == 1,
        )

    @staticmethod
    def _columns(batch: pa.RecordBatch) -> dict[str, Any]:
        lists = {name: (batch[name].offsets.to_numpy(), batch[name].values.to_numpy()) for name in _LISTS}
        return {"record_id": batch["record_id"], "prompt_length": batch["prompt_length"].to_numpy()} | lists


def build_dataset(
    inputs: Sequence[str],
    config: DataConfig,
    tokenizer: Any,
    store: SpanStore | None,
    cache_dir: Path,
    pairs: bool = False,
    prompts_only: bool = False,
) -> EncodedDataset:
    """Encode the records of ``inputs``, or open what an earlier call with the same content has encoded.

    Args:
        pairs: encode both responses of preference records; a record is dropped whole if either has to be. Otherwise
            such a record is its prompt and the chosen response.
        prompts_only: encode the prompts, with or without a response, for models that will answer them; no spans.

    Raises:
        UserError: a bad row, two records of one id, a store parsed from other text or without a record, no record
            left, a record that is no preference with ``pairs``, or a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise UserError("the tokenizer is a slow one, without character offsets; spans need a fast tokenizer")
    kind: Kind = "pairs" if pairs else "prompts" if prompts_only else "responses"
    folder = cache_dir / f"examples-{_fingerprint(inputs, config, tokenizer, store, kind)}"
    if not folder.is_dir():
        with atomic_folder(folder, keep_existing=True) as temporary:
            summary = _write(temporary / "examples.arrow", inputs, config, tokenizer, store, kind)
            write_atomic(temporary / "summary.json", summary.model_dump_json(indent=1))
    return EncodedDataset(folder)


def _fingerprint(inputs: Sequence[str], config: DataConfig, tokenizer: Any, store: SpanStore | None, kind: Kind) -> str:
    """Hash of everything that the examples depend on."""
    files = [[f"{file} {sha256(file)}" for file in local_files(source)] or [source] for source in inputs]
    content = {
        "format": _FORMAT,
        "kind": kind,
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


def _write(
    path: Path, inputs: Sequence[str], config: DataConfig, tokenizer: Any, store: SpanStore | None, kind: Kind
) -> DatasetSummary:
    dropped: Counter[str] = Counter()
    tally: Counter[str] = Counter()
    rows: list[Example] = []
    lookup = store.units if store else None
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
        for record in _records(inputs):
            group, num_changed = _encode(record, config, tokenizer, lookup, kind)
            examples = [example for example in group if isinstance(example, Example)]
            if len(examples) < len(group):
                dropped[next(example.reason for example in group if isinstance(example, Dropped))] += 1
                continue
            _count(examples, tally)
            tally["changed_fields"] += num_changed
            rows += examples
            if len(rows) >= _ROWS_PER_BATCH:
                writer.write_batch(_to_batch(rows))
                rows.clear()
        if rows:
            writer.write_batch(_to_batch(rows))
    if not tally["records"]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "the input is empty"
        raise UserError(f"{', '.join(inputs)}: no records left to train or evaluate on ({reasons})")
    return DatasetSummary(dropped=dict(dropped), group=2 if kind == "pairs" else 1, **tally)


def _encode(
    record: Record, config: DataConfig, tokenizer: Any, lookup: Lookup | None, kind: Kind
) -> tuple[list[Example | Dropped], int]:
    """The examples of a record, or why it has none; and the number of its fields that the template changed."""
    if kind == "prompts":
        return [encode_question(record, config, tokenizer)], 0
    is_pair = kind == "pairs"
    rendered = [render(record, config.template, tokenizer, half=half) for half in _halves(record, is_pair)]
    group = [encode_parts(record, parts, config, tokenizer, lookup) for parts in rendered]
    return group, changed_fields(record, [part for parts in rendered for part in parts], is_pair)


def _halves(record: Record, pairs: bool) -> tuple[Half, ...]:
    """The responses that give an example each."""
    if not pairs:
        return ("chosen",)
    if record.format != "preference":
        raise UserError(
            f"{record.where}: record {record.id} has no chosen and rejected responses to train on as a pair; "
            "'mta-ds generate --pair-with' writes records that have"
        )
    return ("chosen", "rejected")


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


def _count(examples: Sequence[Example], tally: Counter[str]) -> None:
    """Add up what the examples of one record hold."""
    tally["records"] += 1
    tally["with_spans"] += any(len(spans) for example in examples for spans in example.spans.values())
    for example in examples:
        ranges = np.concatenate([example.spans[g] for g in GRANULARITIES])
        change = np.zeros(len(example.input_ids) + 1, dtype=np.int64)
        np.add.at(change, ranges[:, 0], 1)
        np.add.at(change, ranges[:, 1], -1)
        tally["tokens"] += len(example.input_ids)
        tally["covered_tokens"] += int((change.cumsum() > 0).sum())
        tally["label_tokens"] += int((example.labels[1:] != IGNORED).sum())


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
