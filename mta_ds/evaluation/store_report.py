"""A page about a whole span store: lengths, labels, heights, coverage, counts, and why rows were rejected.

The parts are read column by column, rows of one row group at a time, which ends after so many words; what is kept is
counts. So memory grows neither with the store nor with the length of its records.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mta_ds.data import (
    Manifest,
    Pace,
    UnitConfig,
    Units,
    check_part,
    choose,
    read_batches,
    read_manifest,
    read_paces,
)
from mta_ds.errors import UserError
from mta_ds.evaluation.charts import Chart, Line, histogram, line_chart, ranking
from mta_ds.evaluation.page import render_page
from mta_ds.files import write_atomic

# The leaves that are needed: neither texts nor tags, and of the words only one column.
_COLUMNS = ["field", "sentences", "words.list.element.start", "constituents"]
_ROWS_PER_BATCH = 1024
_MAX_BARS = 40
_MAX_LABELS = 25
_MAX_SHARDS = 6  # whose pace is drawn
_TIMES = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_TAIL = 0.99  # share of the values that a histogram shows


class Rejects(NamedTuple):
    """Rows of the input that became no record, for one kind of reason."""

    reason: str
    number: int
    example: str
    """The first one: where it stands and what was wrong."""


@dataclass
class StoreStatistics:
    """What a store holds, as counts of values: ``words_per_field[12]`` is the number of fields of 12 words."""

    words_per_sentence: Counter[int] = field(default_factory=Counter)
    words_per_field: Counter[int] = field(default_factory=Counter)
    constituents_per_sentence: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    words_by_field: Counter[str] = field(default_factory=Counter)
    covered_by_field: Counter[str] = field(default_factory=Counter)
    """Words inside a chosen phrase."""
    phrases: int = 0

    @property
    def coverage(self) -> float:
        """Share of all words that are inside a chosen phrase."""
        return self.covered_by_field.total() / max(1, self.words_by_field.total())


def write_store_report(store: Path, output: Path, units: UnitConfig | None = None) -> Path:
    """Write a page about the store to ``output``.

    Args:
        units: which phrases count as chosen, for the coverage.

    Raises:
        UserError: the store is missing, unfinished or damaged, or the page cannot be written.
    """
    units = units or UnitConfig()
    manifest = read_manifest(store)
    statistics = read_statistics(store, manifest, units)
    context = {
        "title": store.resolve().name,
        "manifest": manifest,
        "units": units,
        "statistics": statistics,
        "charts": store_charts(statistics),
        "paces": pace_charts(read_paces(store, manifest.num_shards), manifest.num_shards),
        "rejects": read_rejects(store),
    }
    try:
        write_atomic(output, render_page("store.html.j2", context))
    except OSError as error:
        raise UserError(f"{output}: cannot write: {error.strerror or error}") from None
    return output


def read_statistics(store: Path, manifest: Manifest, units: UnitConfig) -> StoreStatistics:
    """Count over all parts of a store, in memory that does not depend on their size.

    Raises:
        UserError: a part is missing or damaged.
    """
    statistics = StoreStatistics()
    for part in manifest.parts:
        check_part(store, part, full=False)
        try:
            for batch in read_batches(store / part.file, _ROWS_PER_BATCH, _COLUMNS):
                _count(batch, statistics, units)
        except (OSError, pa.ArrowException):
            raise UserError(f"{store / part.file}: part is damaged; remove it and run 'mta-ds parse' again") from None
    return statistics


def store_charts(statistics: StoreStatistics) -> list[Chart]:
    """The plots of the page; no empty ones."""
    spreads = [
        ("Words per sentence", "words", "sentences", statistics.words_per_sentence),
        ("Words per field", "words", "fields", statistics.words_per_field),
        ("Constituents per sentence", "constituents", "sentences", statistics.constituents_per_sentence),
        ("Height of constituents", "height", "constituents", statistics.heights),
    ]
    charts = [_spread(title, unit, what, counts) for title, unit, what, counts in spreads if counts]
    if labels := statistics.labels.most_common(_MAX_LABELS):
        names, values = [name for name, _ in labels], [number for _, number in labels]
        note = f"{len(labels)} of {len(statistics.labels)}, unary chains as they are"
        charts.append(Chart("Labels", note, ranking("Labels", "constituents", names, values)))
    if words := statistics.words_by_field.most_common(_MAX_LABELS):
        names = [name for name, _ in words]
        shares = [100 * statistics.covered_by_field[name] / max(1, number) for name, number in words]
        charts.append(
            Chart("Coverage", "words inside chosen phrases, by field", ranking("Coverage", "%", names, shares))
        )
    return charts


def pace_charts(paces: Sequence[Pace], num_shards: int) -> list[Chart]:
    """Records/s over time, each shard from its own start: of all shards, or of the slowest and the fastest."""
    if not paces:
        return []
    ranked = sorted(paces, key=lambda pace: pace.mean)
    few = len(ranked) <= _MAX_SHARDS
    drawn = sorted(ranked) if few else [*ranked[: _MAX_SHARDS // 2], *ranked[-(_MAX_SHARDS // 2) :]]
    longest = max(pace.times[-1] - pace.times[0] for pace in drawn)
    unit, size = next((name, size) for name, size in _TIMES if longest >= 2 * size or size == 1)
    records, taken = sum(p.records[-1] for p in paces), sum(p.times[-1] - p.times[0] for p in paces)
    note = f"{records:,} records, {records / taken:,.1f}/s a shard; slowest {ranked[0].mean:,.1f}/s" + (
        f" (shard {ranked[0].shard})" if len(ranked) > 1 else ""
    )
    if len(paces) < num_shards:
        note += f"; {num_shards - len(paces)} of {num_shards} shards left no log"
    charts = [Chart("Records/s", note, line_chart("Records/s", [_pace_line(p, size) for p in drawn], unit))]
    if not few:
        shown = ranked[:_MAX_LABELS]
        names, values = [f"shard {pace.shard}" for pace in shown], [pace.mean for pace in shown]
        note = f"the slowest {len(shown)} of {len(paces)} shards"
        charts.append(Chart("Slowest shards", note, ranking("Slowest shards", "records/s", names, values)))
    return charts


def _pace_line(pace: Pace, size: int) -> Line:
    """Records/s between each two samples, drawn in their middle; times in units of ``size`` seconds."""
    times, records = np.array(pace.times) - pace.times[0], np.array(pace.records)
    seconds = np.diff(times)
    kept = seconds > 0
    middles = (times[:-1] + times[1:])[kept] / 2 / size
    return Line(f"shard {pace.shard}", middles.tolist(), (np.diff(records)[kept] / seconds[kept]).tolist())


def read_rejects(store: Path) -> list[Rejects]:
    """The rejected rows beside a store by kind of reason, the most frequent first.

    Raises:
        UserError: a line that is no reject.
    """
    numbers: Counter[str] = Counter()
    first: dict[str, str] = {}
    for where, row in _reject_rows(store):
        try:
            reason = str(row.get("kind") or row["reason"])
            first.setdefault(reason, f"{row['where']}: {row['reason']}")
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{where}: not a reject; run 'mta-ds parse' again") from None
        numbers[reason] += 1
    return [Rejects(reason, number, first[reason]) for reason, number in numbers.most_common()]


def _reject_rows(store: Path) -> Iterator[tuple[str, Any]]:
    for path in sorted(store.glob("rejects*.jsonl")):
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield f"{path}:{number}", json.loads(line)
                except ValueError:
                    raise UserError(f"{path}:{number}: not valid JSON; run 'mta-ds parse' again") from None


def _count(batch: pa.RecordBatch, statistics: StoreStatistics, config: UnitConfig) -> None:
    """Add a batch's rows to the statistics."""
    num_words = np.diff(_offsets(batch["words"]))
    flat = batch["constituents"].flatten()
    ranges = np.stack([flat.field(name).to_numpy() for name in ("start_word", "end_word", "height")], axis=1)
    _add(statistics.words_per_field, num_words)
    _add(statistics.heights, ranges[:, 2])
    for counted in flat.field("label").value_counts().to_pylist():
        statistics.labels[counted["values"]] += counted["counts"]
    _count_sentences(batch, num_words, ranges[:, 0], statistics)
    _count_phrases(batch, num_words, ranges, statistics, config)


def _count_sentences(
    batch: pa.RecordBatch, num_words: np.ndarray, starts: np.ndarray, statistics: StoreStatistics
) -> None:
    """Lengths of sentences; ``starts`` are the constituents' first words, by row."""
    offsets = _offsets(batch["sentences"])
    first_word = np.cumsum(num_words) - num_words
    edges = batch["sentences"].flatten().to_numpy() + np.repeat(first_word, np.diff(offsets))
    is_last = np.zeros(len(edges), dtype=bool)
    is_last[offsets[1:][np.diff(offsets) > 0] - 1] = True  # a row's last edge opens no sentence
    opens = np.flatnonzero(~is_last)
    _add(statistics.words_per_sentence, edges[opens + 1] - edges[opens])
    # words are numbered through the batch, so one search finds every constituent's sentence
    at = starts + np.repeat(first_word, np.diff(_offsets(batch["constituents"])))
    sentence = np.searchsorted(edges[opens], at, side="right") - 1
    _add(statistics.constituents_per_sentence, np.bincount(sentence, minlength=len(opens)))


def _count_phrases(
    batch: pa.RecordBatch, num_words: np.ndarray, ranges: np.ndarray, statistics: StoreStatistics, config: UnitConfig
) -> None:
    """Chosen phrases and the words inside them, row by row."""
    bounds = _offsets(batch["constituents"]).tolist()
    labels = batch["constituents"].flatten().field("label").to_pylist()
    inside_phrases = config.model_copy(update={"words": "in_phrases"})
    for row, (name, length) in enumerate(zip(batch["field"].to_pylist(), num_words.tolist(), strict=True)):
        own = slice(bounds[row], bounds[row + 1])
        chosen = choose(_bare_units(length, ranges[own], labels[own]), inside_phrases)
        statistics.words_by_field[name] += length
        statistics.covered_by_field[name] += len(chosen.words)
        statistics.phrases += len(chosen.phrases)


def _bare_units(num_words: int, constituents: np.ndarray, labels: list[str]) -> Units:
    """A row without its text: each word is one character."""
    words = np.arange(num_words, dtype=np.int32)
    return Units(b"", num_words, words[:0], np.stack([words, words + 1], axis=1), [], constituents, labels)


def _offsets(lists: pa.ListArray) -> np.ndarray:
    """Bounds of each row's values in ``lists.flatten()``."""
    offsets: np.ndarray = lists.offsets.to_numpy().astype(np.int64)
    offsets -= offsets[0]
    return offsets


def _add(counts: Counter[int], values: np.ndarray) -> None:
    distinct, numbers = np.unique(values, return_counts=True)
    for value, number in zip(distinct.tolist(), numbers.tolist(), strict=True):
        counts[value] += number


def _spread(title: str, unit: str, what: str, counts: Mapping[int, int]) -> Chart:
    """A histogram up to the 99th percentile, with median and extremes in words."""
    values = np.array(sorted(counts))
    below = np.cumsum([counts[value] for value in values.tolist()])
    total = int(below[-1])
    median, end = (int(values[np.searchsorted(below, share * total)]) for share in (0.5, _TAIL))
    first = int(values[0])
    width = -(-(end + 1 - first) // _MAX_BARS)
    edges = np.arange(first, end + 1 + width, width)
    shown = values < edges[-1]
    bars = np.histogram(values[shown], edges, weights=[counts[value] for value in values[shown].tolist()])[0]
    mean = sum(value * number for value, number in counts.items()) / total
    note = f"{total:,} {what}: median {median:,}, mean {mean:,.1f}, largest {int(values[-1]):,}"
    if beyond := total - int(bars.sum()):
        note += f"; {beyond:,} beyond the right edge"
    return Chart(title, note, histogram(title, unit, (edges - 0.5).tolist(), bars.astype(int).tolist()))
