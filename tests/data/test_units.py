"""The choice of units, against brute force over random trees."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ds.data import UnitConfig, Units, choose

LABELS = ("NP", "VP", "PP", "S::VP", "NP::NP", "S")


@st.composite
def random_units(draw: st.DrawFn) -> Units:
    """A nested bracketing over 1 to 9 words; word i is characters 3i to 3i + 2."""
    num_words = draw(st.integers(1, 9))
    brackets: list[tuple[int, int, str]] = []

    def grow(start: int, end: int) -> None:
        if draw(st.booleans()):
            brackets.append((start, end, draw(st.sampled_from(LABELS))))
        if end - start > 1:
            cut = draw(st.integers(start + 1, end - 1))
            grow(start, cut)
            grow(cut, end)

    grow(0, num_words)
    brackets.sort(key=lambda b: (b[0], -b[1]))
    words = np.array([[3 * i, 3 * i + 2] for i in range(num_words)], dtype=np.int32)
    rows = np.array([[a, b, 1] for a, b, _ in brackets], dtype=np.int32).reshape(-1, 3)
    return Units(
        b"", 3 * num_words, np.array([0, num_words]), words, [""] * num_words, rows, [label for *_, label in brackets]
    )


def brute_force(units: Units, config: UnitConfig) -> list[tuple[int, int]]:
    labelled: dict[tuple[int, int], set[str]] = {}
    for (a, b, _), label in zip(units.constituents.tolist(), units.labels, strict=True):
        own = set(label.split("::")) & set(config.labels)
        if own and config.min_words <= b - a <= (config.max_words or 99):
            labelled.setdefault((a, b), set()).update(own)

    def inside(x: tuple[int, int], y: tuple[int, int]) -> bool:
        return x != y and y[0] <= x[0] and x[1] <= y[1]

    ranges = sorted(labelled, key=lambda r: (r[0], -r[1]))
    if config.choose == "innermost":
        return [
            r for r in ranges if any(not any(inside(o, r) and x in labelled[o] for o in ranges) for x in labelled[r])
        ]
    if config.choose == "maximal":
        return [r for r in ranges if not any(inside(r, o) for o in ranges)]
    return ranges


@pytest.mark.parametrize("choice", ["innermost", "maximal", "all"])
@pytest.mark.parametrize("words", ["in_phrases", "all"])
@settings(max_examples=150)
@given(units=random_units(), min_words=st.integers(1, 3), max_words=st.one_of(st.none(), st.integers(3, 6)))
def test_equals_brute_force(choice, words, units: Units, min_words: int, max_words: int | None) -> None:
    config = UnitConfig(choose=choice, words=words, min_words=min_words, max_words=max_words)
    expected = brute_force(units, config)
    chosen = choose(units, config)
    assert chosen.phrases.tolist() == [[3 * a, 3 * (b - 1) + 2] for a, b in expected]
    kept = [i for i in range(len(units.words)) if words == "all" or any(a <= i < b for a, b in expected)]
    assert chosen.words.tolist() == [[3 * i, 3 * i + 2] for i in kept]


def test_no_constituents_give_no_phrases() -> None:
    none = Units(b"", 2, np.array([0, 1]), np.array([[0, 2]]), [""], np.zeros((0, 3), np.int32), [])
    assert choose(none, UnitConfig()).words.tolist() == choose(none, UnitConfig()).phrases.tolist() == []
    assert choose(none, UnitConfig(words="all")).words.tolist() == [[0, 2]]


def test_maximal_of_verb_groups_that_overlap_is_the_released_rule() -> None:
    """Every match of a pattern, as ``--parser spacy:MODEL`` gives them: they cross, which a tree's never do."""
    rows = [
        (0, 2, "NP"),
        (2, 6, "VP"),
        (2, 5, "VP"),
        (3, 6, "VP"),
        (4, 8, "VP"),
        (5, 8, "NP"),
        (7, 8, "VP"),
        (9, 10, "NP"),
    ]
    words = np.array([[3 * i, 3 * i + 2] for i in range(10)], dtype=np.int32)
    constituents = np.array([[a, b, 1] for a, b, _ in rows], dtype=np.int32)
    units = Units(b"", 30, np.array([0, 10]), words, [""] * 10, constituents, [label for *_, label in rows])
    released: list[list[int]] = []
    for start, end, _ in sorted(rows, key=lambda r: (r[0], -r[1])):  # one that ends inside an earlier one is dropped
        if not released or end > released[-1][1]:
            released.append([start, end])
    assert released == [[0, 2], [2, 6], [4, 8], [9, 10]]
    expected = [[3 * a, 3 * (b - 1) + 2] for a, b in released]
    assert choose(units, UnitConfig(choose="maximal")).phrases.tolist() == expected
