"""Which words and constituents of a field become units: labels, length, and innermost, maximal or all (METHOD §3)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from mta_ds.config import Section
from mta_ds.spans.store import Units


class UnitConfig(Section):
    """The choice of units; the defaults are the nearest to the paper's noun chunks and verb groups."""

    labels: tuple[str, ...] = Field(default=("NP", "VP"), min_length=1)
    """Constituent labels; "S::VP" counts as S and as VP."""
    choose: Literal["innermost", "maximal", "all"] = "innermost"
    """innermost: without one of its own label inside; maximal: not inside another that was chosen."""
    min_words: int = Field(default=1, ge=1)
    max_words: int | None = Field(default=None, ge=1)
    words: Literal["in_phrases", "all"] = "in_phrases"
    """Words that become units: those inside the chosen phrases, or every word."""
    fields: Literal["all", "response"] = "all"
    """Fields whose units count; token weights always see the whole sequence."""


class Chosen(NamedTuple):
    """Character ranges of one field's units, each in reading order."""

    words: np.ndarray
    """int32 [W, 2]"""
    phrases: np.ndarray
    """int32 [P, 2]"""


def choose(units: Units, config: UnitConfig) -> Chosen:
    """The units of one field that a run uses."""
    phrases = choose_phrases(units, config)
    words = units.words
    if config.words == "in_phrases":
        change = np.zeros(len(words) + 1, dtype=np.int64)
        np.add.at(change, phrases[:, 0], 1)
        np.add.at(change, phrases[:, 1], -1)
        words = words[change[:-1].cumsum() > 0]
    ranges = np.stack([units.words[phrases[:, 0], 0], units.words[phrases[:, 1] - 1, 1]], axis=1)
    return Chosen(words.astype(np.int32), ranges.astype(np.int32))


def choose_phrases(units: Units, config: UnitConfig) -> np.ndarray:
    """Word ranges [P, 2] of the chosen constituents, by start, longer first; equal ranges once."""
    candidates: dict[tuple[int, int], set[str]] = {}
    for (start, end, _height), label in zip(units.constituents.tolist(), units.labels, strict=True):
        matching = set(label.split("::")) & set(config.labels)
        if matching and config.min_words <= end - start <= (config.max_words or end - start):
            candidates.setdefault((start, end), set()).update(matching)
    ordered = sorted(candidates, key=lambda r: (r[0], -r[1]))
    if config.choose == "innermost":
        ordered = _innermost(ordered, candidates)
    elif config.choose == "maximal":
        ordered = _maximal(ordered)
    return np.array(ordered, dtype=np.int64).reshape(-1, 2)


def _innermost(ordered: list[tuple[int, int]], labels: dict[tuple[int, int], set[str]]) -> list[tuple[int, int]]:
    """Ranges that, for one of their labels, hold no smaller range of that label.

    Constituents nest, so walking them backwards by start meets the inside before the outside.
    """
    kept = []
    nearest: dict[str, int] = {}  # label -> smallest end of the ranges met so far, which all start at or after this one
    for start, end in reversed(ordered):
        own = labels[start, end]
        if any(nearest.get(label, end + 1) > end for label in own):
            kept.append((start, end))
        for label in own:
            nearest[label] = min(nearest.get(label, end), end)
    return kept[::-1]


def _maximal(ordered: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges not inside an earlier one (the released code's rule)."""
    kept: list[tuple[int, int]] = []
    reach = 0
    for start, end in ordered:
        if end > reach:
            kept.append((start, end))
            reach = end
    return kept
