"""Products with a head that is rounded, and how large a chunk is."""

from __future__ import annotations

import pytest
import torch
from op_cases import random

from mta_ds.ops import heads


def test_chunks_grow_with_the_budget():
    like = torch.zeros(1)
    assert heads.chunk_tokens(1000, like, 2 * 4 * 1000 * 64) == 64
    assert heads.chunk_tokens(256_000, like, 1) == 32
    assert 64 <= heads.chunk_tokens(49_152, like, None) <= 512


def test_all_logits_of_a_chunk_share_the_budget():
    like = torch.zeros(1)
    assert heads.chunk_tokens(1000, like, 2 * 4 * 1000 * 64, layers=2) == 32
    assert 2 * heads.chunk_tokens(49_152, like, None, layers=2) <= heads.chunk_tokens(49_152, like, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_have_the_digits_of_fp32(monkeypatch, dtype):
    monkeypatch.setattr(heads, "_SLAB_ROWS", 10)
    hidden, head, upstream = random(5, 7, dtype=dtype), random(33, 7, seed=1, dtype=dtype), random(5, 33, seed=2)
    total = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = upstream.to(total)
    logits, towards, summed = heads.logits_of(hidden, head), torch.full((5, 7), 3.0, dtype=total), random(33, 7, seed=3)
    summed = summed.to(total)
    expected = summed.double() + upstream.double().T @ hidden.double()
    heads.write_hidden_gradient(towards, upstream, head)
    heads.add_head_gradient(summed, upstream, hidden)
    close = {"rtol": 1e-6, "atol": 1e-5}
    assert logits.dtype == total
    torch.testing.assert_close(logits.double(), hidden.double() @ head.double().T, **close)
    torch.testing.assert_close(towards.double(), upstream.double() @ head.double(), **close)
    torch.testing.assert_close(summed.double(), expected, **close)
