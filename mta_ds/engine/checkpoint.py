"""Checkpoints that count only when they are whole: DeepSpeed's files, hashed, and a COMMIT file written last.

    checkpoints/step-00000100/      DeepSpeed's shards of student, projections and optimizer, one set a rank;
                                    not of weights that are frozen: they come from the student's folder again
                              method.json, rollouts.safetensors   what the base method carries from step to step
                              rng-00000.safetensors    random state of rank 0, ...
                              COMMIT                   step, shape of the run, size and SHA-256 of every file

A folder without COMMIT, or whose files do not match it, is no checkpoint: it is named and passed over.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.files import fsync_directory, fsync_file, sha256, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 2
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, and what it must have in common with the run that resumes it."""

    step: int
    samples: int
    world_size: int
    zero_stage: int
    config_hash: str


def save(
    engine: Any, checkpoints: Path, progress: Progress, keep_last: int, save_more: Callable[[Path], None] | None = None
) -> None:
    """Save at a step boundary; every rank must call it. Older checkpoints beyond ``keep_last`` go afterwards.

    Args:
        save_more: writes further files into the folder, on rank 0.

    Killed at any instruction, it leaves all earlier checkpoints and at most one folder without COMMIT.
    """
    folder = checkpoints / f"step-{progress.step:08d}"
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
    # DeepSpeed would write its `latest` before its last barrier: a pointer to a checkpoint that may lack a shard
    engine.save_checkpoint(
        str(checkpoints), tag=folder.name, save_latest=False, exclude_frozen_parameters=_has_frozen(engine)
    )
    if save_more is not None and distributed.rank() == 0:
        save_more(folder)
    save_file(_rng_state(), folder / f"rng-{distributed.rank():05d}.safetensors")
    distributed.barrier()
    digests = _digest_my_share(folder, _files(folder), sync=True)
    distributed.barrier()
    if distributed.rank() == 0:
        fsync_directory(folder)
        commit = {"format": FORMAT} | asdict(progress) | {"files": digests}
        write_atomic(folder / "COMMIT", json.dumps(commit, indent=1))
        fsync_directory(checkpoints)
        for old in _committed(checkpoints)[keep_last:]:
            # Without its COMMIT first, a half-removed folder cannot pass for a checkpoint.
            (old / "COMMIT").unlink()
            shutil.rmtree(old, ignore_errors=True)
    distributed.barrier()


def find_newest(checkpoints: Path, config_hash: str, zero_stage: int) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose files match their hashes, or None; every rank must call it and gets the same.

    Raises:
        UserError: it belongs to another configuration, world size, ZeRO stage or a newer format.
    """
    for folder in _committed(checkpoints):
        try:
            commit = json.loads((folder / "COMMIT").read_text(encoding="utf-8"))
            files = commit.pop("files")
            digests = _digest_my_share(folder, sorted(files), sync=False)
            damaged = sorted(name for name, digest in files.items() if digests.get(name) != digest)
        except (ValueError, KeyError, OSError):
            damaged = ["COMMIT"]
        if damaged:
            logger.warning("%s is damaged (%s): skipped", folder, damaged[0])
            continue
        if commit.pop("format") > FORMAT:
            raise UserError(f"{folder}: written by a newer mta_ds; upgrade to resume it")
        progress = Progress(**commit)
        _check_same_run(folder, progress, config_hash, zero_stage)
        return folder, progress
    return None


def load(engine: Any, folder: Path) -> None:
    """Restore student, projections, optimizer and this rank's random state from a checkpoint found valid."""
    loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise UserError(
            f"{folder}: DeepSpeed cannot load the checkpoint; remove the folder to resume from an older one"
        )
    state = load_file(folder / f"rng-{distributed.rank():05d}.safetensors")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _has_frozen(engine: Any) -> bool:
    """Whether the student's own weights stay as they were loaded, as with LoRA."""
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


def _check_same_run(folder: Path, saved: Progress, config_hash: str, zero_stage: int) -> None:
    if saved.config_hash != config_hash:
        raise UserError(
            f"{folder}: saved under another configuration of model, data, loss or batch; "
            "resume with that run's config.yaml, or choose another run_dir"
        )
    if (saved.world_size, saved.zero_stage) != (distributed.world_size(), zero_stage):
        raise UserError(
            f"{folder}: saved by {saved.world_size} ranks under ZeRO-{saved.zero_stage}, "
            f"this run has {distributed.world_size()} under ZeRO-{zero_stage}; resume with the same"
        )


def _committed(checkpoints: Path) -> list[Path]:
    """Folders that hold a COMMIT, newest first."""
    if not checkpoints.is_dir():
        return []
    folders = [f for f in checkpoints.iterdir() if _NAME.fullmatch(f.name) and (f / "COMMIT").is_file()]
    return sorted(folders, reverse=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != "COMMIT")


def _digest_my_share(folder: Path, names: Sequence[str], sync: bool) -> dict[str, list[int | str]]:
    """Size and SHA-256 of each file by name: every rank reads its share, all get the whole. Missing files are left out.

    Args:
        sync: also make the files durable.
    """
    mine: dict[str, list[int | str]] = {}
    for name in names[distributed.rank() :: distributed.world_size()]:
        path = folder / name
        if path.is_file():
            if sync:
                fsync_file(path)
            mine[name] = [path.stat().st_size, sha256(path)]
    if distributed.world_size() == 1:
        return mine
    shares: list[dict[str, list[int | str]] | None] = [None] * distributed.world_size()
    dist.all_gather_object(shares, mine)
    return {name: digest for share in shares for name, digest in (share or {}).items()}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
