"""Every base method with and without MTA on a small pair and real text: held-out KL to the teacher, loss, ROUGE-L.

    python benchmarks/methods.py --records train.jsonl --heldout dev.jsonl --output RUNS

All that is run is the product's own commands, each in its process: a teacher (8 layers of 256) learns the records from
nothing, a student (4 of 128) learns them for a while, and then every method goes on from that student, for as many
steps of as many sequences, once for each seed. Within a method, rows with and without MTA differ in MTA alone. What is
there already is not run again, so the command may be repeated until it is done, with ``--methods`` for some of the
rows. The table is printed and written to RUNS/methods.md.

The pair is tiny, so the figures compare methods under one budget; they are not those of the paper.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

MAX_LENGTH, MAX_PROMPT = 128, 64
TEACHER = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
STUDENT = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4}
ROLLOUTS = {"max_new_tokens": 48, "batch_size": 16}
# Rows with and without MTA differ in MTA alone: FDD's τ, whose default depends on MTA, is fixed in each.
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    "fdd": {"method": "fdd", "num_layers": 3, "stride": 1, "temperature": 2.0},
    "fdd-tau5": {"method": "fdd", "num_layers": 3, "stride": 1, "temperature": 5.0},
    "distillm": {"method": "distillm", "initial_phi": 0.5, "buffer_size": 256, "rollouts": ROLLOUTS},
    "distillm2": {"method": "distillm2"},
    "gkd": {"method": "gkd", "rollouts": ROLLOUTS},
}
MTA = {"num_layers": 3, "stride": 1}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is run."""

    records: int
    heldout: int
    vocabulary: int
    teacher_steps: int
    start_steps: int
    steps: int
    batch: int
    seeds: tuple[int, ...]


FULL = Sizes(3000, 64, 4096, 500, 200, 100, 16, (1, 2, 3))
SMALL = Sizes(24, 4, 400, 2, 1, 2, 4, (1,))


def main() -> None:
    """Prepare, run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True, help="instruction records to train on (JSON lines)")
    parser.add_argument("--heldout", type=Path, required=True, help="records to score on")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--small", action="store_true", help="a few steps, to see that it runs")
    arguments = parser.parse_args()
    sizes = SMALL if arguments.small else FULL
    root: Path = arguments.output.resolve()
    root.mkdir(parents=True, exist_ok=True)
    prepare(root, arguments.records, arguments.heldout, sizes)
    if "distillm2" in arguments.methods:
        prepare_pairs(root, sizes)
    results: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for seed in sizes.seeds:
        for method in arguments.methods:
            for with_mta in (False, True):
                result = run_method(root, sizes, method, with_mta, seed)
                results.setdefault((method, with_mta), []).append(result)
    start = evaluate(root, config_of(root, sizes, root / "start", "kd", False, 1), root / "start" / "export")
    table = render(results, start, sizes)
    (root / "methods.md").write_text(table, encoding="utf-8")
    print(table)


def prepare(root: Path, records: Path, heldout: Path, sizes: Sizes) -> None:
    """Records, tokenizer, both models and the span store that all methods share."""
    for name, source, count in (("train", records, sizes.records), ("heldout", heldout, sizes.heldout)):
        if not (root / f"{name}.jsonl").is_file():
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
            fitting = [line for line in lines if len(json.loads(line)["output"]) < 4 * (MAX_LENGTH - MAX_PROMPT)]
            (root / f"{name}.jsonl").write_text("".join(fitting[:count]), encoding="utf-8")
    for name, shape in (("teacher", TEACHER), ("student", STUDENT)):
        if not (root / f"{name}_init").is_dir():
            make_model(root, root / f"{name}_init", shape, sizes.vocabulary)
    sft = {"method": "kd", "divergence": "sft"}
    for name, start, steps in (
        ("teacher", "teacher_init", sizes.teacher_steps),
        ("start", "student_init", sizes.start_steps),
    ):
        config = base_config(root, root / name, root / start, sizes, sft, seed=0, steps=steps)
        config |= {"teacher": {"path": str(root / start)}, "mta": None}
        config["data"] |= {"spans": None, "validation": []}
        config["train"] |= {"lr": 1e-3, "warmup_steps": min(20, steps - 1)}
        run_once(root / name / "export", "train", write(root / name, config), "--nproc", "1")
    run_once(
        root / "spans" / "manifest.json",
        *("parse", "--input", root / "train.jsonl", "--input", root / "heldout.jsonl", "--output", root / "spans"),
    )


def prepare_pairs(root: Path, sizes: Sizes) -> None:
    """DistiLLM-2's records: the teacher's responses and the start's to all prompts, and their span store."""
    answers = write(root / "answers", config_of(root, sizes, root / "answers", "kd", False, 1))
    chosen, rejected = root / "answers" / "chosen", root / "answers" / "rejected"
    run_once(chosen / "manifest.json", "generate", answers, "--model", root / "teacher" / "export", "--output", chosen)
    run_once(
        rejected / "pairs.jsonl",
        *("generate", answers, "--model", root / "start" / "export", "--output", rejected, "--pair-with", chosen),
    )
    run_once(
        root / "pair_spans" / "manifest.json",
        *("parse", "--input", rejected / "pairs.jsonl", "--input", root / "heldout.jsonl"),
        *("--output", root / "pair_spans"),
    )


def make_model(root: Path, folder: Path, shape: dict[str, int], vocabulary: int) -> None:
    """A random model with a byte-level BPE tokenizer of the records."""
    rows = map(json.loads, (root / "train.jsonl").read_text(encoding="utf-8").splitlines())
    tokenizer = train_tokenizer((text for row in rows for text in row.values()), vocabulary)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def base_config(
    root: Path, run_dir: Path, student: Path, sizes: Sizes, loss: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """A run's YAML as plain values."""
    return {
        "run_dir": str(run_dir),
        "teacher": {"path": str(root / "teacher" / "export")},
        "student": {"path": str(student)},
        "data": {
            "train": [str(root / "train.jsonl")],
            "validation": [str(root / "heldout.jsonl")],
            "spans": str(root / "spans"),
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT,
        },
        "loss": loss,
        "train": {"steps": steps, "micro_batch_size": sizes.batch, "lr": 5e-4, "seed": seed},
        "generation": {
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT,
            "max_new_tokens": 48,
            "num_shards": 1,
        },
        "evaluation": {
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT,
            "do_sample": False,
            "batch_size": 32,
        },
    }


def config_of(root: Path, sizes: Sizes, run_dir: Path, method: str, with_mta: bool, seed: int) -> dict[str, Any]:
    """The run of a method from the common start; all differ in their losses and, of DistiLLM-2, their records alone."""
    loss = METHODS[method]
    config = base_config(root, run_dir, root / "start" / "export", sizes, loss, seed, sizes.steps)
    config["mta"] = MTA if with_mta else None
    if method == "distillm2":
        config["data"] |= {
            "train": [str(root / "answers" / "rejected" / "pairs.jsonl")],
            "spans": str(root / "pair_spans"),
        }
        config["train"]["micro_batch_size"] = sizes.batch // 2  # pairs: as many sequences a step as the others
    return config


def run_method(root: Path, sizes: Sizes, method: str, with_mta: bool, seed: int) -> dict[str, Any]:
    """Train and score one run; its scores."""
    run_dir = root / "runs" / f"{method}{'-mta' if with_mta else ''}-seed{seed}"
    config = config_of(root, sizes, run_dir, method, with_mta, seed)
    run_once(run_dir / "export", "train", write(run_dir, config), "--nproc", "1")
    scores = evaluate(root, config, run_dir / "export")
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    return scores


def evaluate(root: Path, config: dict[str, Any], model: Path) -> dict[str, Any]:
    """Held-out KL, loss and ROUGE-L of a model folder."""
    run_dir = Path(config["run_dir"])
    result = run_dir / "evaluation" / "after.json"
    run_once(result, "evaluate", write(run_dir, config), "--student", model)
    scores: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return scores


def write(run_dir: Path, config: dict[str, Any]) -> Path:
    """The YAML of a run, in its folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def run_once(result: Path, *arguments: object) -> None:
    """One ``mta-ds`` command, unless its result is there."""
    if result.exists():
        return
    environment = {"OMP_WAIT_POLICY": "passive"} | os.environ
    command = [sys.executable, "-m", "mta_ds", *map(str, arguments)]
    print("mta-ds", *map(str, arguments), flush=True)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def render(results: dict[tuple[str, bool], list[dict[str, Any]]], start: dict[str, Any], sizes: Sizes) -> str:
    """The table in Markdown: mean and standard deviation over seeds."""
    lines = [
        f"{sizes.steps} steps of {sizes.batch} sequences, seeds {' '.join(map(str, sizes.seeds))}; "
        f"{sizes.heldout} held-out records, greedy decoding.",
        "",
        "| method | MTA | KL to the teacher | held-out loss | ROUGE-L |",
        "|---|---|---|---|---|",
        "| the common start | | " + " | ".join(cell([score(start, name)]) for name in ("kl", "loss", "rouge_l")) + " |",
    ]
    for (method, with_mta), scores in results.items():
        cells = (cell([score(each, name) for each in scores]) for name in ("kl", "loss", "rouge_l"))
        lines.append(f"| {method} | {'yes' if with_mta else 'no'} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def score(scores: dict[str, Any], name: str) -> float:
    return float(scores[name]["mean"] if name == "rouge_l" else scores[name])


def cell(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


if __name__ == "__main__":
    main()
