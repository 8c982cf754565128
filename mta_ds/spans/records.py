"""Text records of every format in use, each with a stable id; bad rows are rejects with a reason.

Formats, told by their keys: ``{instruction, input, output}``, ``{prompt, response | output | completion}``,
``{messages: [{role, content}, ...]}``, ``{text}``; and preferences, any of the first three with ``chosen`` and
``rejected`` in place of the response. sources.py says where rows come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from mta_ds.spans.sources import GENERATION, BadRow, input_files, local_files, read_rows

__all__ = [
    "GENERATION",
    "HALVES",
    "RESPONSES",
    "Format",
    "Record",
    "Reject",
    "content_id",
    "input_files",
    "local_files",
    "may_follow",
    "parse_row",
    "read_records",
    "read_rows",
    "text_hash",
]

Format = Literal["instruction", "prompt", "messages", "preference", "text"]

HALVES = ("chosen", "rejected")
"""The two responses of a preference record."""

_ORDERS = (
    ("instruction", "input", "output"),
    ("instruction", "input", *HALVES),
    ("prompt", "response"),
    ("prompt", *HALVES),
)
RESPONSES = ("response", "output", "completion")
"""Names that the response of a prompt may have."""
_KEYS_TOLD = 8


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its non-empty text fields by name, in reading order."""

    id: str
    """Given, else a hash of the content."""
    format: Format
    fields: dict[str, str]
    """instruction, input, output | prompt, response | messages.0, messages.1, ... | text; a preference has chosen and
    rejected after its prompt's fields."""
    roles: tuple[str, ...]
    """Of ``messages``: one a field (none for chosen and rejected); else empty."""
    references: tuple[str, ...]
    """Acceptable responses, the first is the one that is trained on; empty where there is none."""
    where: str
    """"file.jsonl:12", for error messages."""
    unfinished: frozenset[str] = frozenset()
    """Fields with a response that a length limit cut off (``"ended": false`` in the row): no EOS follows them."""


class Reject(NamedTuple):
    """A row that is no record."""

    where: str
    reason: str
    record_id: str | None
    kind: str = ""
    """The same for all rows with a reason of this kind, to count them by; where empty the reason itself is."""


def read_records(
    inputs: Sequence[str], *, num_shards: int = 1, shard_index: int = 0, max_bytes: int | None = None
) -> Iterator[Record | Reject]:
    """Stream the records of ``inputs`` that belong to a shard, round robin by position in the whole input.

    Args:
        max_bytes: a longer record is rejected, and never held whole where it is a line; None: of any length.

    Raises:
        UserError: an input that is no file, folder, glob or data set, or a folder that is still being generated.
    """
    rows = read_rows(inputs, num_shards=num_shards, shard_index=shard_index, max_bytes=max_bytes)
    for where, row in rows:
        yield parse_row(row, where)


def text_hash(text: str) -> bytes:
    """16 bytes that tell one text from another."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_id(fields: Mapping[str, str], roles: Sequence[str]) -> str:
    """The id of a record that brings none: a hash of everything that it says."""
    content = json.dumps([list(fields.items()), list(roles)], ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def may_follow(field: str, later: str) -> bool:
    """Whether ``later`` can come after ``field`` in the reading order of one record."""
    if field.startswith("messages."):
        if not later.startswith("messages."):
            return later in HALVES
        return int(field.removeprefix("messages.")) < int(later.removeprefix("messages."))
    return any(field in order and later in order[order.index(field) + 1 :] for order in _ORDERS)


def parse_row(row: Any, where: str) -> Record | Reject:
    """One row (decoded JSON, or the reason it could not be decoded) as a record or a reject."""
    if isinstance(row, BadRow):
        return Reject(where, str(row), None, row.kind)
    given: str | None = None
    try:
        if not isinstance(row, dict):
            raise BadRow(
                "not a JSON object", f"not a JSON object but {type(row).__name__}; want JSON lines, one object each"
            )
        given = _given_id(row)
        kind, fields, roles, references = _content(row)
    except BadRow as error:
        return Reject(where, str(error), given, error.kind)
    kept = {name: text for name, text in fields.items() if text}
    if not any(text.strip() for text in kept.values()):
        return Reject(where, "no text", given, "no text")
    # the roles are those of the first fields: a preference has its two responses behind them
    kept_roles = tuple(role for role, text in zip(roles, fields.values(), strict=False) if text)
    record_id = given or content_id(kept, kept_roles)
    return Record(record_id, kind, kept, kept_roles, references, where, _unfinished(row, kind, kept))


def _unfinished(row: dict[str, Any], kind: Format, fields: dict[str, str]) -> frozenset[str]:
    """The responses that ``ended`` says were cut off: false or, for a preference, {"chosen": false, ...}."""
    ended = row.get("ended")
    if kind == "preference":
        by_half = ended if isinstance(ended, dict) else dict.fromkeys(HALVES, ended)
        return frozenset(half for half in HALVES if by_half.get(half) is False)
    return frozenset([next(reversed(fields))]) if ended is False else frozenset()


def _content(row: dict[str, Any]) -> tuple[Format, dict[str, str], tuple[str, ...], tuple[str, ...]]:
    if _is_preference(row):
        fields, roles = _preference_prompt(row)
        fields |= {half: _text(row, half) for half in HALVES}
        return "preference", fields, roles, (fields["chosen"],) if fields["chosen"] else ()
    if "messages" in row:
        return _messages(row["messages"])
    if "instruction" in row:
        references = _responses(row, "output")
        return "instruction", _instruction(row) | {"output": references[0] if references else ""}, (), references
    if "prompt" in row:
        name = next((n for n in RESPONSES if n in row), "response")
        references = _responses(row, name)
        return (
            "prompt",
            {"prompt": _text(row, "prompt"), "response": references[0] if references else ""},
            (),
            references,
        )
    if "text" in row:
        return "text", {"text": _text(row, "text")}, (), ()
    raise BadRow("missing field", f"missing field: want text, messages, prompt or instruction, found {_listed(row)}")


def _listed(row: dict[str, Any]) -> str:
    """The row's keys, of which a stranger's file may have any number of any length."""
    keys = sorted(f"{key!s:.40}" for key in row)
    return (", ".join(keys[:_KEYS_TOLD]) or "none") + (", ..." if len(keys) > _KEYS_TOLD else "")


def _is_preference(row: dict[str, Any]) -> bool:
    # beside messages, other data sets have whole conversations under these names
    return any(isinstance(row.get(half), str) if "messages" in row else half in row for half in HALVES)


def _preference_prompt(row: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The fields before chosen and rejected, and the roles of those that are messages."""
    if "messages" in row:
        _, fields, roles, _ = _messages(row["messages"])
        if roles[-1] == "assistant":
            raise BadRow(
                "no turn to answer", "messages: the last is the assistant's, so that chosen and rejected answer nothing"
            )
        return fields, roles
    return (_instruction(row) if "instruction" in row else {"prompt": _text(row, "prompt")}), ()


def _instruction(row: dict[str, Any]) -> dict[str, str]:
    return {"instruction": _text(row, "instruction"), "input": _text(row, "input", optional=True)}


def _messages(messages: Any) -> tuple[Format, dict[str, str], tuple[str, ...], tuple[str, ...]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow("wrong type", "messages: want a non-empty list")
    fields, roles = {}, []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow("wrong type", f"messages[{i}]: want an object with role and content")
        fields[f"messages.{i}"] = _text(message, "content", of=f"messages[{i}].")
        roles.append(_clean(message["role"], f"messages[{i}].role"))
    last = fields[f"messages.{len(roles) - 1}"]
    return "messages", fields, tuple(roles), (last,) if roles[-1] == "assistant" and last else ()


def _responses(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """One response, or (in evaluation files) a list of acceptable ones."""
    value = row.get(name)
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise BadRow("wrong type", f"{name}: want a string or a list of strings")
        return tuple(_clean(item, name) for item in value if item)
    text = _text(row, name, optional=True)
    return (text,) if text else ()


def _text(row: dict[str, Any], name: str, optional: bool = False, of: str = "") -> str:
    """The string under ``name``; ``of`` says in messages what the row is a part of."""
    value = row.get(name)
    if value is None and (optional or name in row):
        return ""
    if value is None:
        raise BadRow("missing field", f"missing field: {of}{name}")
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{of}{name}: want a string, got {type(value).__name__}")
    return _clean(value, f"{of}{name}")


def _clean(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode", f"{name}: invalid Unicode (a lone surrogate)") from None
    return text


def _given_id(row: dict[str, Any]) -> str | None:
    value = row.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow("wrong type", f"id: want a string or a whole number, got {value!r:.40}")
    return _clean(str(value), "id")
