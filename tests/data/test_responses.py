"""Rows with other responses: what is kept, what is replaced, and what can be joined."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from mta_ds.data import answered, paired, parse_row, to_line, write_pairs
from mta_ds.errors import UserError

USER, OLD = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Old."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p"}, {"prompt": "p", "response": "new"}),
        ({"prompt": "p", "output": "old", "k": 1}, {"prompt": "p", "output": "new", "k": 1}),
        ({"instruction": "i", "input": "n", "output": ["a", "b"]}, {"instruction": "i", "input": "n", "output": "new"}),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "response": "new"}),
        ({"messages": [USER, OLD]}, {"messages": [USER, {"role": "assistant", "content": "new"}]}),
        ({"messages": [USER], "chosen": "c", "rejected": "r"}, {"messages": [USER, OLD | {"content": "new"}]}),
        ({"id": 3, "prompt": "p", "ended": False}, {"prompt": "p", "response": "new"}),
    ],
)
def test_an_answered_row_has_the_response_in_the_place_of_its_own(row: dict, expected: dict) -> None:
    before = json.dumps(row)
    made = answered(row, "r", "new", True)
    assert made == expected | {"id": "r", "ended": True} and json.dumps(row) == before
    record, cut = parse_row(made, "x:1"), parse_row(answered(row, "r", "new", False), "x:1")
    assert record.references == cut.references == ("new",) and record.id == "r"
    assert not record.unfinished and len(cut.unfinished) == 1


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "x"}, {"instruction": "i"}, {"messages": [USER, OLD]}])
def test_a_paired_row_has_two(row: dict) -> None:
    record = parse_row(paired(row, "r", ("good", True), ("bad", False)), "x:1")
    assert (record.id, record.format, record.unfinished) == ("r", "preference", {"rejected"})
    assert [*record.fields.values()][-2:] == ["good", "bad"] and len(record.fields) == 3


def test_a_line_is_json_whatever_the_row_holds() -> None:
    row = {"id": "r", "day": datetime.date(2024, 2, 29), "odd": "a\ud800b", "text": "naïve\n"}
    line = to_line(row)
    assert line.count(b"\n") == 1 and "naïve".encode() in line
    assert json.loads(line) == row | {"day": "2024-02-29"}


def write(path: Path, *rows: dict) -> list[str]:
    path.write_bytes(b"".join(map(to_line, rows)))
    return [str(path)]


def test_only_answers_to_one_question_are_joined(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours.jsonl", {"id": "a", "prompt": "p", "response": "bad"})
    other = write(tmp_path / "other.jsonl", {"id": "a", "prompt": "q", "response": "good"})
    with pytest.raises(UserError, match=r"ours\.jsonl:1: record a has another prompt in .*other\.jsonl"):
        write_pairs(other, ours, tmp_path / "pairs.jsonl")
    stranger = write(tmp_path / "stranger.jsonl", {"id": "b", "prompt": "p", "response": "good"})
    with pytest.raises(UserError, match=r"have no record in common; records are joined by id"):
        write_pairs(stranger, ours, tmp_path / "pairs.jsonl")
    broken = write(tmp_path / "broken.jsonl", {"id": "a"})
    with pytest.raises(UserError, match=r"broken\.jsonl:1: missing field"):
        write_pairs(broken, ours, tmp_path / "pairs.jsonl")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("pairs", ".pairs"))]


def test_a_record_without_an_answer_or_repeated_joins_once(tmp_path: Path) -> None:
    good = {"id": "a", "prompt": "p", "response": "good"}
    chosen = write(tmp_path / "chosen.jsonl", good, good, {"id": "b", "prompt": "p", "response": "good"})
    bad = {"id": "a", "prompt": "p", "response": "bad"}
    rejected = write(tmp_path / "rejected.jsonl", bad, bad, {"id": "b", "prompt": "p"})
    counts = write_pairs(chosen, rejected, tmp_path / "pairs.jsonl")
    assert counts == (1, (), ("b",))
    (line,) = (tmp_path / "pairs.jsonl").read_bytes().splitlines()
    ended = {"chosen": True, "rejected": True}
    assert json.loads(line) == {"id": "a", "prompt": "p", "chosen": "good", "rejected": "bad", "ended": ended}
