"""Statistics of a whole store against a plain count over its rows, and the page that shows them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mta_ds.data import Pace, SpanStore, UnitConfig, choose, read_manifest, read_records
from mta_ds.errors import UserError
from mta_ds.evaluation import store_report
from mta_ds.evaluation.charts import histogram, ranking
from mta_ds.evaluation.store_report import (
    pace_charts,
    read_rejects,
    read_statistics,
    store_charts,
    write_store_report,
)
from mta_ds.spans import parse as parse_module
from mta_ds.spans import rows as rows_module
from mta_ds.spans.parse import ParseConfig, parse


@pytest.fixture
def store(pair: Path, tmp_path: Path) -> Path:
    """A copy of the pair's store that a test may damage."""
    return Path(shutil.copytree(pair / "spans", tmp_path / "spans"))


@pytest.mark.parametrize("rows_per_batch", [1, 7, 1024])
def test_statistics_equal_a_plain_count(pair, monkeypatch, rows_per_batch):
    monkeypatch.setattr(store_report, "_ROWS_PER_BATCH", rows_per_batch)
    manifest, config = read_manifest(pair / "spans"), UnitConfig(words="all")
    found = read_statistics(pair / "spans", manifest, config)
    rows = pq.read_table(pair / "spans" / manifest.parts[0].file).to_pylist()
    sentences = [
        (start, end, [c for c in row["constituents"] if start <= c["start_word"] < end])
        for row in rows
        for start, end in zip(row["sentences"], row["sentences"][1:], strict=False)
    ]
    assert found.words_per_field == Counter(len(row["words"]) for row in rows)
    assert found.words_per_sentence == Counter(end - start for start, end, _ in sentences)
    assert found.constituents_per_sentence == Counter(len(inside) for *_, inside in sentences)
    assert found.labels == Counter(c["label"] for row in rows for c in row["constituents"])
    assert found.heights == Counter(c["height"] for row in rows for c in row["constituents"])
    assert found.words_per_sentence.total() == manifest.counts.sentences
    assert found.words_by_field.total() == manifest.counts.words


@pytest.mark.parametrize("config", [UnitConfig(), UnitConfig(choose="maximal", labels=("PP",))])
def test_coverage_is_what_training_would_choose(pair, config):
    found = read_statistics(pair / "spans", read_manifest(pair / "spans"), config)
    reader = SpanStore.open(pair / "spans")
    words, phrases = Counter(), 0
    for record in read_records([str(pair / "train.jsonl"), str(pair / "heldout.jsonl")]):
        for name, text in record.fields.items():
            chosen = choose(reader.units(record.id, name, text), config)
            words[name] += len(chosen.words)
            phrases += len(chosen.phrases)
    assert found.covered_by_field == words and found.phrases == phrases
    assert found.coverage == pytest.approx(words.total() / found.words_by_field.total())


def test_the_page_is_whole_and_loads_nothing(store, tmp_path):
    output = write_store_report(store, tmp_path / "new" / "store.html")
    html = output.read_text(encoding="utf-8")
    assert html.count("<svg") == html.count("</svg>") == 7
    assert "<script" not in html and "<link" not in html and 'src="' not in html and "url(http" not in html
    for words in (
        "29 records in 1 part",
        "parsed by bundled",
        "unparsed",
        "Words per sentence",
        "Coverage",
        "Records/s</b> 29 records",
    ):
        assert words in html
    assert "Rejects</h2>" not in html


def test_rejects_are_told_by_reason_and_escaped(store, tmp_path):
    rows = [
        ("f.jsonl:3", "bad JSON: <script>alert(1)</script>", "bad JSON"),
        ("f.jsonl:9", "bad JSON: x", "bad JSON"),
        ("f.jsonl:1", "no text", "no text"),
    ]
    lines = [json.dumps({"where": w, "reason": r, "record_id": None, "kind": k}) + "\n" for w, r, k in rows]
    (store / "rejects-00000-of-00002.jsonl").write_text("".join(lines[:2]))
    (store / "rejects-duplicates.jsonl").write_text(lines[2])
    first, second = read_rejects(store)
    assert (first.reason, first.number, second.reason, second.number) == ("bad JSON", 2, "no text", 1)
    assert first.example.startswith("f.jsonl:3: bad JSON")
    html = write_store_report(store, tmp_path / "store.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)" in html and "<script" not in html


def test_a_store_whose_log_is_gone_has_no_chart_of_speed(store, tmp_path):
    shutil.rmtree(store / "log")
    html = write_store_report(store, tmp_path / "store.html").read_text(encoding="utf-8")
    assert html.count("<svg") == 6 and "Records/s" not in html


def test_records_per_second_stand_between_the_samples():
    line = store_report._pace_line(Pace(3, [100.0, 110.0, 110.0, 130.0], [0, 50, 60, 160]), 10)
    assert (line.name, line.steps, line.values) == ("shard 3", [0.5, 2.0], [5.0, 5.0])


def test_few_shards_are_all_drawn_and_of_many_the_slowest_and_fastest():
    paces = [Pace(i, [1e9 + i, 1e9 + i + 7200], [0, 7200 * (i + 1)]) for i in range(30)]
    (few,) = pace_charts(paces[1:3], 3)
    assert few.note == "36,000 records, 2.5/s a shard; slowest 2.0/s (shard 1); 1 of 3 shards left no log"
    assert "shard 1" in few.svg and "shard 2" in few.svg and "hours" in few.svg
    many, slowest = pace_charts(paces, 30)
    shown = {i for i in range(30) if f">shard {i}<" in many.svg}
    assert shown == {0, 1, 2, 27, 28, 29}
    assert slowest.note == "the slowest 25 of 30 shards" and ">shard 24<" in slowest.svg
    assert ">shard 25<" not in slowest.svg
    assert pace_charts([], 2) == []


def test_labels_of_a_foreign_parser_are_only_text():
    svg = str(ranking("Labels", "constituents", ["$x^2$", "<script>", "-LRB-", "a--b"], [3, 2, 1, 1]))
    assert "<script>" not in svg and "&lt;script&gt;" in svg and "$x^2$" in svg


def test_charts_without_values_are_left_out():
    statistics = store_report.StoreStatistics(words_per_field=Counter({5: 3}))
    (chart,) = store_charts(statistics)
    assert chart.note == "3 fields: median 5, mean 5.0, largest 5"
    assert statistics.coverage == 0


def test_a_store_of_words_alone_with_a_field_of_none(tmp_path):
    rows = [{"id": "a", "prompt": "  ", "response": "Yes."}, {"id": "b", "text": "Two words. And three more."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = tmp_path / "spans"
    parse(ParseConfig(inputs=(str(tmp_path / "rows.jsonl"),), output=store, parser="none"))
    found = read_statistics(store, read_manifest(store), UnitConfig())
    assert found.words_per_field == {0: 1, 2: 1, 7: 1} and found.words_per_sentence == {2: 1, 3: 1, 4: 1}
    assert found.constituents_per_sentence == {0: 3} and not found.labels and found.coverage == 0
    assert "0.0 % of the words" in write_store_report(store, tmp_path / "page.html").read_text(encoding="utf-8")


def test_one_row_group_is_held_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parse_module, "_WORDS_PER_GROUP", 1)  # a group each unit of work
    monkeypatch.setattr(rows_module, "FIELDS_AT_ONCE", 3)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"Row {i}."}) + "\n" for i in range(7)))
    store = tmp_path / "spans"
    parse(ParseConfig(inputs=(str(tmp_path / "rows.jsonl"),), output=store, parser="none", workers=1))
    counted = []
    monkeypatch.setattr(store_report, "_count", lambda batch, *_: counted.append(batch.num_rows))
    read_statistics(store, read_manifest(store), UnitConfig())
    assert counted == [3, 3, 1]


def test_a_long_tail_is_cut_off_and_told():
    counts = Counter(dict.fromkeys(range(1, 301), 100)) + Counter({1_000_000: 1})
    (chart,) = store_charts(store_report.StoreStatistics(words_per_field=counts))
    assert "largest 1,000,000" in chart.note and "beyond the right edge" in chart.note
    assert len(str(chart.svg)) < 60_000


def test_a_histogram_is_the_same_twice():
    arguments = ("Words", "words", [0.5, 1.5, 2.5], [3, 4])
    assert histogram(*arguments) == histogram(*arguments)


def test_mistakes(store, tmp_path):
    with pytest.raises(UserError, match="no such span store"):
        write_store_report(tmp_path / "none", tmp_path / "page.html")
    (store / "rejects-x.jsonl").write_text('{"where": "a"}\n')
    with pytest.raises(UserError, match=r"rejects-x.jsonl:1: not a reject"):
        write_store_report(store, tmp_path / "page.html")
    (store / "rejects-x.jsonl").write_text("{nonsense\n")
    with pytest.raises(UserError, match=r"rejects-x.jsonl:1: not valid JSON"):
        write_store_report(store, tmp_path / "page.html")
    (store / "rejects-x.jsonl").unlink()
    next(store.glob("part-*.parquet")).unlink()
    with pytest.raises(UserError, match="part is missing"):
        write_store_report(store, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
