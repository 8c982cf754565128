"""Rows of every container, with what is wrong with them, and every name an input may have."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mta_ds.errors import UserError
from mta_ds.spans import sources
from mta_ds.spans.records import Record, Reject, read_records
from mta_ds.spans.sources import input_files


def lines(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def test_bad_lines_are_rejected_with_their_number(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": \n{"text": "\xff"}\n' + b"[" * 100_000 + b'\n{"text": "last"}'
    )
    found = list(read_records([str(path)]))
    assert [f.where for f in found] == [f"{path}:{n}" for n in (1, 3, 4, 5, 6)]
    assert [type(f) for f in found] == [Record, Reject, Reject, Reject, Record]
    assert [f.reason.partition(":")[0] for f in found if isinstance(f, Reject)] == [
        "bad JSON",
        "invalid UTF-8 at byte 10",
        "bad JSON",
    ]


def test_every_container_gives_the_same_records(tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": f"text {i}"} for i in range(5)]
    plain = Path(lines(tmp_path / "plain.jsonl", *rows))
    data = plain.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))
    (tmp_path / "b.json.zst").write_bytes(zstd(data[:20]) + zstd(data[20:]))  # two frames
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    for name in ("plain.jsonl", "a.jsonl.gz", "b.json.zst", "c.parquet"):
        found = [r for r in read_records([str(tmp_path / name)]) if isinstance(r, Record)]
        assert [(r.id, r.fields["text"]) for r in found] == [(r["id"], r["text"]) for r in rows], name
    assert len(list(read_records([str(tmp_path)]))) == 20
    assert len(list(read_records([str(tmp_path / "*.jsonl*")]))) == 10


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))

    def texts(source: str) -> list[str]:
        return [r.fields["text"] for r in read_records([str(tmp_path / source)]) if isinstance(r, Record)]

    assert texts("one") == texts("two") == ["a", "b"]
    assert texts("two:test") == ["b"]


def test_shards_are_disjoint_and_whole_over_all_inputs(tmp_path: Path) -> None:
    first = lines(tmp_path / "a.jsonl", *({"text": f"a{i}"} for i in range(4)))
    second = lines(tmp_path / "b.jsonl", *({"text": f"b{i}"} for i in range(3)))
    whole = list(read_records([first, second]))
    shards = [list(read_records([first, second], num_shards=3, shard_index=i)) for i in range(3)]
    assert [len(shard) for shard in shards] == [3, 2, 2]
    assert [shards[i % 3][i // 3] for i in range(7)] == whole


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    lines(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file; did you mean .*train\.jsonl\?"):
        list(read_records([str(tmp_path / "trian.jsonl")]))
    with pytest.raises(UserError, match=r"\*\.json: no record file there"):
        list(read_records([str(tmp_path / "*.json")]))
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(UserError, match="not a record file; want one of"):
        input_files(str(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no record file there"):
        input_files(str(tmp_path / "empty"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_container_is_one_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is none of them, whatever its name says")
    with pytest.raises(UserError, match=f"{name}: cannot read"):
        list(read_records([str(path)]))


def test_cut_off_containers_are_not_read_as_shorter_ones(tmp_path: Path) -> None:
    data = b"".join(json.dumps({"text": f"{i * 7919 % 1000} is it"}).encode() + b"\n" for i in range(3000))
    for name, packed in (
        ("a.jsonl.gz", gzip.compress(data)),
        ("a.jsonl.zst", zstd(data)),
    ):
        (tmp_path / name).write_bytes(packed[: len(packed) // 2])
        with pytest.raises(UserError, match=f"{name}: cannot read"):
            list(read_records([str(tmp_path / name)]))


def test_over_long_records_are_rejected_and_the_next_ones_read(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b" * 3_000_000}, {"text": "c" * 980}, {"text": "d" * 1000}]
    source = lines(tmp_path / "a.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist([*rows[:3], {"text": "d" * 1001}]), tmp_path / "b.parquet")
    for path in (source, str(tmp_path / "b.parquet")):
        found = list(read_records([path], max_bytes=1000))
        assert [f.where for f in found] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
        assert [isinstance(f, Record) for f in found] == [True, False, True, False]
        assert {(f.kind, f.reason[:16]) for f in found if isinstance(f, Reject)} == {("over-long record",) * 2}
        assert all(isinstance(f, Record) for f in read_records([path]))
        shards = [list(read_records([path], num_shards=2, shard_index=i, max_bytes=1000)) for i in range(2)]
        assert [f.where for f in shards[1]] == [f"{path}:{n}" for n in (2, 4)]


def test_a_line_of_the_longest_length_without_an_end_is_a_record(tmp_path: Path) -> None:
    line = json.dumps({"text": "a"})
    (tmp_path / "a.jsonl").write_text(line)
    for limit, kind in ((len(line), Record), (len(line) - 1, Reject)):
        assert [type(f) for f in read_records([str(tmp_path / "a.jsonl")], max_bytes=limit)] == [kind]


def test_one_bad_value_of_parquet_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe bad", b"fine"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    first, second, third = read_records([str(tmp_path / "a.parquet")])
    assert isinstance(first, Record) and isinstance(third, Record)
    assert isinstance(second, Reject) and second.kind == "invalid UTF-8" and second.where.endswith(":2")


def test_an_array_of_records_is_told_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"text": "a"},\n')
    (tmp_path / "b.json").write_text('[{"text": "a"}]')
    for name in "ab":
        first, *_ = read_records([str(tmp_path / f"{name}.json")])
        assert isinstance(first, Reject) and "one object" in first.reason


def test_a_glob_descends_into_the_folders_it_matches_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    lines(tmp_path / "in" / "deep" / "a.jsonl", {"text": "a"})
    assert len(input_files(str(tmp_path / "i*"))) == len(input_files(str(tmp_path / "**"))) == 1


def test_names_that_are_too_long_are_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        input_files(str(tmp_path / ("x" * 300)))
    assert input_files("x" * 300) == []


def test_a_data_set_that_breaks_off_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "a"}
        raise ConnectionError("gone\nfor good")

    monkeypatch.setattr(sources, "open_dataset", lambda source: rows())
    with pytest.raises(UserError, match=r"some-name: cannot read on: gone$"):
        list(read_records(["some-name"]))


def test_a_span_store_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is met with: below a folder, matched by a glob as a folder, or its files one by one."""
    record = lines(tmp_path / "data" / "a.jsonl", {"text": "a"})
    deep = lines(tmp_path / "data" / "more" / "store.json", {"text": "records, whatever their file's name is"})
    store = tmp_path / "data" / "spans"
    for name in ("part-00000-of-00001.json", "log/inputs.json"):
        lines(store / name, {"rows": 1})
    (store / "store.json").write_text('{\n "schema_version": 1,\n "num_shards": 1}\n')
    data = str(tmp_path / "data")
    monkeypatch.setenv("HOME", data)
    for source in (data, f"{data}/", "~", f"{data}/*", f"{data}/**", f"{data}/**/*.json*", "~/*", "~/**/*"):
        assert list(map(str, input_files(source))) == [record, deep], source
    with pytest.raises(UserError, match="no record file there"):
        input_files(f"{data}/s*/*.json")
    for source in (str(store), f"{store}/*", "~/spans", f"{store}/log/../*"):
        with pytest.raises(UserError, match=r"spans.* is a span store, whose files are no records"):
            input_files(source)


def test_a_saved_data_set_does_not_count_the_store_in_it(tmp_path: Path) -> None:
    info = lines(tmp_path / "saved" / "dataset_info.json", {})
    lines(tmp_path / "saved" / "spans" / "store.json", {"schema_version": 1})
    assert list(map(str, sources.local_files(str(tmp_path / "saved")))) == [info]
