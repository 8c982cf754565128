"""What a model's layers keep and need, read off the model itself on the meta device: no weights, no memory, no guesses.

A formula for activations knows one architecture. Here one and two decoder layers run on tensors without data, and what
autograd saves, and what exists at once, is added up; attention is outlined as a fused kernel, which keeps its inputs,
its output and a row's log-sum-exp, and no matrix of scores. A model without fused attention (Gemma 2) runs its own.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.body import decoder_layers
from mta_ds.models.initialise import cut_config
from mta_ds.models.loading import model_outline

_ATTENTION = "mta_ds_outline"


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes for each token of a batch, padding included."""

    saved: float
    """That autograd keeps of one decoder layer until backward."""
    saved_outside: float
    """The same of everything outside the decoder layers: embeddings and the final norm."""
    working: float
    """That exist at once while one layer runs without autograd, its input and output included."""


def outline(
    config: PretrainedConfig, dtype: torch.dtype, num_tokens: int, trust_remote_code: bool = False
) -> LayerBytes:
    """Measure a decoder layer of ``config`` in ``dtype`` on one sequence of ``num_tokens``.

    Where attention is not fused, a token's bytes grow with the sequence: on shorter ones they are an upper bound.

    Raises:
        UserError: the model's forward looks at values, as a mixture of experts does, so that it cannot be outlined.
    """
    AttentionInterface.register(_ATTENTION, _attention)
    own = model_outline(cut_config(config, range(1)), trust_remote_code).config._attn_implementation
    options = {} if own == "eager" else {"attn_implementation": _ATTENTION}
    models = [
        model_outline(cut_config(config, range(layers)), trust_remote_code, dtype=dtype, **options)
        for layers in (1, min(2, config.num_hidden_layers))
    ]
    try:
        saved = [_saved_bytes(model, num_tokens) for model in models]
        working = _working_bytes(models[0], num_tokens)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{type(models[0]).__name__}: its layers cannot be sized without weights ({reason})") from None
    one = saved[1] - saved[0] if config.num_hidden_layers > 1 else saved[0]
    return LayerBytes(one / num_tokens, max(0, saved[0] - one) / num_tokens, working / num_tokens)


def _run(model: PreTrainedModel, num_tokens: int) -> Tensor:
    ids = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
    # beside a mask nobody looks for packed sequences, which only values could tell; fused attention is outlined without
    mask = torch.ones_like(ids) if model.config._attn_implementation == "eager" else None
    hidden: Tensor = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden


def _saved_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Bytes of all that autograd saves in a forward, parameters apart."""
    known = {_key(p) for p in model.parameters()} | {_key(b) for b in model.buffers()}
    kept: dict[int, Tensor] = {}  # the tensor beside its key: a storage that is gone could give its address away

    def pack(tensor: Tensor) -> Tensor:
        if (key := _key(tensor)) not in known:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _run(model, num_tokens)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@torch.no_grad()
def _working_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """The most bytes that exist at once inside the first decoder layer, without autograd; parameters apart."""
    counter = _LiveBytes(model)
    layer: nn.Module = decoder_layers(model)[0]
    peaks: list[int] = []

    def begin(*_: Any) -> None:
        counter.peak = counter.live

    def end(*_: Any) -> None:
        peaks.append(counter.peak)

    layer.register_forward_pre_hook(begin)
    layer.register_forward_hook(end)
    with counter:
        _run(model, num_tokens)
    return peaks[0]


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made, and those alive at once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {_key(p) for p in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, storage.nbytes())
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Attention(torch.autograd.Function):
    """The shapes of a fused attention and of what it keeps; there are no values to compute."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        raise AssertionError("an outline has no backward")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Query heads [B, H, T, d]; fewer key heads are repeated, as they are beside a mask."""
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None
