"""Matrix products that take a short cut, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from op_cases import random
from torch._subclasses.fake_tensor import FakeTensorMode

from mta_ds.ops import products
from mta_ds.ops.products import gram


@pytest.mark.parametrize("length", [0, 1, 63, 127, 128, 195, 257])
def test_a_gram_matrix_is_whole_and_symmetric(length):
    x = random(2 * length, 12).view(2, length, 12)
    got = gram(x)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got.double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-5)


def test_a_plain_product_of_halves_is_none_of_a_gpu():
    """Straight into halves it may be made of partial sums that are rounded to halves."""
    with FakeTensorMode():
        dtypes = torch.bfloat16, torch.float16, torch.float32
        kinds = [torch.zeros(4, 4, dtype=dtype, device="cuda") for dtype in dtypes]
        assert [products._is_native(x) for x in kinds] == [False, False, True]
