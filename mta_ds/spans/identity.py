"""What a store is made of: ``store.json``, which its first task writes and every other one must agree with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from mta_ds.errors import UserError
from mta_ds.files import create_atomic, sha256
from mta_ds.spans.sources import local_files, open_dataset
from mta_ds.spans.store import SCHEMA_VERSION, Identity


def claim_store(output: Path, identity: Identity) -> None:
    """Write down what the store is made of, or check that it is the same as before; of two tasks at once one writes.

    Raises:
        UserError: it is made of something else, or what it says is damaged.
        OSError: the folder cannot be written to.
    """
    if create_atomic(output / "store.json", identity.model_dump_json(indent=1) + "\n"):
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
    path = output / "store.json"
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


def fingerprint_inputs(inputs: Iterable[str]) -> str:
    """Names and content of the input files, in order: what decides which record is in which part.

    Every task reads all of its input anyway; hashing costs less than that. A data set counts by its name; it is opened
    all the same, since a mistyped name must not be what a store is made of.

    Raises:
        UserError: an input that is not there or cannot be read.
    """
    seen: list[list[str]] = []
    for source in inputs:
        files = local_files(source)
        if not files:
            open_dataset(source)
        try:
            seen.append([f"{file.name}:{sha256(file)}" for file in files] or [source])
        except OSError as error:
            raise UserError(f"{error.filename}: cannot read: {error.strerror or error}") from None
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
