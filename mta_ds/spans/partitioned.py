"""benepar's partitioned transformer for inference: its own weights, arranged for few and large matrix products.

The layers between a pretrained encoder and the chart keep content and position apart (Kitaev and Klein 2018,
"Constituency Parsing with a Self-Attentive Encoder", section 3): every matrix has two blocks, one a half of the vector,
which meet only in the attention's scores and in the norms. benepar computes them with einsums over [head, in, 3, out]
weights and an explicit softmax; here a half's queries, keys and values are one product, and attention is fused.
"""

from __future__ import annotations

import torch
from benepar.partitioned_transformer import (
    PartitionedLinear,
    PartitionedTransformerEncoder,
    PartitionedTransformerEncoderLayer,
)
from torch import Tensor
from torch.nn import functional

Halves = tuple[Tensor, Tensor]


class FastPartitionedEncoder:
    """What ``PartitionedTransformerEncoder`` computes in eval mode, up to rounding."""

    def __init__(self, encoder: PartitionedTransformerEncoder, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is that of the matrix products; sums and norms are in the encoder's own."""
        self._layers = [_Layer(layer, dtype) for layer in encoder.layers]

    def __call__(self, vectors: Tensor, valid: Tensor) -> Tensor:
        """Vectors [B, T, d_model] of words, of which ``valid`` [B, T] says which are none of padding."""
        batch, length, width = vectors.shape
        vectors = vectors.reshape(batch * length, width)
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        for layer in self._layers:
            vectors = layer(vectors, mask, batch)
        return vectors.view(batch, length, width)


class _Layer:
    """One layer; vectors are [B * T, d_model], content in the first half."""

    def __init__(self, layer: PartitionedTransformerEncoderLayer, dtype: torch.dtype) -> None:
        attention = layer.self_attn
        heads, inside, three, size = attention.w_qkv_c.shape
        self._dtype, self._heads, self._size = dtype, heads, size
        # [head, in, 3, out] to [3 * head * out, in], [head, in, out] to [out, head * in]
        self._qkv = [
            weight.permute(2, 0, 3, 1).reshape(three * heads * size, inside).to(dtype)
            for weight in (attention.w_qkv_c, attention.w_qkv_p)
        ]
        self._out = [weight.flatten(0, 1).T.to(dtype).contiguous() for weight in (attention.w_o_c, attention.w_o_p)]
        self._scale: float = attention.scaling_factor
        self._up, self._down = (_Linear(linear, dtype) for linear in (layer.linear1, layer.linear2))
        self._norm_attention, self._norm_feed_forward = layer.norm_attn, layer.norm_ff

    def __call__(self, vectors: Tensor, mask: Tensor | None, batch: int) -> Tensor:
        vectors = self._norm_attention(_add(vectors, self._attend(vectors, mask, batch)))
        first, second = self._up(self._halves(vectors))
        halves: Tensor = self._norm_feed_forward(_add(vectors, self._down((first.relu_(), second.relu_()))))
        return halves

    def _attend(self, vectors: Tensor, mask: Tensor | None, batch: int) -> Halves:
        parts = [
            functional.linear(half, weight).view(batch, -1, 3, self._heads, self._size)
            for half, weight in zip(self._halves(vectors), self._qkv, strict=True)
        ]
        # a head's vector is its content, then its position: [B, head, T, 2 * size]
        queries, keys, values = torch.cat(parts, -1).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=self._scale)
        content, position = found.transpose(1, 2).reshape(-1, self._heads, 2, self._size).unbind(2)
        return (
            functional.linear(content.flatten(1), self._out[0]),
            functional.linear(position.flatten(1), self._out[1]),
        )

    def _halves(self, vectors: Tensor) -> Halves:
        content, position = vectors.to(self._dtype).chunk(2, -1)
        return content, position


class _Linear:
    """``PartitionedLinear``, of halves."""

    def __init__(self, linear: PartitionedLinear, dtype: torch.dtype) -> None:
        both = (linear.linear_c, linear.linear_p)
        self._weights = [(one.weight.to(dtype), one.bias.to(dtype)) for one in both]

    def __call__(self, halves: Halves) -> Halves:
        (first, first_bias), (second, second_bias) = self._weights
        return functional.linear(halves[0], first, first_bias), functional.linear(halves[1], second, second_bias)


def _add(vectors: Tensor, halves: Halves) -> Tensor:
    return vectors + torch.cat(halves, -1)
