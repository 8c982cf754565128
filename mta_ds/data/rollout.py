"""A student's own answer as an example to train on: its spans lie on the ids that were generated.

Encoding the decoded text again could give other ids; so each generated id is given its place in the text instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mta_ds.data.collate import GRANULARITIES, IGNORED, Example
from mta_ds.data.encode import unique_ranges
from mta_ds.data.project import project
from mta_ds.data.units import UnitConfig, choose
from mta_ds.spans.store import Units

_NO_CHARACTER = "\ufffd"  # what decoders write for bytes that make no character


def decode_with_offsets(ids: Sequence[int], tokenizer: Any) -> tuple[str, np.ndarray]:
    """The text of generated ids, and each id's character range in it, int64 [n, 2].

    The text is the tokenizer's, less its special tokens and U+FFFD, which stands for bytes that make no character. Ids
    that share a character (its bytes) all have its range; ids without text have none (start = end).
    """
    ids = [int(token) for token in ids]
    special = _special_ids(tokenizer)
    last = max((position for position, token in enumerate(ids) if token not in special), default=-1)
    offsets = np.zeros((len(ids), 2), dtype=np.int64)
    text = ""
    before: list[int] = []  # the ids that gave the text's end, on which it depends how the next ones read
    length_before = 0  # of their text by itself
    waiting: list[int] = []  # positions of the ids since

    def decode(part: list[int]) -> str:
        decoded: str = tokenizer.backend_tokenizer.decode(part, skip_special_tokens=False)
        return decoded

    def read(positions: Sequence[int]) -> str:
        return decode(before + [ids[position] for position in positions])[length_before:]

    for position, token in enumerate(ids):
        offsets[position] = len(text)
        if token in special:
            continue
        waiting.append(position)
        piece = read(waiting)
        if piece.endswith(_NO_CHARACTER) and position < last:
            continue  # the next id may bring the missing bytes
        piece = piece.replace(_NO_CHARACTER, "")
        if piece:  # of the ids that waited, the fewest that read the same: those before are stray bytes
            tails = (waiting[i:] for i in range(len(waiting) - 1, 0, -1))
            owners = next((tail for tail in tails if read(tail).replace(_NO_CHARACTER, "") == piece), waiting)
            offsets[owners] = (len(text), len(text) + len(piece))
            before, text = [], text + piece
        before = before + [ids[position] for position in waiting]
        length_before, waiting = len(decode(before)), []
    return text, offsets


def _special_ids(tokenizer: Any) -> set[int]:
    """Ids that are no text: those with a role, and those that the vocabulary itself calls special."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


class ParsedResponse(NamedTuple):
    """A response's text with the places of its ids in it, as :func:`decode_with_offsets` gives them, and its units."""

    text: str
    offsets: np.ndarray
    units: Units


def rollout_example(
    asked: Example, response: Sequence[int], parsed: ParsedResponse | None, config: UnitConfig
) -> Example:
    """``asked``'s prompt with another response: its labels are the generated ids, its spans the prompt's and their own.

    Args:
        response: at least one id, with the EOS that ended it.
        parsed: None: nobody has parsed it, and the example has no spans at all, so that MTA passes over it.
    """
    start = asked.prompt_length
    ids = np.concatenate([asked.input_ids[:start], np.asarray(response, dtype=np.int32)])
    labels = ids.copy()
    labels[:start] = IGNORED
    spans = {granularity: np.zeros((0, 2), dtype=np.int32) for granularity in GRANULARITIES}
    if parsed is not None:
        for granularity, chosen in zip(GRANULARITIES, choose(parsed.units, config), strict=True):
            found = project(parsed.text, parsed.offsets, chosen)
            own = unique_ranges(found[found[:, 0] < found[:, 1]]) + start
            before = asked.spans[granularity]
            spans[granularity] = np.concatenate([before[before[:, 1] <= start], own]).astype(np.int32)
    return dataclasses.replace(asked, input_ids=ids, labels=labels, spans=spans)
