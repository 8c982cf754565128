"""What saves memory, for real on one rank and two: the results stay those of a run without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import CPU_TEST, assert_same_run, run_command, train, write_config

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
    assert_same_run(train(pair, tmp_path, 2, **options), plain)


def test_a_teacher_on_the_host_is_exactly_the_same(pair: Path, tmp_path: Path) -> None:
    offloaded = deepspeed_json(tmp_path / "cpu.json", offload_param={"device": "cpu", "pin_memory": False})
    found = train(pair, tmp_path / "a", 1, teacher__deepspeed=offloaded)
    assert_same_run(found, train(pair, tmp_path / "b", 1), tolerance=0)


def test_a_teacher_with_secondary_shards_is_the_same(pair: Path, plain, tmp_path: Path) -> None:
    hpz = deepspeed_json(tmp_path / "hpz.json", zero_hpz_partition_size=2)
    assert_same_run(train(pair, tmp_path, 2, teacher__deepspeed=hpz, train__micro_batch_size=2), plain)


def test_weights_are_verified_on_every_rank(pair: Path, plain, tmp_path: Path) -> None:
    options = {"train__verify_weights": True, "train__micro_batch_size": 2}
    assert_same_run(train(pair, tmp_path, 2, **options), plain)


def test_grouping_by_length_does_not_depend_on_the_ranks(pair: Path, tmp_path: Path) -> None:
    # long enough that lengths differ
    options = {"data__max_length": 384, "train__steps": 1, "data__validation": []}
    grouped = options | {"train__length_grouping": 8}
    one = train(pair, tmp_path / "1", 1, **grouped)
    assert_same_run(one, train(pair, tmp_path / "2", 2, **grouped, train__micro_batch_size=2))
    drawn = train(pair, tmp_path / "3", 1, **options)
    assert one[0][0]["loss"] != drawn[0][0]["loss"]
    path = write_config(pair, tmp_path / "4", **grouped)
    assert "with length_grouping: 8 (as set)" in run_command("check", path).stdout
