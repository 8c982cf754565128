"""Atomic writes: the old content or the new, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disk_cases import file_size_limit

from mta_ds import files
from mta_ds.files import (
    Appender,
    atomic_folder,
    atomic_path,
    belongs_to_shard,
    create_atomic,
    process_start,
    scratch_folder,
    sha256,
    write_atomic,
)


def test_write_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")
    write_atomic(path, "ünew")
    assert path.read_bytes() == "ünew".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_folder(path) as folder:
            (folder / content).write_text(content)
            assert not (path / content).exists()
        assert [p.name for p in path.iterdir()] == [content]
    with pytest.raises(RuntimeError), atomic_folder(path) as folder:
        raise RuntimeError
    assert [p.name for p in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_of_several_caches_stays(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    for content in ("first", "second"):
        with atomic_folder(path, keep_existing=True) as folder:
            (folder / content).write_text(content)
    assert [p.name for p in path.iterdir()] == ["first"]
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    code = f"""
import os, signal
from pathlib import Path
from mta_ds.files import atomic_path
with atomic_path(Path({str(path)!r})) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    write_atomic(path, "whole")
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_owner_of_a_folder_left_goes_with_the_next_one(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from mta_ds.files import scratch_folder
with scratch_folder(Path({str(tmp_path / "merge")!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with scratch_folder(tmp_path / "merge") as folder:
        assert list(tmp_path.iterdir()) == [folder] != [left]
    assert not list(tmp_path.iterdir())


def test_what_a_writer_in_another_container_has_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number means another process there, or none here."""
    monkeypatch.setattr(files, "process_space", lambda: "here-1")
    monkeypatch.setattr(files, "process_start", lambda pid: None)
    for space in ("here-2", "there-1", "here-1"):
        (tmp_path / f".file.{space}-77.ab.tmp").write_text("half")
    write_atomic(tmp_path / "file", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.here-2-77.ab.tmp", ".file.there-1-77.ab.tmp"}


@pytest.mark.parametrize("has_links", [True, False])
def test_of_several_creators_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def link(*_: Path) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", link)
    assert [create_atomic(tmp_path / "new" / "file", text) for text in ("one", "two")] == [True, False]
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ["one"]


def test_a_log_grows_by_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log"
    with file_size_limit(10):
        log = Appender(path)
        for record in (b"one\n", b"two\n", b"three\n"):
            log.add(record)
        assert path.read_bytes() == b"one\ntwo\n"
    log.add(b"four\n")
    assert path.read_bytes() == b"one\ntwo\nthree\nfour\n"
    log.close()
    Appender(path, size=8).close()
    assert path.read_bytes() == b"one\ntwo\n"


def test_what_the_system_took_and_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over a network, where the room runs out after the write."""
    path = tmp_path / "log"
    log = Appender(path)
    log.add(b"one\n")
    log.sync()

    def fsync(_: int) -> None:
        path.write_bytes(b"one\n\0\0\0\0")
        raise OSError(122, "Disk quota exceeded")

    log.add(b"two\n")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fsync)
        with pytest.raises(OSError, match="quota"):
            log.sync()
    log.sync()
    assert path.read_bytes() == b"one\ntwo\n"


def test_the_memory_of_a_log_is_bounded(tmp_path: Path) -> None:
    log = Appender(tmp_path / "log")
    for _ in range(50):
        log.add(b"." * 100_000)
    assert len(log._records) <= 1_100_000 and (tmp_path / "log").stat().st_size == 5_000_000


def test_when_a_process_began() -> None:
    own = process_start(os.getpid())
    assert own is not None and own == process_start(os.getpid()) != process_start(1)
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_start(child.pid) is None  # a zombie
    child.wait()
    assert process_start(child.pid) is None


def test_sha256_of_known_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_every_item_belongs_to_one_shard() -> None:
    owners = [[i for i in range(3) if belongs_to_shard(n, 3, i)] for n in range(10)]
    assert owners == [[n % 3] for n in range(10)]
