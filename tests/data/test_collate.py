"""Batches against plain loops."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mta_ds.data import GRANULARITIES, Example, collate, total


def example(length: int, num_spans: int, seed: int) -> Example:
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, 99, length).astype(np.int32)
    prompt = int(generator.integers(0, length))
    labels = np.where(np.arange(length) < prompt, -100, ids).astype(np.int32)
    starts = generator.integers(0, length, num_spans)
    ends = starts + generator.integers(1, 4, num_spans)
    spans = np.stack([starts, np.minimum(ends, length)], axis=1).astype(np.int32)
    return Example(f"r{seed}", ids, labels, {"word": spans, "phrase": spans[::2]}, prompt)


@pytest.mark.parametrize("shapes", [[(1, 0)], [(1, 1), (7, 0)], [(5, 3), (9, 1), (2, 2), (9, 7)], [(3, 0), (3, 0)]])
def test_batch_equals_loops(shapes: list[tuple[int, int]]) -> None:
    examples = [example(n, k, i) for i, (n, k) in enumerate(shapes)]
    batch = collate(examples, pad_id=0)
    width = max(n for n, _ in shapes)
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(shapes), width)
    ragged_ids = batch.input_ids.flatten()[batch.valid]
    assert ragged_ids.tolist() == [t for e in examples for t in e.input_ids.tolist()]
    assert batch.attention_mask.sum(1).tolist() == [n for n, _ in shapes]
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [n for n, _ in shapes]).tolist()
    targets = [t for e in examples for t in [*e.labels[1:].tolist(), -100]]
    assert batch.targets.tolist() == targets
    for granularity in GRANULARITIES:
        expected, bounds = [], [0]
        for e, start in zip(examples, batch.cu_seqlens.tolist(), strict=False):
            expected += [[a + start, b + start] for a, b in e.spans[granularity].tolist()]
            bounds.append(len(expected))
        assert batch.spans[granularity].ranges.tolist() == expected
        assert batch.spans[granularity].cu_spans.tolist() == bounds
        sizes = np.diff(bounds)
        assert batch.counts.covered[granularity] == (sizes >= 1).sum()
        assert batch.counts.comparable[granularity] == (sizes >= 2).sum()
    assert batch.counts.tokens == sum(t != -100 for t in targets) and batch.counts.sequences == len(shapes)
    assert batch.counts.valid_tokens == sum(n for n, _ in shapes) and batch.rejected == (False,) * len(shapes)
    assert all(t.dtype == torch.int64 for t in (batch.input_ids, batch.valid, batch.targets, batch.cu_seqlens))
    assert batch.to(torch.device("cpu")).targets.tolist() == targets


def test_empty_spans_cover_nothing_and_are_not_counted() -> None:
    spans = {"word": np.array([[1, 1], [2, 3]], np.int32), "phrase": np.array([[0, 0], [2, 2]], np.int32)}
    counts = collate([dataclasses.replace(example(5, 0, 0), spans=spans), example(9, 2, 1)], pad_id=0).counts
    assert counts.covered == {"word": 2, "phrase": 1} and counts.comparable == {"word": 1, "phrase": 0}


def test_total_adds_every_count() -> None:
    first = collate([example(5, 3, 0), example(4, 0, 1)], pad_id=0).counts
    second = collate([example(9, 2, 2)], pad_id=0).counts
    both = total([first, second])
    assert (both.valid_tokens, both.sequences, both.tokens) == (18, 3, first.tokens + second.tokens)
    assert both.covered == {"word": 2, "phrase": 2} and both.comparable == {"word": 2, "phrase": 1}
    assert total([]).valid_tokens == 0
