"""LoRA for the student: a frozen base with small trained matrices beside its projections (arXiv 2106.09685).

The adapters are peft's, injected into the loaded model, which stays the ``PreTrainedModel`` that the rest of the
package knows: whatever reads hidden states, the head or trainable parameters works on it unchanged. What leaves the run
are two folders, the model with its adapters merged and the adapters alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mta_ds.config import Section
from mta_ds.errors import UserError
from mta_ds.models.partitions import gathered

ALL_LINEAR: Literal["all-linear"] = "all-linear"
_ADAPTER = "default"  # peft's name for a model's only adapter


class LoraConfig(Section):
    """Train low-rank adapters instead of the student's own weights, which stay as they were loaded."""

    r: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    alpha: int = Field(default=32, ge=1)
    """Adapters are scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapters' inputs, where ``train.dropout`` keeps dropout at all."""
    targets: tuple[str, ...] | Literal["all-linear"] = ALL_LINEAR
    """Modules to adapt by the end of their names (q_proj, c_attn, mlp.c_proj), or every matrix but the LM head."""
    use_rslora: bool = False
    """Scale by alpha / √r instead, which keeps large ranks learning (arXiv 2312.03732)."""


class AdapterSize(NamedTuple):
    """How much of a model its adapters are."""

    modules: int
    trainable: int
    """Elements of the adapters."""
    total: int
    """Elements of the base."""


def inject_adapters(model: PreTrainedModel, config: LoraConfig, seed: int, base: str) -> None:
    """Freeze ``model`` and put adapters beside its target modules, in place; call before ``deepspeed.initialize``.

    The base may be in ZeRO-3 partitions already; the adapters are whole, and become partitions with the engine. Their
    values depend on ``seed`` and the model's architecture alone (A is random, B zero), so ranks agree without talking.

    Args:
        base: what the exported adapters name as their base model.

    Raises:
        UserError: peft is not installed, or a target matches no module, or one that cannot be adapted.
    """
    targets = target_names(model, config)
    peft = _import_peft()
    adapters = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in _adaptable(model).values()),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(adapters, model, adapter_name=_ADAPTER)


def base_name(path: str | None, folder: Path) -> str:
    """How an exported adapter names its base: a hub name as it was given, else the folder's absolute path."""
    if path is not None and not Path(path).expanduser().is_dir():
        return path
    return str(folder.resolve())


def target_names(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The ends of module names that ``config`` adapts in ``model``, each of which some adaptable module has.

    Raises:
        UserError: a target that matches no module, or the LM head, an embedding or another that is no matrix.
    """
    adaptable = _adaptable(model)
    known = sorted({name.rpartition(".")[2] for name in adaptable})
    if config.targets == ALL_LINEAR:
        return known
    for target in config.targets:
        matched = [name for name, _ in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not matched:
            raise UserError(
                f"student.lora.targets: no module of {type(model).__name__} is named '{target}'; "
                f"choose from {', '.join(known)}, or {ALL_LINEAR}"
            )
        if unfit := [name for name in matched if name not in adaptable]:
            raise UserError(
                f"student.lora.targets: '{target}' is {unfit[0]}, which cannot be adapted (the losses read the LM head "
                f"as one matrix, and only matrices have adapters); choose from {', '.join(known)}"
            )
    if not config.targets:
        raise UserError(f"student.lora.targets: empty; choose from {', '.join(known)}, or {ALL_LINEAR}")
    return list(config.targets)


def adapter_size(outline: PreTrainedModel, config: LoraConfig) -> AdapterSize:
    """Count what :func:`inject_adapters` would train, and raise what it would raise.

    Args:
        outline: a model without weights; it has the adapters then.
    """
    total = sum(p.numel() for p in outline.parameters())
    with torch.device("meta"):
        inject_adapters(outline, config, seed=0, base="")
    trainable = sum(p.numel() for p in outline.parameters() if p.requires_grad)
    return AdapterSize(len(_lora_layers(outline)), trainable, total)


def plain_parameters(model: PreTrainedModel) -> Iterator[tuple[list[str], Callable[[], Tensor]]]:
    """Every parameter of ``model`` as if it had no adapters: its names, and a function for its value with them merged.

    Every rank must iterate. A parameter, and its adapters, are whole while their item is the current one, and only
    then may the function be called: it adds in float32 and returns a copy, on the parameter's device and in its dtype.
    """
    layers = {layer.base_layer.weight: layer for layer in _lora_layers(model).values()}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not _is_adapter(name):
            names.setdefault(parameter, []).append(name.replace(".base_layer.", "."))
    for parameter, aliases in names.items():
        layer = layers.get(parameter)
        factors = [] if layer is None else [layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight]
        with gathered([parameter, *factors]):
            yield aliases, functools.partial(_merged, parameter, layer)


def adapter_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The adapters' parameters by the names that peft's files give them; empty for a model without adapters."""
    return {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if _is_adapter(name)
    }


def save_adapter(model: PreTrainedModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a folder that ``peft.PeftModel.from_pretrained`` loads: the adapters' configuration and ``tensors``."""
    config = copy.deepcopy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # a set: its order would differ from run to run
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _adaptable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that may have an adapter: matrices, without the LM head, whose weight the losses read themselves."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head}


def _lora_layers(model: PreTrainedModel) -> dict[str, Any]:
    """peft's adapted modules by name; asked without peft, which a run without adapters need not have."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


@torch.no_grad()
def _merged(parameter: nn.Parameter, layer: Any | None) -> Tensor:
    """W + s B A in float32, rounded once; W itself where it has no adapter."""
    if layer is None:
        return parameter.detach().clone()
    a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    return add_low_rank(parameter, a, b, layer.scaling[_ADAPTER], layer.fan_in_fan_out)


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scale: float, transposed: bool) -> Tensor:
    """W + scale · B A, added in float32 and rounded once to W's dtype.

    Args:
        weight: [out, in], or [in, out] if ``transposed`` (GPT-2's Conv1D).
        a, b: [r, in] and [out, r].
    """
    delta = scale * (b.float() @ a.float())
    return (weight.float() + (delta.T if transposed else delta)).to(weight.dtype)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UserError("student.lora needs the package peft: pip install 'mta-ds[lora]'") from None
    return peft
