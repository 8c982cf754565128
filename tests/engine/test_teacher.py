"""The streaming teacher in ZeRO-3's partitions: by whole layers, by matrices, and on a disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.models import load_pretrained, zero
from mta_ds.models.body import decoder_layers
from mta_ds.models.loading import TeacherConfig
from mta_ds.models.teacher import load_teacher

ZERO = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu", "pin_memory": False}}


def states_of(folder: Path, zero_optimization: dict[str, Any], path: Path) -> tuple[Any, list[Tensor]]:
    """The teacher, and layer 1's and the final state of two batches: DeepSpeed fetches ahead from the second on."""
    path.write_text(json.dumps({"zero_optimization": zero_optimization}))
    teacher = load_teacher(folder, TeacherConfig(path=str(folder), deepspeed=path), "float32", 2, (1,), True)
    states: list[Tensor] = []
    for length in (5, 9, 9):
        ids = torch.arange(2 * length).view(2, length)
        batch = SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), valid=torch.arange(2 * length))
        states.append(teacher.run(batch, lambda _, hidden: states.append(hidden.clone())))
    return teacher.model, states


def assert_own_states(folder: Path, states: list[Tensor]) -> None:
    """The states are those of the model whole."""
    model = load_pretrained(folder, "float32").eval()
    for length, of_layer, final in zip((5, 9, 9), states[::2], states[1::2], strict=True):
        with torch.no_grad():
            found = model.base_model(torch.arange(2 * length).view(2, length), output_hidden_states=True)
        assert torch.equal(of_layer, found.hidden_states[1].flatten(0, 1))
        assert torch.equal(final, found.last_hidden_state.flatten(0, 1))


@pytest.mark.parametrize(
    ("small", "prefetch", "whole"), [(0, 0, False), (0, 100, False), (0, 10**6, True), (10**6, 0, True)]
)
def test_layers_are_gathered_whole_where_no_fetch_ahead_is_lost(
    pair: Path,
    one_rank_group: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: int,
    prefetch: int,
    whole: bool,
) -> None:
    monkeypatch.setattr(zero, "SMALL_LAYER", small)
    options = {"stage3_prefetch_bucket_size": prefetch}
    model, states = states_of(pair / "teacher", ZERO | options, tmp_path / "zero3.json")
    assert {z3_leaf_module(layer) for layer in decoder_layers(model)} == {whole}
    assert_own_states(pair / "teacher", states)


@pytest.mark.skipif(
    "MTA_DS_TEST_NVME" not in os.environ, reason="MTA_DS_TEST_NVME=1 builds DeepSpeed's async_io (libaio), for minutes"
)
def test_a_teacher_on_a_disk_goes_by_matrices_through_few_buffers(one_rank_group: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=64, **sizes)  # DeepSpeed leaves what has less than 1 MB in memory
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    disk = {"device": "nvme", "nvme_path": str(tmp_path), "pin_memory": False, "max_in_cpu": 0}
    offload = {"offload_param": disk | {"buffer_count": 5, "buffer_size": 600_000}}
    model, states = states_of(tmp_path / "teacher", ZERO | offload, tmp_path / "nvme.json")
    assert not any(z3_leaf_module(layer) for layer in decoder_layers(model))
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("zero_stage_3/**/*.swp"))
    assert on_disk == 4 * 3 * (4 * 512 * 512 + 3 * 512 * 1024)
    assert_own_states(tmp_path / "teacher", states)
