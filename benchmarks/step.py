"""The whole training step: against its floor and in parts, with MTA and without, with few and many teacher layers.

    python benchmarks/step.py --json rows.json                  # all cases, some fifteen minutes on two cores
    python benchmarks/step.py --cases floor --demo-folder runs/demo_pair    # made once

Case "floor" compares one rank of the demo's pair with both models' bare bodies, heads, backward and AdamW (see
``parts.py``), in turns, and says what the step's time goes into. In the other cases every run is one rank of
``mta-ds train`` in a process of its own, stopped as soon as it has logged its last measured step; step times are those
of its perf.jsonl. Memory is the high-water mark of anonymous memory over the measured steps: a mapped weight file is
no copy.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from common import (
    Row,
    anonymous_peak_bytes,
    bounded,
    machine_row,
    measure,
    options,
    peak_bytes,
    pin_threads,
    report,
    reset_peak,
    time_ratio,
)
from parts import OTHER, PARTS, make_floor, make_step
from tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mta_ds.demo import ASSETS, render_config, unpack_teacher
from mta_ds.launch.local import rank_environment
from mta_ds.spans.parse import ParseConfig, parse

WARM_UP_STEPS = 3
MEASURED_STEPS = 5
SECONDS_ALLOWED = 900
FLOOR_ROUNDS = 4  # of floor and steps in turns, a repeat: one step says little on a busy machine
STEP_BOUND = 1.15
RANKS = 2  # that share a deep teacher
STUDENTS = ("ZeRO-3", "ZeRO-2")
# partitions everything and keeps nothing gathered, so that what grows with the teacher is its partition alone
PARTITION_ALL = Path(__file__).parents[1] / "ds_configs" / "cpu_test.json"
# glibc maps blocks from the first size on and unmaps them when they are freed; of its heap's free end it keeps the
# second. What it would keep of freed memory grows with the teacher, and is no memory of the step: before 2.38 it
# finds no use for a hole as large as the aligned block wanted
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}


class Steps(NamedTuple):
    """What the measured steps of one run needed."""

    seconds: list[float]
    peak_bytes: int
    """Of anonymous memory."""
    resident_bytes: int
    """The peak with mapped files, as far as they were in memory."""
    rows: list[dict[str, Any]]
    """What the run said of each measured step."""


def run_steps(config: dict[str, Any], run_dir: Path, variables: dict[str, str] | None = None, ranks: int = 1) -> Steps:
    """Train until the last measured step is logged, then end the processes.

    Args:
        variables: added to the processes' environment.
    """
    run_dir.mkdir(parents=True)
    config_path = run_dir / "run.yaml"
    config_path.write_text(yaml.safe_dump(config | {"run_dir": str(run_dir)}))
    return watch_steps([sys.executable, "-m", "mta_ds", "train", str(config_path)], run_dir, variables, ranks)


def watch_steps(command: list[str], run_dir: Path, variables: dict[str, str] | None = None, ranks: int = 1) -> Steps:
    """Start a command that appends a row with "seconds" to ``run_dir``/perf.jsonl after each step; end it in time.

    Memory is the first rank's.
    """
    log_path, perf_path, port = run_dir / "log.txt", run_dir / "perf.jsonl", free_port()
    with log_path.open("w") as log:
        process, *others = (
            subprocess.Popen(
                command,
                env=rank_environment(rank, ranks, port) | (variables or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        )
        try:
            wait_for_step(WARM_UP_STEPS, perf_path, process, log_path)
            reset_peak(process.pid)
            rows = wait_for_step(WARM_UP_STEPS + MEASURED_STEPS, perf_path, process, log_path)
            anonymous, resident = anonymous_peak_bytes(process.pid), peak_bytes(process.pid)
        finally:
            for each in (process, *others):
                each.kill()
                each.wait()
    measured = rows[WARM_UP_STEPS : WARM_UP_STEPS + MEASURED_STEPS]
    return Steps([row["seconds"] for row in measured], anonymous, resident, measured)


def wait_for_step(step: int, perf: Path, process: subprocess.Popen[bytes], log: Path) -> list[dict[str, Any]]:
    """The rows of perf.jsonl, once there are ``step`` whole ones."""
    deadline = time.monotonic() + SECONDS_ALLOWED
    while True:
        lines = perf.read_text().split("\n")[:-1] if perf.exists() else []
        if len(lines) >= step:
            return [json.loads(line) for line in lines]
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"step {step} was not reached:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def demo_config(pair: Path) -> dict[str, Any]:
    """The run of the demo, its teacher and parses made in ``pair`` unless they are there."""
    unpack_teacher(pair / "teacher")
    config: dict[str, Any] = yaml.safe_load(render_config(pair, steps=1000, method="kd"))
    parse(ParseConfig(**config["parse"]))
    config["data"]["validation"] = []  # scored before the first step; nothing that is measured here
    return config


def against_the_floor(folder: Path, pair: Path, repeats: int) -> list[Row]:
    """The step with MTA, under the demo's ZeRO-3 and with the student under ZeRO-2, and the floor; then its parts."""
    config = demo_config(pair)
    zero2 = {"stage": 2, "reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}
    (folder / "zero2.json").write_text(json.dumps({"zero_optimization": zero2}))
    students = {"ZeRO-3": config["student"], "ZeRO-2": config["student"] | {"deepspeed": str(folder / "zero2.json")}}
    paths = {name: folder / f"{name}.yaml" for name in students}
    for name, student in students.items():
        paths[name].write_text(yaml.safe_dump(config | {"student": student}))
    contestants = {"floor": (make_floor, paths["ZeRO-3"])}
    found = measure(contestants | {name: (make_step, path) for name, path in paths.items()}, FLOOR_ROUNDS * repeats)
    rows = [Row("bare bodies, heads, backward, AdamW: the floor", found["floor"].median_seconds, "s")]
    for name in STUDENTS:
        step = f"demo step, student {name}"
        rows.append(Row(step, found[name].median_seconds, "s"))
        # one rank's student belongs under ZeRO-2 (docs/memory-and-speed.md): ZeRO-3 has nothing to cut
        bound = STEP_BOUND if name == "ZeRO-2" else None
        rows.append(bounded(f"{step} / floor", time_ratio(found[name], found["floor"]), "<=", bound))
        rows += parts_of(step, paths[name])
    return rows


def parts_of(step: str, config_path: Path) -> list[Row]:
    """What a step's time goes into, measured in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("parts.py")), str(config_path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    whole = sum(seconds.values())
    rows = [Row(f"{step}: {name}", 1000 * seconds[name], "ms") for name in (*PARTS, OTHER)]
    return [*rows, bounded(f"{step}: loader / step", 100 * seconds["loader"] / whole, "<=", 1.0, "%")]


def with_and_without_mta(folder: Path, pair: Path, repeats: int) -> list[Row]:
    """The demo's pair and data, with MTA and with ``mta: null``, in turns."""
    config = demo_config(pair)
    variants = {"on": config, "off": config | {"mta": None}}
    runs: dict[str, list[Steps]] = {name: [] for name in variants}
    for i in range(repeats):
        for name, variant in variants.items():
            runs[name].append(run_steps(variant, folder / f"mta_{name}_{i}"))
    # step i trains on the same records in every run, so steps are compared one by one
    ratios = [
        x / y for on, off in zip(runs["on"], runs["off"], strict=True) for x, y in zip(on[0], off[0], strict=True)
    ]
    seconds = {name: statistics.median(s for run in several for s in run.seconds) for name, several in runs.items()}
    peaks = {name: statistics.median(run.peak_bytes for run in several) for name, several in runs.items()}
    return [
        *(Row(f"demo step, MTA {name}", seconds[name], "s") for name in variants),
        bounded("demo step, MTA on / off: time", statistics.median(ratios), "<=", 1.10),
        *(Row(f"demo step, MTA {name}: peak anonymous memory", peaks[name] / 1e6, "MB") for name in variants),
        bounded("demo step, MTA on / off: peak anonymous memory", peaks["on"] / peaks["off"], "<=", 1.05),
    ]


def teacher_depth(folder: Path) -> list[Row]:
    """Peak memory of a step on one of two ranks, its share of the teacher aside, with 12 and 48 layers of one width.

    The batch is large so that one state kept for each layer would show: 36 of them are over 150 MB here. What is left
    is bookkeeping, DeepSpeed's and Python's objects for each of a layer's modules and parameters, whatever its size.
    """
    records = folder / "train.jsonl"
    records.write_text("\n".join((ASSETS / "train.jsonl").read_text().splitlines()[:64]) + "\n")
    parse(ParseConfig(inputs=(str(records),), output=folder / "spans"))
    tokenizer = train_tokenizer(records.read_text().splitlines())
    make_model(folder / "student", 4, tokenizer)
    rows, rest = [], {}
    for layers in (12, 48):
        weights = 4 * make_model(folder / f"teacher_{layers}", layers, tokenizer) // RANKS
        config = depth_config(folder, folder / f"teacher_{layers}")
        run = run_steps(config, folder / f"run_{layers}", RETURN_FREED_MEMORY, RANKS)
        rest[layers] = run.peak_bytes - weights
        rows.append(Row(f"step memory, {layers} teacher layers: all but its parameters", rest[layers] / 1e6, "MB"))
        rows.append(Row(f"step memory, {layers} teacher layers: its share of the parameters", weights / 1e6, "MB"))
    growth = (rest[48] - rest[12]) / 36
    rows.append(Row("step memory for each further teacher layer, parameters aside", growth / 1e6, "MB"))
    return [*rows, bounded("step memory, 48 / 12 teacher layers, parameters aside", rest[48] / rest[12], "<=", 1.02)]


def depth_config(folder: Path, teacher: Path) -> dict[str, Any]:
    """A run of the small pair."""
    return {
        "teacher": {"path": str(teacher), "deepspeed": str(PARTITION_ALL)},
        "student": {"path": str(folder / "student"), "deepspeed": str(PARTITION_ALL)},
        "data": {"train": [str(folder / "train.jsonl")], "spans": str(folder / "spans"), "max_length": 256},
        "mta": {"num_layers": 3},
        "train": {"steps": 1000, "micro_batch_size": 16},
    }


def make_model(folder: Path, layers: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """Write a random model 256 wide; returns the number of its parameters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=layers,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


CASES = ("floor", "mta", "teacher_depth")


def main() -> None:
    parser = options(__doc__.partition("\n\n")[0])
    parser.set_defaults(repeats=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--demo-folder", type=Path, help="keeps the demo's teacher, student and parses")
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    rows = [machine_row(arguments.threads)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = (arguments.demo_folder or folder / "demo").resolve()
        if "floor" in arguments.cases:
            rows += against_the_floor(folder, pair, arguments.repeats)
        if "mta" in arguments.cases:
            rows += with_and_without_mta(folder, pair, arguments.repeats)
        if "teacher_depth" in arguments.cases:
            rows += teacher_depth(folder)
    report("Training step", rows, arguments.json)


if __name__ == "__main__":
    main()
