"""What a store is made of: ``store.json``, which its first task writes and every other one must agree with."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mta_ds.errors import UserError
from mta_ds.files import create_atomic, sha256, write_atomic
from mta_ds.spans.log import FOLDER
from mta_ds.spans.sources import STORE, local_files, open_dataset
from mta_ds.spans.store import SCHEMA_VERSION, Identity

_DIGESTS = "digests.json"
# A clock of files may stand still for so long: what changed again in that time cannot be told by it.
_SETTLED_NS = 2_000_000_000


def claim_store(output: Path, identity: Identity) -> None:
    """Write down what the store is made of, or check that it is the same as before; of two tasks at once one writes.

    Raises:
        UserError: it is made of something else, or what it says is damaged.
        OSError: the folder cannot be written to.
    """
    if create_atomic(output / STORE, identity.model_dump_json(indent=1) + "\n"):
        return
    before = read_identity(output)
    other = {
        "other rules for sentences": before.segmentation != identity.segmentation,
        f"{before.num_shards} shards": before.num_shards != identity.num_shards,
        f"records up to {before.max_record_bytes} bytes": before.max_record_bytes != identity.max_record_bytes,
        "other inputs": before.inputs != identity.inputs,
        f"another parser ('{before.parser.name}', this is '{identity.parser.name}')": before.parser.fingerprint
        != identity.parser.fingerprint,
    }
    for what, differs in other.items():
        if differs:
            raise UserError(f"{output}: already holds a store of {what}; choose another output or remove it")


def read_identity(output: Path) -> Identity:
    """What a store is made of.

    Raises:
        UserError: there is no store, one of another version, or what it says is damaged.
    """
    path = output / STORE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (version := values["schema_version"]) != SCHEMA_VERSION:
            raise UserError(f"{output}: holds a store of schema {version}; choose another output or remove it")
        return Identity.model_validate(values)
    except FileNotFoundError:
        raise UserError(f"{output}: no span store; 'mta-ds parse' makes one") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, ValidationError, RecursionError):
        raise UserError(f"{path}: damaged; remove the folder and parse again") from None


class InputDigests:
    """Hashes of the inputs, kept in the store's log: its tasks and their reruns read a corpus for them once.

    A file is the one that was hashed while its path, size, time of change and inode are the same.
    """

    def __init__(self, store: Path) -> None:
        self._path = store / FOLDER / _DIGESTS
        self._before = self._read()
        self._known: dict[str, list[Any]] = {}

    def fingerprint(self, inputs: Iterable[str]) -> str:
        """Names and content of the input files, in order: what decides which record is in which part.

        A data set counts by its name; it is opened all the same, since a mistyped name must not be what a store is
        made of.

        Raises:
            UserError: an input that is not there or cannot be read.
        """
        seen: list[list[str]] = []
        for source in inputs:
            files = local_files(source)
            if not files:
                open_dataset(source)
            try:
                seen.append([f"{file.name}:{self._digest(file)}" for file in files] or [source])
            except OSError as error:
                raise UserError(f"{error.filename}: cannot read: {error.strerror or error}") from None
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def write(self) -> None:
        """Keep what :meth:`fingerprint` found out.

        Raises:
            OSError: the store cannot be written to.
        """
        if self._known and self._known != self._before:
            write_atomic(self._path, json.dumps(self._known) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    def _digest(self, file: Path) -> str:
        place, now, found = os.path.abspath(file), time.time_ns(), os.stat(file)
        state = [found.st_size, found.st_mtime_ns, found.st_ino]
        match self._before.get(place):
            case [*before, str(digest)] if before == state:
                pass
            case _:
                digest = sha256(file)
        if found.st_mtime_ns < now - _SETTLED_NS:
            self._known[place] = [*state, digest]
        return digest
