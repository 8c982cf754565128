"""The chart decoder against brute force over all binary trees, and against benepar's own decoder, ties included."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
import torch
from benepar.decode_chart import ChartDecoder
from chart_cases import NAMES, all_trees, pack, random_chart
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ds.spans.decode import compiled, decode, span_fenceposts
from mta_ds.spans.parser import Constituent

VOCAB = {name: number for number, name in enumerate(NAMES)}


def decode_charts(charts: list[np.ndarray], force_root: bool) -> list[tuple[Constituent, ...]]:
    scores, labels = zip(*(pack(chart, force_root) for chart in charts), strict=True)
    lengths = np.array([len(chart) for chart in charts], np.int64)
    return decode(np.concatenate(scores), np.concatenate(labels), lengths, NAMES)


def benepar_constituents(charts: list[np.ndarray], force_root: bool) -> list[set[tuple[int, int, str]]]:
    """What benepar's decoder makes of the same charts, padded into one batch."""
    lengths = torch.tensor([len(chart) for chart in charts])
    batch = torch.zeros(len(charts), int(lengths.max()), int(lengths.max()), len(NAMES))
    for row, chart in zip(batch, charts, strict=True):
        row[: len(chart), : len(chart)] = torch.from_numpy(chart)
    decoder = ChartDecoder(VOCAB, force_root_constituent=force_root)
    outputs = map(decoder.compressed_output_from_chart, decoder.charts_from_pytorch_scores_batched(batch, lengths))
    return [
        {(s, e, NAMES[label]) for s, e, label in zip(o.starts, o.ends, o.labels, strict=True) if label} for o in outputs
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7])
def test_best_of_all_trees(length: int) -> None:
    full = random_chart(np.random.default_rng(length), length)
    best = full.max(-1)
    expected = max(all_trees(0, length - 1), key=lambda tree: sum(float(best[cell]) for cell in tree))
    (found,) = decode_charts([full], force_root=False)
    assert {(c.start_word, c.end_word - 1) for c in found} == {cell for cell in expected if full[cell].argmax()}
    assert all(c.label == NAMES[full[c.start_word, c.end_word - 1].argmax()] for c in found)


@pytest.mark.parametrize("force_root", [True, False])
@pytest.mark.parametrize("whole_numbers", [True, False], ids=["ties", "floats"])
def test_equals_benepar(force_root: bool, whole_numbers: bool) -> None:
    rng = np.random.default_rng(3)
    charts = [random_chart(rng, int(length), whole_numbers) for length in rng.integers(1, 24, 60)]
    found = decode_charts(charts, force_root)
    as_sets = [{(c.start_word, c.end_word, c.label) for c in constituents} for constituents in found]
    assert as_sets == benepar_constituents(charts, force_root)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 2**31))
def test_order_nesting_and_heights(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    charts = [random_chart(rng, length) for length in lengths]
    for constituents in decode_charts(charts, force_root=True):
        assert list(constituents) == sorted(constituents, key=lambda c: (c.start_word, -c.end_word))
        for number, outer in enumerate(constituents):
            inner = [c for c in constituents[number + 1 :] if c.start_word < outer.end_word]
            assert all(c.end_word <= outer.end_word for c in inner)
            assert outer.height == 1 + max((c.height for c in inner), default=0)


def test_a_label_without_a_name_is_no_constituent() -> None:
    scores, labels = np.ones(3, np.float32), np.array([0, 1, 2], np.int64)
    assert decode(scores, labels, np.array([2]), ("", "", "NP")) == [(Constituent(1, 2, "NP", 1),)]


def test_no_sentences() -> None:
    assert decode(np.empty(0, np.float32), np.empty(0, np.int64), np.empty(0, np.int64), NAMES) == []


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="one value for each"):
        decode(np.zeros(2, np.float32), np.zeros(2, np.int64), np.array([2]), NAMES)


def test_span_fenceposts() -> None:
    left, right = span_fenceposts(np.array([2, 1]), 5)
    assert left.tolist() == [0, 0, 1, 5]
    assert right.tolist() == [1, 2, 2, 6]


def test_code_is_compiled_where_it_cannot_be_kept() -> None:
    """As with the package in a read-only image and no home: numba finds no folder, here since there is no file."""
    names: dict[str, Any] = {}
    exec(compile("def distance(a, b): return abs(a - b)", "<nowhere>", "exec"), names)
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(names["distance"])
    assert compiled(names["distance"])(3, 5) == 2
