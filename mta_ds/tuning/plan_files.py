"""A plan as files: both models' plain DeepSpeed JSON, and a YAML override that names them beside the batch's cut.

The override is given to every later command of the run: ``mta-ds train CONFIG @<run_dir>/tune/override.yaml``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mta_ds.files import write_atomic
from mta_ds.tuning.memory import PERSISTENCE_THRESHOLD, SUB_GROUP, Plan
from mta_ds.tuning.shapes import ModelShape


def student_json(plan: Plan, student: ModelShape) -> dict[str, Any]:
    """The DeepSpeed configuration of the student's engine."""
    zero: dict[str, Any] = {
        "stage": plan.student_stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": plan.reduce_bucket_size,
    }
    if plan.student_stage < 3:
        zero["allgather_bucket_size"] = plan.reduce_bucket_size
    else:
        released = student.largest + student.layer_parameters + plan.prefetch_bucket_size
        zero |= {
            "sub_group_size": SUB_GROUP,
            "stage3_prefetch_bucket_size": plan.prefetch_bucket_size,
            "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
            "stage3_max_live_parameters": student.parameters if plan.resident else released,
            # from the first layer's forward to its backward all weights are met twice
            "stage3_max_reuse_distance": 2 * student.parameters if plan.resident else 0,
        }
    if not plan.offload_optimizer:
        return {"zero_optimization": zero}
    zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    # torch's fused AdamW steps on the CPU as well; DeepSpeed asks to be told that it is wanted
    return {"zero_force_ds_cpu_optimizer": False, "zero_optimization": zero}


def teacher_json(plan: Plan) -> dict[str, Any]:
    """The DeepSpeed configuration of the teacher's engine."""
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": plan.prefetch_bucket_size,
        "stage3_param_persistence_threshold": PERSISTENCE_THRESHOLD,
    }
    if plan.teacher_hpz > 1:
        zero["zero_hpz_partition_size"] = plan.teacher_hpz
    if plan.offload_teacher:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero}


def override(plan: Plan, folder: Path) -> dict[str, Any]:
    """The settings of a run that the plan decides, by section."""
    return {
        "teacher": {"deepspeed": str(folder / "teacher.json")},
        "student": {"deepspeed": str(folder / "student.json")},
        "train": {
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "gradient_checkpointing": plan.gradient_checkpointing,
        },
    }


def write_plan(plan: Plan, student: ModelShape, folder: Path) -> Path:
    """Write both DeepSpeed JSONs and the override that names them; returns the override."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "student.json", json.dumps(student_json(plan, student), indent=2) + "\n")
    write_atomic(folder / "teacher.json", json.dumps(teacher_json(plan), indent=2) + "\n")
    path = folder / "override.yaml"
    write_atomic(path, yaml.safe_dump(override(plan, folder), sort_keys=False))
    return path
