"""Where inputs stood and how fast records went: what a store's folder ``log`` says, and what it does not touch."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from mta_ds.spans import log as module
from mta_ds.spans.log import Pace, Progress, read_inputs, read_paces, write_inputs
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.spans.records import Record, Reject
from mta_ds.spans.rows import Parsed


def record(number: int, num_fields: int) -> Record:
    return Record(f"r{number}", "prompt", {f"f{i}": "x" for i in range(num_fields)}, (), (), "a.jsonl:1")


def results(*num_rows: int) -> list[Parsed]:
    return [Parsed(pa.table({"record_id": ["x"] * n}), {}) for n in num_rows]


def test_a_record_is_done_with_its_last_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(1000.0, 1e-4)  # a machine on which nothing takes a millisecond
    monkeypatch.setattr(module.time, "monotonic", lambda: next(seconds))
    progress = Progress(tmp_path, 0, 1)
    rows = [record(0, 2), Reject("a:2", "no text", None), record(1, 3), record(2, 1), Reject("a:5", "no text", None)]
    assert list(progress.read(rows)) == rows
    counts = [progress._done for _ in progress.done(results(1, 1, 2, 2))]
    assert counts == [0, 2, 2, 5]
    progress.write()
    (pace,) = read_paces(tmp_path, 1)
    assert (pace.records[0], pace.records[-1]) == (0, 5)
    progress.close()
    assert "parse shard 1/1: 5 records" in capsys.readouterr().err


def test_a_long_shard_keeps_few_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    progress = Progress(tmp_path, 2, 3)
    rows = [record(i, 1) for i in range(5000)]
    for _ in zip(progress.read(rows), progress.done(results(*[1] * 5000)), strict=False):
        seconds[0] += 1.0
    progress.write()
    (pace,) = read_paces(tmp_path, 3)
    assert pace.shard == 2 and 100 < len(pace.times) <= module._MAX_SAMPLES + 1
    assert pace.times == sorted(set(pace.times)) and pace.records == sorted(pace.records)
    assert pace.records[-1] == 5000 and pace.mean == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("content", ["", "{}", "nonsense", '{"time": 1, "records": 0}', '{"time": 1}\n[]'])
def test_a_damaged_log_is_no_error(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "part-00000-of-00001.jsonl").write_text(content)
    (folder / "inputs.json").write_text(content)
    assert read_paces(tmp_path, 1) == [] and read_inputs(tmp_path) == []


def test_a_pace_that_lasted_no_time_has_a_mean() -> None:
    assert Pace(0, [1.0, 1.0], [0, 0]).mean == 0


def test_inputs_are_known_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    Path("data/a.jsonl").write_text('{"text": "One."}\n')
    (tmp_path / "saved").mkdir()
    Path("saved/dataset_info.json").write_text("{}")
    write_inputs(tmp_path / "store", ["data/a.jsonl", "data", "data/*.jsonl", "saved:train", "owner/name:test"])
    absolute = [os.path.join(tmp_path, name) for name in ("data/a.jsonl", "data", "data/*.jsonl", "saved:train")]
    assert read_inputs(tmp_path / "store") == [*absolute, "owner/name:test"]


def test_the_log_is_of_the_last_run_and_the_rest_of_the_store_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"id": str(i), "prompt": f"{i}?", "response": "Yes."} for i in range(9)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "bad\n")
    config = ParseConfig(
        inputs=("a.jsonl",), output=Path("s"), parser="none", num_shards=2, max_reject_share=0.5, workers=1
    )
    parse(config)
    before = {path.name: path.read_bytes() for path in Path("s").iterdir() if path.is_file()}
    assert [pace.records[-1] for pace in read_paces(Path("s"), 2)] == [5, 5]
    assert read_inputs(Path("s")) == [str(tmp_path / "a.jsonl")]
    (tmp_path / "moved").mkdir()
    Path("a.jsonl").rename("moved/a.jsonl")
    Path("s/part-00001-of-00002.parquet").unlink()
    Path("s/log/part-00001-of-00002.jsonl").unlink()
    parse(config.model_copy(update={"inputs": ("moved/a.jsonl",)}))
    assert read_inputs(Path("s")) == [str(tmp_path / "moved" / "a.jsonl")]
    assert [pace.shard for pace in read_paces(Path("s"), 2)] == [0, 1]
    after = {path.name: path.read_bytes() for path in Path("s").iterdir() if path.is_file()}
    assert after.keys() == before.keys()
    same = {name for name in before if before[name] == after[name]}
    assert before.keys() - same <= {"rejects-00001-of-00002.jsonl"}  # which tells where the bad row stands
