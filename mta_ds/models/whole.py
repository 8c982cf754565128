"""A model out of its ZeRO-3 partitions, whole on every rank, for as long as it generates.

Generating from partitions would gather every layer again for every token. One gather and a plain copy take the memory
of the model in its own dtype, and give it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mta_ds.models.lora import plain_parameters


@contextmanager
def whole_copy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A plain model with the values that ``model`` has now, adapters merged; ``model`` itself if it is whole.

    Every rank must enter it; inside, ranks do not depend on one another.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield model
        return
    with torch.device("meta"):
        copy: PreTrainedModel = AutoModelForCausalLM.from_config(
            model.config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    copy.generation_config = model.generation_config
    for names, value in plain_parameters(model):
        parameter = nn.Parameter(value(), requires_grad=False)
        for name in names:
            parent, _, leaf = name.rpartition(".")
            setattr(copy.get_submodule(parent), leaf, parameter)
    for name, buffer in model.named_buffers():
        parent, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
        copy.get_submodule(parent)._buffers[leaf] = buffer.clone()
    yield copy.eval()
