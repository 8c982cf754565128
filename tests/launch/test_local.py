"""Local ranks stand and fall together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mta_ds.errors import UserError
from mta_ds.launch import local


def start(code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE)


def test_every_rank_has_its_own_number_and_share_of_the_cores() -> None:
    environments = [local.rank_environment(rank, 2, 1234) for rank in range(2)]
    assert [e["RANK"] for e in environments] == [e["LOCAL_RANK"] for e in environments] == ["0", "1"]
    assert all(e["WORLD_SIZE"] == "2" and e["MASTER_PORT"] == "1234" for e in environments)
    if "OMP_NUM_THREADS" not in os.environ:
        assert int(environments[0]["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 128 + 9), ("sys.exit(75)", 75)]
)
def test_the_first_failure_takes_the_others_down(ending: str, code: int) -> None:
    ranks = [start("import time; time.sleep(60)"), start(f"import os, sys; {ending}")]
    assert local._wait(ranks, grace_seconds=0.1) == code
    assert all(rank.poll() is not None for rank in ranks)


def test_the_port_is_the_ranks_alone_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    monkeypatch.delenv("MASTER_PORT", raising=False)
    with local._reserve_port() as reserved, socket.socket() as other:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError):
            other.bind(("127.0.0.1", port))
        TCPStore("127.0.0.1", port, 1, is_master=True)


def test_a_master_port_that_is_set_is_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match=f"MASTER_PORT {other.getsockname()[1]}: something else listens"):
            local._reserve_port()
    with local._reserve_port() as reserved:
        assert str(reserved.getsockname()[1]) == os.environ["MASTER_PORT"]


def test_all_done_is_zero() -> None:
    assert local._wait([start("pass"), start("pass")]) == 0


def test_a_rank_ends_when_its_launcher_is_killed() -> None:
    child = "from mta_ds.launch.local import follow_parent; import time; follow_parent(0.05); time.sleep(60)"
    code = f"""
import os, subprocess, sys, time
environment = os.environ | {{"{local.PARENT}": str(os.getpid())}}
print(subprocess.Popen([sys.executable, "-c", {child!r}], env=environment).pid, flush=True)
time.sleep(60)
"""
    launcher = start(code)
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    time.sleep(1)
    os.kill(pid, 0)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().split()[2] == "Z":  # ended; nobody has collected it
                return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the rank outlived its launcher")
