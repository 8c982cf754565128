"""What a run writes down: metrics.jsonl (deterministic values only), perf.jsonl (time, memory) and TensorBoard."""

from __future__ import annotations

import hashlib
import json
import math
import resource
from pathlib import Path
from typing import IO, Any

import torch

from mta_ds.errors import UserError
from mta_ds.files import write_atomic


class MetricsLog:
    """Appends one row a step to the run folder's logs; every row is flushed, so a killed job leaves whole lines.

    Two files because only one may differ between a run and its exact repetition: metrics.jsonl is equal byte for byte
    when an interrupted run is resumed, perf.jsonl is not.
    """

    def __init__(self, run_dir: Path, resume_step: int, wandb_project: str | None = None) -> None:
        # a run without a checkpoint begins anew, with the validation before its first step
        kept = resume_step if resume_step > 0 else -1
        self._metrics = _open_cut(run_dir / "metrics.jsonl", kept)
        self._perf = _open_cut(run_dir / "perf.jsonl", kept)
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged beyond the checkpoint it resumes from
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=kept + 1)
        self._wandb = _open_wandb(wandb_project, run_dir) if wandb_project is not None else None

    def write(self, step: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """Log one optimizer step's values; of a step that was left out, those that are numbers."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for file, row in ((self._metrics, metrics), (self._perf, perf)):
            if row:
                file.write(json.dumps({"step": step} | row) + "\n")
                file.flush()
        for name, value in (metrics | {f"perf/{k}": v for k, v in perf.items()}).items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(metrics | {f"perf/{k}": v for k, v in perf.items()}, step=step)

    def announce(self, step: int, num_steps: int, metrics: dict[str, float], perf: dict[str, float]) -> None:
        """One line for whoever watches the job."""
        self.say(
            f"step {step}/{num_steps}  loss {metrics['loss']:.4f}  base {metrics['base']:.4f}  "
            f"dsa {metrics.get('dsa', 0.0):.4f}  hid {metrics.get('hid', 0.0):.4f}  "
            f"{perf['seconds']:.2f} s  {perf['tokens_per_second']:.0f} tokens/s"
        )

    def say(self, line: str) -> None:
        """Print a line at once, also into a batch log."""
        print(line, flush=True)

    def close(self) -> None:
        """Flush and close all three logs."""
        self._metrics.close()
        self._perf.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _open_wandb(project: str, run_dir: Path) -> Any:
    """A run of Weights & Biases that a resumed run of this folder goes on with."""
    try:
        import wandb  # type: ignore[import-not-found]  # not ours to install
    except ImportError:
        raise UserError("train.wandb_project: wandb is not installed; 'pip install wandb', or remove the key") from None
    identity = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]
    return wandb.init(project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir))


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on its GPU, or resident in the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _open_cut(path: Path, last_step: int) -> IO[str]:
    """Open for appending after dropping rows beyond ``last_step``, and a half-written last line."""
    if path.exists():
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= last_step]
        write_atomic(path, "".join(line + "\n" for line in kept))
    return open(path, "a", encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        row: Any = json.loads(line)
        return float(row["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
