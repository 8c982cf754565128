"""Pooling on every backend against the reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
from op_cases import LENGTHS, assert_matches, bounds, random, random_spans

from mta_ds.ops import normalise_within, reference, span_pool, span_weights

COUNTS = (64, 1, 130, 0, 2, 65)
SPANS, CU_SPANS = random_spans(LENGTHS, COUNTS)


def check(hidden, weights, spans=SPANS):
    assert_matches(
        lambda hidden: [span_pool(hidden, weights, spans)],
        lambda hidden: [reference.span_pool(hidden, weights.to(hidden.dtype), spans)],
        {"hidden": hidden},
        trained=["hidden"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 20])
def test_equals_the_reference(backend, dtype, width):
    check(random(sum(LENGTHS), width, dtype=dtype), random(sum(LENGTHS), seed=1).abs())


def test_features_go_in_blocks(backend):
    check(random(9, 1100), random(9, seed=1).abs(), torch.tensor([[0, 3], [2, 9]]))


def test_any_order_nothing_and_no_weight(backend):
    hidden, weights = random(9, 6), random(9, seed=1).abs()
    weights[2:5] = 0
    for spans in ([[7, 9], [0, 3], [2, 5], [3, 3], [7, 9]], [[0, 9]], []):
        check(hidden, weights, torch.tensor(spans, dtype=torch.int64).reshape(-1, 2))
    check(hidden[:, ::2], weights, torch.tensor([[1, 4]]))


def test_float64_keeps_its_digits():
    hidden, weights = random(sum(LENGTHS), 5, dtype=torch.float64), random(sum(LENGTHS), seed=1).abs().double()
    check(hidden, weights)


@pytest.mark.parametrize("num_spans", [63, 257])
def test_numbers_of_spans_around_blocks(backend, num_spans):
    spans, _ = random_spans(LENGTHS, (0, 0, num_spans, 0, 0, 0), seed=num_spans)
    check(random(sum(LENGTHS), 5), random(sum(LENGTHS), seed=1).abs(), spans)


@pytest.mark.parametrize("small", [1e-37, 1e-39, 1e-44])
def test_ratios_count_however_small_weights_are(backend, small):
    """Weights of a span that are the smallest numbers of fp32, of which the inverse is infinite."""
    hidden, weights = random(9, 6), random(9, seed=1).abs()
    weights[3:6] = small * torch.tensor([1.0, 2.0, 5.0])
    spans = torch.tensor([[3, 6], [4, 5], [0, 4], [5, 9]])
    check(hidden, weights, spans)
    cu = bounds([3, 3, 3])
    expected = reference.normalise_within(weights.double(), cu)
    torch.testing.assert_close(normalise_within(weights, cu).double(), expected, rtol=1e-5, atol=1e-9)
    omega, exact = (
        each(w, spans, bounds([2, 2]))
        for each, w in ((span_weights, weights), (reference.span_weights, weights.double()))
    )
    torch.testing.assert_close(omega.double(), exact, rtol=1e-5, atol=1e-9)


def test_no_memory_is_read_before_it_is_written(backend, poisoned):
    check(random(sum(LENGTHS), 20), random(sum(LENGTHS), seed=1).abs())


def test_span_weights_and_segments_equal_the_reference(backend):
    weights = random(sum(LENGTHS), seed=1).abs()
    expected = reference.span_weights(weights.double(), SPANS, CU_SPANS)
    torch.testing.assert_close(span_weights(weights, SPANS, CU_SPANS).double(), expected, rtol=1e-5, atol=1e-9)
    cu = bounds(LENGTHS)
    expected = reference.normalise_within(weights.double(), cu)
    torch.testing.assert_close(normalise_within(weights, cu).double(), expected, rtol=1e-5, atol=1e-9)
    assert normalise_within(weights[:0], bounds([0, 0])).tolist() == []


def test_wrong_arguments_are_named():
    hidden, weights = torch.zeros(4, 3), torch.zeros(4)
    for spans, message in (
        ([[0, 5]], "spans: want 0 <= start <= end <= 4"),
        ([[-1, 2]], "spans: want 0 <= start <= end <= 4"),
        ([[2, 1]], "spans: want 0 <= start <= end <= 4"),
        ([0, 1], r"spans: want int64 \[K, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            span_pool(hidden, weights, torch.tensor(spans))
    with pytest.raises(ValueError, match=r"weights: want floating \[4\]"):
        span_pool(hidden, weights[:3], torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"weights: float64 goes with float64 only, got torch.float64 beside hidden's"):
        span_pool(hidden, weights.double(), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"hidden: want at least one feature, got \[4, 0\]"):
        span_pool(hidden[:, :0], weights, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="weights: want it on cpu as hidden is, got meta"):
        span_pool(hidden, torch.zeros(4, device="meta"), torch.tensor([[0, 1]]))
