"""Look at one record of a span store: its trees and chosen units in a terminal, or on a page that needs nothing else.

A store holds character ranges, so the text comes from the record files; its hash must be the store's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup, escape

from mta_ds.data import Manifest, Record, SpanStore, UnitConfig, choose, input_files, read_inputs, read_records
from mta_ds.errors import UserError, printable
from mta_ds.evaluation.page import render_page
from mta_ds.evaluation.tree import Node, ParsedExample, marked_text, sentence_nodes, trees
from mta_ds.evaluation.weights import RecordWeights, Token
from mta_ds.files import write_atomic

_TOP_TOKENS = 10
_LEAST_SIMILAR = 0.5


class InspectedField(NamedTuple):
    """One field of the record."""

    name: str
    example: ParsedExample


class Inspection(NamedTuple):
    """One record with what the store knows of it."""

    record: Record
    store: Path
    units: UnitConfig
    fields: tuple[InspectedField, ...]


def inspect(
    store_path: Path,
    record_id: str,
    records: Sequence[str],
    field: str | None = None,
    units: UnitConfig | None = None,
) -> Inspection:
    """Find a record and join its text with its parse.

    Args:
        records: files, folders, globs or ``datasets`` names, of which one holds the record; where none are given,
            those that the store was parsed from.
        field: the only field to look at; else all of them.
        units: which phrases and words count as chosen.

    Raises:
        UserError: no record of that id (the message names the nearest), no such field, or a store that is incomplete,
            does not have the record, or has it with another text.
    """
    units = units or UnitConfig()
    store = SpanStore.open(store_path)
    record = _find_record(records or _parsed_inputs(store_path), record_id, store)
    if field is not None and field not in record.fields:
        raise UserError(f"{record.where}: record {record_id} has no field '{field}'; it has {', '.join(record.fields)}")
    names = [field] if field is not None else list(record.fields)
    fields = tuple(InspectedField(name, _parsed(store, record, name, units)) for name in names)
    return Inspection(record, store_path, units, fields)


def describe(inspection: Inspection, weights: RecordWeights | None = None) -> str:
    """The record for a terminal: trees sentence by sentence, chosen units, and the heaviest tokens."""
    lines = []
    for name, example in inspection.fields:
        number = len(example.units.sentences) - 1
        title = f"{inspection.record.id} · {name} · {number} sentence{'s' if number != 1 else ''}"
        lines += [title, ""]
        bounds = pairwise(example.units.sentences.tolist())
        for number, (where, nodes) in enumerate(zip(bounds, sentence_nodes(example), strict=True), 1):
            lines += _describe_sentence(example, number, where, nodes)
    if weights is not None:
        lines += _describe_weights(weights)
    return "\n".join(printable(line).rstrip() for line in lines).rstrip()


def write_page(path: Path, inspection: Inspection, weights: RecordWeights | None = None) -> Path:
    """Write the record as one HTML page: marked text, trees, filters by label and height, token weights.

    Raises:
        UserError: the file cannot be written.
    """
    examples = [example for _, example in inspection.fields]
    labels = Counter(part for e in examples for label in e.units.labels for part in label.split("::"))
    context = {
        "inspection": inspection,
        "labels": labels.most_common(),
        "max_height": max((int(e.units.constituents[:, 2].max(initial=1)) for e in examples), default=1),
        "fields": [_page_field(field, weights) for field in inspection.fields],
        "weights": weights,
    }
    try:
        write_atomic(path, render_page("inspect.html.j2", context))
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror or error}") from None
    return path


def _parsed_inputs(store: Path) -> list[str]:
    """The inputs that the store was parsed from, as far as they are still there."""
    inputs = read_inputs(store)
    if not inputs:
        raise UserError(f"{store}: a span store holds no text; give the record files with --records")
    there = [source for source in inputs if _is_there(source)]
    if not there:
        raise UserError(f"{inputs[0]}: {store} was parsed from it, but it is gone; name the text with --records")
    return there


def _is_there(source: str) -> bool:
    try:
        input_files(source)
    except UserError:
        return False
    return True


def _find_record(records: Sequence[str], record_id: str, store: SpanStore) -> Record:
    nearest = _Nearest(record_id)
    for record in read_records(records):
        if isinstance(record, Record):
            if record.id == record_id:
                return record
            nearest.see(record.id)
    listed = ", ".join(records)
    if any(stored == record_id for stored in _stored_ids(store.path, store.manifest)):
        raise UserError(f"record {record_id}: the store has it, but not {listed}; name its file with --records")
    raise UserError(f"record {record_id}: not in {listed}{nearest.hint()}")


def _parsed(store: SpanStore, record: Record, name: str, config: UnitConfig) -> ParsedExample:
    text = record.fields[name]
    units = store.units(record.id, name, text)
    if units is None:
        nearest = _Nearest(record.id)
        for stored in _stored_ids(store.path, store.manifest):
            nearest.see(stored)
        raise UserError(f"{record.where}: record {record.id} (field '{name}') is not in {store.path}{nearest.hint()}")
    return ParsedExample(text, units, *choose(units, config))


def _stored_ids(path: Path, manifest: Manifest) -> Iterator[str]:
    for part in manifest.parts:
        for batch in pq.ParquetFile(path / part.file).iter_batches(columns=["record_id"]):
            yield from batch.column(0).to_pylist()


class _Nearest:
    """The most similar of many names, seen one at a time."""

    def __init__(self, wanted: str) -> None:
        self._matcher = SequenceMatcher(b=wanted)  # which keeps what it finds out about ``b``
        self._wanted = wanted
        self._name = ""
        self._ratio = _LEAST_SIMILAR

    def see(self, name: str) -> None:
        if name == self._wanted:
            return
        self._matcher.set_seq1(name)
        if self._matcher.real_quick_ratio() > self._ratio and self._matcher.quick_ratio() > self._ratio:
            ratio = self._matcher.ratio()
            if ratio > self._ratio:
                self._name, self._ratio = name, ratio

    def hint(self) -> str:
        return f"; did you mean '{self._name}'?" if self._name else ""


def _describe_sentence(example: ParsedExample, number: int, where: tuple[int, int], nodes: Sequence[Node]) -> list[str]:
    first, last = where
    if first == last:
        return []
    start, end = (int(example.units.words[first, 0]), int(example.units.words[last - 1, 1]))
    lines = [f"{number}  {_one_line(example.text[start:end])}", ""]
    for node in nodes:
        lines += [f"   {line}" for line in _tree_lines(node)]
    for name, ranges in (("phrases", example.phrases), ("words", example.words)):
        low, high = np.searchsorted(ranges[:, 0], (start, end))  # they are in reading order
        inside = [example.text[s:e] for s, e in ranges[low:high].tolist() if e <= end]
        lines.append(f"   {name + ':':9}{' | '.join(map(_one_line, inside)) or '(none)'}")
    return [*lines, ""]


def _tree_lines(node: Node) -> list[str]:
    """An indented tree; a constituent of words alone is one line, a chosen one has a star."""
    if node.level == 0:
        return [_one_line(node.title)]
    label = f"{_one_line(node.label)}{' *' if node.chosen else ''}"
    if all(child.level == 0 for child in node.children):
        return [f"{label}  {' '.join(_one_line(child.title) for child in node.children)}"]
    lines = [label]
    for child in node.children:
        is_last = child is node.children[-1]
        head, *rest = _tree_lines(child)
        lines.append(("└─ " if is_last else "├─ ") + head)
        lines += [("   " if is_last else "│  ") + line for line in rest]
    return lines


def _describe_weights(weights: RecordWeights) -> list[str]:
    """The heaviest tokens; a weight beside how many times the mean it is."""
    heaviest = sorted(weights.tokens, key=lambda token: -token.weight)[:_TOP_TOKENS]
    rows = [(repr(t.text), t.field or "(template)", t.weight, t.weight * weights.num_tokens) for t in heaviest]
    width = max((len(row[0]) for row in rows), default=0)
    field_width = max((len(row[1]) for row in rows), default=0)
    lines = [f"token weights, layer {weights.layer} of {weights.model}, {weights.num_tokens} tokens", ""]
    return lines + [f"   {t:{width}}  {f:{field_width}}  {w:.5f}  {m:6.2f} × mean" for t, f, w, m in rows]


def _one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())


class _PageField(NamedTuple):
    name: str
    constituents: str
    """JSON: [{"labels": [...], "height": 2, "chosen": true}, ...]; pieces of the text refer to them by position."""
    marked: Markup
    shaded: Markup
    trees: list[tuple[str, Markup]]


def _page_field(field: InspectedField, weights: RecordWeights | None) -> _PageField:
    example = field.example
    ranges = _constituent_ranges(example)
    phrases = set(map(tuple, example.phrases.tolist()))
    columns = zip(example.units.labels, example.units.constituents[:, 2].tolist(), ranges, strict=True)
    described = [{"labels": label.split("::"), "height": h, "chosen": where in phrases} for label, h, where in columns]
    tokens = [token for token in weights.tokens if token.field == field.name] if weights else []
    return _PageField(
        field.name,
        json.dumps(described),
        marked_text(example, ranges),
        Markup("").join(_shaded_pieces(example.text, tokens, weights) if weights else ()),
        list(zip(_sentence_texts(example), trees(example), strict=True)),
    )


def _constituent_ranges(example: ParsedExample) -> list[tuple[int, int]]:
    words = example.units.words.tolist()
    return [(words[start][0], words[end - 1][1]) for start, end, _ in example.units.constituents.tolist()]


def _sentence_texts(example: ParsedExample) -> list[str]:
    words = example.units.words.tolist()
    bounds = pairwise(example.units.sentences.tolist())
    return [example.text[words[first][0] : words[last - 1][1]] for first, last in bounds if last > first]


def _shaded_pieces(text: str, tokens: Iterable[Token], weights: RecordWeights) -> Iterator[Markup]:
    """The text with each token's weight as tooltip and shade, from none for the record's lightest to full."""
    lightest, heaviest = (bound(token.weight for token in weights.tokens) for bound in (min, max))
    cursor = 0
    for start, end, weight in _merge_sharing(tokens):
        yield escape(text[cursor:start])
        cursor = end
        yield Markup('<span class="token" style="--w:{:.3f}" title="{}">{}</span>').format(
            min(1.0, (weight - lightest) / max(heaviest - lightest, 1e-12)),
            f"{weight:.5f}, {weight * weights.num_tokens:.2f} × the mean",
            text[start:end],
        )
    yield escape(text[cursor:])


def _merge_sharing(tokens: Iterable[Token]) -> list[tuple[int, int, float]]:
    """(start, end, weight) in reading order; tokens that share a character, as an emoji's bytes do, are added up."""
    merged: list[tuple[int, int, float]] = []
    for token in sorted(tokens, key=lambda token: token.start):
        start, end, weight = merged[-1] if merged else (0, 0, 0.0)
        if token.end > end:
            merged.append((max(token.start, end), token.end, token.weight))
        elif merged:
            merged[-1] = (start, end, weight + token.weight)
    return merged
