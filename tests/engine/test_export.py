"""The student of a checkpoint as a folder, without what only training needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from support import run_command, train, write_config

from mta_ds.config import load
from mta_ds.engine import RunConfig
from mta_ds.engine.export import model_card


def test_a_checkpoint_is_exported_without_data_teacher_weights_or_its_batch(pair: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(pair, tmp_path / "pair"))
    train(own, tmp_path / "run", 2, train__micro_batch_size=2, train__steps=1)
    trained = (tmp_path / "run" / "export" / "model.safetensors").read_bytes()
    for gone in (own / "train.jsonl", own / "heldout.jsonl", own / "teacher" / "model.safetensors"):
        gone.unlink()
    for gone in (own / "spans", tmp_path / "run" / "cache", tmp_path / "run" / "export"):
        shutil.rmtree(gone)
    path = write_config(own, tmp_path / "run", train__micro_batch_size=2, train__steps=1)
    done = run_command("export", path, "train.micro_batch_size=3")
    assert done.stdout.split() == [str(tmp_path / "run" / "export")]
    assert (tmp_path / "run" / "export" / "model.safetensors").read_bytes() == trained
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    failed = run_command("export", path, "--nproc", 2, check=False)
    assert failed.returncode == 1 and failed.stderr.count("no valid checkpoint to export") == 1


def test_a_card_has_the_scores_of_its_own_step(pair: Path, tmp_path: Path) -> None:
    """A log may go on behind an exported checkpoint, and end in the middle of a row."""
    config = load(write_config(pair, tmp_path), RunConfig)
    assert "held-out" not in model_card(config, "kd", 900)
    rows = [f'{{"step": {step}, "validation/loss": {step / 100}}}\n' for step in (800, 900, 1000)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows) + '{"step": 1001, "valid')
    assert "| held-out loss | 9.0000 |" in model_card(config, "kd", 900)
    assert "| held-out loss | 10.0000 |" in model_card(config, "kd", 1000)
