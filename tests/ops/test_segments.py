"""Shares within segments on every backend against softmax, segment by segment."""

from __future__ import annotations

import pytest
import torch
from op_cases import bounds, random

from mta_ds.ops.layout import Segments
from mta_ds.ops.segments import pair_weights, softmax_within

LENGTHS = (0, 3, 1, 40, 0, 1100, 2)


@pytest.mark.parametrize("lengths", [LENGTHS, (5,) * 9, (), (0, 0)], ids=str)
def test_softmax_of_each_segment(backend, lengths):
    logs = 50 * random(sum(lengths), dtype=torch.float64) - 700
    if len(logs) > 4:
        logs[3], logs[:2] = -torch.inf, -torch.inf
    shares, sums = softmax_within(logs, Segments(bounds(lengths)), torch.float32)
    assert shares.dtype == torch.float32 and sums.dtype == torch.float64
    for part, share, total in zip(logs.split(lengths), shares.split(lengths), sums, strict=True):
        torch.testing.assert_close(total, part.logsumexp(0))
        expected = torch.where(part == -torch.inf, 0.0, (part - total).exp())
        torch.testing.assert_close(share, expected.float())


def test_a_segment_that_weighs_nothing_has_zeros_and_nan_shows_in_its_own(backend):
    logs = torch.tensor([-torch.inf, -torch.inf, 0.0, torch.nan, 1.0, 1.0], dtype=torch.float64)
    shares, sums = softmax_within(logs, Segments(bounds((2, 2, 2))), torch.float32)
    assert shares[:2].tolist() == [0.0, 0.0] and float(sums[0]) == -torch.inf
    assert shares[2:4].isnan().all() and sums[1].isnan()
    assert shares[4:].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("gap", [0.0, 10.0, 39.0, 41.0, 100.0, 2000.0])
def test_products_with_the_largest_keep_their_digits(backend, gap):
    """Of one span with nearly all weight and three others."""
    mass = torch.tensor([-gap, 0.0, 1.0 - gap, -gap - 2, 5.0], dtype=torch.float64)
    omega, lift = pair_weights(mass, Segments(bounds((4, 1))), torch.float32)
    pairs = torch.outer(omega[:4], omega[:4]).double().fill_diagonal_(0)
    log_pairs = (mass[:4, None] + mass[:4]).fill_diagonal_(-torch.inf)
    expected = (log_pairs - log_pairs.flatten().logsumexp(0)).exp()
    torch.testing.assert_close(pairs / pairs.sum(), expected, rtol=1e-5, atol=1e-12)
    log_z = log_pairs.flatten().logsumexp(0) - 2 * mass[:4].logsumexp(0)
    torch.testing.assert_close(pairs.sum().log() - lift[0], log_z, rtol=1e-5, atol=1e-5)
    assert float(omega[4]) == 1.0 and float(lift[1]) == 0.0
