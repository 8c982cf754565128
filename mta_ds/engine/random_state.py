"""The random states of a rank, in a file without pickle: torch's, the GPU's, NumPy's and Python's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


class RandomState(NamedTuple):
    """What all generators of this process would draw next."""

    tensors: dict[str, torch.Tensor]
    others: dict[str, str]
    """Of Python and NumPy, as JSON, which keeps every number exactly."""


def random_state() -> RandomState:
    """The states of this process, copied."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return RandomState(tensors, {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)})


def write_random_state(state: RandomState, path: Path) -> None:
    """Write a rank's file."""
    save_file(state.tensors, path, state.others)


def restore_random_state(path: Path) -> None:
    """Go on drawing where :func:`random_state` was taken."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        others = {name: json.loads(text) for name, text in file.metadata().items()}
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    np.random.set_state(others["numpy"])
    version, words, gauss = others["python"]
    random.setstate((version, tuple(words), gauss))
