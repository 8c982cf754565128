"""Rollouts by themselves, with a student that writes what a test says: draws, resumption, bad input; and with LoRA."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support import read_metrics, train_tokenizer, write_config

from mta_ds.config import load
from mta_ds.data import DataConfig, StepLoader, build_dataset
from mta_ds.engine import RunConfig, distributed
from mta_ds.engine.rollouts import Rollouts
from mta_ds.engine.train import train
from mta_ds.errors import UserError
from mta_ds.evaluation import generate
from mta_ds.losses import DistiLLMConfig, Source, make_method
from mta_ds.models import load_pretrained, load_tokenizer

NUM_STEPS = 1000
# rollouts until the buffer is full, and nothing but replays from then on
REPLAYS = {"initial_phi": 1.0, "schedule": "increasing", "buffer_size": 8, "rollouts": {"ahead": 0}}


@pytest.fixture(scope="module")
def tokenizer(pair: Path):
    return load_tokenizer(pair / "student")


@pytest.fixture
def make(pair: Path, tmp_path: Path, tokenizer) -> Callable[..., Rollouts]:
    """Rollouts of four sequences a step; the student answers with the number of the sequence, and EOS."""

    def write(prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[list[int]]:
        return [[300 + key, tokenizer.eos_token_id] for key in keys]

    def make(records=None, writes=write, reader=tokenizer, rank: int = 0, world_size: int = 1) -> Rollouts:
        data = DataConfig(train=(str(records or pair / "train.jsonl"),), max_length=96, max_prompt_length=64)
        dataset = build_dataset(data.train, data, tokenizer, None, tmp_path / "cache")
        loader = StepLoader(dataset, 0, 1, 4 // world_size, 1, rank, world_size)
        method = make_method(DistiLLMConfig(method="distillm", **REPLAYS))
        return Rollouts(method, loader, writes, data, reader, 1, NUM_STEPS, None)

    return make


def written(batches) -> list[int]:
    """The student's answer in each sequence."""
    rows = [(row, mask) for batch in batches for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return [int(row[mask.bool()][-2]) for row, mask in rows]


def test_a_full_buffer_is_replayed_without_repetition_and_the_same_on_any_number_of_ranks(make, tmp_path: Path) -> None:
    alone = make()
    for step in (1, 2):
        assert alone.next_step(step)[0] is Source.STUDENT
    alone.save(tmp_path / "rollouts.safetensors")
    ranks = [make(rank=rank, world_size=2) for rank in (0, 1)]
    for each in ranks:
        each.load(tmp_path / "rollouts.safetensors")
    seen = set()
    for step in range(3, 10):
        source, batches = alone.next_step(step)
        drawn = written(batches)
        assert source is Source.BUFFER and len({*drawn}) == 4 and {*drawn} <= {*range(300, 308)}
        assert [token for each in ranks for token in written(each.next_step(step)[1])] == drawn
        seen |= {*drawn}
    assert len(seen) == 8


def test_a_buffer_of_another_tokenizer_is_refused(make, tmp_path: Path) -> None:
    before = make()
    before.next_step(1)
    before.save(tmp_path / "rollouts.safetensors")
    with pytest.raises(UserError, match=r"rollouts\.safetensors: written with another tokenizer; resume with") as error:
        make(reader=train_tokenizer("zebra quux " * 99)).load(tmp_path / "rollouts.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_empty_rollouts_are_trained_on_and_told_once(make, tokenizer, caplog, monkeypatch, rank: int) -> None:
    def write(prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> list[list[int]]:
        return [[tokenizer.eos_token_id] if key < 3 else [300, tokenizer.eos_token_id] for key in keys]

    monkeypatch.setattr(distributed, "rank", lambda: rank)
    with caplog.at_level(logging.WARNING):
        source, (batch,) = make(writes=write).next_step(1)
    assert source is Source.STUDENT and int((batch.targets != -100).sum()) == 5  # three EOS, and a token with its EOS
    told = [] if rank else ["step 1: 3 of 4 rollouts are empty (EOS first)"]
    assert [record.getMessage() for record in caplog.records] == told


def test_a_record_without_a_prompt_is_named(make, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"id": f"t{i}", "text": "Only a text."}) + "\n" for i in range(4)))
    with pytest.raises(UserError, match=r"^record t\d: has no prompt; the student cannot answer it in a rollout$"):
        make(records=file).next_step(1)


def test_a_student_with_adapters_writes_with_them_merged(
    pair: Path, tmp_path: Path, one_rank_group, monkeypatch
) -> None:
    """It starts as the base model, and writes as something else once its adapters have learnt."""
    writers = []

    def note(model, *arguments, **options):
        writers.append({name: value.clone() for name, value in model.state_dict().items()})
        return generate(model, *arguments, **options)

    monkeypatch.setattr("mta_ds.engine.rollouts.generate", note)
    loss = {"method": "gkd", "on_policy_share": 1.0, "rollouts": {"max_new_tokens": 6, "ahead": 0}}
    changes = {"loss": loss, "mta": None, "student__lora": {"r": 3, "alpha": 7}, "data__validation": []}
    assert train(load(write_config(pair, tmp_path, **changes, train__asynchronous_saves=False), RunConfig))
    base = load_pretrained(pair / "student", "float32").state_dict()
    first, second, third = writers
    assert first.keys() == second.keys() == third.keys() == base.keys()
    learnt = "model.layers.0.self_attn.q_proj.weight"
    assert all(torch.equal(value, first[name]) for name, value in base.items())
    assert not torch.equal(second[learnt], first[learnt]) and not torch.equal(third[learnt], second[learnt])
    exported = load_pretrained(tmp_path / "export", "float32").state_dict()
    change = [float((exported[learnt] - each[learnt]).norm()) for each in writers]
    assert change[2] < change[1] < change[0]  # the export is the student a step after it wrote last
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert all(row["source/student"] and row["loss"] == row["base"] > 0 for row in rows) and len(rows) == 3
