"""What tune writes loads in the product: the override in a run's YAML, both JSONs in its engines and in DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from support import CPU_TEST
from tuning_cases import PRESETS, preset, small_plan, small_work

from mta_ds.config import dump, load
from mta_ds.engine import RunConfig
from mta_ds.models import student_config, teacher_config
from mta_ds.models.zero import read_deepspeed_config
from mta_ds.tuning.plan_files import write_plan

PLANS = {
    "stage 1": small_plan(student_stage=1),
    "stage 2, offload": small_plan(offload_optimizer=True),
    "stage 3, resident": small_plan(student_stage=3, resident=True, gradient_checkpointing=True),
    "stage 3, released, all moved": small_plan(student_stage=3, offload_optimizer=True, offload_teacher=True),
    "hpZ": small_plan(student_stage=3, teacher_hpz=8),
}


@pytest.mark.parametrize("name", PLANS)
def test_written_files_load_in_the_product(name: str, tmp_path) -> None:
    plan = PLANS[name]
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2", "gpt2")
    run = tmp_path / "run.yaml"
    run.write_text(dump(config))
    written = write_plan(plan, small_work().student, tmp_path / "tune")
    changed = load(run, RunConfig, [f"@{written}"])
    train = changed.train
    assert (train.micro_batch_size, train.gradient_accumulation_steps) == (2, 2)
    assert train.gradient_checkpointing == plan.gradient_checkpointing
    assert changed.model_dump(exclude={"train", "teacher", "student"}) == config.model_dump(
        exclude={"train", "teacher", "student"}
    )
    student = student_config(changed.student.deepspeed, "bfloat16", 2, 2, 1, 1.0)
    teacher = teacher_config(changed.teacher.deepspeed, "bfloat16", 2)
    zero = DeepSpeedConfig(student).zero_config
    assert zero.stage == plan.student_stage
    assert zero.reduce_bucket_size == plan.reduce_bucket_size
    assert (zero.offload_optimizer is not None) == plan.offload_optimizer
    if plan.student_stage == 3:
        assert zero.max_live_parameters == (100 if plan.resident else 40 + 30 + 3)
        assert zero.max_reuse_distance == (200 if plan.resident else 0)  # to the last layer and back
    own = DeepSpeedConfig(teacher).zero_config
    assert own.stage == 3 and own.prefetch_bucket_size == 3
    assert own.zero_hpz_partition_size == plan.teacher_hpz
    assert (own.offload_param is not None) == plan.offload_teacher


FOLDER = PRESETS.parents[1] / "ds_configs"
SHIPPED = sorted(FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_are_deepspeeds(path) -> None:
    made = []
    if path.stem == "teacher_zero3_nvme":  # its engine wants the disk; DeepSpeed's own reading of it does not
        made.append(read_deepspeed_config(path) | {"train_micro_batch_size_per_gpu": 2})
    elif path.stem.startswith("teacher"):
        made.append(teacher_config(path, "bfloat16", 2))
    else:
        made.append(student_config(path, "bfloat16", 2, 1, 1, 1.0))
    if path == CPU_TEST:
        made.append(teacher_config(path, "bfloat16", 2))
    for values in made:
        zero = DeepSpeedConfig(values).zero_config
        written = json.loads(path.read_text())["zero_optimization"]
        known = {field.alias or name for name, field in type(zero).model_fields.items()}
        assert set(written) <= known  # what it does not know, DeepSpeed passes over in silence
        assert zero.stage == written["stage"]


def test_every_line_of_the_shipped_configs_is_explained() -> None:
    page = (FOLDER.parent / "docs" / "zero.md").read_text(encoding="utf-8")
    for path in SHIPPED:
        assert f"`{path.name}`" in page
        for key in keys_of(json.loads(path.read_text())):
            assert f"`{key}" in page or f".{key}" in page, (path.name, key)


def keys_of(values: dict) -> Iterator[str]:
    """All keys, those of sections as well, but not the one section that every file has."""
    for key, value in values.items():
        if key != "zero_optimization":
            yield key
        if isinstance(value, dict):
            yield from keys_of(value)
