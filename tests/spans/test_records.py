from __future__ import annotations

from typing import Any

import pytest

from mta_ds.spans.records import Record, Reject, may_follow, parse_row


def record(row: Any) -> Record:
    found = parse_row(row, "x:1")
    assert isinstance(found, Record), found
    return found


def reject(row: Any) -> Reject:
    found = parse_row(row, "x:1")
    assert isinstance(found, Reject), found
    return found


@pytest.mark.parametrize(
    ("row", "kind", "fields", "references"),
    [
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "instruction",
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            ("3",),
        ),
        (
            {"instruction": "Go", "output": ["a", "b"]},
            "instruction",
            {"instruction": "Go", "output": "a"},
            ("a", "b"),
        ),
        ({"instruction": "Go", "input": None}, "instruction", {"instruction": "Go"}, ()),
        ({"prompt": "p", "completion": "c"}, "prompt", {"prompt": "p", "response": "c"}, ("c",)),
        ({"prompt": "p", "output": "c"}, "prompt", {"prompt": "p", "response": "c"}, ("c",)),
        ({"prompt": "p", "response": "c"}, "prompt", {"prompt": "p", "response": "c"}, ("c",)),
        (
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            "preference",
            {"prompt": "p", "chosen": "c", "rejected": "r"},
            ("c",),
        ),
        ({"text": "t"}, "text", {"text": "t"}, ()),
    ],
)
def test_formats(row: Any, kind: str, fields: dict[str, str], references: tuple[str, ...]) -> None:
    found = record(row)
    assert (found.format, found.fields, found.references) == (kind, fields, references)
    assert list(found.fields) == list(fields)  # reading order


def test_messages_keep_roles_beside_fields_that_have_text() -> None:
    turns = [("system", ""), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao")]
    found = record({"messages": [{"role": role, "content": content} for role, content in turns]})
    assert found.fields == {"messages.1": "hi", "messages.2": "hello", "messages.3": "bye", "messages.4": "ciao"}
    assert found.roles == ("user", "assistant", "user", "assistant")
    assert found.references == ("ciao",)


def test_id_is_given_or_of_the_content() -> None:
    assert record({"id": 7, "text": "a"}).id == "7"
    assert record({"id": "q", "text": "a"}).id == "q"
    ids = {record(row).id for row in ({"text": "a"}, {"text": "b"}, {"prompt": "a"}, {"prompt": "a", "output": "b"})}
    assert len(ids) == 4
    assert record({"text": "a", "other": 1}).id == record({"text": "a"}).id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "not a JSON object"),
        (None, "not a JSON object"),
        ({}, "missing field"),
        ({"id": "a", "question": "?"}, "found id, question"),
        ({"text": ""}, "no text"),
        ({"text": " \n"}, "no text"),
        ({"text": None}, "no text"),
        ({"text": 3}, "text: want a string, got int"),
        ({"prompt": "a", "chosen": "b"}, "missing field: rejected"),
        ({"prompt": "a", "response": ["b", 1]}, "response: want a string or a list of strings"),
        ({"messages": []}, "messages: want a non-empty list"),
        ({"messages": [{"content": "a"}]}, "messages[0]: want an object with role and content"),
        ({"messages": [{"role": "user"}]}, "missing field: messages[0].content"),
        ({"id": 1.5, "text": "a"}, "id: want a string or a whole number"),
        ({"id": "\ud800", "text": "a"}, "id: invalid Unicode"),
        ({"text": "a\udfffb"}, "text: invalid Unicode"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, "role: invalid Unicode"),
    ],
)
def test_reject_says_why(row: Any, reason: str) -> None:
    assert reason in reject(row).reason


@pytest.mark.parametrize(
    ("prompt", "fields", "roles"),
    [
        ({"prompt": "p"}, {"prompt": "p"}, ()),
        ({"instruction": "i", "input": "n", "output": "old"}, {"instruction": "i", "input": "n"}, ()),
        ({"instruction": "i", "input": ""}, {"instruction": "i"}, ()),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "u"}]},
            {"messages.1": "u"},
            ("user",),
        ),
    ],
)
def test_a_preference_has_any_prompt(prompt: Any, fields: dict[str, str], roles: tuple[str, ...]) -> None:
    found = record(prompt | {"chosen": "c", "rejected": "r"})
    assert (found.format, found.references, found.roles) == ("preference", ("c",), roles)
    assert list(found.fields.items()) == [*fields.items(), ("chosen", "c"), ("rejected", "r")]  # reading order
    for i, field in enumerate(found.fields):
        assert all(may_follow(field, later) for later in [*found.fields][i + 1 :])
    assert record(prompt | {"chosen": "c", "rejected": ""}).fields == fields | {"chosen": "c"}
    assert record(prompt | {"chosen": None, "rejected": "r"}).references == ()


def test_what_is_no_preference() -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert record({"messages": turns, "chosen": turns, "rejected": turns}).format == "messages"
    assert "missing field: rejected" in reject({"messages": turns[:1], "chosen": "c"}).reason
    assert "missing field: chosen" in reject({"instruction": "i", "rejected": "r"}).reason
    assert "the last is the assistant's" in reject({"messages": turns, "chosen": "c", "rejected": "r"}).reason
    assert "missing field: prompt" in reject({"chosen": "c", "rejected": "r"}).reason


def test_responses_that_a_limit_cut_off_are_told() -> None:
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert record({"prompt": "p", "response": "r", "ended": False}).unfinished == {"response"}
    assert record({"instruction": "p", "output": "r", "ended": False}).unfinished == {"output"}
    assert record({"messages": turns, "ended": False}).unfinished == {"messages.1"}
    assert not record({"prompt": "p", "response": "r", "ended": True}).unfinished
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert record(pair | {"ended": {"chosen": True, "rejected": False}}).unfinished == {"rejected"}
    assert record(pair | {"ended": False}).unfinished == {"chosen", "rejected"}
    assert not record(pair).unfinished and record(pair).id == record(pair | {"ended": False}).id


def test_reasons_of_one_kind_have_one_name() -> None:
    content = [{"role": "user", "content": "u"}, {"role": "assistant", "content": 3}]
    assert reject({"messages": content})[1:] == ("messages[1].content: want a string, got int", None, "wrong type")
    assert reject({"text": 3}).kind == "wrong type" and reject({"x": 3}).kind == "missing field"
    many = reject({f"key {i}" + "y" * 100: 1 for i in range(100)}).reason
    assert len(many) < 500 and many.endswith(", ...")
