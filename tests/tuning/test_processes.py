"""How trials are started and ended: own launcher or srun, SIGTERM before SIGKILL, a baseline that is the rank's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tuning_cases import small_machine

from mta_ds.errors import UserError
from mta_ds.tuning import processes
from mta_ds.tuning.processes import end, library_bytes, rank_variables, run_ranks


def started(code: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def test_a_process_is_asked_to_end_before_it_is_killed() -> None:
    process = started(
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    )
    end(process, 20)
    assert process.returncode == 7


def test_one_that_does_not_end_is_killed() -> None:
    process = started(
        "import signal; signal.signal(15, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
    )
    end(process, 0.2)
    assert process.returncode == -9


def test_several_nodes_without_srun_are_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"srun is not found: .* container"):
        run_ranks(["train"], small_machine(num_nodes=2), tmp_path / "log.txt", 1)


def test_ranks_of_one_node_need_no_srun_and_of_several_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert processes._launcher(small_machine()) == []
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    assert processes._launcher(small_machine(num_nodes=2)) == ["srun", "--kill-on-bad-exit=1", "--ntasks=4"]


def test_the_baseline_is_not_that_of_the_process_which_asks() -> None:
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = b"1" * len(ballast[::4096])
    on_a_cpu = library_bytes(small_machine(is_gpu=False))
    assert 100e6 < on_a_cpu < len(ballast)
    assert library_bytes(small_machine()) == 0


def test_a_cpus_ranks_merge_what_they_free() -> None:
    assert "mxfast=0" in rank_variables(small_machine(is_gpu=False))["GLIBC_TUNABLES"]
    assert rank_variables(small_machine()) == {}
