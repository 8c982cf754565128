"""The folder that ``mta-ds generate`` fills: what it is made of, which parts are complete, and its manifest.

    generation.json                      what the texts are made of, written by the first task
    part-00000-of-00008.jsonl, .json     the records of a shard, each with its new response; their counts and hash
    rejects-00000-of-00008.jsonl         records that were left out, with the reason
    manifest.json                        all of it; the folder is read as records once this is there

A part counts when the JSON beside it is there, the folder when the manifest is; both are written last, by rename.
Whichever task finds all parts complete writes the manifest, and twice or at once is the same file.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mta_ds.config import Section
from mta_ds.data import GENERATION, part_name
from mta_ds.errors import UserError
from mta_ds.files import sha256, write_atomic


class ResponseCounts(Section):
    """What became of the records of a part, or of all."""

    records: int = 0
    written: int = 0
    no_prompt: int = 0
    """Left out: records of text alone."""
    long_prompt: int = 0
    """Left out: their prompt is longer than ``max_prompt_length``, and ``data.long_prompts`` is "drop"."""
    empty: int = 0
    """Left out: the response was EOS at once, or white space alone."""
    cut_prompts: int = 0
    """Written, with a prompt cut to ``max_prompt_length``."""
    cut_responses: int = 0
    """Written, but the length limit ended them and not EOS (``"ended": false``)."""
    tokens: int = 0
    """Generated, EOS included, in the responses that were written."""


class GeneratedPart(Section):
    """One complete part."""

    file: str
    sha256: str
    counts: ResponseCounts


class AnsweringModel(Section):
    """Where the model was, and the SHA-256 of each of its files."""

    path: str
    sha256: dict[str, str]


class GeneratedManifest(Section):
    """A complete folder of generated records: manifest.json."""

    format: int
    model: AnsweringModel
    inputs: dict[str, list[str]]
    """For each input its files' names and SHA-256, or the name of a data set that is no file here."""
    settings: dict[str, Any]
    num_shards: int
    versions: dict[str, str]
    parts: tuple[GeneratedPart, ...]
    counts: ResponseCounts


def claim(output: Path, identity: dict[str, Any]) -> None:
    """Write down what the folder is made of, or check that it is the same as before."""
    path = output / GENERATION
    if not path.is_file():
        try:
            write_atomic(path, json.dumps(identity, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{output}: cannot write: {error.strerror}") from None
        return
    if differences := _differences(_read_identity(output), identity):
        raise UserError(
            f"{output}: already holds texts of {', '.join(differences)}; choose another output or remove it"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a folder is made of that this run would make otherwise; paths and versions may differ."""
    found = []
    if before["model"]["sha256"] != now["model"]["sha256"]:
        found.append(f"another model ({before['model']['path']}, this is {now['model']['path']})")
    if list(before["inputs"].values()) != list(now["inputs"].values()):
        found.append(f"other inputs ({', '.join(before['inputs'])})")
    if before["num_shards"] != now["num_shards"]:
        found.append(f"{before['num_shards']} shards (this run has {now['num_shards']})")
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            found.append(f"{name} {before['settings'].get(name)} (this run has {value})")
    return found


def _read_identity(output: Path) -> dict[str, Any]:
    path = output / GENERATION
    try:
        identity: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        GeneratedManifest(**identity, parts=(), counts=ResponseCounts())
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged; remove the folder and generate again") from None
    return identity


def finish(output: Path) -> GeneratedManifest | None:
    """Write the manifest if all parts are there, unless it is; None while parts are missing.

    Raises:
        UserError: a part is damaged, or no record was answered.
    """
    identity = _read_identity(output)
    num_shards = identity["num_shards"]
    parts = [part for i in range(num_shards) if (part := complete_part(output, i, num_shards)) is not None]
    if len(parts) < num_shards:
        return None
    summed = Counter[str]()
    for part in parts:
        summed.update(part.counts.model_dump())
    counts = ResponseCounts(**summed)
    if not counts.written:
        raise UserError(f"{', '.join(identity['inputs'])}: {_why_nothing(counts)}")
    manifest = GeneratedManifest(**identity, parts=tuple(parts), counts=counts)
    path, text = output / "manifest.json", manifest.model_dump_json(indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)
    return manifest


def complete_part(output: Path, index: int, num_shards: int) -> GeneratedPart | None:
    """The part if it is complete; UserError if it was and is damaged now."""
    sidecar = output / f"{part_name(index, num_shards)}.json"
    try:
        part = GeneratedPart.model_validate_json(sidecar.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None
    file = output / part.file
    if not file.is_file():
        return None
    if sha256(file) != part.sha256:
        raise UserError(
            f"{file}: part is damaged; remove it and run 'mta-ds generate' again, which makes only this part"
        )
    return part


def _why_nothing(counts: ResponseCounts) -> str:
    if not counts.records:
        return "no records"
    if counts.no_prompt == counts.records:
        return "no prompts: these are records of text alone"
    if counts.empty:
        return f"no response says anything: {counts.empty} of {counts.records} are EOS at once or white space"
    return (
        f"no prompt of at most max_prompt_length tokens ({counts.long_prompt} are longer, {counts.no_prompt} have none)"
    )
