"""How far a sentence's best tree is ahead of every other: whether rounding could have chosen it.

The margin is the score of the best tree less that of the best tree with other constituents. For every chart cell,
inside and outside scores (the max-marginals of Goodman 1996, "Parsing Algorithms and Metrics") give the best tree
through it, so all alternatives are seen in the time of three CKY passes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mta_ds.spans.decode import compiled, fill_chart


def tree_margins(
    scores: NDArray[np.float32], labelled: NDArray[np.float32], lengths: NDArray[np.int64], force_root: bool
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Margins over trees with other spans, and the cells whose label another could still replace.

    Args:
        scores: float32 [M], each cell's best score as :func:`mta_ds.spans.decode.decode` takes it.
        labelled: float32 [M], each cell's best score of a label that is not the empty one.
        lengths: int64 [B], words in each sentence, at least 1.
        force_root: whether the whole sentence must bear a label.

    Returns:
        float32 [B], infinite where there is no other tree; the labelled cells of the best trees, int64 [K]; and the
        sentence of each, int64 [K].
    """
    margins, chosen, sentences = _margins(scores, labelled, lengths, force_root)
    return margins, chosen, sentences


@compiled
def _margins(scores, labelled, lengths, force_root):  # type: ignore[no-untyped-def]
    longest = lengths.max() if len(lengths) else 0
    inside = np.empty((longest, longest), np.float32)
    mirror = np.empty((longest, longest), np.float32)
    split = np.empty((longest, longest), np.int32)
    # outside[i, j]: of left parts, and of right parts transposed, so that both are written in order
    of_left = np.empty((longest, longest), np.float32)
    of_right = np.empty((longest, longest), np.float32)
    in_tree = np.empty((longest, longest), np.bool_)
    margins = np.empty(len(lengths), np.float32)
    room = 2 * lengths.sum()
    chosen, sentences = np.empty(room, np.int64), np.empty(room, np.int64)
    offset, found = 0, 0
    for sentence in range(len(lengths)):
        length = lengths[sentence]
        cells = length * (length + 1) // 2
        fill_chart(scores[offset : offset + cells], length, inside, mirror, split)
        _fill_outside(scores[offset : offset + cells], length, inside, mirror, of_left, of_right)
        _mark_tree(length, split, in_tree)
        total, margin, cell = inside[0, length - 1], np.float32(np.inf), offset
        for i in range(length):
            for j in range(i, length):
                is_root = force_root and i == 0 and j == length - 1
                if in_tree[i, j] and (scores[cell] > 0 or is_root):
                    # the same tree without this label
                    if not is_root:
                        margin = min(margin, labelled[cell])
                    chosen[found], sentences[found] = cell, sentence
                    found += 1
                else:
                    through = inside[i, j] + max(of_left[i, j], of_right[j, i])
                    margin = min(margin, total - through + scores[cell] - labelled[cell])
                cell += 1
        margins[sentence] = margin
        offset += cells
    return margins, chosen[:found], sentences[:found]


@compiled
def _fill_outside(scores, length, inside, mirror, of_left, of_right):  # type: ignore[no-untyped-def]
    """Score of the best tree less what is inside a span: the larger of of_left[i, j] and of_right[j, i]."""
    of_left[:length, :length] = -np.inf
    of_right[:length, :length] = -np.inf
    of_left[0, length - 1] = 0
    for width in range(length - 1, 0, -1):
        for i in range(length - width):
            j = i + width
            around = max(of_left[i, j], of_right[j, i]) + scores[i * length - i * (i - 1) // 2 + width]
            for k in range(i, j):
                of_left[i, k] = max(of_left[i, k], around + mirror[j, k + 1])
                of_right[j, k + 1] = max(of_right[j, k + 1], around + inside[i, k])


@compiled
def _mark_tree(length, split, in_tree):  # type: ignore[no-untyped-def]
    in_tree[:length, :length] = False
    stack = np.empty((2 * length, 2), np.int64)
    stack[0, 0], stack[0, 1], depth = 0, length - 1, 1
    while depth:
        depth -= 1
        i, j = stack[depth]
        in_tree[i, j] = True
        if i < j:
            k = split[i, j]
            stack[depth, 0], stack[depth, 1] = k + 1, j
            stack[depth + 1, 0], stack[depth + 1, 1] = i, k
            depth += 2
