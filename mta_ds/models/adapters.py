"""A teacher with its LoRA adapter merged: one plain model folder, which every stage then loads by the one strict path.

Streamed from file to file: at most one file of the base's weights is in memory, so that a 70B teacher merges on any
host. Needs no peft, only the format of its files. What is not plain LoRA is refused rather than merged wrongly.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, sha256
from mta_ds.models.initialise import INDEX, copy_code, copy_tokenizer, weight_files
from mta_ds.models.loading import load_config, model_outline
from mta_ds.models.lora import add_low_rank

_FORMAT = 1  # of the merge: a change makes old caches stale
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.weight")
_PREFIX = "base_model.model."
# Options that change what an adapter's tensors mean, or the model around them.
_VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "velora_config",
)
# Initial values that leave the base as it is; the others (PiSSA, OLoRA, CorDA, ...) have moved a part of it into A, B.
_PLAIN_INITS = (True, False, None, "gaussian", "eva")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of one matrix: scale · B A."""

    a: Tensor
    """[r, in]"""
    b: Tensor
    """[out, r]"""
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter folder holds, by the names that modules and parameters have in the model."""

    folder: Path
    low_rank: dict[str, LowRank]
    """By module."""
    replaced: dict[str, Tensor]
    """Parameters that were trained whole (modules_to_save, biases)."""


def merged_folder(base: Path, adapter: Path | None, cache: Path, trust_remote_code: bool = False) -> Path:
    """The folder of ``base`` with ``adapter`` merged, made in ``cache`` unless it is there; without one, ``base``.

    Its name has a hash of both inputs, so that an adapter trained on, or another base, is merged anew.

    Raises:
        UserError: the adapter is none, is of a kind that cannot be merged, or does not fit the base.
    """
    if adapter is None:
        return base
    read = read_adapter(adapter)
    output = cache / f"teacher-merged-{_identity(base, adapter)}"
    if not output.is_dir():
        merge(base, read, output, trust_remote_code)
    return output


def read_adapter(folder: Path) -> Adapter:
    """Read a folder that peft's ``save_pretrained`` has written.

    Raises:
        UserError: no adapter, weights as a pickle, or an adapter that is not plain LoRA.
    """
    config = _read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        if pickles := sorted(folder.glob("adapter_model*.bin")):
            raise UserError(
                f"{pickles[0]}: a pickle can run code and is not loaded; load the adapter with peft where it is "
                "trusted and save it with save_pretrained, which writes safetensors"
            )
        raise UserError(f"{folder}: no LoRA adapter, it has no adapter_model.safetensors")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: damaged: {error}") from None
    factors: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if found := _FACTOR.fullmatch(name):
            factors.setdefault(found[1], {})[found[2]] = tensor
        elif "lora_" in name:
            raise UserError(f"{file}: '{key}' is not one of plain LoRA's matrices; merge this adapter with peft")
        else:
            replaced[name] = tensor
    for module, pair in factors.items():
        if len(pair) < 2 or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{file}: damaged: '{module}' lacks lora_A or lora_B, or their ranks differ")
    if not factors:
        raise UserError(f"{file}: no LoRA adapter, it has no lora_A and lora_B")
    low_rank = {m: LowRank(p["A"], p["B"], _scale(config, m, p["A"].shape[0])) for m, p in factors.items()}
    return Adapter(folder, low_rank, replaced)


def merge(base: Path, adapter: Adapter, output: Path, trust_remote_code: bool = False) -> None:
    """Write ``base`` with ``adapter`` merged to ``output``; W + scale · B A is added in float32, W keeps its dtype.

    Raises:
        UserError: the adapter does not fit the base, or the base's weights are not in safetensors.
    """
    config = load_config(base, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{base}: its weights are quantised; merging needs a model in bfloat16, float16 or float32")
    skeleton = model_outline(config, trust_remote_code)
    transposed = _check_fit(adapter, skeleton, base)
    files = weight_files(base)
    stored: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            stored.update(tensors.keys())
    prefix = f"{skeleton.base_model_prefix}."

    def stored_name(name: str) -> str:
        # a base model's checkpoint lacks the prefix that the same weights have in the causal language model
        found = next((n for n in (name, name.removeprefix(prefix)) if n in stored), None)
        if found is None:
            raise UserError(
                f"{base}: its files store '{name}', which {adapter.folder} changes, under another name; "
                "load the model with transformers and save it again with save_pretrained"
            )
        return found

    changes = {stored_name(f"{module}.weight"): module for module in adapter.low_rank}
    replaced = {stored_name(name): tensor for name, tensor in adapter.replaced.items()}
    with atomic_folder(output, keep_existing=True) as folder:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                shard = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
            for name, weight in shard.items():
                if name in replaced:
                    shard[name] = replaced[name].to(weight.dtype)
                elif (module := changes.get(name)) is not None:
                    change = adapter.low_rank[module]
                    shard[name] = add_low_rank(weight, change.a, change.b, change.scale, transposed[module])
            save_file(shard, folder / file.name, {"format": "pt"})
        for file in (base / "config.json", base / INDEX):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        copy_code(base, folder)
        copy_tokenizer(base, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    if not file.is_file():
        raise UserError(f"{folder}: no LoRA adapter, it has no adapter_config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not an adapter's configuration ({type(error).__name__}: {error})") from None
    if kind != "LORA":
        raise UserError(f"{file}: the adapter is {kind}; only LoRA can be merged here, merge it with peft")
    if variants := [name for name in _VARIANTS if config.get(name)]:
        raise UserError(f"{file}: {variants[0]} is more than plain LoRA; merge this adapter with peft")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise UserError(f"{file}: adapters initialised by {init} change the base as well; merge this one with peft")
    return config  # type: ignore[no-any-return]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / √r of rank-stabilised LoRA; alpha may depend on the module, and r is what the file has."""
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _check_fit(adapter: Adapter, skeleton: PreTrainedModel, base: Path) -> dict[str, bool]:
    """Whether each adapted module keeps its matrix as [in, out]; UserError where the adapter is another model's."""
    modules = dict(skeleton.named_modules())
    shapes = {name: tuple(value.shape) for name, value in skeleton.state_dict(keep_vars=True).items()}
    transposed: dict[str, bool] = {}
    for name, change in adapter.low_rank.items():
        module = modules.get(name)
        if not isinstance(module, (nn.Linear, Conv1D)):
            what = f"no module '{name}'" if module is None else f"a {type(module).__name__} as '{name}', no matrix"
            raise UserError(f"{adapter.folder}: the adapter of another base: {base} has {what}")
        transposed[name] = isinstance(module, Conv1D)
        ours = (change.b.shape[0], change.a.shape[1])
        theirs = shapes[f"{name}.weight"][:: -1 if transposed[name] else 1]
        if ours != theirs:
            raise UserError(
                f"{adapter.folder}: the adapter of another base: it changes a {ours[0]} × {ours[1]} matrix '{name}', "
                f"which has {theirs[0]} × {theirs[1]} in {base}"
            )
    for name, tensor in adapter.replaced.items():
        if shapes.get(name) != tuple(tensor.shape):
            found = "none" if name not in shapes else f"{list(shapes[name])}"
            raise UserError(
                f"{adapter.folder}: the adapter replaces '{name}' by {list(tensor.shape)}, {base} has {found}; "
                "a model with added tokens must be merged with peft"
            )
    _refuse_tied(adapter, skeleton)
    return transposed


def _refuse_tied(adapter: Adapter, skeleton: PreTrainedModel) -> None:
    """A weight that two modules share cannot change in one of them and stay one."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    tied = {name: aliases for aliases in names.values() if len(aliases) > 1 for name in aliases}
    for name in (*(f"{module}.weight" for module in adapter.low_rank), *adapter.replaced):
        if name in tied:
            raise UserError(
                f"{adapter.folder}: the adapter changes '{name}', which the base ties ({' = '.join(tied[name])}); "
                "untie the model and merge with peft"
            )


def _identity(base: Path, adapter: Path) -> str:
    """Hash of what a merge depends on; the base's large files by name, size and time."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(base)]
    hashes = [sha256(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")]
    return hashlib.sha256(json.dumps([_FORMAT, str(base.resolve()), stats, hashes]).encode()).hexdigest()[:16]
