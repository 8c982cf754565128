"""What ranks do together, and what they must have in common."""

from __future__ import annotations

import importlib.util
import json
import pickle
from pathlib import Path

import pytest
from support import write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig, distributed
from mta_ds.engine.setup import common_to_ranks, refuse_early
from mta_ds.errors import UsageError, UserError


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """This process as rank 0 of two; what it broadcasts."""
    told: list[object] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda values, src: told.append(values[0]))
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
