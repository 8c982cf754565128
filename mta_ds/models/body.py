"""A causal language model without its logits: run the body and hand out each key layer's hidden state as it emits.

Numbering is transformers': ``hidden_states[l]`` is the output of the l-th layer, and for the last layer the model's
final state, which most models return after their final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.loading import output_head

OnLayer = Callable[[int, Tensor], None]


class CausalBody(nn.Module):
    """Wraps ``model`` so that an engine's forward never computes logits; the head is read by whoever owns the loss."""

    def __init__(self, model: PreTrainedModel, key_layers: Sequence[int], num_layers: int | None = None) -> None:
        """``num_layers`` is the whole model's depth, where ``model`` has been truncated."""
        super().__init__()
        self.model = model
        self.key_layers = tuple(key_layers)
        self.num_layers = num_layers or len(decoder_layers(model))
        self._on_layer: OnLayer | None = None
        assert all(1 <= layer <= self.num_layers for layer in self.key_layers)

    @property
    def head(self) -> nn.Parameter:
        """The LM head's weight [vocabulary, hidden]."""
        return output_head(self.model)

    def norm(self, hidden: Tensor) -> Tensor:
        """A lower layer's state [n, d] through the model's final norm."""
        normed: Tensor = final_norm(self.model)(hidden)
        return normed

    def register_taps(self) -> None:
        """Put the hooks on the key layers: once, and after ``deepspeed.initialize``.

        Hooks that are there before DeepSpeed's own see size-0 weights in backward, and hooks that come and go between
        steps invalidate ZeRO-3's parameter trace.
        """
        layers = decoder_layers(self.model)
        for number in self.key_layers:
            if number < self.num_layers:
                layers[number - 1].register_forward_hook(self._tap(number))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Final hidden state [B, T, d]; calls ``on_layer(l, hidden [B, T, d])`` for each key layer, lowest first.

        Args:
            input_ids, attention_mask: int64 [B, T].
            on_layer: must not raise: an exception inside a ZeRO-3 forward leaves the engine unusable.
        """
        # One sink at a time, none outside a forward: recomputation in backward finds nobody to hand out to.
        self._on_layer = on_layer
        try:
            output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            self._on_layer = None
        final: Tensor = output.last_hidden_state
        if on_layer is not None and self.num_layers in self.key_layers:
            on_layer(self.num_layers, final)
        return final

    def _tap(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self._on_layer is not None:
                self._on_layer(number, output[0] if isinstance(output, tuple) else output)

        return hook


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of the model's decoder layers, found by its length: every architecture names it differently.

    Raises:
        UserError: the model has no list of ``num_hidden_layers`` modules.
    """
    return decoder_layers_named(model)[1]


def decoder_layers_named(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """:func:`decoder_layers` with its dotted name inside ``model`` ("transformer.h", "model.layers")."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise UserError(f"{type(model).__name__}: cannot find its decoder layers; the architecture is not supported")


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last decoder layer and the head: the last one that is in no decoder layer.

    Raises:
        UserError: the model has none (some OPT).
    """
    inside, _ = decoder_layers_named(model)
    norms = [
        module
        for name, module in model.base_model.named_modules(prefix=model.base_model_prefix)
        if "norm" in type(module).__name__.lower() and not name.startswith(f"{inside}.")
    ]
    if not norms:
        raise UserError(f"{type(model).__name__}: has no final norm; set loss.final_norm: false")
    norm: nn.Module = norms[-1]
    return norm


def truncate(model: PreTrainedModel, num_layers: int) -> None:
    """Drop every decoder layer above ``num_layers``, in place: nobody reads them, so they cost no memory and no gather.

    The hidden states below stay bit-identical; the final state then means nothing.
    """
    layers = decoder_layers(model)
    del layers[num_layers:]
    model.config.num_hidden_layers = num_layers


def state_width(config: PretrainedConfig, layer: int) -> int:
    """Width of ``hidden_states[layer]``; a model that projects its final state (some OPT) narrows the last one."""
    if layer == config.num_hidden_layers and getattr(config, "word_embed_proj_dim", None):
        return int(config.word_embed_proj_dim)
    return int(config.hidden_size)


@torch.no_grad()
def count_parameters(model: nn.Module) -> int:
    """Number of elements, also where ZeRO-3 holds only a partition."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
