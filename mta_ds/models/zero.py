"""DeepSpeed configurations: the user's plain JSON (or the default), completed with what the run's YAML decides."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from mta_ds.errors import UsageError
from mta_ds.models.loading import Dtype

# Buckets far below DeepSpeed's 5e8 elements, which alone are 1 GB a buffer in half precision.
DEFAULT: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }
}

DEEPSPEED_PREFETCH = 50_000_000
"""Elements that DeepSpeed gathers ahead where a configuration does not say."""
SMALL_LAYER = 1 << 24
"""Elements of a layer that takes longer to ask for than to send."""

# What the YAML owns; a JSON that says it too could only disagree.
_OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)


def read_deepspeed_config(path: Path | None) -> dict[str, Any]:
    """A DeepSpeed JSON as written, or the default.

    Raises:
        UsageError: no such file, bad JSON, or a key that the run's YAML owns.
    """
    if path is None:
        return copy.deepcopy(DEFAULT)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot read the DeepSpeed config: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from None
    for key in _OWNED:
        if config.get(key, "auto") != "auto":
            raise UsageError(f"{path}: '{key}' is set by the run's YAML (section train); remove it or write \"auto\"")
        config.pop(key, None)
    return config


def is_fetched_whole(layer_elements: int, prefetch_bucket_size: int) -> bool:
    """Whether ZeRO-3 gathers a frozen decoder layer at once: it is small, or the next one still fits ahead of it."""
    return layer_elements <= max(prefetch_bucket_size, SMALL_LAYER)


def student_config(
    path: Path | None,
    dtype: Dtype,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    world_size: int,
    gradient_clipping: float,
) -> dict[str, Any]:
    """The student engine's configuration; ZeRO stage 1, 2 or 3."""
    config = read_deepspeed_config(path)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise UsageError(f"{path}: zero_optimization.stage is {stage}; the student runs under stage 1, 2 or 3")
    if world_size == 1:  # nothing is sent, so nothing need be collected for it: a copy of every gradient less
        config["zero_optimization"].setdefault("contiguous_gradients", False)
    return (
        config
        | _precision(dtype)
        | {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "train_batch_size": micro_batch_size * gradient_accumulation_steps * world_size,
            "gradient_clipping": gradient_clipping,
        }
    )


def teacher_config(
    path: Path | None, dtype: Dtype, micro_batch_size: int, on_this_machine: bool = True
) -> dict[str, Any]:
    """The frozen teacher engine's configuration; DeepSpeed partitions a model without optimizer under stage 3 only.

    Args:
        on_this_machine: see :func:`check_offload`.
    """
    config = read_deepspeed_config(path)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise UsageError(f"{path}: zero_optimization.stage is {stage}; a frozen teacher runs under stage 3 only")
    check_offload(path, config["zero_optimization"].get("offload_param") or {}, on_this_machine)
    return config | _precision(dtype) | {"train_micro_batch_size_per_gpu": micro_batch_size}


def check_offload(path: Path | None, offload: dict[str, Any], on_this_machine: bool = True) -> None:
    """Refuse an ``offload_param`` that DeepSpeed would find out about when the model is half loaded.

    Args:
        on_this_machine: whether the folder and async_io must be there; a login node need not have them.

    Raises:
        UsageError: another device than cpu, nvme and none; nvme without a folder, or where async_io cannot be built.
    """
    device = offload.get("device", "none")
    if device not in ("none", "cpu", "nvme"):
        raise UsageError(f"{path}: offload_param.device is '{device}'; choose cpu, nvme or none")
    if device != "nvme":
        return
    folder = offload.get("nvme_path")
    if folder is None or (on_this_machine and not Path(folder).is_dir()):
        raise UsageError(f"{path}: offload_param.nvme_path: {folder or 'missing'}; name a folder on the NVMe disk")
    if not on_this_machine:
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UsageError(
            f"{path}: offload_param.device nvme needs DeepSpeed's async_io, which cannot be built here "
            "(libaio's headers: libaio-dev or libaio-devel); install them, or set device: cpu"
        )


def _precision(dtype: Dtype) -> dict[str, Any]:
    # without the check, ZeRO-1 and 2 make an update of NaN in bfloat16
    return {"bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": True}}
