"""What is written down at each start of a run."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from disk_cases import file_size_limit

from mta_ds.engine.environment import describe_environment, describe_ranks, record_start


def test_every_start_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    environment = describe_environment({"training_hash": "abc"}, ["node1: A100", "node2: H100"])
    assert environment["world_size"] == 2 and environment["packages"]["torch"]
    record_start(tmp_path, 0, "seed: 0\n", environment)
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": half')  # killed
    record_start(tmp_path, 40, "seed: 0\nsteps: 9\n", environment | {"ranks": ["node3: A100"]})
    rows = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(row["step"], row["environment"]["ranks"]) for row in rows] == [
        (0, ["node1: A100", "node2: H100"]),
        (40, ["node3: A100"]),
    ]
    assert (tmp_path / "config.yaml").read_text() == rows[1]["config"] == "seed: 0\nsteps: 9\n"
    assert json.loads((tmp_path / "environment.json").read_text()) == rows[1]["environment"]
    with file_size_limit(0):
        record_start(tmp_path, 50, "", {})
    assert "not written" in caplog.text and len((tmp_path / "starts.jsonl").read_text().splitlines()) == 2


def test_a_rank_names_its_machine() -> None:
    assert len(describe_ranks()) == 1 and describe_ranks()[0].startswith(f"{socket.gethostname()}: ")
