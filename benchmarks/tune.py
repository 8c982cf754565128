"""Predicted against measured peak memory on a CPU: 13 configurations of a small pair, trained for real.

    python benchmarks/tune.py [--json rows.json]

One and two ranks, ZeRO-1 to 3, with and without checkpointing, and an offloaded optimizer. Measured is the resident
memory of rank 0 above what the imported libraries take, and its peak over four steps. The pair is random; all
sequences are as long as allowed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from common import Row, bounded, report
from tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.engine import RunConfig
from mta_ds.tuning.machine import cpu_machine
from mta_ds.tuning.memory import Plan
from mta_ds.tuning.search import judge
from mta_ds.tuning.shapes import workload
from mta_ds.tuning.trials import Runner, Trial

LENGTH, BATCH = 256, 4
STEPS = 4  # ZeRO-3 knows its order of gathers after the second, and memory grows no more
SIZES = {
    "teacher": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 12},
    "student": {"hidden_size": 384, "intermediate_size": 1152, "num_attention_heads": 6, "num_hidden_layers": 8},
}
CASES = [
    (ranks, stage, recompute, False) for ranks, stage, recompute in itertools.product((1, 2), (1, 2, 3), (False, True))
]
CASES += [(2, 3, False, True)]


def make_run(root: Path) -> RunConfig:
    """A pair of random models and records that fill every sequence."""
    text = "the quick brown fox jumps over a lazy dog while seven wizards box with zeal " * 60
    records = [{"id": str(i), "prompt": f"{i} say it", "response": f"{i} {text}"} for i in range(64)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer([text])
    for name, sizes in SIZES.items():
        config = AutoConfig.for_model("llama", vocab_size=16_384, num_key_value_heads=2, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return RunConfig.model_validate(
        {
            "run_dir": str(root / "run"),
            "teacher": {"path": str(root / "teacher")},
            "student": {"path": str(root / "student")},
            "data": {"train": [str(root / "train.jsonl")], "max_length": LENGTH, "max_prompt_length": 64},
            "mta": None,
            "train": {"steps": 8, "micro_batch_size": BATCH},
        }
    )


def run_case(config: RunConfig, root: Path, case: tuple[int, int, bool, bool]) -> Trial:
    """One configuration, predicted and then trained."""
    ranks, stage, recompute, offload = case
    machine = replace(cpu_machine(ranks), headroom=0.0)
    plan = Plan(stage, True, offload, 1, False, recompute, BATCH, 1, 10_000_000, 10_000_000)
    work = workload(config)
    runner = Runner(config, work.student, machine, root / "trials", minutes=30, steps=STEPS)
    return runner.run([judge(work, plan, machine)])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = make_run(root)
        for case in CASES:
            ranks, stage, recompute, offload = case
            trial = run_case(config, root, case)
            extras = f"{', checkpointing' if recompute else ''}{', offload' if offload else ''}"
            name = f"{ranks} rank{'s' * (ranks > 1)}, ZeRO-{stage}{extras}"
            if trial.peak_bytes is None:
                rows.append(Row(name, f"{trial.outcome}: {trial.note}"))
                continue
            figures = f"predicted {trial.predicted_bytes / 1e6:.0f}, measured {trial.peak_bytes / 1e6:.0f} MB"
            rows.append(Row(f"{name}: {figures}", ""))
            off = 100 * abs(trial.predicted_bytes / trial.peak_bytes - 1)
            rows.append(bounded(f"{name}: off by", off, "<=", 10.0, "%"))
    report("Peak memory, predicted against measured", rows, options.json)


if __name__ == "__main__":
    main()
