"""Whether loaded weights are the files': every tensor's hash, whole or out of its ZeRO-3 partitions.

Loading has silently re-initialised or permuted weights before (transformers#43257, #45313), and a partition passes
through several hands. A check reads all files once more, so it is asked for (``train.verify_weights``).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.initialise import weight_files
from mta_ds.models.partitions import gathered


def verify_weights(model: PreTrainedModel, folder: Path) -> int:
    """Compare each parameter with the tensor of its name in ``folder``, in the parameter's dtype; every rank must call.

    Returns:
        The number of tensors compared.

    Raises:
        UserError: a tensor differs, or has another name in the files; only after all have been gathered.
    """
    files = _tensor_files(folder)
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    wrong: list[str] = []
    for parameter, aliases in names.items():
        with gathered([parameter]):
            stored = _stored(files, aliases, model.base_model_prefix)
            if stored is None:
                wrong.append(f"'{aliases[0]}' has another name in the files")
            elif tensor_hash(parameter.detach()) != tensor_hash(stored.to(parameter.dtype)):
                wrong.append(f"'{aliases[0]}' differs from the files")
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} of {len(names)} weights are not those of the files (first: {wrong[0]}); "
            "load the model with transformers, save it again with save_pretrained, or set train.verify_weights: false",
            on_every_rank=True,
        )
    return len(names)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in memory order, so that NaNs and signed zeros count too."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _stored(files: dict[str, Path], aliases: list[str], prefix: str) -> Tensor | None:
    """The file's tensor under any name that a parameter has; a base model's files lack the prefix."""
    for alias in aliases:
        for name in (alias, alias.removeprefix(f"{prefix}.")):
            if name in files:
                with safe_open(files[name], framework="pt") as tensors:
                    tensor: Tensor = tensors.get_tensor(name)
                    return tensor
    return None
