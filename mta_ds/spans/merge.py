"""The end of the parse stage: duplicates over all parts, the share of bad rows, and the manifest.

Whichever task finds all parts complete merges. Merging twice, or twice at once, gives the same files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
from pydantic import ValidationError

from mta_ds.errors import UserError
from mta_ds.files import atomic_path, write_atomic
from mta_ds.spans.records import Reject, may_follow, read_records, text_hash
from mta_ds.spans.store import Counts, Manifest, Part, check_part, part_name

_DUPLICATES = "rejects-duplicates.jsonl"
_STALE_SECONDS = 24 * 3600


def merge(output: Path, inputs: Sequence[str], num_shards: int, max_reject_share: float) -> Manifest | None:
    """Write the manifest if all parts are there and the bad rows few enough; None while parts are missing.

    Raises:
        UserError: a part is damaged, more than ``max_reject_share`` of the rows are bad, or there is no record.
    """
    parts = [part for i in range(num_shards) if (part := complete_part(output, i, num_shards)) is not None]
    if len(parts) < num_shards:
        return None
    for part in parts:
        check_part(output, part, full=True)
    _remove_stale(output)
    counts = _merge_counts(output, inputs, parts)
    _refuse_many_rejects(output, counts, max_reject_share)
    if counts.records == 0:
        raise UserError(f"{', '.join(inputs)}: no records")
    identity = read_identity(output)
    manifest = Manifest(parts=tuple(parts), counts=counts, **identity)
    path, text = output / "manifest.json", manifest.model_dump_json(indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
    return manifest


def complete_part(output: Path, index: int, num_shards: int) -> Part | None:
    """The part if it is complete; UserError if it was and is damaged now."""
    sidecar = output / f"{part_name(index, num_shards)}.json"
    try:
        part = Part.model_validate_json(sidecar.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
    if not (output / part.file).is_file():
        return None
    check_part(output, part, full=False)
    return part


def read_identity(output: Path) -> dict[str, Any]:
    """What a store is made of, as its first task wrote it down.

    Raises:
        UserError: there is no store, or what it says is damaged.
    """
    path = output / "store.json"
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        identity["num_shards"] = int(identity["num_shards"])
    except FileNotFoundError:
        raise UserError(f"{output}: no span store; 'mta-ds parse' makes one") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; remove the folder and parse again") from None
    return identity


def missing_parts(output: Path) -> str:
    """Which parts a store lacks, in one line that a job array's ``--array`` understands."""
    num_shards = read_identity(output)["num_shards"]
    missing = [i for i in range(num_shards) if complete_part(output, i, num_shards) is None]
    if not missing:
        return f"all {num_shards} parts are there"
    return f"{len(missing)} of {num_shards} parts are missing: {','.join(map(str, missing))}"


def status(output: Path) -> str:
    """The state of a store in a few lines: parts, manifest, counts, bad rows.

    Raises:
        UserError: there is no store, or a part that was complete is damaged.
    """
    lines = [missing_parts(output)]
    num_shards = read_identity(output)["num_shards"]
    parts = [part for i in range(num_shards) if (part := complete_part(output, i, num_shards)) is not None]
    counts = sum((part.counts for part in parts), Counts())
    is_whole = (output / "manifest.json").is_file()
    lines.append("the manifest is written" if is_whole else "no manifest yet: a store without one is not read")
    lines.append("so far " + ", ".join(f"{number} {name}" for name, number in counts if number))
    return "\n".join(lines)


@contextmanager
def reject_log(path: Path) -> Iterator[Callable[[Reject], None]]:
    """Yield a function that writes one JSON line a reject; no file remains where there is none."""
    with ExitStack() as stack:
        file: BinaryIO | None = None

        def log(reject: Reject) -> None:
            nonlocal file
            if file is None:
                file = stack.enter_context(open(stack.enter_context(atomic_path(path)), "wb"))
            line = json.dumps(reject._asdict(), ensure_ascii=False) + "\n"
            # a lone surrogate (in a file's name) becomes the JSON escape that it is
            file.write(line.encode("utf-8", "backslashreplace"))

        yield log
        if file is None:
            path.unlink(missing_ok=True)


def _merge_counts(output: Path, inputs: Sequence[str], parts: Sequence[Part]) -> Counts:
    counts = sum((part.counts for part in parts), Counts())
    repeated, conflicts = _find_duplicates(output, inputs, parts)
    update = {
        "records": counts.records - repeated,
        "duplicates": repeated - conflicts,
        "rejects": counts.rejects + conflicts,
    }
    return counts.model_copy(update=update)


def _find_duplicates(output: Path, inputs: Sequence[str], parts: Sequence[Part]) -> tuple[int, int]:
    """Records whose id came before; those of them with other content, each of which is rejected.

    On disk, so that memory stays flat over any corpus.
    """
    repeated = differing = 0
    with (
        tempfile.TemporaryDirectory(dir=output, prefix=".merge-") as folder,
        closing(sqlite3.connect(Path(folder) / "ids")) as ids,
    ):
        ids.execute("PRAGMA journal_mode=OFF")
        ids.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, content BLOB, conflict INTEGER) WITHOUT ROWID")
        for record_id, content in _contents(output, parts):
            key = record_id.encode()
            if ids.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, 0)", (key, content)).rowcount:
                continue
            repeated += 1
            conflict = "UPDATE ids SET conflict = 1, content = NULL WHERE id = ? AND content IS NOT ?"
            differing += ids.execute(conflict, (key, content)).rowcount
        if differing:
            return repeated, _reject_conflicts(output, inputs, ids)
    (output / _DUPLICATES).unlink(missing_ok=True)
    return repeated, 0


def _reject_conflicts(output: Path, inputs: Sequence[str], ids: sqlite3.Connection) -> int:
    """Read the inputs once more, for the places of the conflicting records: the first in their order stands."""
    num_conflicts = 0
    with reject_log(output / _DUPLICATES) as log:
        for record in read_records(inputs):
            if isinstance(record, Reject):
                continue
            key, content = record.id.encode(), _digest((f, text_hash(t)) for f, t in record.fields.items())
            found = ids.execute("SELECT content FROM ids WHERE id = ? AND conflict = 1", (key,)).fetchone()
            if found is None:
                continue
            if found[0] is None:
                ids.execute("UPDATE ids SET content = ? WHERE id = ?", (content, key))
            elif found[0] != content:
                log(Reject(record.where, "duplicate id with other content", record.id))
                num_conflicts += 1
    return num_conflicts


def _contents(output: Path, parts: Sequence[Part]) -> Iterator[tuple[str, bytes]]:
    """(record id, hash of all fields) of every record in the parts."""
    columns = ["record_id", "field", "text_hash"]
    for part in parts:
        record_id, fields = "", dict[str, bytes]()
        for batch in pq.ParquetFile(output / part.file).iter_batches(columns=columns):
            for row_id, field, text in zip(*(batch[c].to_pylist() for c in columns), strict=True):
                # under the same id, a field that cannot follow the last one opens another record
                if fields and (row_id != record_id or not may_follow(next(reversed(fields)), field)):
                    yield record_id, _digest(fields.items())
                    fields = {}
                record_id = row_id
                fields[field] = text
        if fields:
            yield record_id, _digest(fields.items())


def _digest(fields: Iterable[tuple[str, bytes]]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for field, text in fields:
        digest.update(field.encode() + b"\0" + text)
    return digest.digest()


def _refuse_many_rejects(output: Path, counts: Counts, max_reject_share: float) -> None:
    total = counts.records + counts.duplicates + counts.rejects
    if counts.rejects <= max_reject_share * total:
        return
    first: dict[str, str] | None = None
    reasons: Counter[str] = Counter()
    for path in sorted(output.glob("rejects-*.jsonl")):
        with open(path, encoding="utf-8") as file:
            for line in file:
                reject = json.loads(line)
                first = first or reject
                reasons[reject["reason"].partition(":")[0]] += 1
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(4))
    opening = f"{first['where']}: {first['reason']}; " if first else ""
    raise UserError(
        f"{opening}{counts.rejects} of {total} rows are bad ({listed}; see {output}/rejects-*.jsonl); "
        "mend them, or allow them with --max-reject-share"
    )


def _remove_stale(output: Path) -> None:
    """Remove what killed tasks left behind; what is young may be another task's, given the same shard by mistake."""
    for path in (*output.glob(".*.tmp"), *output.glob("log/.*.tmp"), *output.glob(".merge-*")):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another task was faster
