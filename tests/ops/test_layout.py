"""Layouts against brute force, and what they refuse."""

from __future__ import annotations

import weakref

import pytest
import torch
from op_cases import LENGTHS, bounds, random_spans

from mta_ds.ops import SpanLayout
from mta_ds.ops.layout import Membership, Segments, runs

COUNTS = (9, 1, 30, 0, 3, 8)
CU_SEQLENS = bounds(LENGTHS)
SPANS, CU_SPANS = random_spans(LENGTHS, COUNTS, seed=4)


def test_members_both_ways():
    members = Membership(SPANS, sum(LENGTHS))
    pairs = [(i, t) for i, (start, end) in enumerate(SPANS.tolist()) for t in range(start, end)]
    assert members.span_tokens.tolist() == [t for _, t in pairs]
    by_token = sorted((t, i) for i, t in pairs)
    assert members.token_spans.tolist() == [i for _, i in by_token]
    assert [pairs[k] for k in members.token_pairs.tolist()] == [(i, t) for t, i in by_token]
    assert members.covered.tolist() == sorted({t for _, t in pairs})
    for row, t in enumerate(members.covered.tolist()):
        first, last = members.covered_offsets[row : row + 2].tolist()
        assert members.token_spans[first:last].tolist() == [i for i, token in pairs if token == t]
    assert members.on("covered", torch.device("cpu")) is members.on("covered", torch.device("cpu"))


@pytest.mark.parametrize("size", [1, 66, 300, 10_000])
def test_groups_are_whole_sequences_and_all_of_them(size):
    layout = SpanLayout(CU_SEQLENS, SPANS, CU_SPANS)
    groups = layout.groups(size)
    members = layout.members
    for whole, part in (
        (sum(LENGTHS), "tokens"),
        (len(SPANS), "spans"),
        (len(members.span_tokens), "pairs"),
        (len(members.covered), "covered"),
    ):
        slices = [getattr(group, part) for group in groups]
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(whole))
    for group in groups:
        inner = group.layout
        assert len(inner.cu_seqlens) == 2 or inner.num_tokens <= size
        assert torch.equal(inner.members.spans + group.tokens.start, SPANS[group.spans])
        assert torch.equal(inner.members.span_tokens + group.tokens.start, members.span_tokens[group.pairs])
        assert torch.equal(inner.members.covered + group.tokens.start, members.covered[group.covered])
        assert inner.covered.cu[-1] == len(inner.members.covered)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1]], ids=str)
def test_a_batch_that_is_one_group_is_that_group_and_does_not_keep_itself(lengths):
    layout = SpanLayout(bounds(lengths), SPANS[: COUNTS[0]], bounds((COUNTS[0], *(0,) * (len(lengths) - 1))))
    (group,) = layout.groups(10_000 if len(lengths) > 1 else 1)
    assert group.layout is layout
    seen = weakref.ref(layout)
    del layout, group
    assert seen() is None
    assert SpanLayout(bounds([]), SPANS[:0], bounds([])).groups(10) == []


def test_runs_are_segments_of_one_length():
    cu = bounds((4, 4, 4, 4, 2, 0, 0, 3, 3, 300))
    found = [(first, run.rows.start, run.rows.stop, run.num_segments, run.length) for first, run in runs(cu, 48)]
    assert found == [
        *[(0, 0, 12, 3, 4), (3, 12, 16, 1, 4), (4, 16, 18, 1, 2)],
        *[(5, 18, 18, 2, 0), (7, 18, 24, 2, 3), (9, 24, 324, 1, 300)],
    ]
    values = torch.arange(324 * 2).reshape(324, 2)
    _, run = next(iter(runs(cu, 48)))
    assert run.of(values).shape == (3, 4, 2) and run.of(values)[1, 0].tolist() == values[4].tolist()
    assert list(runs(bounds([]), 48)) == []


def test_tiles_cover_every_row_once():
    segments = Segments(CU_SEQLENS)
    grid = segments.tiles
    rows = [row for first, start, end in grid.tolist() for row in range(first, min(first + 64, end)) if row >= start]
    assert rows == list(range(sum(LENGTHS))) and grid.dtype == torch.int32
    assert Segments(bounds([])).tiles.shape == Segments(bounds([0, 0])).tiles.shape == (0, 3)
    # layers share what is copied beside their tensors
    cpu = torch.device("cpu")
    assert segments.on("tiles", cpu, torch.int32) is segments.on("tiles", cpu, torch.int32)
    assert segments.owners.tolist() == [i for i, length in enumerate(LENGTHS) for _ in range(length)]


@pytest.mark.parametrize(
    ("cu_seqlens", "spans", "cu_spans", "message"),
    [
        ([0, 4, 8], [[0, 2], [3, 5]], [0, 2, 2], r"spans: row 1 \[3, 5\] is outside its sequence 0, tokens 0 to 4"),
        ([0, 4, 8], [[0, 2], [5, 6]], [0, 0, 2], r"spans: row 0 \[0, 2\] is outside its sequence 1, tokens 4 to 8"),
        ([0, 4, 8], [[0, 2]], [0, 1], "cu_spans: want 3 bounds as cu_seqlens has, got 2"),
        ([0, 4, 8], [[0, 2]], [0, 1, 2], "cu_spans: want bounds from 0 to 1, got 0 to 2"),
        ([0, 5, 4], [[0, 2]], [0, 1, 1], "cu_seqlens: bounds must not fall"),
        ([1, 4], [[1, 2]], [0, 1], "cu_seqlens: want bounds from 0 to n, got 1 to 4"),
        ([0, 4], [[0, 9]], [0, 1], "spans: want 0 <= start <= end <= 4"),
        ([0, 4], [[3, 2]], [0, 1], "spans: want 0 <= start <= end <= 4"),
    ],
)
def test_what_does_not_fit_is_named(cu_seqlens, spans, cu_spans, message):
    with pytest.raises(ValueError, match=message):
        SpanLayout(torch.tensor(cu_seqlens), torch.tensor(spans), torch.tensor(cu_spans))


def test_a_layout_on_a_gpu_is_refused():
    elsewhere = CU_SEQLENS.to("meta")
    with pytest.raises(ValueError, match="cu_seqlens: layouts are host data, read without waiting for a GPU"):
        SpanLayout(elsewhere, SPANS, CU_SPANS)
    with pytest.raises(ValueError, match="spans: layouts are host data"):
        Membership(SPANS.to("meta"), 4)
