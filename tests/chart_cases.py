"""Charts of label scores, and all binary trees over them."""

from __future__ import annotations

import itertools

import numpy as np

NAMES = ("", "NP", "S::VP", "X")


def pack(full: np.ndarray, force_root: bool) -> tuple[np.ndarray, np.ndarray]:
    """Best score and label of every cell of a full chart [n, n, labels]."""
    length = len(full)
    scores, labels = [], []
    for i in range(length):
        for j in range(i, length):
            cell = full[i, j].copy()
            if force_root and (i, j) == (0, length - 1):
                cell[0] = -np.inf
            labels.append(int(cell.argmax()))
            scores.append(cell.max())
    return np.array(scores, np.float32), np.array(labels, np.int64)


def random_chart(rng: np.random.Generator, length: int, whole_numbers: bool = False) -> np.ndarray:
    values = rng.integers(-2, 3, (length, length, 4)) if whole_numbers else rng.normal(size=(length, length, 4))
    full = values.astype(np.float32)
    full[..., 0] = 0
    return full


def all_trees(first: int, last: int) -> list[frozenset[tuple[int, int]]]:
    if first == last:
        return [frozenset({(first, last)})]
    return [
        left | right | {(first, last)}
        for split in range(first, last)
        for left, right in itertools.product(all_trees(first, split), all_trees(split + 1, last))
    ]
