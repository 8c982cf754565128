"""What a store is made of: the inputs' fingerprint, and hashes that one task leaves for the next."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mta_ds.spans import identity as module
from mta_ds.spans.identity import InputDigests


class Corpus:
    """Three files that were written long ago, and how often each is read for its hash."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.store, self.read = folder / "in", folder / "store", list[str]()
        self.folder.mkdir()
        for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
            self.write(name, f'{{"text": "{name}"}}\n')
        sha256 = module.sha256
        monkeypatch.setattr(module, "sha256", lambda path: self.read.append(path.name) or sha256(path))

    def write(self, name: str, text: str, age: float = 100) -> None:
        path = self.folder / name
        path.write_text(text)
        os.utime(path, (path.stat().st_mtime - age,) * 2)

    def hashed(self) -> tuple[str, list[str]]:
        """A task's fingerprint, and what it read for that."""
        self.read.clear()
        digests = InputDigests(self.store)
        found = digests.fingerprint([str(self.folder)])
        digests.write()
        return found, list(self.read)

    @property
    def memo(self) -> Path:
        return self.store / "log" / "digests.json"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    return Corpus(tmp_path, monkeypatch)


def test_the_next_task_reads_only_what_has_changed(corpus: Corpus) -> None:
    first, read = corpus.hashed()
    assert read == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert corpus.hashed() == (first, [])
    corpus.write("b.jsonl", '{"text": "B.jsonl"}\n', age=50)  # of the same size
    other, read = corpus.hashed()
    assert other != first and read == ["b.jsonl"]
    corpus.write("new.jsonl", (corpus.folder / "c.jsonl").read_text())
    os.utime(corpus.folder / "new.jsonl", ns=(0, (corpus.folder / "c.jsonl").stat().st_mtime_ns))
    (corpus.folder / "new.jsonl").rename(corpus.folder / "c.jsonl")  # another file of that size and time
    assert corpus.hashed() == (other, ["c.jsonl"])
    assert corpus.hashed() == (other, [])


def test_a_file_that_was_just_written_is_read_again(corpus: Corpus) -> None:
    """Its clock may not have moved on when it changes once more."""
    corpus.write("a.jsonl", '{"text": "1"}\n', age=0)
    before = corpus.hashed()[0]
    assert corpus.hashed() == (before, ["a.jsonl"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"PATH": []}', b'{"PATH": 7}'])
def test_damaged_hashes_are_made_again(corpus: Corpus, content: bytes) -> None:
    found, read = corpus.hashed()
    corpus.memo.write_bytes(content.replace(b"PATH", str(corpus.folder / "a.jsonl").encode()))
    assert corpus.hashed() == (found, read)
    assert corpus.hashed() == (found, [])


def test_hashes_of_other_inputs_go(corpus: Corpus) -> None:
    corpus.hashed()
    (corpus.folder / "c.jsonl").unlink()
    corpus.write("a.jsonl", '{"text": "1"}\n', age=50)
    corpus.hashed()
    assert [Path(place).name for place in json.loads(corpus.memo.read_text())] == ["a.jsonl", "b.jsonl"]
