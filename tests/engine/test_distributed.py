"""What ranks do together, and what they must have in common."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
from pathlib import Path

import pytest
from support import write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig, check, distributed
from mta_ds.engine.setup import common_to_ranks, refuse_early
from mta_ds.errors import UsageError, UserError


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """This process as rank 0 of two; the errors that it broadcasts."""
    told: list[object] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "_host_group", lambda: None)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda values, **_: told.append(values[0]))
    return told


def test_within_an_order_there_is_no_other(two_ranks: list[object]) -> None:
    work = distributed.on_rank_zero_first
    assert work(lambda: [work(lambda: 1), work(lambda: 2)]) == [1, 2]
    assert two_ranks == [None]

    def refuse() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError, match="no"):
        work(lambda: work(refuse))
    shared = pickle.loads(pickle.dumps(two_ranks[1]))
    assert isinstance(shared, UsageError) and shared.on_every_rank and str(shared) == "no"
    assert work(lambda: 3) == 3 and len(two_ranks) == 3  # an order has an end, also if it fails


def test_what_rank_zero_finds_goes_to_all(two_ranks: list[object]) -> None:
    assert distributed.from_rank_zero(lambda: "found") == "found" and two_ranks == [None]
    with pytest.raises(ZeroDivisionError):
        distributed.from_rank_zero(lambda: 1 // 0)
    assert isinstance(two_ranks[1], UserError) and "rank 0 failed: ZeroDivisionError" in str(two_ranks[1])


def test_slurm_is_asked_for_the_first_host_only_where_nobody_has_said_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container there may be no scontrol."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    values = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "c[1-2]"}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # so that what is set below goes
            patch.delenv(name)
        for name, value in (values | {"MASTER_ADDR": "c1", "PATH": ""}).items():
            patch.setenv(name, value)
        distributed._complete_environment()
        assert [os.environ[name] for name in names] == ["3", "4", "0", "20007"] and os.environ["MASTER_ADDR"] == "c1"


@pytest.mark.parametrize(
    ("model", "zero", "said"),
    [
        ("student", {}, "zero_optimization.stage is 0; the student runs"),
        ("student", {"stage": 0}, "zero_optimization.stage is 0; the student runs"),
        ("teacher", {"stage": 2}, "a frozen teacher runs under stage 3 only"),
        ("teacher", {"stage": 3, "offload_param": {"device": "disk"}}, "choose cpu, nvme or none"),
    ],
)
def test_a_stage_that_no_engine_takes_is_refused_before_anything_is_loaded(
    pair: Path, tmp_path: Path, model: str, zero: dict[str, object], said: str
) -> None:
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    config = load(write_config(pair, tmp_path, **{f"{model}__deepspeed": str(tmp_path / "zero.json")}), RunConfig)
    for refuse in (refuse_early, check):
        with pytest.raises(UsageError, match=said):
            refuse(config)


def test_deepspeed_files_are_compared_by_what_they_say(pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    config = load(write_config(pair, tmp_path, student__deepspeed=str(file)), RunConfig)
    told = []
    for stage in (2, 3):
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        told.append(common_to_ranks(config))
    assert [name for name in told[0] if told[0][name] != told[1][name]] == ["DeepSpeed configuration of the student"]
    refuse_early(config)
    file.unlink()
    assert common_to_ranks(config)["DeepSpeed configuration of the student"] == ""
    with pytest.raises(UsageError, match=r"zero\.json: cannot read"):
        refuse_early(config)


def test_a_missing_wandb_is_found_before_anything_is_loaded(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = load(write_config(pair, tmp_path, train__wandb_project="mine"), RunConfig)
    with pytest.raises(UserError, match=r"train\.wandb_project: wandb is not installed"):
        refuse_early(config)
