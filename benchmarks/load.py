"""Loading into ZeRO-3 partitions: the peak of anonymous memory of each rank, against its partition.

    python benchmarks/load.py --json rows.json             # 2 GB on two ranks, as the teacher and as the student
    python benchmarks/load.py --megabytes 200              # smaller, to see that it runs

A random model is written as sharded safetensors, then every rank loads it as ``mta-ds train`` does. The bound is the
rank's partition, its largest tensor whole, and 500 MB, over what the process held with its libraries imported. Mapped
files are no copy, so anonymous memory alone counts; it is sampled every two milliseconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from common import Row, bounded, machine_row, options, pin_threads, report
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.launch.local import rank_environment

SLACK_BYTES = 500e6
ROLES = ("teacher", "student")


def write_model(folder: Path, megabytes: int) -> tuple[int, int]:
    """A random model of about this size, in shards of 200 MB; returns the bytes of all tensors and of the largest."""
    hidden, vocabulary = (2048, 16000) if megabytes >= 1000 else (768, 8000)
    per_layer = 4 * (4 * hidden * hidden + 3 * hidden * 3 * hidden)
    layers = max(1, round((1e6 * megabytes - 2 * 4 * vocabulary * hidden) / per_layer))
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_hidden_layers=layers,
    )
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    sizes = [4 * parameter.numel() for parameter in model.parameters()]
    return sum(sizes), max(sizes)


def anonymous_bytes() -> int:
    """Anonymous memory of this process now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


@contextmanager
def sampled_peak() -> Iterator[list[int]]:
    """The highest anonymous memory while the block runs, in a list of one."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def be_a_rank(role: str, folder: Path, output: Path) -> None:
    """Load ``folder`` in one role; writes this rank's memory before, its peak, and whether a tensor is the file's."""
    from mta_ds.engine import distributed
    from mta_ds.models import gathered, load_pretrained
    from mta_ds.models.zero import student_config, teacher_config

    distributed.initialise()
    size = distributed.world_size()
    config = teacher_config(None, "float32", 1) if role == "teacher" else student_config(None, "float32", 1, 1, size, 1)
    before = anonymous_bytes()
    began = time.perf_counter()
    with sampled_peak() as peak:
        model = load_pretrained(folder, "float32", config)
    seconds = time.perf_counter() - began
    name, parameter = list(model.named_parameters())[len(list(model.parameters())) // 2]
    with gathered([parameter]):
        equal = torch.equal(parameter, stored(folder, name))
    row = {"before": before, "peak": peak[0], "seconds": seconds, "equal": equal}
    output.with_suffix(f".{distributed.rank()}").write_text(json.dumps(row))
    distributed.shutdown()


def stored(folder: Path, name: str) -> torch.Tensor:
    """A tensor as the files have it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / index[name], framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor


def measure_load(role: str, folder: Path, sizes: tuple[int, int], ranks: int, work: Path) -> list[Row]:
    """Rows of one role."""
    from step import free_port

    port, output = free_port(), work / role
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder), "--output", str(output)]
    processes = [subprocess.Popen(command, env=rank_environment(rank, ranks, port)) for rank in range(ranks)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{role}: a rank failed")
    found = [json.loads(output.with_suffix(f".{rank}").read_text()) for rank in range(ranks)]
    limit = sizes[0] / ranks + sizes[1] + SLACK_BYTES
    rows = [Row(f"{role}: seconds of the load", max(each["seconds"] for each in found), "s")]
    for rank, each in enumerate(found):
        peak = (each["peak"] - each["before"]) / 1e6
        rows.append(bounded(f"{role}, rank {rank}: peak anonymous memory of the load", peak, "<=", limit / 1e6, "MB"))
    equal = sum(each["equal"] for each in found) / ranks
    return [*rows, bounded(f"{role}: a gathered tensor equals the file's", equal, ">=", 1.0, "of 1")]


def main() -> None:
    parser = options(__doc__.partition("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--ranks", type=int, default=2)
    for name in ("role", "folder", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        return be_a_rank(arguments.role, Path(arguments.folder), Path(arguments.output))
    pin_threads(max(1, arguments.threads // arguments.ranks))
    rows = [machine_row(arguments.threads)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        sizes = write_model(folder, arguments.megabytes)
        rows.append(Row("the model's tensors", sizes[0] / 1e6, "MB"))
        rows.append(Row("its largest tensor", sizes[1] / 1e6, "MB"))
        for role in ROLES:
            rows += measure_load(role, folder, sizes, arguments.ranks, Path(temporary))
    report(f"Loading into partitions on {arguments.ranks} ranks", rows, arguments.json)


if __name__ == "__main__":
    main()
