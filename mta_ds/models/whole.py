"""A model out of its ZeRO-3 partitions, whole on every rank, for as long as it generates.

Generating from partitions would gather every layer again for every token. One gather and a plain copy take the memory
of the model in its own dtype, and give it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.lora import plain_parameters


@contextmanager
def whole_copy(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A plain model with the values that ``model`` has now, adapters merged; ``model`` itself if it is whole.

    Every rank must enter it; inside, ranks do not depend on one another.

    Raises:
        UserError: the copy does not fit into what is free of this rank's GPU.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield model
        return
    _insist_on_room(model)
    with torch.device("meta"):  # of the model's own class: it may be one that came with its folder
        copy: PreTrainedModel = type(model)._from_config(
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


def _insist_on_room(model: PreTrainedModel) -> None:
    """Refuse a copy that would end in an out-of-memory error halfway through its gathers.

    Ranks hold equally much and find the same; where they do not, whoever refuses ends the run.
    """
    if not torch.cuda.is_available():
        return
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # torch keeps what it has freed
    if needed > (free := torch.cuda.mem_get_info()[0] + unused):
        raise UserError(
            f"{type(model).__name__}: whole, as it has to be to write text, it takes {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB of this rank's GPU are free; write the text before the run ('mta-ds generate' "
            "spreads a model over a node's GPUs), or give the GPU more room (fewer sequences, more ranks, offload)"
        )
