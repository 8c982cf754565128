"""environment.json: what a run ran on, so that its numbers can be traced a year later."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mta_ds
from mta_ds.engine import distributed

_PACKAGES = [
    "mta-ds",
    "torch",
    "transformers",
    "deepspeed",
    "benepar",
    "spacy",
    "datasets",
    "pyarrow",
    "numpy",
    "numba",
    "safetensors",
    "tokenizers",
    "peft",
]


def describe_environment(run: dict[str, Any]) -> str:
    """Versions, hardware, launch and the package's own git state, as JSON.

    Args:
        run: what identifies the run itself, such as its configuration's hash.
    """
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    slurm = {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB") or k == "SLURM_NTASKS"}
    return json.dumps(
        run
        | {
            "python": sys.version.split()[0],
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "git": _git_state(),
            "cpu_count": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": gpus,
            "cuda": torch.version.cuda,
            "world_size": distributed.world_size(),
            "threads_per_rank": torch.get_num_threads(),
            "slurm": slurm,
        },
        indent=1,
    )


def code_state() -> str:
    """Versions and git state in a line: what all ranks must share."""
    return json.dumps([_git_state(), *(_version(name) for name in _PACKAGES)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> str | None:
    """Commit of the checkout the package runs from, "-dirty" where it differs; None for an installed package."""
    root = Path(mta_ds.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        state = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return state.stdout.strip()
