"""Chart decoding: from span scores to constituents, exactly, without autograd and without trees.

CKY over the ragged charts of a batch (Stern et al. 2017, "A Minimal Span-Based Neural Constituency Parser"): the
best binary tree is the one whose spans' label scores have the largest sum; spans with the empty label vanish from
it. Additions are made in single precision and ties broken in the order in which benepar's torch_struct decoder
makes and breaks them (first label, then shortest left part), so that equal scores give equal trees.

Charts are packed: a sentence of n words has n(n+1)/2 cells, row by row: (0,0) (0,1) .. (0,n-1) (1,1) .. (n-1,n-1),
where cell (i, j) is the span of words i to j, both included. B sentences, M cells in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from mta_ds.spans.parser import Constituent


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code, which is kept for other processes where numba finds a folder to write to."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder, nor the user's, nor one that NUMBA_CACHE_DIR names
        return numba.njit(nogil=True)(function)


def decode(
    scores: NDArray[np.float32], labels: NDArray[np.int64], lengths: NDArray[np.int64], names: Sequence[str]
) -> list[tuple[Constituent, ...]]:
    """The constituents of each sentence's best tree, sorted by (start_word, -end_word).

    Args:
        scores: float32 [M], each cell's best label score, where the empty label scores 0.
        labels: int64 [M], each cell's best label, 0 being the empty one.
        lengths: int64 [B], words in each sentence, at least 1.
        names: the labels' names; a label whose name is empty gives no constituent.
    """
    if scores.shape != labels.shape or len(scores) != int((lengths * (lengths + 1) // 2).sum()):
        raise ValueError(f"scores and labels must hold one value for each of the {len(lengths)} charts' cells")
    visible = np.array([bool(name) for name in names])
    bounds, starts, ends, cell_labels, heights = _decode_batch(scores, labels, lengths, visible)
    columns = (starts.tolist(), ends.tolist(), [names[label] for label in cell_labels.tolist()], heights.tolist())
    rows = [Constituent(*row) for row in zip(*columns, strict=True)]
    return [tuple(rows[first:last]) for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]


def most_likely_cells(
    scores: NDArray[np.float32], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cell and sentence number of all 2n - 1 spans, labelled or not, of each sentence's best binary tree.

    Arguments as for :func:`decode`; cells are numbered through the whole batch.
    """
    nothing = np.zeros(len(scores), np.int64)
    bounds, starts, ends, _, _ = _decode_batch(scores, nothing, lengths, np.ones(1, np.bool_))
    sentences = np.repeat(np.arange(len(lengths)), np.diff(bounds))
    first_cells = np.concatenate([[0], np.cumsum(lengths * (lengths + 1) // 2)[:-1]])
    rows = starts * lengths[sentences] - starts * (starts - 1) // 2
    return first_cells[sentences] + rows + ends - 1 - starts, sentences


@compiled
def _decode_batch(scores, labels, lengths, visible):  # type: ignore[no-untyped-def]
    """Every sentence's constituents, concatenated: bounds [B+1], starts, ends, labels, heights [K]."""
    # A binary tree of n words has 2n - 1 nodes.
    room = 2 * lengths.sum()
    starts, ends = np.empty(room, np.int64), np.empty(room, np.int64)
    found, heights = np.empty(room, np.int64), np.empty(room, np.int64)
    bounds = np.zeros(len(lengths) + 1, np.int64)
    longest = lengths.max() if len(lengths) else 0
    # inside[i, j] and its transpose, so that both halves of every split are read in order.
    inside = np.empty((longest, longest), np.float32)
    mirror = np.empty((longest, longest), np.float32)
    split = np.empty((longest, longest), np.int32)
    offset = 0
    for sentence in range(len(lengths)):
        length = lengths[sentence]
        cells = length * (length + 1) // 2
        fill_chart(scores[offset : offset + cells], length, inside, mirror, split)
        first = bounds[sentence]
        bounds[sentence + 1] = _walk(
            labels[offset : offset + cells], length, split, visible, first, starts, ends, found, heights
        )
        offset += cells
    total = bounds[-1]
    return bounds, starts[:total], ends[:total], found[:total], heights[:total]


@compiled
def fill_chart(scores, length, inside, mirror, split):  # type: ignore[no-untyped-def]
    """inside[i, j] = score of the best tree over words i..j; split[i, j] = last word of its left part."""
    cell = 0
    for i in range(length):
        for j in range(i, length):
            inside[i, j] = scores[cell]
            cell += 1
        mirror[i, i] = inside[i, i]
    for width in range(1, length):
        for i in range(length - width):
            j = i + width
            best, where = inside[i, i] + mirror[j, i + 1], i
            for k in range(i + 1, j):
                value = inside[i, k] + mirror[j, k + 1]
                if value > best:
                    best, where = value, k
            inside[i, j] = mirror[j, i] = best + inside[i, j]
            split[i, j] = where


@compiled
def _walk(labels, length, split, visible, first, starts, ends, found, heights):  # type: ignore[no-untyped-def]
    """Write the visible constituents of one tree in pre-order from row ``first``; returns the row after the last."""
    stack = np.empty((2 * length, 3), np.int64)
    parents = np.empty(2 * length, np.int64)
    stack[0, 0], stack[0, 1], stack[0, 2] = 0, length - 1, -1
    depth, row = 1, first
    while depth:
        depth -= 1
        i, j, parent = stack[depth, 0], stack[depth, 1], stack[depth, 2]
        label = labels[i * length - i * (i - 1) // 2 + j - i]
        if visible[label]:
            starts[row], ends[row], found[row], heights[row] = i, j + 1, label, 1
            parents[row - first] = parent
            parent = row
            row += 1
        if i < j:
            k = split[i, j]
            stack[depth, 0], stack[depth, 1], stack[depth, 2] = k + 1, j, parent
            stack[depth + 1, 0], stack[depth + 1, 1], stack[depth + 1, 2] = i, k, parent
            depth += 2
    # Pre-order: going backwards, a constituent is finished before the one around it is asked.
    for node in range(row - 1, first - 1, -1):
        parent = parents[node - first]
        if parent >= 0:
            heights[parent] = max(heights[parent], heights[node] + 1)
    return row


@compiled
def span_fenceposts(lengths, stride):  # type: ignore[no-untyped-def]
    """Left and right fencepost of every cell of the packed charts, int64 [M] each.

    Sentence b's fenceposts are rows ``b * stride`` to ``b * stride + lengths[b]``.
    """
    total = (lengths * (lengths + 1) // 2).sum()
    left, right = np.empty(total, np.int64), np.empty(total, np.int64)
    cell = 0
    for sentence in range(len(lengths)):
        first = sentence * stride
        for i in range(lengths[sentence]):
            for j in range(i, lengths[sentence]):
                left[cell], right[cell] = first + i, first + j + 1
                cell += 1
    return left, right
