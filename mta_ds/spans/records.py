"""Read text records of every format in use, streamed, each with a stable id; bad rows are rejects with a reason.

Formats, told by their keys: ``{instruction, input, output}``, ``{prompt, response | output | completion}``,
``{messages: [{role, content}, ...]}``, ``{text}``; and preferences, any of the first three with ``chosen`` and
``rejected`` in place of the response. Sources: JSON lines (also .gz and .zst), Parquet, folders and globs of these, a
folder that ``datasets`` saved, or a ``datasets`` name.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mta_ds.errors import UserError
from mta_ds.files import belongs_to_shard

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
GENERATION = "generation.json"
"""In a folder that ``mta-ds generate`` writes to: what its texts are made of. Only its parts are records."""
_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_SUFFIXES = (*_LINES, ".parquet")


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


class _BadRow(ValueError):
    """Why a row is no record."""


def read_records(inputs: Sequence[str], *, num_shards: int = 1, shard_index: int = 0) -> Iterator[Record | Reject]:
    """Stream the records of ``inputs`` that belong to a shard, round robin by position in the whole input.

    Raises:
        UserError: an input that is no file, folder, glob or data set, or a folder that is still being generated.
    """
    for where, row in read_rows(inputs, num_shards=num_shards, shard_index=shard_index):
        yield parse_row(row, where)


def read_rows(inputs: Sequence[str], *, num_shards: int = 1, shard_index: int = 0) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row that :func:`read_records` makes a record of, for :func:`parse_row`."""
    ordinal = count()
    for source in inputs:
        for where, row in _rows(source):
            if belongs_to_shard(next(ordinal), num_shards, shard_index):
                yield where, _decode(row) if isinstance(row, bytes) else row


def text_hash(text: str) -> bytes:
    """16 bytes that tell one text from another."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def content_id(fields: Mapping[str, str], roles: Sequence[str]) -> str:
    """The id of a record that brings none: a hash of everything that it says."""
    content = json.dumps([list(fields.items()), list(roles)], ensure_ascii=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def input_files(source: str) -> list[Path]:
    """The record files that a path, folder or glob names, sorted; empty for what may be a ``datasets`` name.

    Raises:
        UserError: a path that is not there, a glob or folder without record files, or one that is still being
            generated.
    """
    path = Path(source).expanduser()
    if _saved_dataset(source) is not None:
        return []
    if path.is_file():
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"{source}: not a record file; want one of {', '.join(_SUFFIXES)}")
        return [path]
    if path.is_dir():
        files = _only_records(p for p in path.rglob("*") if p.is_file())
    elif glob.has_magic(source):
        files = _only_records(map(Path, glob.glob(source, recursive=True)))
    else:
        if _looks_like_a_path(source):
            raise UserError(f"{source}: no such file{_nearest(path)}")
        return []
    if not files:
        raise UserError(f"{source}: no record file there; want {', '.join(_SUFFIXES)}")
    return files


def local_files(source: str) -> list[Path]:
    """All files that one input is read from, those of a folder that ``datasets`` saved too; empty for the name of a
    data set. Raises as :func:`input_files`.
    """
    folder = _saved_dataset(source)
    return input_files(source) if folder is None else sorted(path for path in folder.rglob("*") if path.is_file())


def _only_records(files: Iterable[Path]) -> list[Path]:
    """Files with a name that records have, sorted; of a folder of generated records its parts alone."""
    found = []
    for file in sorted(files):
        if file.name.endswith(_SUFFIXES) and (file.parent / GENERATION).is_file():
            if not (file.parent / "manifest.json").is_file():
                raise UserError(
                    f"{file.parent}: parts are missing; run 'mta-ds generate' again, which makes only these"
                )
            if not file.match("part-*.jsonl"):
                continue
        if file.name.endswith(_SUFFIXES):
            found.append(file)
    return found


def may_follow(field: str, later: str) -> bool:
    """Whether ``later`` can come after ``field`` in the reading order of one record."""
    if field.startswith("messages."):
        if not later.startswith("messages."):
            return later in HALVES
        return int(field.removeprefix("messages.")) < int(later.removeprefix("messages."))
    return any(field in order and later in order[order.index(field) + 1 :] for order in _ORDERS)


def parse_row(row: Any, where: str) -> Record | Reject:
    """One row (decoded JSON, or the reason it could not be decoded) as a record or a reject."""
    if isinstance(row, _BadRow):
        return Reject(where, str(row), None)
    given: str | None = None
    try:
        if not isinstance(row, dict):
            raise _BadRow(f"not a JSON object but {type(row).__name__}")
        given = _given_id(row)
        kind, fields, roles, references = _content(row)
    except _BadRow as error:
        return Reject(where, str(error), given)
    kept = {name: text for name, text in fields.items() if text}
    if not any(text.strip() for text in kept.values()):
        return Reject(where, "no text", given)
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
    keys = ", ".join(sorted(map(str, row))) or "none"
    raise _BadRow(f"missing field: want text, messages, prompt or instruction, found {keys}")


def _is_preference(row: dict[str, Any]) -> bool:
    # beside messages, other data sets have whole conversations under these names
    return any(isinstance(row.get(half), str) if "messages" in row else half in row for half in HALVES)


def _preference_prompt(row: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The fields before chosen and rejected, and the roles of those that are messages."""
    if "messages" in row:
        _, fields, roles, _ = _messages(row["messages"])
        if roles[-1] == "assistant":
            raise _BadRow("messages: the last is the assistant's, so that chosen and rejected answer nothing")
        return fields, roles
    return (_instruction(row) if "instruction" in row else {"prompt": _text(row, "prompt")}), ()


def _instruction(row: dict[str, Any]) -> dict[str, str]:
    return {"instruction": _text(row, "instruction"), "input": _text(row, "input", optional=True)}


def _messages(messages: Any) -> tuple[Format, dict[str, str], tuple[str, ...], tuple[str, ...]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise _BadRow("messages: want a non-empty list")
    fields, roles = {}, []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _BadRow(f"messages[{i}]: want an object with role and content")
        fields[f"messages.{i}"] = _text(message, "content")
        roles.append(_clean(message["role"], "role"))
    last = fields[f"messages.{len(roles) - 1}"]
    return "messages", fields, tuple(roles), (last,) if roles[-1] == "assistant" and last else ()


def _responses(row: dict[str, Any], name: str) -> tuple[str, ...]:
    """One response, or (in evaluation files) a list of acceptable ones."""
    value = row.get(name)
    if isinstance(value, list | tuple):
        if not all(isinstance(item, str) for item in value):
            raise _BadRow(f"{name}: want a string or a list of strings")
        return tuple(_clean(item, name) for item in value if item)
    text = _text(row, name, optional=True)
    return (text,) if text else ()


def _text(row: dict[str, Any], name: str, optional: bool = False) -> str:
    value = row.get(name)
    if value is None and (optional or name in row):
        return ""
    if value is None:
        raise _BadRow(f"missing field: {name}")
    if not isinstance(value, str):
        raise _BadRow(f"{name}: want a string, got {type(value).__name__}")
    return _clean(value, name)


def _clean(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadRow(f"{name}: invalid Unicode (a lone surrogate)") from None
    return text


def _given_id(row: dict[str, Any]) -> str | None:
    value = row.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise _BadRow(f"id: want a string or a whole number, got {value!r:.40}")
    return _clean(str(value), "id")


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of one input, in a fixed order; a line comes undecoded, as another shard may have to decode it."""
    files = input_files(source)
    if not files:
        yield from _dataset_rows(source)
    for path in files:
        yield from _parquet_rows(path) if path.suffix == ".parquet" else _line_rows(path)


def _line_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise UserError(f"{path}: cannot read: {' '.join(str(error).split())}") from None


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _BadRow(f"invalid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return _BadRow(f"bad JSON: {error}")


def _open(path: Path) -> io.BufferedReader:
    """Arrow's streams read on over members and frames, and raise where a file is cut off (zstandard's do not)."""
    return io.BufferedReader(pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = count(1)
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield f"{path}:{next(number)}", row
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read Parquet: {' '.join(str(error).split())}") from None


def _dataset_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Rows of a saved ``datasets`` folder or of a named data set; "name:split" chooses a split, else train."""
    import datasets

    name, _, split = source.partition(":")
    folder = _saved_dataset(source)
    try:
        if folder is not None:
            split = source.removeprefix(str(folder)).lstrip(":")
            loaded = datasets.load_from_disk(str(folder))
            rows = loaded[split or "train"] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises its own, the hub's and the file system's errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        near = _nearest(Path(source))
        raise UserError(f"{source}: no such file, folder or data set ({reason}){near}") from None
    for number, row in enumerate(rows, 1):
        yield f"{source}:{number}", dict(row)


def _saved_dataset(source: str) -> Path | None:
    """The folder, if ``source`` is one that ``datasets`` saved, with or without ":split"."""
    for name in (source, source.rpartition(":")[0]):
        folder = Path(name).expanduser()
        if name and any((folder / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            return folder
    return None


def _looks_like_a_path(source: str) -> bool:
    """Whether ``source`` cannot be meant as the name of a data set ("name" or "owner/name")."""
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return "/" in source and Path(source).parent.is_dir()


def _nearest(path: Path) -> str:
    """ ", did you mean ...?" if the folder holds a name like the missing one."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""
