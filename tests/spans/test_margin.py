"""Margins against brute force over all trees and all labels of their spans."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from chart_cases import NAMES, all_trees, pack, random_chart

from mta_ds.spans.decode import decode
from mta_ds.spans.margin import tree_margins


def brute_force(full: np.ndarray, force_root: bool) -> tuple[float, float]:
    """Score of the best set of labelled spans, and of the best other one."""
    root = (0, len(full) - 1)
    best: dict[frozenset, float] = {}
    for tree in all_trees(*root):
        cells = sorted(tree)
        choices = [range(1, len(NAMES)) if force_root and cell == root else range(len(NAMES)) for cell in cells]
        for labels in itertools.product(*choices):
            found = frozenset((*cell, label) for cell, label in zip(cells, labels, strict=True) if label)
            best[found] = sum(float(full[span]) for span in found)
    ordered = sorted(best.values(), reverse=True)
    return ordered[0], ordered[1] if len(ordered) > 1 else -np.inf


def margin(full: np.ndarray, force_root: bool, before: int) -> float:
    """Of a sentence after ``before`` others, its labels' swaps included, as the parser puts them together."""
    charts = [random_chart(np.random.default_rng(9), 5)] * before + [full]
    scores, labels = (np.concatenate(part) for part in zip(*(pack(chart, force_root) for chart in charts), strict=True))
    labelled = np.concatenate([chart[np.triu_indices(len(chart))][:, 1:].max(1) for chart in charts])
    lengths = np.array([len(chart) for chart in charts], np.int64)
    margins, cells, sentences = tree_margins(scores, labelled.astype(np.float32), lengths, force_root)
    (constituents,) = decode(scores, labels, lengths, NAMES)[before:]
    assert len(constituents) == (sentences == before).sum()
    values = np.concatenate([chart[np.triu_indices(len(chart))] for chart in charts])
    for cell in cells[sentences == before]:
        others = np.delete(values[cell], [0, labels[cell]])
        margins[before] = min(margins[before], values[cell, labels[cell]] - others.max())
    return float(margins[before])


@pytest.mark.parametrize("force_root", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.0])
def test_best_tree_less_the_best_other(length: int, force_root: bool, shift: float) -> None:
    for seed in range(3):
        full = random_chart(np.random.default_rng(seed), length) + np.float32(shift)
        full[..., 0] = 0
        first, second = brute_force(full, force_root)
        assert margin(full, force_root, before=seed) == pytest.approx(first - second, abs=1e-5)


def test_trees_that_tie_have_no_margin() -> None:
    full = np.full((3, 3, 4), -1, np.float32)
    full[..., 0] = 0
    full[0, 1, 1] = full[1, 2, 1] = 2  # either, not both
    assert margin(full, False, before=0) == 0
    full[0, 1, 1] = 2.25
    assert margin(full, False, before=2) == 0.25
