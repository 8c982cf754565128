"""Files that survive a kill: write under a temporary name, fsync, rename; hashes and shard assignment."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
import uuid
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

    Two writers of one path never write into each other's file: the later rename wins whole. On an exception the
    temporary file goes and ``path`` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path, keep_existing: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder; on a clean exit it appears at ``path`` whole.

    Args:
        keep_existing: a folder that is at ``path`` by then stays and the new one goes, as for a cache that several
            processes build at once. Otherwise the new one replaces it; between the two renames ``path`` is missing for
            an instant.
    """
    path = Path(path)
    temporary = _temporary(path)
    old = temporary.with_suffix(".old")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                # some writers create files for their owner alone; a folder that others read must not depend on which
                file.chmod(0o666 & ~_umask())
                fsync_file(file)
        fsync_directory(temporary)
        if not keep_existing and path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            # no system renames onto a folder with something in it: somebody was first
            if not (keep_existing and path.is_dir()):
                raise
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A hidden name beside ``path`` that is this process' alone; what dead processes of this host left goes first."""
    prefix = f".{path.name}.{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
        pid = leftover.name.removeprefix(prefix).partition(".")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
