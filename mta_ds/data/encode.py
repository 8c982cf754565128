"""One record to one example: template, tokens, labels, and units projected onto the tokens that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from mta_ds.config import Section
from mta_ds.data.collate import GRANULARITIES, IGNORED, Example
from mta_ds.data.project import project
from mta_ds.data.template import Half, Part, Template, render
from mta_ds.data.units import Chosen, UnitConfig, choose
from mta_ds.errors import UserError
from mta_ds.spans.records import HALVES, Record
from mta_ds.spans.store import Units

Lookup = Callable[[str, str, str], Units | None]
"""(record id, field, text) -> the field's units, None if it was never parsed."""


class DataConfig(Section):
    """Records, spans and how they become token sequences."""

    train: tuple[str, ...] = ()
    """Record files, folders, globs or ``datasets`` names."""
    validation: tuple[str, ...] = ()
    spans: Path | None = None
    """Span store of the training records; may be left out with MTA off."""
    template: Template = "minillm"
    max_length: int = Field(default=512, ge=2)
    """Tokens of a sequence; the rest is cut off."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Tokens of a single-turn prompt, its first; conversations are cut at ``max_length`` only."""
    long_prompts: Literal["truncate", "drop"] = "truncate"
    """What happens to a record whose prompt is longer."""
    units: UnitConfig = UnitConfig()


class Dropped(NamedTuple):
    """Why a record gives no example."""

    reason: str


class _Tokens(NamedTuple):
    """A growing sequence."""

    ids: list[int]
    labels: list[int]
    spans: dict[str, list[np.ndarray]]


def encode(
    record: Record, config: DataConfig, tokenizer: Any, lookup: Lookup | None, half: Half = "chosen"
) -> Example | Dropped:
    """Render a record, a preference with one of its halves, and :func:`encode_parts`."""
    return encode_parts(record, render(record, config.template, tokenizer, half=half), config, tokenizer, lookup)


def encode_parts(
    record: Record, parts: Sequence[Part], config: DataConfig, tokenizer: Any, lookup: Lookup | None
) -> Example | Dropped:
    """Tokenize a rendered record, part by part, and project its units.

    Two units that cover the same tokens are one span. A unit that is not wholly within the kept tokens is dropped.

    Args:
        lookup: the span store's; None leaves the spans empty.

    Raises:
        UserError: the span store does not have the record, or has it with another text; a preference's half is empty.
    """
    if record.format == "preference":
        _insist_on_a_response(record, parts[-1])
    responses = [i for i, part in enumerate(parts) if part.is_response]
    if not responses:
        return Dropped("without a response")
    chosen = _choose(record, parts, config, lookup)
    tokens = _Tokens(*_opening(parts[0], tokenizer), {g: [] for g in GRANULARITIES})
    single_turn = len(responses) == 1 and record.format != "text"
    prompt_length = 0
    for i, part in enumerate(parts):
        limit = config.max_prompt_length if single_turn and i < responses[0] else None
        if part.is_response and i and len(tokens.ids) < config.max_length:
            prompt_length = len(tokens.ids)  # a rollout answers the last turn that there is room for
        if not _append(tokens, part, tokenizer, chosen, config, limit):
            return Dropped("with a prompt over max_prompt_length")
    return _cut(record, config.max_length, tokens, prompt_length)


def encode_question(record: Record, config: DataConfig, tokenizer: Any) -> Example | Dropped:
    """A record's prompt alone, without labels or spans: one that models will answer."""
    prompt = whole_prompt(record, config, tokenizer)
    if not prompt:
        return Dropped("without a prompt")
    if len(prompt) > config.max_prompt_length and config.long_prompts == "drop":
        return Dropped("with a prompt over max_prompt_length")
    ids = np.array(prompt[: config.max_prompt_length], dtype=np.int32)
    spans = {granularity: np.zeros((0, 2), dtype=np.int32) for granularity in GRANULARITIES}
    return Example(record.id, ids, np.full_like(ids, IGNORED), spans, len(ids))


def encode_prompt(record: Record, config: DataConfig, tokenizer: Any) -> list[int]:
    """The ids a model is asked to continue: the first ``max_prompt_length`` of what stands before the last response.

    Training puts the same ids there, unless a template's generation prompt is not how it renders answers (one that
    opens a thought which the template then strips). A conversation is cut here as well: what is generated needs its
    room.
    """
    return whole_prompt(record, config, tokenizer)[: config.max_prompt_length]


def whole_prompt(record: Record, config: DataConfig, tokenizer: Any) -> list[int]:
    """The ids of what stands before the last response, however many; none for a record of text alone."""
    if record.format == "text":
        return []
    (part,) = render(record, config.template, tokenizer, with_response=False)
    ids, _ = _opening(part, tokenizer)
    return [*ids, *tokenizer(part.text, add_special_tokens=False)["input_ids"]]


def _insist_on_a_response(record: Record, last: Part) -> None:
    """UserError if the half that was rendered, up to its ``last`` part, says nothing."""
    empty = [half for half in HALVES if not record.fields.get(half, "").strip()]
    if empty and (not last.is_response or any(piece.field in empty for piece in last.pieces)):
        raise UserError(
            f"{record.where}: record {record.id} has nothing in {' and '.join(empty)}; "
            "a preference needs both responses: mend or remove the row"
        )


def _choose(record: Record, parts: Sequence[Part], config: DataConfig, lookup: Lookup | None) -> dict[str, Chosen]:
    """The chosen units of every field that has a place in the parts."""
    chosen: dict[str, Chosen] = {}
    if lookup is None:
        return chosen
    for field in dict.fromkeys(piece.field for part in parts for piece in part.pieces):
        units = lookup(record.id, field, record.fields[field])
        if units is None:
            raise UserError(
                f"{record.where}: record {record.id} (field '{field}') is not in the span store (data.spans), "
                "which was parsed from other records; run 'mta-ds parse' on these"
            )
        chosen[field] = choose(units, config.units)
    return chosen


def _opening(first: Part, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The BOS of a tokenizer that begins sequences with one, unless the template has written it already."""
    bos = tokenizer.bos_token_id
    if bos is None or first.text.startswith(tokenizer.bos_token):
        return [], []
    return ([bos], [IGNORED]) if tokenizer("a")["input_ids"][:1] == [bos] else ([], [])


def _append(
    tokens: _Tokens, part: Part, tokenizer: Any, chosen: dict[str, Chosen], config: DataConfig, limit: int | None
) -> bool:
    """Tokenize one part onto the sequence; False if it is a prompt beyond its limit and such records are dropped."""
    encoding = tokenizer(part.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    start = len(tokens.ids)
    if limit is not None and start + len(ids) > limit:
        if config.long_prompts == "drop":
            return False
        ids = ids[: max(0, limit - start)]
    offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    if part.is_response or config.units.fields == "all":
        for granularity, units in _units_in(part, chosen).items():
            spans = project(part.text, offsets, units)
            kept = (spans[:, 0] < spans[:, 1]) & (spans[:, 1] <= len(ids))
            tokens.spans[granularity].append(spans[kept] + start)
    if part.ends_with_eos:
        ids = [*ids, tokenizer.eos_token_id]
    tokens.ids.extend(ids)
    tokens.labels.extend(ids if part.is_response else [IGNORED] * len(ids))
    return True


def _units_in(part: Part, chosen: dict[str, Chosen]) -> dict[str, np.ndarray]:
    """The units of the part's fields, as character ranges of the part."""
    found: dict[str, list[np.ndarray]] = {g: [np.zeros((0, 2), dtype=np.int64)] for g in GRANULARITIES}
    for piece in part.pieces:
        if piece.field not in chosen:
            continue
        for granularity, units in zip(GRANULARITIES, chosen[piece.field], strict=True):
            inside = (units[:, 0] >= piece.field_start) & (units[:, 1] <= piece.field_start + piece.length)
            found[granularity].append(units[inside].astype(np.int64) + (piece.start - piece.field_start))
    return {granularity: np.concatenate(ranges) for granularity, ranges in found.items()}


def _cut(record: Record, max_length: int, tokens: _Tokens, prompt_length: int) -> Example | Dropped:
    labels = np.array(tokens.labels[:max_length], dtype=np.int32)
    # the first token is predicted from nothing, so its label never counts
    if not (labels[1:] != IGNORED).any():
        return Dropped("without a label within max_length")
    spans = {}
    for granularity, ranges in tokens.spans.items():
        joined = np.concatenate([np.zeros((0, 2), dtype=np.int64), *ranges])
        spans[granularity] = unique_ranges(joined[joined[:, 1] <= max_length]).astype(np.int32)
    ids = np.array(tokens.ids[:max_length], dtype=np.int32)
    return Example(record.id, ids, labels, spans, prompt_length)


def unique_ranges(ranges: np.ndarray) -> np.ndarray:
    """Each range [K, 2] once, by start, longer first."""
    if not len(ranges):
        return ranges
    ordered = ranges[np.lexsort((-ranges[:, 1], ranges[:, 0]))]
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return ordered[new]
