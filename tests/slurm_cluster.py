"""A real Slurm for tests: two nodes on loopback, without cgroups, on ports that are free and under names of its own.

Also what tests do to its jobs, and the runs that they submit.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import read_metrics, write_config

from mta_ds.launch.slurm import FINISHED_BADLY

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
NODES = ("c1", "c2")
STEPS = 12
"""Of a run that :func:`write_run` describes."""

Command = Callable[..., tuple[int, str, str]]
"""``mta-ds`` in this process: (exit code, stdout, stderr)."""

CONFIGURATION = """\
ClusterName=ci
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/run/munge.sock
SlurmctldPort={ports[0]}
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmdSpoolDir={root}/%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/log/ctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=5
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=100000
JobRequeue=1
MailProg=/bin/true
{nodes}
PartitionName=debug Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munged, slurmctld and one slurmd a node, in a folder of their own; commands find them by ``environment``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Write the configuration, start the daemons, and wait until both nodes are idle."""
        for folder in ("run", "log", "state", *NODES):
            (self.root / folder).mkdir(parents=True, mode=0o755)
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().partition(".")[0]
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
            for name, port in zip(NODES, ports[1:], strict=True)
        )
        text = CONFIGURATION.format(
            root=self.root, host=host, user=getpass.getuser(), ports=ports, nodes=nodes, names=",".join(NODES)
        )
        (self.root / "slurm.conf").write_text(text)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {"socket": "run/munge.sock", "pid-file": "run/munged.pid", "log-file": "log/munged.log"}
        files = [f"--{option}={self.root / name}" for option, name in names.items()]
        self._spawn("munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={self.root}/seed", *files)
        wait_for(lambda: (self.root / "run" / "munge.sock").exists(), "munged", self.root)
        conf = str(self.root / "slurm.conf")
        self._spawn("slurmctld", "-D", "-f", conf)
        for name in NODES:
            self._spawn("slurmd", "-D", "-f", conf, "-N", name)
        wait_for(self._all_idle, "Slurm's nodes", self.root)

    def stop(self) -> None:
        """End whatever jobs are left, every daemon, and what then still lives."""
        self.run("scancel", "--user", getpass.getuser(), check=False)
        with contextlib.suppress(pytest.fail.Exception):
            wait_for(lambda: self.run("squeue", "--noheader", check=False) == "", "the end of all jobs", self.root, 30)
        self.run("scontrol", "shutdown", check=False)
        for daemon in reversed(self._daemons):
            if daemon.args[0] == "munged":  # type: ignore[index]  # the only one that Slurm does not end itself
                daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        mine = f"SLURM_CONF={self.root}/slurm.conf\0".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if int(process.name) != os.getpid() and mine in (process / "environ").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)

    def logs(self) -> str:
        """The ends of the daemons' logs, for a test that fails."""
        files = sorted((self.root / "log").iterdir())
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in files)

    def run(self, *command: str, check: bool = True) -> str:
        """What a command of this cluster prints."""
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self, job: str) -> dict[str, str]:
        """State of a job, or of each task of an array, by number."""
        lines = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%i %T")
        return dict(line.split() for line in lines.splitlines())

    def restarts(self, job: str) -> tuple[str, int]:
        """State of a job that is no array, and how often it was started again."""
        line = self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--Format=State:|,RestartCnt:|")
        state, restarts, *_ = line.split("|")
        return state, int(restarts)

    def steps(self) -> list[str]:
        """The steps that run now, as ``12.0`` or ``12_3.0``."""
        return self.run("squeue", "--steps", "--noheader", "--format=%i").split()

    def kill(self, job: str) -> None:
        """SIGKILL to a one-node job's (or task's) first step, once it has processes, behind Slurm's back."""

        def began() -> bool:
            pids[:] = listed_pids(self.run("scontrol", "listpids", f"{number}.0", node, check=False))
            return bool(pids)

        pids: list[int] = []
        number, node = self.run("squeue", "--noheader", f"--jobs={job}", "--format=%A %N").split()
        wait_for(began, f"a process of {job}", self.root)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, *jobs: str, seconds: float = 900) -> dict[str, str]:
        """Wait until jobs have ended, for good or ill; the states of all their tasks."""

        def ended() -> bool:
            states.clear()
            for job in jobs:
                states.update(self.jobs(job))
            return set(states.values()) <= FINISHED_BADLY | {"COMPLETED"}

        states: dict[str, str] = {}
        wait_for(ended, f"jobs {' '.join(jobs)}", self.root, seconds)
        return states

    def _all_idle(self) -> bool:
        return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * len(NODES)

    def _spawn(self, *command: str) -> None:
        name = f"{command[0]}-{len(self._daemons)}"
        path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
        with open(self.root / "log" / f"{name}.out", "wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=os.environ | self.environment | {"PATH": path},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            )


def missing_programs() -> list[str]:
    """What a machine lacks to run a Slurm."""
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


def listed_pids(listing: str) -> list[int]:
    """The processes that ``scontrol listpids`` tells of.

    A task that Slurm has not forked yet is listed as -1, which to kill(2) is every process of this machine.
    """
    pids = (int(line.split()[0]) for line in listing.splitlines()[1:])
    return [pid for pid in pids if pid > 0]


def wait_for(condition: Callable[[], bool], what: str, root: Path, seconds: float = 300) -> None:
    """Wait until ``condition`` holds; a test that waits in vain fails with the ends of the logs in ``root``/log."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not there after {seconds:.0f} s\n{Cluster(root).logs()}")
        time.sleep(0.2)


def start_again(cluster: Cluster, job: str, restart: int, begun: Sequence[str] = ("RUNNING", "COMPLETED")) -> None:
    """Wait until a job runs for the ``restart``-th time again, and spare it the two minutes that Slurm lets it wait.

    Not all of them: a node refuses a job whose credential is as old, in whole seconds, as the end of its last run, and
    Slurm then calls the job FAILED.
    """
    hurried = False

    def has_begun() -> bool:
        nonlocal hurried
        state, restarts = cluster.restarts(job)
        if restarts == restart and state == "PENDING" and not hurried:
            cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+5")
            hurried = True
        # while a requeue is under way a job may be shown as FAILED: its script has ended with 75
        return restarts > restart or (restarts == restart and state in begun)

    wait_for(has_begun, f"restart {restart}", cluster.root)


def freeze_after(cluster: Cluster, run_dir: Path, job: str, step: int) -> None:
    """Stop a job's ranks, without their knowledge, once they have logged ``step``."""
    metrics = run_dir / "metrics.jsonl"

    def has_come() -> bool:
        assert cluster.jobs(job)[job] not in ("FAILED", "CANCELLED", "COMPLETED"), cluster.logs()
        return metrics.is_file() and any(row["step"] >= step for row in read_metrics(run_dir))

    wait_for(has_come, f"step {step}", cluster.root)
    cluster.run("scancel", "--signal=STOP", job)


def minutes_so_far(cluster: Cluster, job: str) -> int:
    """How long a job has run, in minutes, rounded up."""
    *_, minutes, _ = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
    return int(minutes) + 1


def write_run(pair: Path, root: Path, run_dir: Path, **changes: object) -> Path:
    """A run's YAML that parses into ``root``/spans."""
    values = {
        "parse": {
            "inputs": [str(pair / "train.jsonl"), str(pair / "heldout.jsonl")],
            "output": str(root / "spans"),
            "num_shards": 4,
        },
        "data__spans": str(root / "spans"),
        "train__steps": STEPS,
        "train__save_every": 4,
        "train__micro_batch_size": 2,
        "evaluation": {"max_length": 40, "max_prompt_length": 24, "seeds": [10], "max_records": 2},
    }
    return write_config(pair, run_dir, **(values | changes))


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()
