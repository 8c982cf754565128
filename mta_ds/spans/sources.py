"""Where rows come from: JSON lines (also .gz and .zst), Parquet, folders and globs of these, a folder that ``datasets``
saved, or a ``datasets`` name. All are streamed, and a row knows where it stands.
"""

from __future__ import annotations

import difflib
import glob
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mta_ds.errors import UserError
from mta_ds.files import belongs_to_shard

GENERATION = "generation.json"
"""In a folder that ``mta-ds generate`` writes to: what its texts are made of. Only its parts are records."""
STORE = "store.json"
"""A span store's first file, which says what the store is made of: never a folder of records."""
_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")
_SUFFIXES = (*_LINES, ".parquet")
_DRAINED_AT_ONCE = 1 << 20  # bytes of a line that is too long
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 1024, 16 << 20  # of Parquet that is decoded


class BadRow(ValueError):
    """Why a row is no record."""

    def __init__(self, kind: str, reason: str) -> None:
        """``kind``: the same for all rows with a reason like this one."""
        super().__init__(reason)
        self.kind = kind


def read_rows(
    inputs: Sequence[str], *, num_shards: int = 1, shard_index: int = 0, max_bytes: int | None = None
) -> Iterator[tuple[str, Any]]:
    """(where, row) of every row of a shard, for :func:`records.parse_row`; a BadRow for one that cannot be decoded.

    Args:
        max_bytes: a longer row is a BadRow, too; None: of any length.

    Raises:
        UserError: an input that is no file, folder, glob or data set, that cannot be read, or a folder that is still
            being generated.
    """
    # for each row of the whole input in turn, whether it is the shard's: others need not be decoded
    mine = (belongs_to_shard(ordinal, num_shards, shard_index) for ordinal in count())
    for source in inputs:
        files = input_files(source)
        if not files:
            yield from _dataset_rows(source, mine, max_bytes)
        for path in files:
            read = _parquet_rows if path.suffix == ".parquet" else _line_rows
            yield from read(path, mine, max_bytes)


def input_files(source: str) -> list[Path]:
    """The record files that a path, folder or glob names, sorted; empty for what may be a ``datasets`` name.

    A folder or glob never names what belongs to a span store: a store may lie among the records that it is made of.

    Raises:
        UserError: a path that is not there, a glob or folder without record files, one that is still being generated,
            or a span store.
    """
    path = Path(os.path.expanduser(source))  # unlike a Path's own, no error for an unknown user
    if _saved_dataset(source) is not None:
        return []
    if os.path.isfile(path):  # unlike a Path's own, false for a name that is too long
        if not path.name.endswith(_SUFFIXES):
            raise UserError(f"{source}: not a record file; want one of {', '.join(_SUFFIXES)}")
        return [path]
    if os.path.isdir(path):
        _refuse_store(source, path)
        files = _only_records(_files_below(path))
    elif glob.has_magic(source):
        files = _only_records(_matching_files(source))
    else:
        if _looks_like_a_path(source):
            raise UserError(f"{source}: no such file{_nearest(path)}")
        return []
    if not files:
        raise UserError(f"{source}: no record file there; want {', '.join(_SUFFIXES)}")
    return files


def local_files(source: str) -> list[Path]:
    """All files that one input is read from, those of a folder that ``datasets`` saved too; empty for the name of a
    data set. Raises as :func:`input_files`.
    """
    folder = _saved_dataset(source)
    return input_files(source) if folder is None else sorted(_files_below(folder))


def open_dataset(source: str) -> Iterable[Any]:
    """A saved ``datasets`` folder or a named data set, to iterate over; "name:split" chooses a split, else train.

    Raises:
        UserError: there is no such data set.
    """
    import datasets

    name, _, split = source.partition(":")
    folder = _saved_dataset(source)
    try:
        if folder is not None:
            split = source.removeprefix(str(folder)).lstrip(":")
            loaded = datasets.load_from_disk(str(folder))
            rows: Iterable[Any] = loaded[split or "train"] if isinstance(loaded, dict) else loaded
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except Exception as error:  # datasets raises its own, the hub's and the file system's errors
        near = _nearest(Path(source))
        raise UserError(f"{source}: no such file, folder or data set ({_first_line(error)}){near}") from None
    return rows


def _matching_files(source: str) -> set[Path]:
    """Files that a glob matches, and those below the folders that it does."""
    pattern = os.path.expanduser(source)
    base = Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))  # is named, not matched
    _refuse_store(source, base)
    is_store = cache(_is_store)
    found: set[Path] = set()
    for each in map(Path, glob.glob(pattern, recursive=True)):
        if any(is_store(folder) for folder in each.parents if folder.is_relative_to(base)):
            continue
        found.update(_files_below(each) if each.is_dir() else [each])
    return found


def _files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and its folders, without span stores."""
    for parent, folders, names in os.walk(folder):
        if _is_store(parent):
            folders.clear()
            continue
        yield from (path for name in names if (path := Path(parent, name)).is_file())


def _is_store(folder: Path | str) -> bool:
    """Whether a span store is there, or is being made; a file of records may have the name of a store's first file."""
    try:
        with open(os.path.join(folder, STORE), "rb") as file:
            return b'"schema_version"' in file.read(64)
    except OSError:
        return False


def _refuse_store(source: str, folder: Path) -> None:
    if _is_store(folder):
        raise UserError(f"{source}: {folder} is a span store, whose files are no records; name the records themselves")


def _only_records(files: Iterable[Path]) -> list[Path]:
    """Files with a name that records have, sorted; of a folder of generated records its parts alone."""
    found = []
    for file in sorted(files):
        if file.name.endswith(_SUFFIXES) and (file.parent / GENERATION).is_file():
            if not (file.parent / "manifest.json").is_file():
                raise UserError(
                    f"{file.parent}: parts are missing; run 'mta-ds generate' again, which makes only these"
                )
            if not file.match("part-*.jsonl"):
                continue
        if file.name.endswith(_SUFFIXES):
            found.append(file)
    return found


def _line_rows(path: Path, mine: Iterator[bool], max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    limit = -1 if max_bytes is None else max_bytes + 1  # with the line's end
    try:
        with _open(path) as file:
            for number in count(1):
                line = file.readline(limit)
                if not line:
                    return
                is_long = len(line) == limit and not line.endswith(b"\n")
                if is_long:
                    _drain(file)
                if not is_long and not line.strip():
                    continue
                if next(mine):
                    yield f"{path}:{number}", _too_long(max_bytes) if is_long else _decode(line)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {' '.join(str(error).split())}") from None


def _drain(file: io.BufferedReader) -> None:
    """Read on to the line's end, without holding it."""
    while (rest := file.readline(_DRAINED_AT_ONCE)) and not rest.endswith(b"\n"):
        pass


def _too_long(max_bytes: int | None) -> BadRow:
    return BadRow(
        "over-long record", f"over-long record: more than {max_bytes} bytes; parse.max_record_bytes allows more"
    )


def _decode(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BadRow("invalid UTF-8", f"invalid UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow("bad JSON", f"bad JSON: {error}; want JSON lines, one object each")


def _open(path: Path) -> io.BufferedReader:
    """Arrow's streams read on over members and frames, and raise where a file is cut off (zstandard's do not)."""
    return io.BufferedReader(pa.input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}.get(path.suffix)))


def _parquet_rows(path: Path, mine: Iterator[bool], max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            first = 1
            for batch in file.iter_batches(batch_size=_rows_at_once(file.metadata)):
                own = [number for number in range(batch.num_rows) if next(mine)]
                share = batch if len(own) == batch.num_rows else batch.take(pa.array(own, pa.int64()))
                for number, row in zip(own, _to_python(share), strict=True):
                    yield f"{path}:{first + number}", _limited(row, max_bytes)
                first += batch.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot read Parquet: {' '.join(str(error).split())}") from None


def _rows_at_once(metadata: pq.FileMetaData) -> int:
    """So many that memory stays small, however long they are on the average of a row group."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    longest = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(_ROWS_AT_ONCE, int(_BYTES_AT_ONCE / max(1, longest))))


def _to_python(batch: pa.RecordBatch) -> list[Any]:
    """The rows; where one has a value that cannot be, as a string that is not UTF-8, only that one is bad."""
    try:
        rows: list[Any] = batch.to_pylist()
        return rows
    except UnicodeDecodeError as error:
        bad = BadRow("invalid UTF-8", f"invalid UTF-8 at byte {error.start} of a value")
    except (ValueError, OverflowError, pa.ArrowException) as error:
        bad = BadRow("bad value", f"bad value: {_first_line(error)}")
    if batch.num_rows == 1:
        return [bad]
    return [row for number in range(batch.num_rows) for row in _to_python(batch.slice(number, 1))]


def _dataset_rows(source: str, mine: Iterator[bool], max_bytes: int | None) -> Iterator[tuple[str, Any]]:
    rows = enumerate(open_dataset(source), 1)
    while True:
        try:
            number, row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network's, the hub's, a damaged file's
            raise UserError(f"{source}: cannot read on: {_first_line(error)}") from None
        if next(mine):
            yield f"{source}:{number}", _limited(dict(row), max_bytes)


def _limited(row: Any, max_bytes: int | None) -> Any:
    return row if max_bytes is None or _num_bytes(row) <= max_bytes else _too_long(max_bytes)


def _num_bytes(value: Any) -> int:
    """Of all strings in a row."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return sum(map(_num_bytes, value))


def _saved_dataset(source: str) -> Path | None:
    """The folder, if ``source`` is one that ``datasets`` saved, with or without ":split"."""
    for name in (source, source.rpartition(":")[0]):
        folder = Path(os.path.expanduser(name))
        if name and any(os.path.isfile(folder / mark) for mark in ("dataset_info.json", "dataset_dict.json")):
            return folder
    return None


def _looks_like_a_path(source: str) -> bool:
    """Whether ``source`` cannot be meant as the name of a data set ("name" or "owner/name")."""
    if source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return True
    return "/" in source and os.path.isdir(Path(source).parent)


def _nearest(path: Path) -> str:
    """ ", did you mean ...?" if the folder holds a name like the missing one."""
    if not os.path.isdir(path.parent):
        return ""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f"; did you mean {path.with_name(near[0])}?" if near else ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
