"""Write the student as a Hugging Face folder, from whatever partitions it lives in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mta_ds.engine import distributed
from mta_ds.files import atomic_folder, fsync_directory
from mta_ds.models import (
    adapter_parameters,
    copy_tokenizer,
    gathered,
    plain_parameters,
    quiet_transformers,
    save_adapter,
)

ADAPTER = "adapter"


def export(model: PreTrainedModel, tokenizer_from: Path, output: Path) -> None:
    """Save ``model`` so that ``AutoModelForCausalLM.from_pretrained(output)`` gives equal logits.

    Adapters are merged there, and written by themselves to ``output/adapter``, as peft reads them.

    Every rank must call it; parameters are gathered one at a time, and only rank 0 keeps them (in CPU memory). The
    folder appears whole, replacing an older one. Tied weights are written once, as ``save_pretrained`` does.
    """
    weights = _gather_state(model)
    adapters = _gather_adapters(model)
    if distributed.rank() == 0:
        with atomic_folder(output) as folder, quiet_transformers():
            model.save_pretrained(folder, state_dict=weights)
            copy_tokenizer(tokenizer_from, folder)
            if adapters:
                save_adapter(model, adapters, folder / ADAPTER)
                fsync_directory(folder / ADAPTER)
    distributed.barrier()


@torch.no_grad()
def _gather_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The full plain state dict on rank 0's CPU, empty elsewhere; names that share a parameter share its copy."""
    state: dict[str, Tensor] = {}
    for names, value in plain_parameters(model):
        if distributed.rank() == 0:
            state |= dict.fromkeys(names, value().cpu())
    if distributed.rank() == 0:
        persistent = model.state_dict().keys()
        state |= {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in persistent}
    return state


@torch.no_grad()
def _gather_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters alone, by peft's names, on rank 0's CPU; empty elsewhere."""
    adapters: dict[str, Tensor] = {}
    for name, parameter in adapter_parameters(model).items():
        with gathered([parameter]):
            if distributed.rank() == 0:
                adapters[name] = parameter.detach().cpu().clone()
    return adapters
