"""Matrix products that take a short cut, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch._subclasses.fake_tensor import FakeTensorMode

from mta_ds.ops import products
from mta_ds.ops.products import ROW_STEP, gram, product, write_product


@pytest.mark.parametrize("length", [0, 1, 63, 127, 128, 195, 257])
def test_a_gram_matrix_is_whole_and_symmetric(length):
    x = random(2 * length, 12).view(2, length, 12)
    got = gram(x)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got.double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [0, 1, ROW_STEP - 1, ROW_STEP, 3 * ROW_STEP])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_that_of_float64_whichever_library_makes_it(rows, dtype, transposed):
    a, b = random(rows, 40).to(dtype), random(40, 24).to(dtype)
    if transposed:  # as W and Wᵀ are
        b = b.T.contiguous().T
    expected = a.double() @ b.double()
    rounded = 2e-2 if dtype == torch.bfloat16 else 1e-5
    got = product(a, b)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=rounded, atol=rounded)
    room = torch.full_like(got, torch.nan)
    torch.testing.assert_close(product(a, b, lambda: room), got, rtol=0, atol=0)
    out = torch.full_like(got, torch.nan, dtype=dtype)
    write_product(out, a, b)
    torch.testing.assert_close(out.double(), expected, rtol=rounded, atol=rounded)


def test_only_numbers_of_rows_that_come_again_are_compiled_for(monkeypatch):
    seen = []
    monkeypatch.setattr(products, "_fp32_by_onednn", lambda: lambda a, b: seen.append(len(a)) or a @ b)
    for rows in range(3 * ROW_STEP):
        product(random(rows, 8), random(8, 8))
    assert seen == [ROW_STEP, 2 * ROW_STEP]
    with torch.backends.mkldnn.flags(enabled=False):
        product(random(ROW_STEP, 8), random(8, 8))
    assert len(seen) == 2


def test_a_plain_product_of_halves_is_none_of_a_gpu():
    """Straight into halves it may be made of partial sums that are rounded to halves."""
    with FakeTensorMode():
        dtypes = torch.bfloat16, torch.float16, torch.float32
        kinds = [torch.zeros(4, 4, dtype=dtype, device="cuda") for dtype in dtypes]
        assert [products._is_native(x) for x in kinds] == [False, False, True]
