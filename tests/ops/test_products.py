"""Matrix products that take a short cut, against the plain ones."""

from __future__ import annotations

import pytest
import torch
from op_cases import random

from mta_ds.ops.products import gram


@pytest.mark.parametrize("length", [0, 1, 63, 127, 128, 195, 257])
def test_a_gram_matrix_is_whole_and_symmetric(length):
    x = random(2 * length, 12).view(2, length, 12)
    got = gram(x)
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got.double(), x.double() @ x.double().mT, rtol=1e-5, atol=1e-5)
