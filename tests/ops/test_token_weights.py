"""Token weights on every backend against the reference."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from op_cases import LENGTHS, Largest, assert_matches, bounds, random

from mta_ds.ops import entropy_weights, reference, token_weights
from mta_ds.ops.layout import Segments

op = importlib.import_module("mta_ds.ops.token_weights")
CU_SEQLENS = bounds(LENGTHS)


def check(hidden, cu_seqlens=CU_SEQLENS):
    assert_matches(
        lambda hidden: [token_weights(hidden, cu_seqlens)],
        lambda hidden: [reference.token_weights(hidden, cu_seqlens)],
        {"hidden": hidden},
        trained=[],
        tolerance=(2e-5, 1e-7),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [2, 70])
def test_equals_the_reference(backend, dtype, width):
    check(3 * random(sum(LENGTHS), width, dtype=dtype) + random(width, seed=1, dtype=dtype))


def test_a_long_sequence_goes_in_blocks(monkeypatch):
    monkeypatch.setattr(op, "_BLOCK_SCORES", 300)
    check(random(sum(LENGTHS), 20))


def test_states_with_a_large_mean_and_strided_rows(backend):
    wide = random(90, 40) + 300.0
    check(wide[:, ::2], bounds([70, 20]))
    check(wide[:, 3:20], bounds([70, 20]))


def test_equal_tokens_share_and_extreme_ones_stay_finite(backend):
    assert token_weights(torch.zeros(4, 5), bounds([4])).tolist() == [0.25] * 4
    hidden = random(70, 16)
    hidden[3] *= 1e6
    hidden[5] = hidden[4]
    check(hidden, bounds([70]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("lengths", [(70, 5), (1, 74)])
def test_what_is_not_finite_shows_in_its_sequence_alone(backend, bad, lengths):
    hidden = random(75, 8)
    hidden[0, 3] = bad
    weights = token_weights(hidden, bounds(lengths)).split(lengths)
    assert weights[0].isnan().all() and weights[1].isfinite().all()


@pytest.mark.parametrize("width", [1, 2])
def test_a_token_alone_weighs_one_however_few_features_it_has(backend, width):
    hidden = random(3, width)
    assert token_weights(hidden, bounds([1, 1, 1])).tolist() == [1.0] * 3
    assert reference.token_weights(hidden, bounds([1, 1, 1])).tolist() == [1.0] * 3
    hidden[1, 0] = torch.inf
    assert token_weights(hidden, bounds([1, 1, 1])).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("gap", [80.0, 90.0, 101.0, 300.0])
def test_a_weight_that_fp32_cannot_hold_has_a_logarithm(backend, crowd, gap):
    hidden = torch.cat([random(5, 64), crowd(gap), random(1, 64)])
    cu_seqlens = bounds((5, 7, 1))
    logs = op.log_token_weights(hidden, Segments(cu_seqlens))
    assert logs.dtype == torch.float64 and float(logs[11]) < 2 - gap
    # a score of 136 has an ulp of 1.5e-5
    torch.testing.assert_close(logs, reference.log_token_weights(hidden.double(), cu_seqlens), rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(token_weights(hidden, cu_seqlens), logs.exp().float())


def test_a_large_mean_leaves_even_float64(backend):
    hidden = random(33, 1600, dtype=torch.float64) + 6.0
    hidden[-1] -= 7.0
    logs = op.log_token_weights(hidden, Segments(bounds([33])))
    assert -2000 < float(logs[-1]) < -1000
    torch.testing.assert_close(logs, reference.log_token_weights(hidden, bounds([33])))


def test_what_underflows_among_blocks(monkeypatch, crowd):
    monkeypatch.setattr(op, "_BLOCK_SCORES", 20)
    hidden = torch.cat([crowd(95.0), crowd(5.0)])
    logs = op.log_token_weights(hidden, Segments(bounds([7, 7])))
    expected = reference.log_token_weights(hidden.double(), bounds([7, 7]))
    torch.testing.assert_close(logs, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_states(backend, dtype):
    check(random(5, 8192, dtype=dtype), bounds([3, 2]))


def test_four_thousand_tokens_and_no_matrix_of_them():
    hidden = random(4096, 8)
    with Largest() as seen:
        token_weights(hidden, bounds([4096]))
    assert seen.elements <= op._BLOCK_SCORES < 4096**2 / 16
    check(hidden, bounds([4096]))


def test_a_thousand_tokens_go_in_tiles(backend):
    check(random(1000, 8), bounds([1000]))


def test_no_memory_is_read_before_it_is_written(backend, poisoned):
    check(random(sum(LENGTHS), 20))


def test_no_tokens(backend):
    assert token_weights(torch.zeros(0, 4), bounds([])).shape == (0,)
    assert token_weights(torch.zeros(0, 4), bounds([0, 0])).shape == (0,)


def test_wrong_arguments_are_named():
    hidden = torch.zeros(4, 3)
    for cu, message in (
        (torch.tensor([0, 3]), "cu_seqlens: want bounds from 0 to 4, got 0 to 3"),
        (torch.tensor([0, 5, 4]), "cu_seqlens: bounds must not fall"),
        (torch.tensor([0, 4]).int(), "cu_seqlens: want int64"),
        (torch.zeros(2, dtype=torch.int64, device="meta"), "cu_seqlens: layouts are host data"),
    ):
        with pytest.raises(ValueError, match=message):
            token_weights(hidden, cu)
    with pytest.raises(ValueError, match="hidden: want a floating matrix"):
        token_weights(hidden.long(), torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="hidden: want at least one feature"):
        token_weights(hidden[:, :0], torch.tensor([0, 4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_of_how_sure_the_teacher_is(dtype):
    entropies = torch.tensor([0.0, math.log(7), 1.0, 0.5, math.log(7), 1e-3], dtype=dtype)
    got = entropy_weights(entropies, 7, torch.tensor([0, 3, 3, 4, 5, 6]))
    sure = [1.0, 0.0, 1 - 1 / math.log(7)]
    want = [*(w / sum(sure) for w in sure), 1.0, 0.0, 1.0]  # a sequence of uniform distributions alone: exact zeros
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="vocab_size: want at least 2"):
        entropy_weights(entropies, 1, torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="cu_seqlens"):
        entropy_weights(entropies, 7, torch.tensor([0, 5]))
