"""What saves memory, for real on one rank and two: the results stay those of a run without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import CPU_TEST, assert_same_run, train, write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig, check

ZERO3 = json.loads(CPU_TEST.read_text())["zero_optimization"]


@pytest.fixture(scope="module")
def plain(pair: Path, tmp_path_factory: pytest.TempPathFactory):
    """The reference: one rank, four sequences a step."""
    return train(pair, tmp_path_factory.mktemp("plain"), 1)


def deepspeed_json(path: Path, **changes: object) -> str:
    path.write_text(json.dumps({"zero_optimization": ZERO3 | changes}))
    return str(path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mlps_in_chunks_change_nothing_though_ranks_have_different_numbers_of_them(
    pair: Path, plain, tmp_path: Path, checkpointing: bool
) -> None:
    options = {"student__mlp_chunk": 37, "train__micro_batch_size": 2, "train__gradient_checkpointing": checkpointing}
    options["train__verify_weights"] = True  # and every rank finds the files' weights
    assert_same_run(train(pair, tmp_path, 2, **options), plain)


def test_a_teacher_on_the_host_is_exactly_the_same(pair: Path, plain, tmp_path: Path) -> None:
    offloaded = deepspeed_json(tmp_path / "cpu.json", offload_param={"device": "cpu", "pin_memory": False})
    assert_same_run(train(pair, tmp_path / "a", 1, teacher__deepspeed=offloaded), plain, tolerance=0)


def test_a_teacher_with_secondary_shards_is_the_same(pair: Path, plain, tmp_path: Path) -> None:
    hpz = deepspeed_json(tmp_path / "hpz.json", zero_hpz_partition_size=2)
    assert_same_run(train(pair, tmp_path, 2, teacher__deepspeed=hpz, train__micro_batch_size=2), plain)


def test_grouping_by_length_does_not_depend_on_the_ranks(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # long enough that lengths differ
    options = {"data__max_length": 384, "train__steps": 1, "data__validation": []}
    grouped = options | {"train__length_grouping": 8}
    one = train(pair, tmp_path / "1", 1, **grouped)
    assert_same_run(one, train(pair, tmp_path / "2", 2, **grouped, train__micro_batch_size=2))
    drawn = train(pair, tmp_path / "3", 1, **options)
    assert one[0][0]["loss"] != drawn[0][0]["loss"]
    path = write_config(pair, tmp_path / "4", **grouped)
    check(load(path, RunConfig))
    assert "with length_grouping: 8 (as set)" in capsys.readouterr().out
