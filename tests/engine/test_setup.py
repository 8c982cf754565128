"""What a run is built of: options of the student that change how it runs, not what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import write_config
from transformers import AutoModelForCausalLM

from mta_ds.config import load
from mta_ds.engine import RunConfig
from mta_ds.engine.setup import Run, prepare
from mta_ds.engine.train import train_step


def prepared(pair: Path, folder: Path, **changes: object) -> Run:
    return prepare(
        load(write_config(pair, folder, mta=None, data__spans=None, data__validation=[], **changes), RunConfig)
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_recomputes_every_layer_from_the_first_step_on(
    pair: Path, one_rank_group, tmp_path: Path, checkpointing: bool
) -> None:
    run = prepared(pair, tmp_path, train__gradient_checkpointing=checkpointing)
    normalised = []
    norm = run.distiller.student.model.model.layers[0].input_layernorm
    norm.register_forward_hook(lambda *_: normalised.append(torch.is_grad_enabled()))
    train_step(run, 1, run.loader.next_step())
    assert len(normalised) == 1 + checkpointing


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_there_if_asked_for(pair: Path, one_rank_group, tmp_path: Path, dropout: bool) -> None:
    student = tmp_path / "student"
    shutil.copytree(pair / "student", student)
    values = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(values | {"attention_dropout": 0.25}))
    run = prepared(pair, tmp_path / "run", student={"path": str(student)}, train__dropout=dropout)
    model = run.distiller.student.model
    assert model.training
    assert {layer.self_attn.attention_dropout for layer in model.model.layers} == {0.25 * dropout}


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_teacher_of_one_rank_has_no_engine_unless_it_is_offloaded(
    pair: Path, one_rank_group, tmp_path: Path, offload: str | None
) -> None:
    zero = {"stage": 3} | ({"offload_param": {"device": offload}} if offload else {})
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    run = prepared(pair, tmp_path, teacher={"path": str(pair / "teacher"), "deepspeed": str(tmp_path / "zero.json")})
    assert run.teacher is not None
    assert {hasattr(parameter, "ds_id") for parameter in run.teacher.model.parameters()} == {offload is not None}
    batch = run.loader.next_step()[0]
    whole = AutoModelForCausalLM.from_pretrained(pair / "teacher").model.eval()
    with torch.no_grad():
        states = whole(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert torch.equal(run.teacher.run(batch), states.flatten(0, 1)[batch.valid])
