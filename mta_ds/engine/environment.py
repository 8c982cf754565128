"""What a run ran with and on, at each of its starts, so that its numbers can be traced a year later."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mta_ds
from mta_ds.engine import distributed
from mta_ds.engine.metrics import size_until
from mta_ds.files import Appender, write_atomic

logger = logging.getLogger(__name__)

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


def describe_environment(run: dict[str, Any], ranks: Sequence[str]) -> dict[str, Any]:
    """Versions, hardware, launch and the package's own git state.

    Args:
        run: what identifies the run itself, such as its configuration's hash.
        ranks: the machine and device of each.
    """
    slurm = {k: v for k, v in os.environ.items() if k.startswith("SLURM_JOB") or k == "SLURM_NTASKS"}
    return run | {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "world_size": len(ranks),
        "ranks": list(ranks),
        "threads_per_rank": torch.get_num_threads(),
        "slurm": slurm,
    }


def describe_ranks() -> list[str]:
    """Machine and device of each rank; every rank must call it."""
    name = f"CPU ({torch.get_num_threads()} threads)"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(distributed.device())
        name = f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB, GPU {distributed.local_rank()}"
    return distributed.gather_objects(f"{socket.gethostname()}: {name}")


def record_start(run_dir: Path, step: int, config: str, environment: dict[str, Any]) -> None:
    """Write down that the run starts, or goes on after ``step``, with what and on what.

    config.yaml and environment.json are of the newest start, starts.jsonl has all. A full disk is told, and stops
    nobody.

    Args:
        config: the whole configuration as YAML.
    """
    starts = run_dir / "starts.jsonl"
    log = Appender(starts, size_until(starts, math.inf))
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step}
    log.add((json.dumps(row | {"config": config, "environment": environment}) + "\n").encode())
    log.close()
    try:
        write_atomic(run_dir / "config.yaml", config)
        write_atomic(run_dir / "environment.json", json.dumps(environment, indent=1))
    except OSError as error:
        logger.error("config.yaml and environment.json of this start are not written: %s", error)


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
