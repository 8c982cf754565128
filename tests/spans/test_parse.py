"""The parse stage: what it writes, what it rejects and refuses, what a second run does."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from span_cases import RightBranching, make_records, parts_of, rows_of, write_rows

from mta_ds.errors import UsageError, UserError
from mta_ds.spans import merge as merging
from mta_ds.spans import parse as module
from mta_ds.spans import rows as rows_module
from mta_ds.spans.parse import ParseConfig, merge_only, parse, recorded_inputs, resolve_config
from mta_ds.spans.parser import BUNDLED
from mta_ds.spans.records import read_records
from mta_ds.spans.store import Manifest, SpanStore

HOSTILE = [
    "\0",
    "\u200b\u200b",
    "é́́ 👩‍👩‍👧 \u202eabc\u202c",
    "x" * 5_000,
    "word " * 2_000,
    "מה? \r\n\r\n - y",
    "a, " * 900,
]


def rejects(store: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(store.glob("rejects-*")) for line in path.read_text().splitlines()]


def done(manifest: Manifest | None) -> Manifest:
    assert manifest is not None
    return manifest


def test_constituents_count_words_of_the_field(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"id": "a", "text": "It rains. We stay here"}])
    counts = done(parse(ParseConfig(inputs=(source,), output=tmp_path / "s"))).counts
    assert (counts.records, counts.fields, counts.sentences, counts.words, counts.constituents) == (1, 1, 2, 6, 6)
    units = SpanStore.open(tmp_path / "s").units("a", "text", "It rains. We stay here")
    assert units is not None
    assert units.sentences.tolist() == [0, 3, 6]
    assert units.constituents.tolist() == [[0, 3, 3], [1, 3, 2], [2, 3, 1], [3, 6, 3], [4, 6, 2], [5, 6, 1]]
    assert units.labels == ["S", "VP", "NP", "S", "VP", "NP"]


def test_long_sentences_are_split_and_odd_words_get_no_constituents(tmp_path: Path, parser: RightBranching) -> None:
    text = "so " * 60 + "\n\na \u200b\u200b b"
    parser.fits = lambda s: len(s.words) <= 40 and "\u200b\u200b" not in s.words  # type: ignore[method-assign]
    source = write_rows(tmp_path / "a.jsonl", [{"id": "a", "text": text}])
    counts = done(parse(ParseConfig(inputs=(source,), output=tmp_path / "s"))).counts
    assert (counts.sentences, counts.words, counts.split, counts.unparsed) == (5, 63, 2, 1)
    units = SpanStore.open(tmp_path / "s").units("a", "text", text)
    assert units is not None
    assert units.sentences.tolist() == [0, 30, 60, 61, 62, 63]
    assert [text[start:end] for start, end in units.words[60:]] == ["a", "\u200b\u200b", "b"]
    assert not any(start <= 61 < end for start, end, _ in units.constituents)


def test_each_distinct_sentence_is_parsed_once(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"id": str(i), "text": "Same here. Same here."} for i in range(1500)])
    parse(ParseConfig(inputs=(source,), output=tmp_path / "s", workers=1))
    assert len(parser.parsed) == -(-1500 // rows_module.FIELDS_AT_ONCE)  # once a unit of work


def test_shards_hold_the_same_rows_as_one(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(25))
    one = done(parse(ParseConfig(inputs=(source,), output=tmp_path / "one")))
    config = ParseConfig(inputs=(source,), output=tmp_path / "many", num_shards=3)
    assert parse(config, 1) is None
    assert parse(config, 2) is None
    many = done(parse(config, 0))  # whichever task is last merges
    assert many.counts == one.counts
    assert rows_of(tmp_path / "many") == rows_of(tmp_path / "one")


def test_small_batches_and_row_groups_change_no_row(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(25))
    parse(ParseConfig(inputs=(source,), output=tmp_path / "large"))
    monkeypatch.setattr(rows_module, "CHARS_AT_ONCE", 150)
    monkeypatch.setattr(module, "_WORDS_PER_GROUP", 100)
    parse(ParseConfig(inputs=(source,), output=tmp_path / "small"))
    assert pq.ParquetFile(tmp_path / "small" / "part-00000-of-00001.parquet").num_row_groups > 3
    assert rows_of(tmp_path / "small") == rows_of(tmp_path / "large")
    assert len(SpanStore.open(tmp_path / "small")) == len(SpanStore.open(tmp_path / "large"))


def test_rerun_does_only_what_is_missing(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(12))
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2)
    manifest = parse(config)
    before = parts_of(tmp_path / "s")
    num_parsed = len(parser.parsed)
    assert parse(config) == manifest
    assert len(parser.parsed) == num_parsed
    (tmp_path / "s" / "part-00001-of-00002.parquet").unlink()
    assert parse(config) == manifest
    assert num_parsed < len(parser.parsed) < 2 * num_parsed
    assert parts_of(tmp_path / "s") == before


def test_damaged_part_is_found_on_resume(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(12))
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2)
    parse(config, 0)
    part = tmp_path / "s" / "part-00000-of-00002.parquet"
    data = bytearray(part.read_bytes())
    data[20] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"part-00000-of-00002\.parquet: part is damaged.*remove it"):
        parse(config)


def test_other_parser_inputs_or_shards_are_refused(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(4))
    config = ParseConfig(inputs=(source,), output=tmp_path / "s")
    parse(config)
    with pytest.raises(UserError, match="already holds a store of 1 shards"):
        parse(config.model_copy(update={"num_shards": 2}))
    monkeypatch.setattr(module, "load_parser", lambda spec, device: RightBranching("other"))
    with pytest.raises(UserError, match="already holds a store of another parser"):
        parse(config)
    monkeypatch.setattr(module, "load_parser", lambda spec, device: parser)
    text = Path(source).read_text()
    Path(source).write_text(text.replace("stay", "play"))  # of the same size
    with pytest.raises(UserError, match="already holds a store of other inputs"):
        parse(config)


def test_bad_rows_fail_the_stage_after_it_is_done(tmp_path: Path, parser: RightBranching) -> None:
    bad = ["{nonsense\n", '{"text": ""}\n', "[1]\n"]
    source = write_rows(tmp_path / "a.jsonl", [*make_records(3), *bad])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2)
    with pytest.raises(UserError, match=r"a\.jsonl:5: no text; 3 of 6 rows are bad \(1 .*rejects-\*\.jsonl"):
        parse(config)
    assert [(reject["where"].rpartition(":")[2], reject["reason"][:8]) for reject in rejects(tmp_path / "s")] == [
        ("5", "no text"),
        ("4", "bad JSON"),
        ("6", "not a JS"),
    ]
    num_parsed = len(parser.parsed)
    counts = done(parse(config.model_copy(update={"max_reject_share": 0.5}))).counts
    assert (counts.records, counts.rejects) == (3, 3)
    assert len(parser.parsed) == num_parsed  # only merged


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_duplicate_ids(tmp_path: Path, parser: RightBranching, num_shards: int) -> None:
    same, other = {"id": "a", "text": "One."}, {"id": "a", "text": "Other."}
    source = write_rows(tmp_path / "a.jsonl", [same, {"id": "b", "text": "Two."}, same, other, other, same])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=num_shards)
    with pytest.raises(UserError, match=r"a\.jsonl:4: duplicate id with other content; 2 of 6 rows are bad"):
        parse(config)
    counts = done(parse(config.model_copy(update={"max_reject_share": 0.5}))).counts
    assert (counts.records, counts.duplicates, counts.rejects) == (2, 2, 2)
    assert [reject["where"].rpartition(":")[2] for reject in rejects(tmp_path / "s")] == ["4", "5"]
    assert SpanStore.open(tmp_path / "s").units("a", "text", "One.") is not None


def test_equal_duplicates_are_one_record(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(
        tmp_path / "a.jsonl", [{"text": "One."}, {"text": "One."}, {"prompt": "p", "response": "q"}] * 2
    )
    counts = done(parse(ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2))).counts
    assert (counts.records, counts.duplicates, counts.rejects) == (2, 4, 0)
    assert not list((tmp_path / "s").glob("rejects-*"))


def test_a_record_apart_by_fields_alone_is_a_duplicate_all_the_same(tmp_path: Path, parser: RightBranching) -> None:
    halves = [{"id": "a", "instruction": "Go."}, {"id": "a", "instruction": "", "output": "Yes."}]
    source = write_rows(tmp_path / "a.jsonl", [{"id": "b", "text": "One."}, *halves])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s")
    with pytest.raises(
        UserError, match=r"a\.jsonl:3: duplicate id with other content; 1 of 3 rows are bad \(1 duplicate"
    ):
        parse(config)
    assert json.loads((tmp_path / "s" / "part-00000-of-00001.json").read_text())["record_starts"] == [2]


def test_over_long_records_are_bad_rows(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", [*make_records(2), {"text": "long " * 100}])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", max_record_bytes=200)
    with pytest.raises(UserError, match=r"a\.jsonl:3: over-long record: more than 200 bytes.*\(1 over-long record;"):
        parse(config)
    with pytest.raises(UserError, match="already holds a store of records up to 200 bytes"):
        parse(config.model_copy(update={"max_record_bytes": 300}))


def test_merging_again_finds_that_it_is_done(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "a.jsonl", [*make_records(4), "bad\n"])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", max_reject_share=0.5)
    manifest = parse(config)
    monkeypatch.setattr(merging, "_merge_counts", None)
    assert merge_only(config) == manifest
    with pytest.raises(UserError, match="1 of 5 rows are bad"):
        merge_only(config.model_copy(update={"max_reject_share": 0.1}))


def test_a_merge_without_room_is_one_clear_line(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(_: Path) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(sqlite3, "connect", connect)
    with pytest.raises(UserError, match="s: cannot merge the parts: database or disk is full"):
        parse(ParseConfig(inputs=(write_rows(tmp_path / "a.jsonl", make_records(2)),), output=tmp_path / "s"))
    assert not list((tmp_path / "s").glob(".*"))


def test_a_merge_takes_the_inputs_of_the_store_and_no_others(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    conflict = [{"id": "r1", "text": "Other."}]
    source = write_rows(tmp_path / "a.jsonl", [*make_records(4), *conflict])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s")
    with pytest.raises(UserError, match="duplicate id"):
        parse(config)
    monkeypatch.chdir(tmp_path / "s")
    assert recorded_inputs(config.output) == [source]
    other = write_rows(tmp_path / "b.jsonl", make_records(4))
    with pytest.raises(UserError, match=r"b\.jsonl: not what .*s was parsed from"):
        merge_only(config.model_copy(update={"inputs": (other,)}))
    monkeypatch.setattr(merging, "read_records", lambda inputs, max_bytes: read_records([other]))
    with pytest.raises(UserError, match=r"changed since .*s was parsed from it"):
        merge_only(config.model_copy(update={"max_reject_share": 1.0}))


def test_parts_of_two_parsers_are_not_merged(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of two tasks that began one store at the same moment where no link can be made."""
    source = write_rows(tmp_path / "a.jsonl", make_records(4))
    config = ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2)
    parse(config, 0)
    monkeypatch.setattr(module, "load_parser", lambda spec, device: RightBranching("other"))
    other = config.model_copy(update={"output": tmp_path / "other"})
    parse(other, 1)
    for path in other.output.glob("part-*"):
        path.rename(config.output / path.name)
    with pytest.raises(UserError, match=r"part-00001-of-00002\.parquet: made by another parser"):
        merge_only(config)


def test_a_data_set_that_is_not_there_claims_no_store(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such data set on the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match="mistyped: no such file, folder or data set"):
        parse(ParseConfig(inputs=("mistyped",), output=tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_a_damaged_store_json_is_one_clear_line(tmp_path: Path, parser: RightBranching) -> None:
    config = ParseConfig(inputs=(write_rows(tmp_path / "a.jsonl", make_records(2)),), output=tmp_path / "s")
    parse(config)
    for text in ("{}", '{"schema_version": 1, "num_shards": 1}', "[" * 100_000, "[1]"):
        (config.output / "store.json").write_text(text)
        for task in (parse, merge_only):
            with pytest.raises(UserError, match=r"store\.json: damaged"):
                task(config)


def test_status_tells_every_damaged_part(tmp_path: Path, parser: RightBranching) -> None:
    config = ParseConfig(
        inputs=(write_rows(tmp_path / "a.jsonl", make_records(4)),), output=tmp_path / "s", num_shards=4
    )
    parse(config)
    (config.output / "part-00003-of-00004.parquet").unlink()
    for index in (0, 2):
        (config.output / f"part-0000{index}-of-00004.parquet").write_text("damaged")
    told = merging.status(config.output).splitlines()
    assert told[0] == "1 of 4 parts are missing: 3" and told[-1].startswith("so far 1 records")
    assert [line.partition(": ")[0][-16:-8] for line in told[1:3]] == ["of-00004"] * 2


def test_no_records_is_an_error(tmp_path: Path, parser: RightBranching) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: no records"):
        parse(ParseConfig(inputs=(write_rows(tmp_path / "a.jsonl", []),), output=tmp_path / "s"))


def test_wrong_use(tmp_path: Path, parser: RightBranching) -> None:
    source = write_rows(tmp_path / "a.jsonl", make_records(2))
    with pytest.raises(UsageError, match="--shard-index 2: want 0 to 1 for 2 shards"):
        parse(ParseConfig(inputs=(source,), output=tmp_path / "s", num_shards=2), 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the span store"):
        parse(ParseConfig(inputs=(source,), output=tmp_path / "file"))


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("parse: {inputs: [a.jsonl], output: s, num_shards: 4}\ntrain: {lr: 1}\n")
    config = resolve_config(file, ["parse.num_shards=5"], {"output": Path("t"), "parser": None})
    assert config == ParseConfig(inputs=("a.jsonl",), output=Path("t"), num_shards=5)
    with pytest.raises(UsageError, match="output: required key is missing"):
        resolve_config(None, (), {"inputs": ["a"]})


@pytest.mark.skipif(not (BUNDLED / "config.json").is_file(), reason="the bundled parser is not there")
def test_real_parser_on_hostile_texts_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    texts = ["The old man who lives here reads a book about cats.", *HOSTILE]
    source = write_rows(tmp_path / "a.jsonl", [{"id": str(i), "text": text} for i, text in enumerate(texts)])
    config = ParseConfig(inputs=(source,), output=tmp_path / "s")
    counts = done(parse(config)).counts
    assert counts.records == len(texts)
    assert counts.split > 0
    assert counts.unparsed > 0
    parse(config.model_copy(update={"output": tmp_path / "again"}))
    assert parts_of(tmp_path / "s") == parts_of(tmp_path / "again")
    store = SpanStore.open(tmp_path / "s")
    for i, text in enumerate(texts):
        units = store.units(str(i), "text", text)
        assert units is not None
        assert "".join(text[start:end] for start, end in units.words) == "".join(text.split())
        assert all(0 <= start < end <= len(units.words) for start, end, _ in units.constituents)
    units = store.units("0", "text", texts[0])
    assert units is not None
    assert {"S", "NP", "VP"} <= set(units.labels)


@pytest.mark.parametrize("source", ["{}", "{}/*", "{}/**/*.json*", "~"])
def test_a_store_among_its_records_is_the_same_as_one_elsewhere(
    tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """Later shards, the merge and a rerun meet the store's own files there."""
    data = tmp_path / "data"
    monkeypatch.setenv("HOME", str(data))
    write_rows(data / "a.jsonl", make_records(10))
    write_rows(data / "z.jsonl", [{"id": "z", "text": "The last."}])
    apart = ParseConfig(inputs=(str(data),), output=tmp_path / "apart", num_shards=3)
    parse(apart)
    config = ParseConfig(inputs=(source.format(data),), output=data / "spans", num_shards=3)
    manifests = [parse(config, index) for index in (2, 0, 1)]
    assert manifests[:2] == [None, None] and done(manifests[2]).counts.records == 11
    assert parse(config) == manifests[2] == merge_only(config)
    assert parts_of(config.output) == parts_of(apart.output)


def test_a_store_does_not_take_the_place_of_its_records(tmp_path: Path, parser: RightBranching) -> None:
    file = write_rows(tmp_path / "data" / "a.jsonl", make_records(4))
    for source in (tmp_path, tmp_path / "*", tmp_path / "data" / "*.jsonl"):
        with pytest.raises(UsageError, match=r"data: holds records of the input .*; choose another output"):
            parse(ParseConfig(inputs=(str(source),), output=tmp_path / "data"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]
    config = ParseConfig(inputs=(file,), output=tmp_path / "data", num_shards=2)  # named itself, it is read
    assert done(parse(config)).counts.records == 4
    with pytest.raises(UserError, match="data is a span store, whose files are no records"):
        parse(config.model_copy(update={"inputs": (str(tmp_path / "data"),), "output": tmp_path / "s"}))


def test_the_home_folder_in_output(tmp_path: Path, parser: RightBranching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "a.jsonl", make_records(2))
    parse(ParseConfig(inputs=("~/a.jsonl",), output=Path("~/s")))
    assert SpanStore.open(Path("~/s")).path == tmp_path / "s"
