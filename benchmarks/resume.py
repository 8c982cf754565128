"""Kill a run again and again, and see whether it ends with the bytes of one that was left alone.

    python benchmarks/resume.py run.yaml --nproc 2 --rounds 20 --output /scratch/resume

Runs the configuration twice: undisturbed, and with a SIGKILL of a random rank, or of the launcher, at a random moment
while it loads, steps or saves (after each step), and in the last two rounds while it exports, so many times. Then
metrics.jsonl and the exported weights are compared byte for byte; and after each kill every checkpoint with a COMMIT
has to be whole. A round makes a step or two: twice as many as rounds are enough.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import Row, bounded, report

from mta_ds.engine.commit import Damage, check_whole, is_committed, step_folders


def main() -> None:
    """Both runs, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    calm, killed = (arguments.output.resolve() / name for name in ("calm", "killed"))
    run(arguments.config, calm, arguments.nproc).wait()
    randomness = random.Random(arguments.seed)
    moments: list[str] = []
    damaged: list[str] = []
    unfinished = 0
    for number in range(arguments.rounds):
        at_the_end = number >= arguments.rounds - 2
        phase = "export" if at_the_end else randomness.choice(["load", "step", "step", "save", "save", "save"])
        moments.append(kill_once(arguments.config, killed, arguments.nproc, phase, randomness))
        damaged += damaged_checkpoints(killed)
        unfinished += any(not is_committed(folder) for folder in step_folders(killed / "checkpoints"))
        print(f"round {len(moments)}: killed while in '{moments[-1]}'", file=sys.stderr, flush=True)
    code = run(arguments.config, killed, arguments.nproc).wait()
    rows = [
        Row("rounds", arguments.rounds, ""),
        *(Row(f"killed while in '{phase}'", moments.count(phase), "") for phase in sorted(set(moments))),
        Row("kills that left an unfinished checkpoint", unfinished, ""),
        bounded("checkpoints with COMMIT that are damaged", len(damaged), "<=", 0, unit=""),
        bounded("last exit code", code, "<=", 0, unit=""),
    ]
    for file in ("metrics.jsonl", "export/model.safetensors"):
        equal = (calm / file).read_bytes() == (killed / file).read_bytes()
        rows.append(bounded(f"{file}: the same bytes", float(equal), ">=", 1, unit=""))
    report("Resume after SIGKILL", rows, arguments.json)


def run(config: Path, run_dir: Path, nproc: int) -> subprocess.Popen[bytes]:
    """Start the run, or go on with it."""
    options = f"run_dir={run_dir}", "train.save_every=1", "--nproc", str(nproc)
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    return subprocess.Popen(
        [sys.executable, "-m", "mta_ds", "train", str(config), *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_once(config: Path, run_dir: Path, nproc: int, phase: str, randomness: random.Random) -> str:
    """Kill one process of the run a moment after it has come to a phase; returns in what it was.

    Raises:
        SystemExit: it had ended before.
    """
    launcher = run(config, run_dir, nproc)
    first, later = None, randomness.randint(1, 2)
    while launcher.poll() is None:
        beat = heartbeat(run_dir)
        if beat.get("pid") in children(launcher.pid):  # of this start, not of the one before
            first = beat["step"] if first is None and beat["phase"] != "load" else first
            if beat["phase"] == phase and (phase in ("load", "export") or beat["step"] >= first + later):
                break
            if phase != "export" and first is not None and beat["step"] > first + 3:
                break  # the phase is too short to be seen: now is as good
        time.sleep(0.001)
    time.sleep(randomness.uniform(0, {"load": 5, "export": 1}.get(phase, 0.3)))
    victims = [*children(launcher.pid), launcher.pid]
    if launcher.poll() is not None:
        raise SystemExit(f"{run_dir}: the run ended before it was killed in '{phase}': give it more train.steps")
    os.kill(randomness.choice(victims), signal.SIGKILL)
    launcher.wait()
    time.sleep(2)  # ranks follow a killed launcher within a second or two
    return str(heartbeat(run_dir).get("phase", "start"))


def damaged_checkpoints(run_dir: Path) -> list[str]:
    """What is wrong with checkpoints that have a COMMIT: nothing, ever."""
    found = []
    for folder in step_folders(run_dir / "checkpoints"):
        if is_committed(folder):
            try:
                check_whole(folder)
            except Damage as damage:
                found.append(f"{folder.name}: {damage}")
                print(found[-1], file=sys.stderr)
    return found


def heartbeat(run_dir: Path) -> dict[str, object]:
    """What rank 0 last said."""
    try:
        found: dict[str, object] = json.loads((run_dir / "heartbeat" / "rank-00000.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def children(pid: int) -> list[int]:
    """The ranks of a launcher."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


if __name__ == "__main__":
    main()
