"""Character ranges to token ranges, through a fast tokenizer's offset mapping (METHOD §3, "Character → token").

A token belongs to a unit when, leading white space aside, it lies inside it. A token that straddles a unit's edge
belongs to neither side; tokens that share one character (the bytes of an emoji) all belong.
"""

from __future__ import annotations

import numpy as np


def project(text: str, offsets: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Token ranges of units.

    Args:
        text: what was tokenized.
        offsets: int [n, 2], each token's character range in ``text``, in reading order; special tokens have none
            (start = end).
        units: int [U, 2], character ranges.

    Returns:
        int32 [U, 2], half-open token ranges; start = end where a unit holds no token whole.
    """
    starts, ends, tokens = _contents(text, offsets)
    first = np.searchsorted(starts, units[:, 0], side="left")
    last = np.searchsorted(ends, units[:, 1], side="right")
    found = first < last
    if not len(tokens):
        return np.zeros((len(units), 2), dtype=np.int32)
    begin = tokens[np.minimum(first, len(tokens) - 1)]
    end = tokens[np.maximum(last, 1) - 1] + 1
    return np.where(found[:, None], np.stack([begin, end], axis=1), 0).astype(np.int32)


def _contents(text: str, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start (leading white space aside), end and index of every token that is more than white space."""
    starts, ends = offsets[:, 0].astype(np.int64), offsets[:, 1].astype(np.int64)
    # next_visible[i]: the first character at or after i that is not white space
    visible = np.array([not c.isspace() for c in text] + [True], dtype=bool)
    position = np.where(visible, np.arange(len(visible)), len(visible))
    next_visible = np.minimum.accumulate(position[::-1])[::-1]
    starts = next_visible[np.minimum(starts, len(text))]
    tokens = np.flatnonzero(starts < ends)
    # A normalizer may report ranges that step back; a search needs them in order, and reading order is the truth.
    return np.maximum.accumulate(starts[tokens]), np.maximum.accumulate(ends[tokens]), tokens
