"""Machines by name and by hand, and those that trials cannot run on."""

from __future__ import annotations

import pytest

from mta_ds.errors import UsageError, UserError
from mta_ds.tuning import machine as machines
from mta_ds.tuning.machine import GB, choose_machine, insist_on_equal_nodes


def test_machines_by_name_and_by_hand() -> None:
    machine = choose_machine(True, gpu="h100-80", gpus_per_node=8, num_nodes=2, inter=400, efficiency=0.5)
    assert (machine.num_ranks, machine.memory, machine.inter, machine.rate(2)) == (16, 80 * GB, 400 * GB, 494.5e12)
    with pytest.raises(UserError, match=r"--gpu h100: unknown GPU; did you mean 'h100-80'\?"):
        choose_machine(True, gpu="h100")
    with pytest.raises(UserError, match="--gpu abacus: unknown GPU; known: a10-24"):
        choose_machine(True, gpu="abacus")


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(machines, "this_machine", lambda: None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.mark.usefixtures("no_gpu")
def test_trials_of_gpus_or_nodes_that_are_not_here_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--gpu a100-80: there is no GPU here to run trials on.*--plan-only"):
        choose_machine(False, gpu="a100-80")
    with pytest.raises(UsageError, match="--nodes 3: trials need an allocation"):
        choose_machine(False, num_nodes=3)
    assert choose_machine(True, gpu="a100-80", num_nodes=3).num_nodes == 3
    assert not choose_machine(False, gpus_per_node=2).is_gpu


def test_a_name_gives_rates_to_the_gpus_that_are_here(monkeypatch) -> None:
    own = machines.known_gpu("l40s-48")
    monkeypatch.setattr(machines, "this_machine", lambda: own)
    found = choose_machine(False, gpu="h100-80")
    assert (found.memory, found.half) == (48 * GB, 989e12)


@pytest.mark.usefixtures("no_gpu")
def test_rates_that_nobody_knows_are_told() -> None:
    assert choose_machine(True, memory=64).rates_of == "a100-80"
    assert choose_machine(True, gpu="a100-80").rates_of is None


def fake_srun(folder, monkeypatch, *lines: str) -> None:
    (folder / "srun").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    (folder / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_gpus_of_several_nodes_are_compared(tmp_path, monkeypatch) -> None:
    fake_srun(tmp_path, monkeypatch, "NVIDIA A100, 81920 MiB", "NVIDIA A100, 81920 MiB")
    insist_on_equal_nodes(2)
    fake_srun(tmp_path, monkeypatch, "NVIDIA A100, 81920 MiB", "NVIDIA A100, 40960 MiB")
    with pytest.raises(UserError, match=r"this job's GPUs differ .*40960 MiB; .*81920 MiB"):
        insist_on_equal_nodes(2)
