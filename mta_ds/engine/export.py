"""Write the student as a Hugging Face folder, from whatever partitions it lives in."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel

from mta_ds.engine import distributed
from mta_ds.engine.config import RunConfig
from mta_ds.engine.distiller import Distiller
from mta_ds.engine.pair import Pair
from mta_ds.files import atomic_folder, fsync_directory
from mta_ds.models import (
    adapter_parameters,
    copy_tokenizer,
    gathered,
    plain_parameters,
    quiet_transformers,
    save_adapter,
)

ADAPTER = "adapter"
_SHARD_SIZE = "5GB"


def export(model: PreTrainedModel, tokenizer_from: Path, output: Path, card: str) -> None:
    """Save ``model`` so that ``AutoModelForCausalLM.from_pretrained(output)`` gives equal logits.

    Weights go into safetensors of at most 5 GB each, beside tokenizer, generation config and model card. Adapters are
    merged there, and written by themselves to ``output/adapter``, as peft reads them.

    Every rank must call it; parameters are gathered one at a time, and only rank 0 keeps them (in CPU memory). The
    folder appears whole, replacing an older one. Tied weights are written once, as ``save_pretrained`` does.
    """
    weights = _gather_state(model)
    adapters = _gather_adapters(model)
    if distributed.rank() == 0:
        with atomic_folder(output) as folder, quiet_transformers():
            model.save_pretrained(folder, state_dict=weights, max_shard_size=_SHARD_SIZE)
            copy_tokenizer(tokenizer_from, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")
            if adapters:
                save_adapter(model, adapters, folder / ADAPTER)
                fsync_directory(folder / ADAPTER)
    distributed.barrier()


@torch.no_grad()
def _gather_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The full plain state dict on rank 0's CPU, empty elsewhere; names that share a parameter share its copy."""
    state: dict[str, Tensor] = {}
    for names, value in plain_parameters(model):
        if distributed.rank() == 0:
            state |= dict.fromkeys(names, value().cpu())
    if distributed.rank() == 0:
        persistent = model.state_dict().keys()
        state |= {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in persistent}
    return state


@torch.no_grad()
def _gather_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters alone, by peft's names, on rank 0's CPU; empty elsewhere."""
    adapters: dict[str, Tensor] = {}
    for name, parameter in adapter_parameters(model).items():
        with gathered([parameter]):
            if distributed.rank() == 0:
                adapters[name] = parameter.detach().cpu().clone()
    return adapters


def export_student(config: RunConfig, pair: Pair, distiller: Distiller, step: int) -> Path:
    """Write a run's student as it is after ``step`` to the run's export folder; every rank must call it."""
    output = config.run_dir / "export"
    card = model_card(config, pair.method.describe(), step) if distributed.rank() == 0 else ""
    export(distiller.student.model, pair.student_dir, output, card)
    return output


def model_card(config: RunConfig, method: str, step: int) -> str:
    """The export's README.md: what the student was made of and how, and its last held-out scores up to ``step``."""
    front = {"library_name": "transformers", "base_model": config.teacher.path, "tags": ["distillation", "mta"]}
    mta = config.mta
    student = config.student
    start = student.path or (f"layers of the teacher: {student.teacher_layers}" if student.teacher_layers else "random")
    rows = {
        "teacher": config.teacher.path + (f", adapter {config.teacher.adapter}" if config.teacher.adapter else ""),
        "student's start": start,
        "training records": ", ".join(config.data.train),
        "base loss": method,
        "MTA": "off" if mta is None else f"λ_DSA {mta.lambda_dsa:g}, λ_Hid {mta.lambda_hid:g}, {mta.reduction}",
        "optimizer steps": str(step),
        "configuration's hash": config.training_hash(),
    }
    rows |= {f"held-out {name}": f"{value:.4f}" for name, value in _last_scores(config.run_dir, step).items()}
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"---\n{yaml.safe_dump(front)}---\n\n# A distilled student\n\n| | |\n|---|---|\n{table}\nMade by mta_ds.\n"


def _last_scores(run_dir: Path, step: int) -> dict[str, float]:
    """Loss and KL of the run's last validation up to ``step``; the log may go on after it, and end in half a row."""
    log, prefix, scores = run_dir / "metrics.jsonl", "validation/", {}
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            if row["step"] <= step and "validation/loss" in row:
                scores = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
    return scores
