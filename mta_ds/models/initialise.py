"""Make the folder a student starts from, where it is not a trained model already: a cut of the teacher, or random.

Every student is then loaded from a folder by the one strict, partitioned path, and the run keeps what it began with. A
folder says what it was made of, and is made again when that has changed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from mta_ds.errors import UserError
from mta_ds.files import atomic_folder, write_atomic
from mta_ds.models.body import decoder_layers_named
from mta_ds.models.loading import TOKENIZER_FILES, load_config, model_outline, quiet_transformers

INDEX = "model.safetensors.index.json"
"""Of a sharded model: which file has which tensor."""


def every_kth(num_layers: int, k: int) -> tuple[int, ...]:
    """Every k-th layer index (from 0), counted down from the top so that the last layer is kept."""
    if not 1 <= k <= num_layers:
        raise UserError(f"student.teacher_layers: every {k}-th layer of a teacher with {num_layers} layers")
    return tuple(sorted(range(num_layers - 1, -1, -k)))


def cut_layers(teacher: Path, layers: Sequence[int] | int, output: Path, trust_remote_code: bool = False) -> Path:
    """Write the model that has only the given ``layers`` (from 0, rising) of ``teacher``, with its tokenizer.

    Nothing is done where that is at ``output`` already. Streams file by file: at most one file of the teacher's weights
    is in memory.

    Raises:
        UserError: a layer that does not exist, or a teacher without safetensors.
    """
    config = load_config(teacher, trust_remote_code)
    total = config.num_hidden_layers
    kept = every_kth(total, layers) if isinstance(layers, int) else tuple(layers)
    bad = [layer for layer in kept if not 0 <= layer < total]
    if bad or not kept or list(kept) != sorted(set(kept)):
        raise UserError(
            f"student.teacher_layers: {' '.join(map(str, kept))}: must be rising, from 0 to {total - 1} ({teacher})"
        )
    files = weight_files(teacher)
    recipe = _recipe(teacher, layers=kept)
    if _is_made_by(recipe, output):
        return output
    pattern = _layer_pattern(config, trust_remote_code)
    renumbered = {old: new for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        found = pattern.search(name)
        if found is None:
            return name
        new = renumbered.get(int(found.group(2)))
        return None if new is None else f"{name[: found.start(2)]}{new}{name[found.end(2) :]}"

    with atomic_folder(output) as folder:
        weight_map: dict[str, str] = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                renames = {name: new for name in tensors.keys() if (new := rename(name)) is not None}  # noqa: SIM118
                if renames:
                    save_file({new: tensors.get_tensor(n) for n, new in renames.items()}, folder / file.name, _METADATA)
            weight_map |= dict.fromkeys(renames.values(), file.name)
        _write_index(folder, weight_map)
        cut_config(config, kept).save_pretrained(folder)
        copy_code(teacher, folder)
        copy_tokenizer(teacher, folder)
        (folder / _RECIPE).write_text(recipe, encoding="utf-8")
    return output


def random_student(
    config_path: Path, seed: int, tokenizer_from: Path, output: Path, trust_remote_code: bool = False
) -> Path:
    """Write a model with random weights (float32, ``seed``) by a config.json, with the teacher's tokenizer.

    Nothing is done where that is at ``output`` already.
    """
    source = config_path.parent if config_path.name == "config.json" else config_path
    config = load_config(source, trust_remote_code)
    recipe = _recipe(tokenizer_from, config=config.to_dict(), seed=seed)
    if _is_made_by(recipe, output):
        return output
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    with atomic_folder(output) as folder, quiet_transformers():
        model.save_pretrained(folder)
        copy_code(source, folder)
        copy_tokenizer(tokenizer_from, folder)
        (folder / _RECIPE).write_text(recipe, encoding="utf-8")
    return output


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model: as its index names them, whatever else lies in the folder.

    Raises:
        UserError: there are none, or one is missing.
    """
    names = ["model.safetensors"]
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"{folder}: needs weights in safetensors, as save_pretrained writes them; no {missing[0]}")
    return [folder / name for name in names]


def copy_code(source: Path, target: Path) -> None:
    """Copy the Python files of a model that brings code of its own."""
    for file in source.glob("*.py"):
        shutil.copyfile(file, target / file.name)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files that make up a tokenizer (and the generation settings), those there are."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


_METADATA = {"format": "pt"}
_RECIPE = "made_of.json"
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists of a config, an entry a decoder layer
_SAMPLES, _SAMPLE_BYTES = 64, 65_536  # of a file: all of a small one


def _recipe(teacher: Path, **settings: Any) -> str:
    """What a student is made of: the teacher's files by their content, sampled, for they may be of many GB."""
    files = [
        path
        for path in sorted(teacher.iterdir())
        if path.suffix in (".safetensors", ".py") or path.name in TOKENIZER_FILES
    ]
    return json.dumps({"files": {path.name: _sampled_hash(path) for path in files}} | settings, indent=1, default=str)


def _sampled_hash(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek(sample * size // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _is_made_by(recipe: str, folder: Path) -> bool:
    path = folder / _RECIPE
    return path.is_file() and path.read_text(encoding="utf-8") == recipe


def _layer_pattern(config: PretrainedConfig, trust_remote_code: bool) -> re.Pattern[str]:
    """Matches a decoder layer's tensor name; group 2 is the layer's number.

    Only the list's own name is matched ("h", "layers"), as base-model checkpoints lack the prefix before it.
    """
    list_name = decoder_layers_named(model_outline(config, trust_remote_code))[0].rpartition(".")[2]
    return re.compile(rf"(^|\.){re.escape(list_name)}\.(\d+)\.")


def cut_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """The config of the model that has only the layers ``kept`` (from 0)."""
    cut = copy.deepcopy(config)
    total = config.num_hidden_layers
    for name in _PER_LAYER:
        per_layer: Any = getattr(config, name, None)
        if isinstance(per_layer, list) and len(per_layer) == total:
            setattr(cut, name, [per_layer[i] for i in kept])
    cut.num_hidden_layers = len(kept)
    if getattr(cut, "max_window_layers", None) is not None:
        cut.max_window_layers = min(cut.max_window_layers, len(kept))
    return cut


def _write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """The sharded checkpoint's index, or the plain name where one file holds everything."""
    names = sorted(set(weight_map.values()))
    if len(names) == 1:
        (folder / names[0]).rename(folder / "model.safetensors")
        return
    size = sum((folder / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(index, indent=1))
