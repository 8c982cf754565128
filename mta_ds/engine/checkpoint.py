"""Checkpoints that count only when they are whole: every file hashed, and a COMMIT file written last.

    checkpoints/step-00000100/      shard-00000.safetensors   rank 0's weights and moments, ... (see shards.py);
                                    not of weights that are frozen: they come from the student's folder again
                              rng-00000.safetensors     random states of rank 0, ...
                              state.json, rollouts.safetensors   what else a run carries from step to step
                              COMMIT                    step, shape of the run, size and SHA-256 of every file

A folder without COMMIT, or whose files do not match it, is no checkpoint (see commit.py). Nothing here can stop a run:
a save that fails is told loudly, its folder goes, and all earlier checkpoints stay.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mta_ds.engine import distributed
from mta_ds.engine.commit import (
    Commit,
    Digests,
    Progress,
    digests_of,
    folder_name,
    is_committed,
    step_folders,
    step_of,
    withdraw_commit,
    write_commit,
)
from mta_ds.engine.random_state import (
    RandomState,
    random_state,
    restore_random_state,
    write_random_state,
)
from mta_ds.engine.setup import set_seed
from mta_ds.engine.shards import Shard, ShardFiles, copy_of, own_shard, restore_shard, write_shard
from mta_ds.errors import UserError
from mta_ds.files import fsync_directory

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MARGIN = 1.05  # of the disk space that a checkpoint needs

SaveMore = Callable[[Path], list[str]]
"""Writes further files into a checkpoint's folder; returns their names."""


@dataclass(frozen=True, slots=True)
class _Pending:
    folder: Path
    progress: Progress
    written: Future[Digests]


class _GivenUp(Exception):
    """A save failed on some rank; raised on all, told, and not for anybody outside."""


class Checkpoints:
    """The checkpoints of a run: written beside the training, committed at a later step boundary.

    Args:
        root: the folder of all.
        keep_last: newest ones that stay.
        keep_every: those of steps divisible by it stay for ever.
        asynchronous: copy this rank's shard and write the copy in a thread; off, write at once and wait.
        resumed_step: the checkpoint that the run goes on from; newer ones were damaged, and do not count as kept.
        before_commit: on rank 0; whatever else must be durable before a checkpoint counts. An OSError gives it up.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = False,
        resumed_step: int = 0,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        self.root = root
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._asynchronous = asynchronous
        self._resumed_step = resumed_step
        self._before_commit = before_commit
        self._own_steps: set[int] = set()
        self._pending: _Pending | None = None

    def save(self, engine: Any, progress: Progress, save_more: SaveMore | None = None) -> None:
        """Begin to save at a step boundary; every rank must call it. An earlier save is finished first.

        Args:
            save_more: on rank 0, at once.
        """
        self.finish()
        folder = self.root / folder_name(progress.step)
        with contextlib.suppress(_GivenUp):
            shard = self._agree(folder, lambda: own_shard(engine))
            size = distributed.sum_counts([shard.nbytes])[0]
            more = self._agree(folder, lambda: _begin(folder, size, save_more))
            taken = self._agree(folder, lambda: copy_of(shard) if self._asynchronous else shard)
            states = self._agree(folder, random_state)
            written = _in_thread(lambda: _write_files(folder, taken, states, more))
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
        with contextlib.suppress(_GivenUp):
            shares = distributed.gather_objects(self._agree(pending.folder, pending.written.result))
            self._agree(pending.folder, lambda: self._commit(pending, shares))
            # not a part of the save: what goes wrong with old ones takes nothing from the new one
            self._prune(pending.progress.step)

    @contextlib.contextmanager
    def finished_at_a_stop(self) -> Iterator[None]:
        """Around a step: where it stops the run on every rank, a save under way is finished first."""
        try:
            yield
        except UserError as error:
            if error.on_every_rank:
                self.finish()
            raise

    def _commit(self, pending: _Pending, shares: list[Digests]) -> None:
        if distributed.rank() != 0:
            return
        fsync_directory(pending.folder)
        if self._before_commit is not None:
            self._before_commit()
        files = {name: digest for share in shares for name, digest in share.items()}
        write_commit(pending.folder, Commit(pending.progress, files))

    def _prune(self, newest: int) -> None:
        """Remove what is older than the checkpoints to keep; those that were found damaged are not among these."""
        self._own_steps.add(newest)
        if distributed.rank() != 0:
            return
        try:
            known = [folder for folder in step_folders(self.root) if is_committed(folder)]
            good = [f for f in known if step_of(f) <= self._resumed_step or step_of(f) in self._own_steps]
            for old in known[known.index(good[: self._keep_last][-1]) + 1 :]:
                if self._keep_every is None or step_of(old) % self._keep_every:
                    _remove(old)
        except OSError as error:
            logger.warning("old checkpoints could not be removed: %s", error)

    def _agree(self, folder: Path, work: Callable[[], T]) -> T:
        """Do a part of a save on every rank; if it failed on any, all give the save up, and the run goes on."""
        problem, result = None, None
        try:
            result = work()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems = distributed.gather_objects(problem)
        failed = [(rank, text) for rank, text in enumerate(problems) if text is not None]
        if not failed:
            return result  # type: ignore[return-value]
        if distributed.rank() == 0:
            self._give_up(folder, *failed[0])
        raise _GivenUp

    def _give_up(self, folder: Path, rank: int, problem: str) -> None:
        with contextlib.suppress(OSError):
            _remove(folder)
        newest = next((other.name for other in step_folders(self.root) if is_committed(other)), "none")
        logger.error(
            "CHECKPOINT NOT SAVED: %s, rank %d: %s; the run goes on, its newest checkpoint is %s",
            *(folder, rank, problem, newest),
        )


def remove_unfinished(root: Path) -> None:
    """Remove what killed saves have left; for the one process that saves there, before it does."""
    try:
        for folder in step_folders(root):
            if not is_committed(folder):
                _remove(folder)
    except OSError as error:
        logger.warning("unfinished checkpoints could not be removed: %s", error)


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
    if distributed.world_size() == progress.world_size:
        restore_random_state(folder / _random_name(rank))
    else:
        set_seed((seed + 1_000_003 * progress.step + rank) % 2**32)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """What ``work`` gives, later; a process that ends does not wait for it, whose folder would be no checkpoint."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return result


def _begin(folder: Path, size: int, save_more: SaveMore | None) -> list[str]:
    """On rank 0: an empty folder with room for ``size`` bytes, and the files that are not a rank's; their names."""
    if distributed.rank() != 0:
        return []
    # what is there already is the rest of a killed save, or damaged: a run never comes to a step a second time
    _remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for parent in (folder.parent, folder.parent.parent):
        fsync_directory(parent)
    free = shutil.disk_usage(folder).free
    if free < _MARGIN * size:
        raise OSError(f"it needs {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free on its disk")
    return save_more(folder) if save_more is not None else []


def _remove(folder: Path) -> None:
    withdraw_commit(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def _random_name(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


def _write_files(folder: Path, shard: Shard, states: RandomState, more: list[str]) -> Digests:
    """Write a rank's files and make them durable, and so ``more`` that are there already.

    Their names are given: a listing would show what other ranks are writing at the moment.
    """
    rank = distributed.rank()
    write_shard(shard, folder / _shard_name(rank))
    write_random_state(states, folder / _random_name(rank))
    names = [*more, _shard_name(rank), _random_name(rank)]
    digests = digests_of(folder, names, sync=True)
    if missing := set(names) - digests.keys():
        raise OSError(f"{sorted(missing)[0]} cannot be read back")
    return digests
