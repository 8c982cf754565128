"""COMMIT, which makes a folder a checkpoint: what it says, and how the newest whole one of a run is found.

COMMIT is a JSON object. ``format`` comes first and is read before anything else; ``sha256`` is the checksum of all the
rest. A file that does not match its size and hash, or a COMMIT that does not match its own, is damage: the checkpoint
is named and passed over. Rank 0 alone lists folders and reads COMMITs, since ranks need not see the same at a moment;
the files' hashes are computed by all ranks together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mta_ds.engine import distributed
from mta_ds.errors import UserError
from mta_ds.files import fsync_file, sha256, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 4
_FILE = "COMMIT"
_NAME = re.compile(r"step-(\d{8})")

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
    inputs: Mapping[str, str]
    """Hashes of records, spans and models by what they are: the configuration only names their paths."""


class Commit(NamedTuple):
    """The content of a COMMIT."""

    progress: Progress
    files: Digests


class Damage(Exception):
    """A folder that is no checkpoint any more; the message says what of it is damaged."""


def folder_name(step: int) -> str:
    """A checkpoint's folder."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named by."""
    return int(folder.name.removeprefix("step-"))


def step_folders(root: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, newest first."""
    if not root.is_dir():
        return []
    return sorted((folder for folder in root.iterdir() if _NAME.fullmatch(folder.name)), reverse=True)


def is_committed(folder: Path) -> bool:
    """Whether a folder holds a COMMIT; what that is worth its hashes tell."""
    return (folder / _FILE).is_file()


def write_commit(folder: Path, commit: Commit) -> None:
    """Make a folder a checkpoint, now that all of its files are durable."""
    body = asdict(commit.progress) | {"files": commit.files}
    content = {"format": FORMAT, "sha256": _checksum(body)} | body
    write_atomic(folder / _FILE, json.dumps(content, indent=1))


def withdraw_commit(folder: Path) -> None:
    """Make a folder no checkpoint: before it is removed, so that half of it cannot pass for one."""
    (folder / _FILE).unlink(missing_ok=True)


def check_whole(folder: Path) -> None:
    """Insist that a checkpoint is whole, whatever run it is of.

    Raises:
        Damage: it is not; the message says what of it.
    """
    _check_files(folder, _parse(_content(folder), folder).files)


def digests_of(folder: Path, names: Sequence[str], sync: bool = False) -> Digests:
    """Size and SHA-256 of files; those that cannot be read are left out. ``sync`` makes them durable first."""
    digests: Digests = {}
    for name in names:
        path = folder / name
        if sync:
            fsync_file(path)
        try:
            digests[name] = [path.stat().st_size, sha256(path)]
        except OSError as error:
            logger.warning("%s: %s", path, error)
    return digests


def find_newest(
    root: Path, config_hash: str, batch_size: int | None = None, inputs: Mapping[str, str] | None = None
) -> tuple[Path, Progress] | None:
    """The newest checkpoint whose files match their hashes, or None; every rank must call it and gets the same.

    Args:
        batch_size, inputs: of the run that is to go on with it; None for who trains no further.

    Raises:
        UserError: it belongs to another run, or has another format; or there are checkpoints, all damaged. On every
            rank.
    """
    damaged = []
    for name in distributed.from_rank_zero(
        lambda: [folder.name for folder in step_folders(root) if is_committed(folder)]
    ):
        folder = root / name
        try:
            commit = _parse(distributed.from_rank_zero(partial(_content, folder)), folder)
            _check_files(folder, commit.files)
        except Damage as damage:
            logger.warning("%s is damaged (%s): skipped", folder, damage)
            damaged.append(f"{name}: {damage}")
            continue
        _check_same_run(folder, commit.progress, config_hash, batch_size, inputs)
        return folder, commit.progress
    if damaged:
        raise UserError(
            f"{root}: no checkpoint is whole ({'; '.join(damaged[:3])}); bring one back from a copy, or move the "
            "folder away to begin anew at step 0",
            on_every_rank=True,
        )
    return None


def _content(folder: Path) -> bytes:
    """A COMMIT's bytes; none of one that cannot be read, which is damage."""
    try:
        return (folder / _FILE).read_bytes()
    except OSError as error:
        logger.warning("%s: %s", folder / _FILE, error)
        return b""


def _parse(content: bytes, folder: Path) -> Commit:
    try:
        values = json.loads(content)
        number = values.pop("format")
        if type(number) is not int:
            raise ValueError("its format is no number")
        if number == FORMAT:
            return _parse_body(values, step_of(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{_FILE}: {error}") from None
    age = "a newer" if number > FORMAT else "an older"
    raise UserError(
        f"{folder}: written by {age} mta_ds (format {number}, this one has {FORMAT}); resume with that, choose another "
        "run_dir, or remove this folder to go on from the one before",
        on_every_rank=True,
    )


def _parse_body(values: dict[str, object], step: int) -> Commit:
    if values.pop("sha256") != _checksum(values):
        raise ValueError("its checksum is another")
    files: Digests = values.pop("files")  # type: ignore[assignment]
    progress = Progress(**values)  # type: ignore[arg-type]
    if progress.step != step:
        raise ValueError(f"it is of step {progress.step}")
    return Commit(progress, files)


def _checksum(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _check_files(folder: Path, files: Digests) -> None:
    """Compare files with their digests: every rank reads its share, all come to the same."""
    mine = digests_of(folder, sorted(files)[distributed.rank() :: distributed.world_size()])
    found = {name: digest for share in distributed.gather_objects(mine) for name, digest in share.items()}
    wrong = sorted(name for name, digest in files.items() if found.get(name) != digest)
    if wrong:
        raise Damage(f"{wrong[0]} is {'another' if wrong[0] in found else 'missing'}")


def _check_same_run(
    folder: Path, saved: Progress, config_hash: str, batch_size: int | None, inputs: Mapping[str, str] | None
) -> None:
    if saved.config_hash != config_hash:
        raise UserError(
            f"{folder}: saved under another configuration of model, data, loss or schedule; "
            "resume with that run's config.yaml, or choose another run_dir",
            on_every_rank=True,
        )
    inputs = saved.inputs if inputs is None else inputs
    names = [*saved.inputs, *(name for name in inputs if name not in saved.inputs)]
    if differing := [name for name in names if saved.inputs.get(name) != inputs.get(name)]:
        raise UserError(
            f"{folder}: saved with other {differing[0]} than there are now under the same path; bring those back, or "
            "choose another run_dir",
            on_every_rank=True,
        )
    if batch_size not in (None, saved.batch_size):
        raise UserError(
            f"{folder}: saved with {saved.batch_size} sequences a step, this run has {batch_size}; choose "
            + _same_batch(saved.batch_size, distributed.world_size()),
            on_every_rank=True,
        )


def _same_batch(size: int, ranks: int) -> str:
    """How a step can have ``size`` sequences again."""
    if size % ranks:
        return f"a number of ranks that divides {size}, which {ranks} does not"
    return f"micro_batch_size x gradient_accumulation_steps = {size // ranks} on {ranks} rank{'s' * (ranks > 1)}"
