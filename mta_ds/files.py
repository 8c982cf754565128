"""Files that survive a kill or a full disk: whole replacements, and logs that grow; hashes and shard assignment."""

from __future__ import annotations

import errno
import glob
import hashlib
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_UNSYNCED = 1 << 20  # bytes of a log that are held in memory


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


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path``, with a name like it; it goes at the block's end, whatever happens."""
    folder = _temporary(path)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path) -> Path:
    """A hidden name beside ``path`` that is this process' alone; what dead processes of its kind left goes first."""
    owner = process_space()
    prefix = f".{path.name}.{owner or socket.gethostname()}-"
    for leftover in path.parent.glob(f"{glob.escape(prefix)}*") if owner else ():
        pid = leftover.name.removeprefix(prefix).partition(".")[0]
        if pid.isdigit() and process_start(int(pid)) is None:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    return path.with_name(f"{prefix}{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")


def process_space() -> str | None:
    """Names those processes whose numbers this one can look up: containers of one host, and hosts of one name, count
    theirs apart. None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:12]
        return f"{boot}-{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the machine did; None if it is gone, or only a zombie.

    A number is given to another process later; with its start it is that one process.
    """
    try:
        # the name before it, in parentheses, may hold anything
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[18] if state not in ("Z", "X") else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` (text as UTF-8) to ``path`` so that a reader sees the old file or the new, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def create_atomic(path: Path, content: str) -> bool:
    """Write ``content`` to ``path`` whole, unless there is a file: of several writers at once exactly one does.

    Returns:
        Whether this one did.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_text(content, encoding="utf-8")
        fsync_file(temporary)
        _link(temporary, path)
        fsync_directory(path.parent)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _link(temporary: Path, path: Path) -> None:
    """Raise FileExistsError where there is a file, as no rename does."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # a file system without links: only a writer of the same instant goes unseen
        if path.exists():
            raise FileExistsError from None
        os.replace(temporary, path)


class Appender:
    """A log that grows by whole records, and that a full disk does not stop.

    What the disk does not take waits in memory for the next record. So does all that is not durable yet: where a disk
    is shared, the system may take records and find no room for them later.

    Args:
        path: made if need be.
        size: so many bytes of what is there stay.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._durable = size
        self._records = bytearray()  # that follow the durable ones
        self._written = 0  # bytes of them that the system has taken
        self._told = False
        self._attempt(self.flush)

    def add(self, record: bytes) -> None:
        """Append a record, now or later; an error is told once."""
        self._records += record
        self._attempt(self.sync if len(self._records) > _MOST_UNSYNCED else self.flush)

    def flush(self) -> None:
        """Hand all records to the system: a kill of the process loses none.

        Raises:
            OSError: it does not take them; nothing of them is in the file.
        """
        descriptor, whole = self._open(), self._written
        try:
            while self._written < len(self._records):
                rest = bytes(self._records[self._written :])
                self._written += os.pwrite(descriptor, rest, self._durable + self._written)
        except OSError:
            self._written = whole
            with suppress(OSError):
                os.ftruncate(descriptor, self._durable + whole)
            raise

    def sync(self) -> None:
        """Make all records durable: no crash of the machine loses any.

        Raises:
            OSError: they are not.
        """
        self.flush()
        try:
            os.fsync(self._open())
            fsync_directory(self._path.parent)
        except OSError:
            self._written = 0  # the system may have dropped what it had taken
            raise
        self._durable += self._written
        self._records.clear()
        self._written = 0

    def close(self) -> None:
        """Make all durable, or tell that it is not."""
        self._attempt(self.sync)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.ftruncate(self._descriptor, self._durable)
        return self._descriptor

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            if not self._told:
                logger.error("LOG NOT WRITTEN: %s: %s; its rows wait in memory, the run goes on", self._path, error)
            self._told = True
        else:
            if self._told:
                logger.warning("%s: all rows are written again", self._path)
            self._told = False


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def belongs_to_shard(ordinal: int, num_shards: int, shard_index: int) -> bool:
    """Whether the ``ordinal``-th item (from 0) is shard ``shard_index``'s: round robin, so shards are even."""
    return ordinal % num_shards == shard_index
