"""The TRL side of ``against_trl.py``: GKDTrainer on given batches; runs where TRL is installed, without this project.

    python trl_worker.py TEACHER STUDENT BATCHES RUN_DIR LR THREADS

Appends to RUN_DIR/perf.jsonl the seconds from the end of one step to the end of the next, and the losses so far.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class InOrder(GKDTrainer):
    """GKD on the batches as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class Log(TrainerCallback):
    """Writes a row after each step's loss is logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []
        self.ended = time.perf_counter()

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs:
            return
        now = time.perf_counter()
        self.losses.append(float(logs["loss"]))
        row = {"seconds": now - self.ended, "first_losses": self.losses[:3]}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.ended = now


def main() -> None:
    teacher, student, batches, run_dir, lr, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    tensors = load_file(batches)
    num_steps = len(tensors) // 3
    names = ("input_ids", "attention_mask", "labels")
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32),
        args=GKDConfig(
            output_dir=run_dir,
            per_device_train_batch_size=1,  # a row of the data set is a whole batch
            max_steps=num_steps,
            learning_rate=float(lr),
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            lmbda=0.0,
            beta=0.0,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"step": list(range(num_steps))}),
        data_collator=lambda rows: {name: tensors[f"{rows[0]['step']}.{name}"] for name in names},
        processing_class=AutoTokenizer.from_pretrained(student),
        callbacks=[Log(Path(run_dir) / "perf.jsonl")],
    )
    trainer.train()


if __name__ == "__main__":
    main()
