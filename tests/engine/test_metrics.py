"""Logs on a disk that is full for a while: nothing stops, nothing is lost, and each line is whole at any moment."""

from __future__ import annotations

import errno
import io
import json
import logging
import sys
from pathlib import Path

import pytest
from disk_cases import file_size_limit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mta_ds.engine.metrics import MetricsLog


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def board(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All curves, as TensorBoard reads them."""
    read = EventAccumulator(str(run_dir / "tensorboard"))
    read.Reload()
    return {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_no_room_for_a_while(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(1, {"loss": 0.5}, {"seconds": 1.0})
    with file_size_limit(700), caplog.at_level(logging.WARNING):
        for step in range(2, 60):
            log.write(step, {"loss": step / 4}, {"seconds": 1.0})
            seen = steps(tmp_path / "metrics.jsonl")
            assert seen == list(range(1, len(seen) + 1))
        assert len(seen) < 59 and caplog.text.count("LOG NOT WRITTEN") == 3
        with pytest.raises(OSError, match="File too large"):
            log.sync()
    log.write(60, {"loss": 15.0}, {"seconds": 1.0})
    log.sync()
    assert caplog.text.count("all rows are written again") == 3
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == steps(tmp_path / "perf.jsonl") == list(range(1, 61))
    assert board(tmp_path)["loss"] == [(1, 0.5), *((step, step / 4) for step in range(2, 61))]


def test_no_room_from_the_start(tmp_path: Path) -> None:
    with file_size_limit(0):
        log = MetricsLog(tmp_path, 0)
        log.write(1, {"loss": 0.5}, {"seconds": 1.0})
    log.write(2, {"loss": 0.25}, {"seconds": 1.0})
    log.close()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2] and len(board(tmp_path)["perf/seconds"]) == 2


def test_tensorboard_forgets_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    for first, value in ((1, 1.0), (3, 2.0)):
        log = MetricsLog(tmp_path, first - 1)
        for step in range(first, 6):
            log.write(step, {"dsa/3": value}, {})
        log.close()
    assert board(tmp_path) == {"dsa/3": [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]}


def test_a_batch_log_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path, 0)
    monkeypatch.setattr(sys, "stdout", Full())
    log.say("step 1/3")
    log.close()


class Service:
    """Weights & Biases' library, which fails from its ``failing`` call on."""

    def __init__(self, failing: int) -> None:
        self.calls: list[str] = []
        self._failing = failing

    def init(self, **_: object) -> Service:
        return self._call("init")

    def log(self, values: dict[str, float], step: int) -> None:
        self._call(f"log {step}")

    def finish(self) -> None:
        self._call("finish")

    def _call(self, name: str) -> Service:
        self.calls.append(name)
        if len(self.calls) > self._failing:
            raise RuntimeError("no network")
        return self


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        (9, ["init", "log 1", "log 2", "finish"]),
        (3, ["init", "log 1", "log 2", "finish"]),
        (1, ["init", "log 1"]),
        (0, ["init"]),
    ],
)
def test_a_service_that_fails_ends_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
    calls: list[str],
) -> None:
    service = Service(failing)
    monkeypatch.setitem(sys.modules, "wandb", service)
    log = MetricsLog(tmp_path, 0, "project")
    for step in (1, 2):
        log.write(step, {"loss": 0.5}, {})
    log.close()
    assert service.calls == calls and steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert caplog.text.count("no network; the run goes on without it") == (failing < 9)
