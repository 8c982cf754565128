"""Memory over hundreds of steps, and what chunks of the student's MLP save.

    python benchmarks/memory.py --json rows.json              # 300 steps on one rank and on two, some minutes
    python benchmarks/memory.py --cases mlp                   # only the MLP

Case "flat": student and teacher of a tiny pair train under ZeRO-3, everything partitioned; each rank's resident memory
is read when a step is logged, and a line is fitted through it from step 50 on (DeepSpeed#3286 is such a leak). Case
"mlp": one long sequence forward and backward through a student with and without ``student.mlp_chunk``.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import Row, Work, bounded, machine_row, measure, options, pin_threads, report
from step import ASSETS, PARTITION_ALL, free_port
from tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mta_ds.launch.local import rank_environment
from mta_ds.spans.parse import ParseConfig, parse

FIRST_STEP = 50
LONG = 8192
CASES = ("flat", "mlp")


def make_model(folder: Path, layers: int, width: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a small random model."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=layers,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_config(folder: Path, steps: int) -> dict[str, Any]:
    """A run of a tiny pair, made in ``folder``; nothing of it is saved before its end."""
    records = folder / "train.jsonl"
    records.write_text("\n".join((ASSETS / "train.jsonl").read_text().splitlines()[:64]) + "\n")
    parse(ParseConfig(inputs=(str(records),), output=folder / "spans"))
    tokenizer = train_tokenizer(records.read_text().splitlines(), size=400)
    make_model(folder / "teacher", 6, 48, tokenizer)
    make_model(folder / "student", 3, 32, tokenizer)
    return {
        "teacher": {"path": str(folder / "teacher"), "deepspeed": str(PARTITION_ALL)},
        "student": {"path": str(folder / "student"), "deepspeed": str(PARTITION_ALL)},
        "data": {"train": [str(records)], "spans": str(folder / "spans"), "max_length": 96, "max_prompt_length": 64},
        "mta": {"num_layers": 2},
        "train": {"steps": steps, "micro_batch_size": 2},
    }


def memory_by_step(config: dict[str, Any], run_dir: Path, ranks: int, steps: int) -> np.ndarray:
    """Resident bytes of every rank at each step [steps, ranks], read as soon as the step is seen in the log."""
    run_dir.mkdir()
    path, log = run_dir / "run.yaml", run_dir / "perf.jsonl"
    path.write_text(yaml.safe_dump(config | {"run_dir": str(run_dir)}))
    port, command = free_port(), [sys.executable, "-m", "mta_ds", "train", str(path)]
    with (run_dir / "log.txt").open("w") as output:
        processes = [
            subprocess.Popen(command, env=rank_environment(r, ranks, port), stdout=output, stderr=subprocess.STDOUT)
            for r in range(ranks)
        ]
        found: dict[int, list[int]] = {}
        try:
            # the last steps may come while the ranks end
            while (step := last_step(log)) < steps - 2:
                if any(process.poll() for process in processes):
                    raise SystemExit(f"a rank failed:\n{(run_dir / 'log.txt').read_text()[-3000:]}")
                if step and step not in found:
                    found[step] = [resident_bytes(process.pid) for process in processes]
                time.sleep(0.005)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return np.array([[step, *values] for step, values in found.items()])


def last_step(log: Path) -> int:
    """The last step that a run has logged, 0 if none."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def resident_bytes(pid: int) -> int:
    """Anonymous memory of a process: mapped data sets come in as they are read."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon:")).split()[1])


def is_flat(folder: Path, steps: int) -> list[Row]:
    """Slope of memory over the steps, for one rank and two."""
    config = make_config(folder, steps)
    rows = []
    for ranks in (1, 2):
        table = memory_by_step(config, folder / f"run_{ranks}", ranks, steps)
        late = table[table[:, 0] >= FIRST_STEP]
        for rank in range(ranks):
            slope = np.polyfit(late[:, 0], late[:, 1 + rank], 1)[0] / 1e3
            name = f"rank {rank} of {ranks}, steps {FIRST_STEP}-{steps}"
            rows.append(Row(f"{name}: memory at the end", late[-1, 1 + rank] / 1e6, "MB"))
            rows.append(bounded(f"{name}: slope", float(slope), "<=", 50.0, "kB a step"))
    return rows


def long_step(chunk: int | None) -> Work:
    """A long sequence forward and backward through two layers 512 wide, layers checkpointed as long inputs need."""
    from mta_ds.models import chunk_mlps

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=64, **sizes)).train()
    if chunk is not None:
        chunk_mlps(model, chunk)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(1, LONG, dtype=torch.int64)

    def work() -> None:
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
        model.zero_grad()

    return work


def mlp_in_chunks(repeats: int) -> list[Row]:
    """Time and memory of a long sequence with and without chunks."""
    names = {f"{LONG} tokens, whole MLP": None, f"{LONG} tokens, mlp_chunk 512": 512}
    found = measure({name: (functools.partial(long_step, chunk),) for name, chunk in names.items()}, repeats)
    rows = []
    for name, each in found.items():
        rows.append(Row(f"{name}: forward and backward", each.median_seconds, "s"))
        rows.append(Row(f"{name}: extra memory", each.extra_bytes / 1e6, "MB"))
    whole, chunked = found.values()
    return [*rows, bounded("mlp_chunk / whole: extra memory", chunked.extra_bytes / whole.extra_bytes, "<=", 0.75)]


def main() -> None:
    parser = options(__doc__.partition("\n\n")[0])
    parser.set_defaults(repeats=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    rows = [machine_row(arguments.threads)]
    with tempfile.TemporaryDirectory() as temporary:
        if "mlp" in arguments.cases:
            rows += mlp_in_chunks(arguments.repeats)
        if "flat" in arguments.cases:
            rows += is_flat(Path(temporary), arguments.steps)
    report("Memory", rows, arguments.json)


if __name__ == "__main__":
    main()
