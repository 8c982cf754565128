"""The end of the parse stage: duplicates over all parts, the share of bad rows, and the manifest.

Whichever task finds all parts complete merges. Merging twice, or twice at once, gives the same files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow.parquet as pq
from pydantic import ValidationError

from mta_ds.errors import UserError, error_line
from mta_ds.files import atomic_path, scratch_folder, write_atomic
from mta_ds.spans.identity import read_identity
from mta_ds.spans.records import Reject, may_follow, read_records, text_hash
from mta_ds.spans.store import PARSER_KEY, Counts, Manifest, ParserInfo, Part, check_part, part_name

_DUPLICATES = "rejects-duplicates.jsonl"
_STALE_SECONDS = 24 * 3600
_DAMAGED_TOLD = 8


def merge(output: Path, inputs: Sequence[str], num_shards: int, max_reject_share: float) -> Manifest | None:
    """Write the manifest if all parts are there and the bad rows few enough; None while parts are missing.

    Raises:
        UserError: a part is damaged or another parser's, more than ``max_reject_share`` of the rows are bad, there is
            no record, the inputs are no more what they were, or the folder cannot be written to.
    """
    try:
        parts = _survey(output, num_shards).all_complete()
        if len(parts) < num_shards:
            return None
        return _merge(output, inputs, parts, max_reject_share)
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{output}: cannot merge the parts: {reason}; run the same command again") from None


def _merge(output: Path, inputs: Sequence[str], parts: Sequence[Part], max_reject_share: float) -> Manifest:
    identity = read_identity(output)
    for part in parts:
        check_part(output, part, full=True)
        _check_parser(output, part, identity.parser)
    _remove_stale(output)
    before = _manifest_before(output)
    made = Manifest(**identity.model_dump(), parts=tuple(parts), counts=before.counts if before else Counts())
    if made != before:
        made = made.model_copy(update={"counts": _merge_counts(output, inputs, parts, identity.max_record_bytes)})
    _refuse_many_rejects(output, made.counts, max_reject_share)
    if made.counts.records == 0:
        raise UserError(f"{', '.join(inputs)}: no records")
    if made != before:
        write_atomic(output / "manifest.json", made.model_dump_json(indent=1) + "\n")
    return made


def _manifest_before(output: Path) -> Manifest | None:
    """What an earlier merge wrote."""
    try:
        return Manifest.model_validate_json((output / "manifest.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _check_parser(output: Path, part: Part, parser: ParserInfo) -> None:
    """A part says itself which parser made it: two tasks may have begun one store at the same moment."""
    found = (pq.read_schema(output / part.file).metadata or {}).get(PARSER_KEY, b"{}")
    try:
        own = ParserInfo.model_validate_json(found)
    except ValidationError:
        own = ParserInfo(name="unknown", fingerprint="", versions={})
    if own.fingerprint != parser.fingerprint:
        raise UserError(
            f"{output / part.file}: made by another parser ('{own.name}', the store's is '{parser.name}'); remove it "
            "and run 'mta-ds parse' again, which makes only this part"
        )


def complete_part(output: Path, index: int, num_shards: int) -> Part | None:
    """The part if it is complete; UserError if it was and is damaged now, or cannot be read."""
    sidecar = output / f"{part_name(index, num_shards)}.json"
    try:
        part = Part.model_validate_json(sidecar.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
    except OSError as error:
        raise UserError(f"{sidecar}: cannot read: {error.strerror or error}") from None
    if not (output / part.file).is_file():
        return None
    check_part(output, part, full=False)
    return part


class _Parts(NamedTuple):
    """The state of all parts of a store."""

    complete: list[Part]
    missing: list[int]
    damaged: list[UserError]

    def all_complete(self) -> list[Part]:
        """The complete ones; raises where one is damaged."""
        if self.damaged:
            raise self.damaged[0]
        return self.complete


def _survey(output: Path, num_shards: int) -> _Parts:
    found = _Parts([], [], [])
    for index in range(num_shards):
        try:
            part = complete_part(output, index, num_shards)
        except UserError as error:
            found.damaged.append(error)
            continue
        if part is None:
            found.missing.append(index)
        else:
            found.complete.append(part)
    return found


def missing_parts(output: Path) -> str:
    """Which parts a store lacks, in one line that a job array's ``--array`` understands."""
    num_shards = read_identity(output).num_shards
    return _told(_survey(output, num_shards), num_shards)


def _told(parts: _Parts, num_shards: int) -> str:
    if parts.missing:
        return f"{len(parts.missing)} of {num_shards} parts are missing: {','.join(map(str, parts.missing))}"
    return (
        f"{len(parts.damaged)} of {num_shards} parts are damaged"
        if parts.damaged
        else f"all {num_shards} parts are there"
    )


def status(output: Path) -> str:
    """The state of a store in a few lines: parts, those that are damaged, manifest, counts, bad rows.

    Raises:
        UserError: there is no store.
    """
    num_shards = read_identity(output).num_shards
    parts = _survey(output, num_shards)
    lines = [_told(parts, num_shards), *map(error_line, parts.damaged[:_DAMAGED_TOLD])]
    if len(parts.damaged) > _DAMAGED_TOLD:
        lines.append(f"and {len(parts.damaged) - _DAMAGED_TOLD} damaged parts more")
    is_whole = (output / "manifest.json").is_file()
    lines.append("the manifest is written" if is_whole else "no manifest yet: a store without one is not read")
    counts = sum((part.counts for part in parts.complete), Counts())
    lines.append("so far " + (", ".join(f"{number} {name}" for name, number in counts if number) or "nothing"))
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
            row = {name: value for name, value in reject._asdict().items() if name != "kind" or value}
            line = json.dumps(row, ensure_ascii=False) + "\n"
            # a lone surrogate (in a file's name) becomes the JSON escape that it is
            file.write(line.encode("utf-8", "backslashreplace"))

        yield log
        if file is None:
            path.unlink(missing_ok=True)


def _merge_counts(output: Path, inputs: Sequence[str], parts: Sequence[Part], max_bytes: int) -> Counts:
    counts = sum((part.counts for part in parts), Counts())
    repeated, conflicts = _find_duplicates(output, inputs, parts, max_bytes)
    update = {
        "records": counts.records - repeated,
        "duplicates": repeated - conflicts,
        "rejects": counts.rejects + conflicts,
    }
    return counts.model_copy(update=update)


def _find_duplicates(output: Path, inputs: Sequence[str], parts: Sequence[Part], max_bytes: int) -> tuple[int, int]:
    """Records whose id came before; those of them with other content, each of which is rejected.

    On disk, so that memory stays flat over any corpus.
    """
    repeated = differing = 0
    with scratch_folder(output / "merge") as folder, closing(sqlite3.connect(folder / "ids")) as ids:
        ids.execute("PRAGMA journal_mode=OFF")
        ids.execute("PRAGMA cache_size=-262144")  # KiB: ids come in any order, and each would read from the disk
        ids.execute("CREATE TABLE ids (id BLOB PRIMARY KEY, content BLOB, conflict INTEGER) WITHOUT ROWID")
        for record_id, content in _contents(output, parts):
            key = record_id.encode()
            if ids.execute("INSERT OR IGNORE INTO ids VALUES (?, ?, 0)", (key, content)).rowcount:
                continue
            repeated += 1
            conflict = "UPDATE ids SET conflict = 1, content = NULL WHERE id = ? AND content IS NOT ?"
            differing += ids.execute(conflict, (key, content)).rowcount
        if differing:
            return repeated, _reject_conflicts(output, inputs, ids, max_bytes)
    (output / _DUPLICATES).unlink(missing_ok=True)
    return repeated, 0


def _reject_conflicts(output: Path, inputs: Sequence[str], ids: sqlite3.Connection, max_bytes: int) -> int:
    """Read the inputs once more, for the places of the conflicting records: the first in their order stands."""
    num_conflicts = 0
    with reject_log(output / _DUPLICATES) as log:
        for record in read_records(inputs, max_bytes=max_bytes):
            if isinstance(record, Reject):
                continue
            key, content = record.id.encode(), _digest((f, text_hash(t)) for f, t in record.fields.items())
            found = ids.execute("SELECT content FROM ids WHERE id = ? AND conflict = 1", (key,)).fetchone()
            if found is None:
                continue
            if found[0] is None:
                ids.execute("UPDATE ids SET content = ? WHERE id = ?", (content, key))
            elif found[0] != content:
                log(Reject(record.where, "duplicate id with other content", record.id, "duplicate id"))
                num_conflicts += 1
        unseen = ids.execute("SELECT count(*) FROM ids WHERE conflict = 1 AND content IS NULL").fetchone()[0]
        if unseen or not num_conflicts:
            raise UserError(
                f"{', '.join(inputs)}: changed since {output} was parsed from it; parse into another output"
            )
    return num_conflicts


def _contents(output: Path, parts: Sequence[Part]) -> Iterator[tuple[str, bytes]]:
    """(record id, hash of all fields) of every record in the parts."""
    columns = ["record_id", "field", "text_hash"]
    for part in parts:
        record_id, fields = "", dict[str, bytes]()
        row_numbers, starts = count(), frozenset(part.record_starts)
        for batch in pq.ParquetFile(output / part.file).iter_batches(columns=columns):
            for row_id, field, text in zip(*(batch[c].to_pylist() for c in columns), strict=True):
                is_start = next(row_numbers) in starts
                # under the same id, a field that cannot follow the last one opens another record
                if fields and (is_start or row_id != record_id or not may_follow(next(reversed(fields)), field)):
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
                reasons[reject.get("kind") or reject["reason"]] += 1
    listed = ", ".join(f"{number} {reason}" for reason, number in reasons.most_common(4))
    opening = f"{first['where']}: {first['reason']}; " if first else ""
    raise UserError(
        f"{opening}{counts.rejects} of {total} rows are bad ({listed}; see {output}/rejects-*.jsonl); "
        "allow them with --max-reject-share, or mend them and parse into another output"
    )


def _remove_stale(output: Path) -> None:
    """Remove what killed tasks left behind; what is young may be another task's, given the same shard by mistake."""
    for path in (*output.glob(".*.tmp"), *output.glob("log/.*.tmp")):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # another task was faster
