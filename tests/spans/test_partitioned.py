"""The fast partitioned encoder against benepar's own, layer for layer, in odd sizes."""

from __future__ import annotations

import pytest
import torch
from benepar.partitioned_transformer import PartitionedTransformerEncoder, PartitionedTransformerEncoderLayer

from mta_ds.spans.partitioned import FastPartitionedEncoder


def encoder(num_layers: int, d_model: int = 36, heads: int = 3, size: int = 10, inner: int = 22):
    torch.manual_seed(0)
    layer = PartitionedTransformerEncoderLayer(d_model, heads, size, inner)
    made = PartitionedTransformerEncoder(layer, num_layers).eval().requires_grad_(False)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 4]])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_is_benepars_up_to_rounding(lengths: list[int], num_layers: int) -> None:
    exact = encoder(num_layers)
    vectors = torch.randn(len(lengths), max(lengths), 36)
    valid = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    expected = exact.double()(vectors.double(), valid)[valid]
    found = FastPartitionedEncoder(exact.float())(vectors, valid)[valid]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def test_products_in_bf16_are_near_and_sums_stay_in_fp32() -> None:
    exact = encoder(1)
    vectors, valid = torch.randn(2, 6, 36), torch.ones(2, 6, dtype=torch.bool)
    found = FastPartitionedEncoder(exact, torch.bfloat16)(vectors, valid)
    expected = exact(vectors, valid)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()
