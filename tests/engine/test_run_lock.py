"""A run folder has one writer: a second one is refused, and what a dead one left is no hindrance."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from disk_cases import file_size_limit

from mta_ds.engine import run_lock
from mta_ds.engine.run_lock import RunLock, hold, owner_of_this_process
from mta_ds.errors import UserError

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def no_touches(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process outlives its locks here."""
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_TOUCHES", 1e6)


def written_by(tmp_path: Path, **changes: object) -> Path:
    """The lock of another machine's process, but for ``changes``."""
    owner = owner_of_this_process({}) | {"token": "other", "machine": "elsewhere", "host": "node7", "pid": 12}
    path = tmp_path / ".lock"
    path.write_text(json.dumps(owner | changes))
    return path


def take_and_die(run_dir: Path) -> None:
    RunLock(run_dir).take()
    os.kill(os.getpid(), signal.SIGKILL)


def take_and_live(run_dir: Path) -> None:
    RunLock(run_dir).take()
    time.sleep(60)


def holder(path: Path) -> str:
    return str(json.loads(path.read_text())["token"])


def test_it_is_held_and_released(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    assert lock.touch()
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"):
        RunLock(tmp_path, patience_seconds=0.3).take()
    lock.release()
    assert not (tmp_path / ".lock").exists()
    RunLock(tmp_path).take()


def test_one_process_may_train_again_in_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with hold(tmp_path):
            assert holder(tmp_path / ".lock")
    with pytest.raises(UserError, match="NaN"), hold(tmp_path):
        raise UserError("NaN")
    assert not (tmp_path / ".lock").exists()


def test_a_killed_process_of_this_machine_is_no_hindrance(tmp_path: Path) -> None:
    process = FORK.Process(target=take_and_die, args=(tmp_path,))
    process.start()
    assert process.pid is not None
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: its number is still taken
    assert (tmp_path / ".lock").exists()
    began = time.monotonic()
    RunLock(tmp_path).take()
    assert time.monotonic() - began < 1
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_the_number_of_a_dead_process_may_be_another_s_now(tmp_path: Path) -> None:
    written_by(tmp_path, machine=owner_of_this_process({})["machine"], pid=os.getpid(), start="1")
    RunLock(tmp_path).take()


def test_a_process_elsewhere_that_lives_refuses(tmp_path: Path) -> None:
    path = written_by(tmp_path, job="77")
    threading.Timer(0.5, os.utime, [path]).start()
    with pytest.raises(UserError, match="process 12 on node7, Slurm job 77"):
        RunLock(tmp_path, stale_seconds=30).take()


def test_a_process_elsewhere_that_is_silent_is_waited_for(tmp_path: Path) -> None:
    path = written_by(tmp_path)
    began = time.monotonic()
    RunLock(tmp_path, stale_seconds=1).take()
    assert 0.5 < time.monotonic() - began < 10 and holder(path) != "other"
    os.utime(written_by(tmp_path), (0, 0))
    began = time.monotonic()
    RunLock(tmp_path).take()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("content", ["", "{half", "[]", "{}"])
def test_one_without_a_word_is_no_hindrance_for_long(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    RunLock(tmp_path, stale_seconds=1).take()
    assert holder(tmp_path / ".lock")


def test_a_job_that_slurm_has_restarted_goes_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    path = written_by(tmp_path, job="77")
    threading.Timer(0.3, os.utime, [path]).start()
    with pytest.raises(UserError):  # twice in one allocation
        RunLock(tmp_path, stale_seconds=30).take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    RunLock(tmp_path, stale_seconds=30).take()
    assert holder(path) != "other"


def test_whoever_lost_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(run_lock, "_SECONDS_BETWEEN_TOUCHES", 0.1)
    process = FORK.Process(target=take_and_live, args=(tmp_path,))
    process.start()
    while not (tmp_path / ".lock").exists():
        time.sleep(0.01)
    written_by(tmp_path)
    process.join(30)
    assert process.exitcode == 1 and "another run has taken this folder over" in capfd.readouterr().err
    assert holder(tmp_path / ".lock") == "other"


def test_a_full_disk_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with file_size_limit(0):
        RunLock(tmp_path).take()
    assert "nothing keeps a second run from this folder" in caplog.text and not (tmp_path / ".lock").exists()
