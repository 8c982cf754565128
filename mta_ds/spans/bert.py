"""BERT for inference: transformers' weights, arranged for few and large matrix products.

A layer's queries, keys and values are one product; norms and the sums between layers stay in fp32 whatever type the
products have, which halves what bf16 costs in digits; and the last layer is computed for those positions alone that
somebody reads, while it attends to all.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertLayer


def is_plain_bert(model: PreTrainedModel | None) -> TypeGuard[BertModel]:
    """Whether :class:`FastBert` computes what the model does."""
    if model is None or type(model) is not BertModel:
        return False
    config: BertConfig = model.config
    return not config.is_decoder and getattr(config, "position_embedding_type", "absolute") == "absolute"


class FastBert:
    """What a ``BertModel`` computes in eval mode, up to rounding."""

    def __init__(self, model: BertModel, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is that of the matrix products; the model's own parameters are fp32 and stay so."""
        self._embeddings = model.embeddings
        self._layers = [_Layer(layer, ACT2FN[model.config.hidden_act], dtype) for layer in model.encoder.layer]

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> Tensor:
        """Last hidden states [B, W, d] at the positions ``index`` [B, W] of a padded batch [B, T]."""
        valid = batch["attention_mask"].bool()
        mask = None if bool(valid.all()) else valid[:, None, None, :]
        vectors: Tensor = self._embeddings(batch["input_ids"], batch.get("token_type_ids"))
        for layer in self._layers[:-1]:
            vectors = layer(vectors, vectors, mask)
        read = vectors.gather(1, index[:, :, None].expand(-1, -1, vectors.shape[-1]))
        return self._layers[-1](read, vectors, mask) if self._layers else read


class _Layer:
    def __init__(self, layer: BertLayer, activation: torch.nn.Module, dtype: torch.dtype) -> None:
        attention, self._activation, self._dtype = layer.attention.self, activation, dtype
        self._heads, self._scale = attention.num_attention_heads, attention.scaling
        three = (attention.query, attention.key, attention.value)
        self._weight = torch.cat([linear.weight for linear in three]).to(dtype)
        self._bias = torch.cat([linear.bias for linear in three]).to(dtype)
        linears = (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)
        self._out, self._up, self._down = ((linear.weight.to(dtype), linear.bias.to(dtype)) for linear in linears)
        self._norms = layer.attention.output.LayerNorm, layer.output.LayerNorm

    def __call__(self, read: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        """New ``read`` [B, W, d], which attends to ``vectors`` [B, T, d]; both may be the same."""
        found = self._norms[0](read + functional.linear(self._attend(read, vectors, mask), *self._out))
        inner = self._activation(functional.linear(found.to(self._dtype), *self._up))
        result: Tensor = self._norms[1](found + functional.linear(inner, *self._down))
        return result

    def _attend(self, read: Tensor, vectors: Tensor, mask: Tensor | None) -> Tensor:
        width, rounded = len(self._weight) // 3, vectors.to(self._dtype)
        if read is vectors:
            queries, keys, values = functional.linear(rounded, self._weight, self._bias).chunk(3, -1)
        else:
            queries = functional.linear(read.to(self._dtype), self._weight[:width], self._bias[:width])
            keys, values = functional.linear(rounded, self._weight[width:], self._bias[width:]).chunk(2, -1)
        queries, keys, values = (
            part.view(*part.shape[:2], self._heads, -1).transpose(1, 2) for part in (queries, keys, values)
        )
        found = functional.scaled_dot_product_attention(queries, keys, values, mask, scale=self._scale)
        return found.transpose(1, 2).flatten(2)
