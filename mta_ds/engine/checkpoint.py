"""Checkpoints that count only when they are whole: every file hashed, and a COMMIT file written last.

    checkpoints/step-00000100/      shard-00000.safetensors   rank 0's weights and moments, ... (see shards.py);
                                    not of weights that are frozen: they come from the student's folder again
                              rng-00000.safetensors     random state of rank 0, ...
                              state.json, rollouts.safetensors   what else a run carries from step to step
                              COMMIT                    step, shape of the run, size and SHA-256 of every file

A folder without COMMIT, or whose files do not match it, is no checkpoint: it is named and passed over. Nothing here can
stop a run: a save that fails is told loudly, its folder goes, and all earlier checkpoints stay.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mta_ds.engine import distributed
from mta_ds.engine.shards import Shard, ShardFiles, copy_of, own_shard, restore_shard, write_shard
from mta_ds.errors import UserError
from mta_ds.files import fsync_directory, fsync_file, sha256, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 3
_NAME = re.compile(r"step-(\d{8})")
_MARGIN = 1.05  # of the disk space that a checkpoint needs

Digests = dict[str, list[int | str]]
"""Size and SHA-256 of files by name."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands, and what it must have in common with the run that resumes it."""

    step: int
    samples: int
    batch_size: int
    """Sequences of an optimizer step, over all ranks and micro-steps."""
    world_size: int
    zero_stage: int
    config_hash: str


@dataclass(frozen=True, slots=True)
class _Pending:
    folder: Path
    progress: Progress
    written: Future[Digests]


class Checkpoints:
    """The checkpoints of a run: written beside the training, committed at a later step boundary.

    Args:
        root: the folder of all.
        keep_last: newest ones that stay.
        keep_every: those of steps divisible by it stay for ever.
        asynchronous: copy this rank's shard and write the copy in a thread; off, write at once and wait.
    """

    def __init__(
        self, root: Path, keep_last: int = 2, keep_every: int | None = None, asynchronous: bool = False
    ) -> None:
        self.root = root
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def save(self, engine: Any, progress: Progress, save_more: Callable[[Path], None] | None = None) -> None:
        """Begin to save at a step boundary; every rank must call it. An earlier save is finished first.

        Args:
            save_more: writes further files into the folder, on rank 0, at once.
        """
        self.finish()
        folder = self.root / f"step-{progress.step:08d}"
        shard = own_shard(engine)
        size = sum(value.nbytes for piece in shard.pieces.values() for value in piece.values.values())
        size = distributed.sum_counts([size])[0]
        if not self._agree(lambda: _begin(folder, size, save_more), folder):
            return
        rng = _rng_state()
        if self._asynchronous:
            shard = copy_of(shard)
        written = self._writer.submit(_write_files, folder, shard, rng, distributed.rank())
        self._pending = _Pending(folder, progress, written)
        if not self._asynchronous:
            self.finish()

    def poll(self) -> None:
        """Commit the save under way if all ranks have written theirs; every rank must call it at the same step."""
        if self._pending is not None:
            done = int(self._pending.written.done())
            if distributed.sum_counts([done])[0] == distributed.world_size():
                self.finish()

    def finish(self) -> None:
        """Wait for the save under way and commit it; every rank must call it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        digests: Digests = {}

        def collect() -> None:
            digests.update(pending.written.result())

        if not self._agree(collect, pending.folder):
            return
        shares = distributed.gather_objects(digests)
        self._agree(lambda: self._commit(pending, shares), pending.folder)

    def _commit(self, pending: _Pending, shares: list[Digests]) -> None:
        if distributed.rank() != 0:
            return
        folder = pending.folder
        files = {name: digest for share in shares for name, digest in share.items()}
        fsync_directory(folder)
        commit = {"format": FORMAT} | asdict(pending.progress) | {"files": files}
        write_atomic(folder / "COMMIT", json.dumps(commit, indent=1))
        fsync_directory(self.root)
        # newer ones than this were passed over when the run was resumed: they do not count
        known = [f for f in _committed(self.root) if _step_of(f) <= pending.progress.step]
        for old in known[self._keep_last :]:
            if self._keep_every is None or _step_of(old) % self._keep_every:
                # Without its COMMIT first, a half-removed folder cannot pass for a checkpoint.
                (old / "COMMIT").unlink()
                shutil.rmtree(old, ignore_errors=True)

    def _agree(self, work: Callable[[], None], folder: Path) -> bool:
        """Do a part of a save on every rank; if it failed on any, all give the save up, and the run goes on."""
        problem = None
        try:
            work()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = distributed.gather_objects(problem)
        failed = [(rank, text) for rank, text in enumerate(problems) if text is not None]
        if not failed:
            return True
        rank, text = failed[0]
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            newest = next((f.name for f in _committed(self.root)), "none")
            logger.error(
                "CHECKPOINT NOT SAVED: %s, rank %d: %s; the run goes on, its newest checkpoint is %s",
                *(folder, rank, text, newest),
            )
        return False


def _begin(folder: Path, size: int, save_more: Callable[[Path], None] | None) -> None:
    """On rank 0: an empty folder with room for ``size`` bytes, and the files that are not a rank's."""
    if distributed.rank() != 0:
        return
    # what is there already is the rest of a killed save, or damaged: a run never comes to a step a second time
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < _MARGIN * size:
        raise OSError(f"it needs {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free on its disk")
    if save_more is not None:
        save_more(folder)


def find_newest(checkpoints: Path, config_hash: str, batch_size: int) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose files match their hashes, or None; every rank must call it and gets the same.

    Raises:
        UserError: it belongs to another configuration or batch size, or a newer format.
    """
    for folder in _committed(checkpoints):
        try:
            commit = json.loads((folder / "COMMIT").read_text(encoding="utf-8"))
            files, found_format = commit.pop("files"), commit.pop("format")
            digests = _digest_my_share(folder, sorted(files))
            damaged = sorted(name for name, digest in files.items() if digests.get(name) != digest)
        except (ValueError, KeyError, OSError):
            damaged = ["COMMIT"]
        if damaged:
            logger.warning("%s is damaged (%s): skipped", folder, damaged[0])
            continue
        if found_format != FORMAT:
            which = "a newer" if found_format > FORMAT else "an older"
            raise UserError(f"{folder}: written by {which} mta_ds; resume with that, or choose another run_dir")
        progress = Progress(**commit)
        _check_same_run(folder, progress, config_hash, batch_size)
        return folder, progress
    return None


def load(engine: Any, folder: Path, progress: Progress, seed: int) -> None:
    """Restore student, projections and optimizer from a checkpoint found valid; every rank must call it.

    As many ranks as saved it get their random states back; others get new ones, from ``seed``, step and rank.
    """
    rank, saved = distributed.rank(), range(progress.world_size)
    order = sorted(saved, key=lambda other: other != rank)  # its own first
    restore_shard(engine, ShardFiles([folder / _shard_name(other) for other in order]))
    if (now := (distributed.world_size(), engine.zero_optimization_stage())) != (
        then := (progress.world_size, progress.zero_stage)
    ):
        logger.info("%s: saved by %d ranks under ZeRO-%d, resumed by %d under ZeRO-%d", folder, *then, *now)
    if distributed.world_size() != progress.world_size:
        torch.manual_seed(seed + 1_000_003 * progress.step + rank)
        return
    state = load_file(folder / f"rng-{rank:05d}.safetensors")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _check_same_run(folder: Path, saved: Progress, config_hash: str, batch_size: int) -> None:
    if saved.config_hash != config_hash:
        raise UserError(
            f"{folder}: saved under another configuration of model, data, loss or schedule; "
            "resume with that run's config.yaml, or choose another run_dir"
        )
    if saved.batch_size != batch_size:
        raise UserError(
            f"{folder}: saved with {saved.batch_size} sequences a step, this run has {batch_size}; choose "
            f"micro_batch_size x gradient_accumulation_steps x ranks = {saved.batch_size}"
        )


def _committed(checkpoints: Path) -> list[Path]:
    """Folders that hold a COMMIT, newest first."""
    if not checkpoints.is_dir():
        return []
    folders = [f for f in checkpoints.iterdir() if _NAME.fullmatch(f.name) and (f / "COMMIT").is_file()]
    return sorted(folders, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def _write_files(folder: Path, shard: Shard, rng: dict[str, torch.Tensor], rank: int) -> Digests:
    """Write a rank's files and make them durable; rank 0 sees to all others that are there already, too."""
    names = [path.name for path in folder.iterdir()] if rank == 0 else []
    names = [name for name in names if not re.fullmatch(r"(shard|rng)-\d{5}\.safetensors", name)]
    write_shard(shard, folder / _shard_name(rank))
    save_file(rng, folder / f"rng-{rank:05d}.safetensors")
    return _digests(folder, [*names, _shard_name(rank), f"rng-{rank:05d}.safetensors"], sync=True)


def _digests(folder: Path, names: Sequence[str], sync: bool) -> Digests:
    """Size and SHA-256 of files; missing ones are left out. ``sync`` makes them durable first."""
    digests: Digests = {}
    for name in names:
        path = folder / name
        if path.is_file():
            if sync:
                fsync_file(path)
            digests[name] = [path.stat().st_size, sha256(path)]
    return digests


def _digest_my_share(folder: Path, names: Sequence[str]) -> Digests:
    """The digests of all files: every rank reads its share, all get the whole."""
    mine = _digests(folder, names[distributed.rank() :: distributed.world_size()], sync=False)
    return {name: digest for share in distributed.gather_objects(mine) for name, digest in share.items()}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
