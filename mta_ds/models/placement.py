"""Where a whole model runs: on one device, or spread over a node's GPUs and its memory if it is too large for one.

For models that write text or are scored outside of training, where one process has the node to itself.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map  # type: ignore[import-untyped]
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import CustomDtype, compute_module_sizes, get_max_memory  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.loading import DeviceMap, Dtype, Quantization, load_config, load_pretrained, model_outline

# The rest of a GPU, or of the node, is for what is computed: keys and values of a batch above all.
_SHARE_OF_WEIGHTS = 0.8


def load_whole(
    path: Path,
    dtype: Dtype,
    *,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """A whole model that is ready to run: on ``device``, or, unless given, on the first GPU, or the CPU without one.

    What the first GPU has no room for is spread, and accelerate's hooks carry the states from one device to the next.
    Such a model still takes its input, and gives its final state, on ``model.device``, where its LM head stands too.
    Only the plan of this has been tested: it has not run on several GPUs.

    Raises:
        UserError: what :func:`load_pretrained` refuses, or a model that fits nowhere.
    """
    load = functools.partial(
        load_pretrained, path, dtype, trust_remote_code=trust_remote_code, quantization=quantization
    )
    if device is None and torch.cuda.is_available():
        outline = model_outline(load_config(path, trust_remote_code), trust_remote_code, dtype=getattr(torch, dtype))
        return _one_device_outside(load(device_map=place(outline, get_max_memory(), quantization))).eval()
    model = load()
    return (model if quantization is not None else model.to(device or "cpu")).eval()  # bitsandbytes has placed it


def place(
    outline: PreTrainedModel, free: Mapping[int | str, int], quantization: Quantization | None = None
) -> DeviceMap:
    """Where the parts of a model go: all to the first GPU if it has the room, else over all, the head to the first.

    Args:
        outline: the model without its weights, in the dtype that they are to have.
        free: bytes free on each GPU, by its number, and of the node's memory ("cpu").

    Raises:
        UserError: it fits nowhere.
    """
    kinds = _stored_as(outline, quantization)
    sizes = compute_module_sizes(outline, **kinds)
    room = {where: int(_SHARE_OF_WEIGHTS * size) for where, size in free.items()}
    host = room.pop("cpu", 0)
    first = min(room)
    if sizes[""] <= room[first]:
        return {"": int(first)}
    head = next(name for name, module in outline.named_modules() if module is outline.get_output_embeddings())
    room[first] = max(0, room[first] - sizes[head])
    # bitsandbytes computes on GPUs alone
    for limits in (room, room | {"cpu": host}) if quantization is None else (room,):
        spread = infer_auto_device_map(outline, limits, outline._no_split_modules, **kinds)
        if "disk" not in spread.values():
            return dict(spread) | {head: int(first)}
    told = ", ".join(f"{size / 1e9:.1f} GB on {where}" for where, size in free.items())
    raise UserError(
        f"{type(outline).__name__}: {sizes[''] / 1e9:.1f} GB of weights do not fit beside what they compute "
        f"(free: {told}); take a node with more, or set teacher.quantization"
    )


def _stored_as(outline: PreTrainedModel, quantization: Quantization | None) -> dict[str, Any]:
    """How accelerate is to count weights: those of the layers as they are rounded, embeddings and head as they are."""
    if quantization is None:
        return {}
    kept = {id(outline.get_input_embeddings().weight), id(outline.get_output_embeddings().weight)}
    return {
        "dtype": torch.int8 if quantization == "8bit" else CustomDtype.INT4,
        "special_dtypes": {name: p.dtype for name, p in outline.named_parameters() if id(p) in kept},
    }


def _one_device_outside(model: PreTrainedModel) -> PreTrainedModel:
    """Let a spread model's body take and give tensors on one device, as its users know no other."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        hook = AlignDevicesHook(model.device, io_same_device=True, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(model.base_model, hook, append=True)
    return model
