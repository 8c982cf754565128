"""Write the student as a Hugging Face folder, from whatever partitions it lives in."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mta_ds.engine import distributed
from mta_ds.files import atomic_folder
from mta_ds.models import copy_tokenizer, gathered, quiet_transformers


def export(model: PreTrainedModel, tokenizer_from: Path, output: Path) -> None:
    """Save ``model`` so that ``AutoModelForCausalLM.from_pretrained(output)`` gives equal logits.

    Every rank must call it; parameters are gathered one at a time, and only rank 0 keeps them (in CPU memory). The
    folder appears whole, replacing an older one. Tied weights are written once, as ``save_pretrained`` does.
    """
    weights = _gather_state(model)
    if distributed.rank() == 0:
        with atomic_folder(output) as folder, quiet_transformers():
            model.save_pretrained(folder, state_dict=weights)
            copy_tokenizer(tokenizer_from, folder)
    distributed.barrier()


@torch.no_grad()
def _gather_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The full state dict on rank 0's CPU, empty elsewhere; names that share a parameter share its copy."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    state: dict[str, Tensor] = {}
    for parameter, aliases in names.items():
        with gathered([parameter]):
            if distributed.rank() == 0:
                state |= dict.fromkeys(aliases, parameter.detach().cpu().clone())
    if distributed.rank() == 0:
        persistent = model.state_dict().keys()
        state |= {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in persistent}
    return state
