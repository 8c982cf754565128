from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from span_cases import PROCESSES, num_words, write_rows

from mta_ds.errors import UserError
from mta_ds.files import sha256
from mta_ds.spans import parse as parse_module
from mta_ds.spans import rows as rows_module
from mta_ds.spans import store as module
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.spans.records import text_hash
from mta_ds.spans.store import SCHEMA, SpanStore, read_batches

ROWS = [{"id": f"r{i}", "prompt": f"Say {i} things. Now!", "response": "A cat, " * (i + 1)} for i in range(12)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parse(ParseConfig(inputs=(str(source),), output=tmp_path / "store", parser="none", num_shards=3))
    return tmp_path / "store"


def test_units_of_every_field(path: Path) -> None:
    store = SpanStore.open(path)
    assert len(store) == 24
    for row in ROWS:
        for field in ("prompt", "response"):
            text = row[field]
            units = store.units(row["id"], field, text)
            assert units is not None
            assert units.text_hash == text_hash(text)
            assert units.num_chars == len(text)
            assert units.words.dtype == units.sentences.dtype == units.constituents.dtype == np.int32
            assert "".join(text[start:end] for start, end in units.words) == text.replace(" ", "")
            assert units.sentences[0] == 0
            assert units.sentences[-1] == len(units.words) == len(units.tags)
            assert units.constituents.shape == (0, 3)
            assert units.labels == []


def test_unknown_record_or_field_is_none_and_other_text_an_error(path: Path) -> None:
    store = SpanStore.open(path)
    assert store.units("r99", "prompt", "a") is None
    assert store.units("r1", "text", "a") is None
    with pytest.raises(UserError, match="record r1: its field 'prompt' is not the text"):
        store.units("r1", "prompt", "Say 1 things. Now?")


def test_hash_collisions_are_told_apart(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_key", lambda record_id, field: np.uint64(5))
    store = SpanStore.open(path)
    for row in ROWS:
        units = store.units(row["id"], "response", row["response"])
        assert units is not None
        assert units.num_chars == len(row["response"])
    assert store.units("r99", "prompt", "a") is None


def test_parts_are_plain_parquet_with_schema_and_origin(path: Path) -> None:
    parts = sorted(path.glob("*.parquet"))
    assert [part.name for part in parts] == [f"part-0000{i}-of-00003.parquet" for i in range(3)]
    file = pq.ParquetFile(parts[0])
    assert file.schema_arrow.equals(SCHEMA)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    metadata = file.schema_arrow.metadata
    assert metadata[b"mta_ds.schema_version"] == b"1"
    assert json.loads(metadata[b"mta_ds.parser"])["name"] == "none"


def test_rows_of_two_row_groups_are_never_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group ends after so many words: filled from several, a batch would grow with the length of the records."""
    monkeypatch.setattr(rows_module, "FIELDS_AT_ONCE", 2)
    monkeypatch.setattr(parse_module, "_WORDS_PER_GROUP", 20)
    source = write_rows(tmp_path / "a.jsonl", ROWS)
    parse(ParseConfig(inputs=(source,), output=tmp_path / "store", parser="none", workers=1))
    part = tmp_path / "store" / "part-00000-of-00001.parquet"
    metadata = pq.read_metadata(part)
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert len(groups) > 3 and sum(groups) == 24
    assert [batch.num_rows for batch in read_batches(part, 4096)] == groups
    assert [batch.num_rows for batch in read_batches(part, 1, ["field"])] == [1] * 24
    assert [batch.num_rows for batch in SpanStore.open(tmp_path / "store")._batches] == groups


def test_manifest_lists_parts_with_rows_and_hashes(path: Path) -> None:
    manifest = SpanStore.open(path).manifest
    assert [part.rows for part in manifest.parts] == [8, 8, 8]
    assert all(sha256(path / part.file) == part.sha256 for part in manifest.parts)
    assert (manifest.counts.records, manifest.counts.fields) == (12, 24)


def test_unfinished_store_names_what_tells_more(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "part-00001-of-00003.json").unlink()
    with pytest.raises(UserError, match=f"not a complete span store.*--status --output {path}'"):
        SpanStore.open(path)
    with pytest.raises(UserError, match="no such span store"):
        SpanStore.open(path / "elsewhere")
    with pytest.raises(UserError, match="'mta-ds parse' makes what is missing"):
        SpanStore.open(path.parent)


@pytest.mark.parametrize("opened_before", [False, True])
def test_missing_part_is_named(path: Path, opened_before: bool) -> None:
    if opened_before:
        SpanStore.open(path)
    (path / "part-00002-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"part-00002-of-00003\.parquet: part is missing"):
        SpanStore.open(path)


def test_damaged_part_is_named(path: Path) -> None:
    part = path / "part-00000-of-00003.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"part-00000-of-00003\.parquet: part is damaged"):
        SpanStore.open(path)
    part.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])  # one bit
    with pytest.raises(UserError, match=r"part-00000-of-00003\.parquet: part is damaged"):
        SpanStore.open(path)
    part.write_bytes(whole)
    SpanStore.open(path)
    part.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    with pytest.raises(UserError, match="damaged"):
        SpanStore.open(path, verify=True)


@pytest.mark.parametrize("name", ["rows.arrow", "keys.npy", "rows.npy", "names.json"])
def test_a_damaged_index_is_one_clear_error(path: Path, name: str) -> None:
    SpanStore.open(path)
    (cache,) = path.glob("cache-*")
    whole = (cache / name).read_bytes()
    for content in (b"", whole[: len(whole) // 2]):
        (cache / name).write_bytes(content)
        with pytest.raises(
            UserError, match=r"cache-\w+: the span store's index is damaged .*remove this folder"
        ) as error:
            SpanStore.open(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"schema_version": 1}'])
def test_damaged_manifest_is_one_clear_error(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        SpanStore.open(path)
    assert "\n" not in str(error.value)


def test_other_schema_version_is_refused(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(UserError, match="schema version 2, this mta_ds reads 1"):
        SpanStore.open(path)


def test_processes_that_open_a_new_store_at_once(path: Path) -> None:
    with PROCESSES.Pool(6) as pool:
        assert pool.starmap(num_words, [(path, ROWS[3])] * 12, chunksize=1) == [12] * 12
    assert len(list(path.glob("cache-*"))) == 1


def test_read_only_store_is_indexed_in_the_users_cache(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert num_words(path, ROWS[3]) == 12
    assert not list(path.glob("cache-*"))
    assert any((tmp_path / "cache" / "mta_ds").iterdir())


def test_documentation_names_every_column_and_type() -> None:
    page = (Path(module.__file__).parents[2] / "docs" / "span-store.md").read_text(encoding="utf-8")
    for field in SCHEMA:
        kind = {"fixed_size_binary[16]": "binary(16)"}.get(str(field.type), str(field.type).replace("item: ", ""))
        assert f"| `{field.name}` | {kind} |" in page
