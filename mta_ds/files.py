"""Files that survive a kill: write under a temporary name, fsync, rename; hashes and shard assignment."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def fsync_directory(path: Path) -> None:
    """Make the names in ``path`` durable: a rename is lost in a power cut until its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the bytes of a file that somebody else wrote durable."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on a clean exit its content appears at ``path`` in one step.

    The temporary name holds the process id, so two writers of one path never write into each other's file:
    the later rename wins whole. On an exception the temporary file goes and ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on a clean exit it appears at ``path`` whole, in place of an older one.

    Between the two renames of a replacement ``path`` is missing for an instant; the old folder is still beside it.
    """
    path = Path(path)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                # some writers create files for their owner alone; a folder that others read must not depend on which
                file.chmod(0o666 & ~_umask())
                fsync_file(file)
        fsync_directory(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` so that a reader sees the old file or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def belongs_to_shard(ordinal: int, num_shards: int, shard_index: int) -> bool:
    """Whether the ``ordinal``-th item (from 0) is shard ``shard_index``'s: round robin, so shards are even."""
    return ordinal % num_shards == shard_index
