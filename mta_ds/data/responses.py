"""Records with generated responses: one response in the place of a record's own, or a preference between two.

Rows keep whatever else they hold, and their ``id``, so that the same record is known again whoever answers it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mta_ds.errors import UserError
from mta_ds.files import atomic_path, write_atomic
from mta_ds.spans.records import HALVES, RESPONSES, Record, Reject, parse_row, read_records, read_rows

logger = logging.getLogger(__name__)

_RESPONSE_KEYS = frozenset((*RESPONSES, *HALVES, "ended"))
_NAMED = 5  # ids that a log line gives of those that are missing


class PairCounts(NamedTuple):
    """What a join of chosen and rejected responses found."""

    pairs: int
    without_chosen: tuple[str, ...]
    """Ids of the records that have a rejected response only."""
    without_rejected: tuple[str, ...]


class _Answer(NamedTuple):
    prompt: dict[str, str]
    text: str
    ended: bool


def answered(row: Mapping[str, Any], record_id: str, text: str, ended: bool) -> dict[str, Any]:
    """A record's row with ``text`` as its response, under the name that it had.

    Args:
        ended: whether the text came to its end, with EOS; one that a length limit cut off trains without EOS.
    """
    prompt = _prompt_of(row, record_id)
    if "messages" in row:
        prompt["messages"] = [*prompt["messages"], {"role": "assistant", "content": text}]
    elif "instruction" in row:
        prompt["output"] = text
    else:
        prompt[next((name for name in RESPONSES if name in row), "response")] = text
    return prompt | {"ended": ended}


def paired(
    row: Mapping[str, Any], record_id: str, chosen: tuple[str, bool], rejected: tuple[str, bool]
) -> dict[str, Any]:
    """A preference record with the prompt of ``row`` and two responses, each a text and whether it ended."""
    both = dict(zip(HALVES, (chosen, rejected), strict=True))
    texts = {half: text for half, (text, _) in both.items()}
    return _prompt_of(row, record_id) | texts | {"ended": {half: ended for half, (_, ended) in both.items()}}


def to_line(row: Mapping[str, Any]) -> bytes:
    """A row as one line of JSON; what JSON has no type for (a date in a Parquet file) becomes text."""
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    return line.encode("utf-8", "backslashreplace")  # a lone surrogate becomes the JSON escape that it is


def write_pairs(chosen: Sequence[str], rejected: Sequence[str], output: Path) -> PairCounts:
    """Join two sets of answered records by id and write the preference records to ``output`` (JSON lines).

    Records that only one side has an answer to are left out: their ids are in a JSON file beside ``output``.

    Args:
        chosen, rejected: files, folders, globs or data sets, as of :func:`read_records`.

    Raises:
        UserError: a bad row, a record whose prompt is not the same on both sides, or no record in common.
    """
    answers = _answers(chosen)
    found: dict[str, bool] = {}  # id -> joined, of the rejected side
    with atomic_path(output) as temporary, open(temporary, "wb") as file:
        for where, row in read_rows(rejected):
            record = _record(parse_row(row, where))
            theirs, ours = answers.get(record.id), _answer(record)
            if ours is None or record.id in found:
                continue
            found[record.id] = theirs is not None
            if theirs is None:
                continue
            if theirs.prompt != ours.prompt:
                raise UserError(f"{where}: record {record.id} has another prompt in {', '.join(chosen)}")
            file.write(to_line(paired(row, record.id, theirs[1:], ours[1:])))
        without_chosen = tuple(record_id for record_id, joined in found.items() if not joined)
        counts = PairCounts(
            len(found) - len(without_chosen),
            without_chosen,
            tuple(record_id for record_id in answers if record_id not in found),
        )
        if not counts.pairs:
            sides = f"{', '.join(chosen)} and {', '.join(rejected)}"
            raise UserError(f"{sides} have no record in common; records are joined by id")
    _tell_missing("chosen", counts.without_chosen, chosen)
    _tell_missing("rejected", counts.without_rejected, rejected)
    summary = {"chosen": list(chosen), "rejected": list(rejected)} | counts._asdict()
    write_atomic(output.with_suffix(".json"), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return counts


def _answers(inputs: Sequence[str]) -> dict[str, _Answer]:
    """The answered records by id; of records with one id the first."""
    answers: dict[str, _Answer] = {}
    for found in read_records(inputs):
        record = _record(found)
        if (answer := _answer(record)) is not None:
            answers.setdefault(record.id, answer)
    return answers


def _record(found: Record | Reject) -> Record:
    if isinstance(found, Reject):
        raise UserError(f"{found.where}: {found.reason}; mend or remove the row")
    return found


def _answer(record: Record) -> _Answer | None:
    """What a record is asked and answers, in the words of its fields; None if it has no response, or a blank one."""
    if not record.references or not record.references[0].strip():
        return None
    fields = dict(record.fields)
    if record.format == "messages":
        del fields[next(reversed(fields))]
    prompt = {name: text for name, text in fields.items() if name not in _RESPONSE_KEYS}
    response = next((half for half in HALVES if half in fields), next(reversed(record.fields)))
    return _Answer(prompt, record.references[0], response not in record.unfinished)


def _prompt_of(row: Mapping[str, Any], record_id: str) -> dict[str, Any]:
    """A row without its responses; of messages those that have text."""
    prompt = {"id": record_id} | {name: value for name, value in row.items() if name not in _RESPONSE_KEYS}
    prompt["id"] = record_id  # a number, in some rows
    if "messages" in row:
        turns = [turn for turn in row["messages"] if turn["content"]]
        prompt["messages"] = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return prompt


def _tell_missing(half: str, ids: Sequence[str], inputs: Sequence[str]) -> None:
    if ids:
        named = ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")
        logger.warning("%d records left out without a %s response in %s: %s", len(ids), half, ", ".join(inputs), named)
