"""Pooling on every backend against the reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
from op_cases import LENGTHS, assert_matches, bounds, random, random_spans

from mta_ds.ops import normalise_within, reference, span_pool, span_weights
from mta_ds.ops.span_pool import segment_sums

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


def test_span_weights_and_segments_equal_the_reference(backend):
    weights = random(sum(LENGTHS), seed=1).abs()
    expected = reference.span_weights(weights.double(), SPANS, CU_SPANS)
    torch.testing.assert_close(span_weights(weights, SPANS, CU_SPANS).double(), expected, rtol=1e-5, atol=1e-9)
    cu = bounds(LENGTHS)
    expected = reference.normalise_within(weights.double(), cu)
    torch.testing.assert_close(normalise_within(weights, cu).double(), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(segment_sums(weights, cu), torch.stack([part.sum() for part in weights.split(LENGTHS)]))
    assert segment_sums(weights[:0], bounds([0, 0])).tolist() == [0.0, 0.0]


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
    with pytest.raises(ValueError, match="weights: want it on cpu as hidden is, got meta"):
        span_pool(hidden, torch.zeros(4, device="meta"), torch.tensor([[0, 1]]))
