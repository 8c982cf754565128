"""Against TRL's GKD trainer: the demo's pair, the same batches, off-policy KL(teacher ‖ student), MTA off.

    python3.11 -m venv trl-venv && trl-venv/bin/pip install torch trl==1.16.0 datasets
    python benchmarks/against_trl.py --trl-python trl-venv/bin/python --json rows.json

TRL is no dependency of the project: ``trl_worker.py`` runs in the environment that ``--trl-python`` names, with the
batches of our loader in a file. Both train in one process, in turns, with the same threads; neither checkpoints
activations. A step is counted from the end of the one before it, loader and log included. Memory is the peak of
resident memory over the measured steps, mapped weights included, because TRL's teacher stays in its mapped file. That
both do the same is checked by their losses.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from common import Row, bounded, machine_row, options, pin_threads, report
from safetensors.torch import save_file
from step import MEASURED_STEPS, WARM_UP_STEPS, Steps, demo_config, run_steps, watch_steps

from mta_ds.config import load

WORKER = Path(__file__).with_name("trl_worker.py")
SPARE_STEPS = 3  # the run must still be alive when its memory is read


def save_batches(config_path: Path, file: Path) -> tuple[Path, Path, int]:
    """Write the batches of a run's first steps; returns its teacher, its student and the tokens of a measured step."""
    from mta_ds.data import IGNORED, StepLoader
    from mta_ds.engine import RunConfig
    from mta_ds.engine.pair import prepare_pair
    from mta_ds.engine.setup import load_data, pad_id

    config = load(config_path, RunConfig)
    pair = prepare_pair(config)
    train, _ = load_data(config, pair.tokenizer, pair.method.pairs)
    loader = StepLoader(train, pad_id(pair.tokenizer), config.train.seed, config.train.micro_batch_size, 1, 0, 1)
    tensors, tokens = {}, 0
    for step in range(WARM_UP_STEPS + MEASURED_STEPS + SPARE_STEPS):
        (batch,) = loader.next_step()
        labels = batch.input_ids.new_full(batch.input_ids.shape, IGNORED)
        # a target stands where its token is predicted, a label where it is
        rows, columns = batch.valid // labels.shape[1], batch.valid % labels.shape[1]
        counted = batch.targets != IGNORED
        labels[rows[counted], columns[counted] + 1] = batch.targets[counted]
        tensors |= {f"{step}.input_ids": batch.input_ids, f"{step}.attention_mask": batch.attention_mask}
        tensors[f"{step}.labels"] = labels
        if WARM_UP_STEPS <= step < WARM_UP_STEPS + MEASURED_STEPS:
            tokens += len(batch.valid)
    save_file(tensors, file)
    return pair.teacher_dir, pair.student_dir, tokens


def our_steps(config: dict[str, Any], run_dir: Path) -> tuple[Steps, list[float], list[float]]:
    """Our run: its steps, the seconds with the loader's, and the losses."""
    steps = run_steps(config, run_dir)
    metrics = [yaml.safe_load(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    return steps, [row["seconds"] + row["data_seconds"] for row in steps.rows], losses[:WARM_UP_STEPS]


def compare(folder: Path, pair: Path, trl_python: Path, batch_size: int, threads: int, repeats: int) -> list[Row]:
    """Both trainers in turns."""
    config = demo_config(pair) | {"mta": None}
    # what both do alike: transformers' warm-up begins at a rate of zero, ours does not
    config["train"] |= {"schedule": "constant", "warmup_steps": 0, "lr": 1e-4, "micro_batch_size": batch_size}
    config_path = folder / "pair.yaml"
    config_path.write_text(yaml.safe_dump(config))
    batches = folder / "batches.safetensors"
    teacher, student, tokens = save_batches(config_path, batches)
    ours: list[tuple[Steps, list[float], list[float]]] = []
    theirs: list[Steps] = []
    for i in range(repeats):
        ours.append(our_steps(config, folder / f"ours_{i}"))
        run_dir = folder / f"trl_{i}"
        run_dir.mkdir()
        arguments = [teacher, student, batches, run_dir, config["train"]["lr"], threads]
        # -P: the folder of this script has modules that libraries would take for their own
        theirs.append(watch_steps([str(trl_python), "-P", str(WORKER), *map(str, arguments)], run_dir))
    seconds = {
        "ours": statistics.median(sum(each[1]) for each in ours),
        "TRL": statistics.median(sum(each.seconds) for each in theirs),
    }
    peaks = {
        "ours": statistics.median(each[0].resident_bytes for each in ours),
        "TRL": statistics.median(each.resident_bytes for each in theirs),
    }
    their_losses = theirs[0].rows[0]["first_losses"]
    apart = max(abs(a / b - 1) for a, b in zip(ours[0][2], their_losses, strict=True))
    return [
        *(Row(f"off-policy KL, {name}", tokens / value, "tokens/s") for name, value in seconds.items()),
        bounded("ours / TRL: tokens/s", seconds["TRL"] / seconds["ours"], ">=", 1.3),
        *(Row(f"off-policy KL, {name}: peak resident memory", value / 1e6, "MB") for name, value in peaks.items()),
        bounded("ours / TRL: peak resident memory", peaks["ours"] / peaks["TRL"], "<=", 0.7),
        bounded(f"losses of the first {WARM_UP_STEPS} steps: worst relative difference", apart, "<=", 1e-3, ""),
    ]


def main() -> None:
    parser = options(__doc__.partition("\n\n")[0])
    parser.set_defaults(repeats=2)
    parser.add_argument("--trl-python", type=Path, required=True, help="Python of an environment that has TRL 1.16")
    parser.add_argument("--batch-size", type=int, default=24, help="sequences a step")
    parser.add_argument("--demo-folder", type=Path, help="keeps the demo's teacher, student and parses")
    arguments = parser.parse_args()
    pin_threads(arguments.threads)
    check = "import trl; print(trl.__version__)"
    found = subprocess.run([arguments.trl_python, "-c", check], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"--trl-python {arguments.trl_python}: no TRL there: pip install trl==1.16.0")
    rows = [machine_row(arguments.threads), Row("TRL", found.stdout.strip())]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pair = (arguments.demo_folder or folder / "demo").resolve()
        rows += compare(
            folder, pair, arguments.trl_python.absolute(), arguments.batch_size, arguments.threads, arguments.repeats
        )
    report("Training step against TRL's GKD trainer", rows, arguments.json)


if __name__ == "__main__":
    main()
