"""The encoded data set: equal to encoding record by record, cached by content, and clear about bad input."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import train_tokenizer

from mta_ds.data import DataConfig, Record, SpanStore, build_dataset, encode, read_records
from mta_ds.errors import UserError
from mta_ds.models import load_tokenizer
from mta_ds.spans.parse import ParseConfig, parse


@pytest.fixture
def tokenizer(pair: Path):
    return load_tokenizer(pair / "student")


def build(pair: Path, tokenizer, cache: Path, **options: object):
    config = DataConfig(**options)
    return build_dataset([str(pair / "train.jsonl")], config, tokenizer, SpanStore.open(pair / "spans"), cache)


def test_equals_encoding_each_record(pair: Path, tokenizer, tmp_path: Path) -> None:
    dataset = build(pair, tokenizer, tmp_path, max_length=400)
    lookup = SpanStore.open(pair / "spans").units
    records = [r for r in read_records([str(pair / "train.jsonl")]) if isinstance(r, Record)]
    assert len(dataset) == dataset.summary.records == len(records) == 24
    tokens = covered = labels = 0
    for i, record in enumerate(records):
        ours, expected = dataset[i], encode(record, DataConfig(max_length=400), tokenizer, lookup)
        assert ours.record_id == expected.record_id and ours.prompt_length == expected.prompt_length
        for name in ("input_ids", "labels"):
            assert np.array_equal(getattr(ours, name), getattr(expected, name))
        for granularity, spans in expected.spans.items():
            assert np.array_equal(ours.spans[granularity], spans) and len(spans)
        tokens += len(expected.input_ids)
        covered += len({t for spans in expected.spans.values() for a, b in spans.tolist() for t in range(a, b)})
        labels += int((expected.labels[1:] != -100).sum())
    summary = dataset.summary
    assert (summary.tokens, summary.covered_tokens, summary.label_tokens) == (tokens, covered, labels)
    assert summary.with_spans == 24 and not summary.dropped
    with pytest.raises(IndexError):
        dataset[24]


def test_cache_is_used_until_something_changes(pair: Path, tokenizer, tmp_path: Path) -> None:
    def folders() -> int:
        return len([p for p in tmp_path.iterdir() if p.name.startswith("examples-")])

    build(pair, tokenizer, tmp_path)
    build(pair, tokenizer, tmp_path)
    assert folders() == 1
    build(pair, tokenizer, tmp_path, max_length=99)
    build(pair, train_tokenizer("other words"), tmp_path)
    assert folders() == 3
    other = Path(shutil.copytree(pair, tmp_path / "other"))
    lines = (other / "train.jsonl").read_text(encoding="utf-8").splitlines()[:-1]
    (other / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(build(other, tokenizer, tmp_path)) == 23 and folders() == 4


def test_another_store_or_chat_template_is_another_cache(pair: Path, tokenizer, tmp_path: Path) -> None:
    inputs, config = [str(pair / "train.jsonl")], DataConfig()
    with_spans = build_dataset(inputs, config, tokenizer, SpanStore.open(pair / "spans"), tmp_path)
    other = Path(shutil.copytree(pair / "spans", tmp_path / "spans"))
    (other / "manifest.json").write_text(
        (other / "manifest.json").read_text(encoding="utf-8").rstrip() + "\n\n", encoding="utf-8"
    )
    build_dataset(inputs, config, tokenizer, SpanStore.open(other), tmp_path)
    without = build_dataset(inputs, config, tokenizer, None, tmp_path)
    assert with_spans.summary.with_spans and not without.summary.with_spans
    assert len(list(tmp_path.glob("examples-*"))) == 3
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    build_dataset(inputs, config, tokenizer, None, tmp_path)
    assert len(list(tmp_path.glob("examples-*"))) == 4


def test_examples_are_found_in_every_written_batch(
    pair: Path, tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(pair, tokenizer, tmp_path / "whole")
    monkeypatch.setattr("mta_ds.data.dataset._ROWS_PER_BATCH", 7)
    pieces = build(pair, tokenizer, tmp_path / "pieces")
    assert len(whole) == len(pieces) == 24
    for i in reversed(range(24)):
        ours, expected = pieces[i], whole[i]
        assert (ours.record_id, ours.prompt_length) == (expected.record_id, expected.prompt_length)
        assert np.array_equal(ours.input_ids, expected.input_ids) and np.array_equal(ours.labels, expected.labels)
        assert all(np.array_equal(ours.spans[g], expected.spans[g]) for g in expected.spans)


def test_without_a_store_there_are_no_spans(pair: Path, tokenizer, tmp_path: Path) -> None:
    dataset = build_dataset([str(pair / "train.jsonl")], DataConfig(), tokenizer, None, tmp_path)
    assert dataset.summary.with_spans == dataset.summary.covered_tokens == 0
    assert dataset[0].spans["word"].shape == (0, 2)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["{oops"], ":1: bad JSON"),
        (['{"id": "a", "text": "x"}', '{"id": "a", "text": "y"}'], ":2: id a has other content at .*:1"),
        (['{"prompt": "only a prompt"}'], "no records left .*1 without a response"),
        ([], "no records left .*empty"),
    ],
)
def test_bad_records(tokenizer, tmp_path: Path, lines: list[str], words: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        build_dataset([str(file)], DataConfig(), tokenizer, None, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").glob("**/*") if p.is_file()]


def test_an_equal_duplicate_is_one_record(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"text": "x y"}\n{"text": "z"}\n{"text": "x y"}\n', encoding="utf-8")
    assert len(build_dataset([str(file)], DataConfig(), tokenizer, None, tmp_path / "cache")) == 2
    assert len(build_dataset([str(file)] * 2, DataConfig(), tokenizer, None, tmp_path / "cache")) == 2


def test_saved_data_set_is_cached_by_its_content(tokenizer, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    for number in (2, 3):
        shutil.rmtree(folder, ignore_errors=True)
        datasets.Dataset.from_list([{"text": f"text {i}"} for i in range(number)]).save_to_disk(str(folder))
        assert len(build_dataset([str(folder)], DataConfig(), tokenizer, None, tmp_path / "cache")) == number


def test_fields_that_the_chat_template_changes_are_counted(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    rows = [{"prompt": "Say it", "response": "it"}, {"prompt": "say it", "chosen": "it", "rejected": "no"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | lower }}\n{% endfor %}"
    dataset = build_dataset([str(file)], DataConfig(template="chat"), tokenizer, None, tmp_path / "cache")
    assert dataset.summary.changed_fields == 1 and dataset.summary.records == 2


def test_store_of_other_text_names_the_record(pair: Path, tokenizer, tmp_path: Path) -> None:
    row = json.loads((pair / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(row | {"instruction": "Something else"}), encoding="utf-8")
    with pytest.raises(UserError, match=f"{row['id']}.*instruction"):
        build_dataset([str(file)], DataConfig(), tokenizer, SpanStore.open(pair / "spans"), tmp_path)


def test_record_that_was_never_parsed_is_named(pair: Path, tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"id": "new", "prompt": "Who?", "response": "Nobody."}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"records\.jsonl:1: record new .*'prompt'.* not in the span store"):
        build_dataset([str(file)], DataConfig(), tokenizer, SpanStore.open(pair / "spans"), tmp_path)


def test_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="fast tokenizer"):
        build_dataset(["x.jsonl"], DataConfig(), Slow(), None, tmp_path)


def test_killed_while_building_leaves_no_half_cache(pair: Path, tokenizer, tmp_path: Path) -> None:
    code = f"""
import os, signal
import mta_ds.data.dataset as d
from mta_ds.models import load_tokenizer
from mta_ds.spans.parse import ParseConfig, parse
from pathlib import Path
encode_parts = d.encode_parts
def dying(record, *rest):
    if record.id.endswith("9"):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode_parts(record, *rest)
d.encode_parts = dying
pair = Path({str(pair)!r})
tokenizer = load_tokenizer(pair / "student")
d.build_dataset([str(pair / "train.jsonl")], d.DataConfig(), tokenizer, None, Path({str(tmp_path)!r}))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("examples-")]
    dataset = build_dataset([str(pair / "train.jsonl")], DataConfig(), tokenizer, None, tmp_path)
    assert len(dataset) == 24
    assert [p.name for p in tmp_path.iterdir()] == [next(tmp_path.glob("examples-*")).name]


def preferences(pair: Path, tmp_path: Path, *more: dict) -> tuple[str, list[Record]]:
    """The pair's records with two responses each, in the fields of their prompt."""
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"chosen": row["output"], "rejected": f"Not so: {row['output'][::-1]}"} for row in rows]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]), encoding="utf-8")
    return str(file), [r for r in read_records([str(file)]) if isinstance(r, Record)]


def test_a_pair_is_two_examples_side_by_side_with_the_spans_of_both(pair: Path, tokenizer, tmp_path: Path) -> None:
    file, records = preferences(pair, tmp_path)
    parse(ParseConfig(inputs=(file,), output=tmp_path / "spans", workers=1))
    store = SpanStore.open(tmp_path / "spans")
    config = DataConfig(max_length=400)
    dataset = build_dataset([file], config, tokenizer, store, tmp_path / "cache", pairs=True)
    assert (dataset.group, dataset.summary.records, len(dataset)) == (2, 24, 48)
    tokens = 0
    for i, record in enumerate(records):
        for half, name in enumerate(("chosen", "rejected")):
            ours, expected = dataset[2 * i + half], encode(record, config, tokenizer, store.units, half=name)
            assert (ours.record_id, ours.is_rejected) == (record.id, bool(half))
            assert ours.input_ids.tolist() == expected.input_ids.tolist()
            assert ours.labels.tolist() == expected.labels.tolist()
            inside = {g: spans[spans[:, 0] >= ours.prompt_length] for g, spans in ours.spans.items()}
            assert all(ours.spans[g].tolist() == expected.spans[g].tolist() and len(inside[g]) for g in inside)
            assert tokenizer.decode(ours.input_ids[ours.labels != -100]) == f"{record.fields[name]}<|end|>"
            tokens += len(ours.input_ids)
    assert dataset.summary.tokens == tokens and dataset.summary.with_spans == 24
    # without pairs the same file is the chosen responses, under a cache of its own
    chosen = build_dataset([file], config, tokenizer, store, tmp_path / "cache")
    assert (chosen.group, len(chosen)) == (1, 24) and not chosen[1].is_rejected
    assert all(np.array_equal(chosen[i].input_ids, dataset[2 * i].input_ids) for i in range(24))


def test_a_pair_is_dropped_whole(pair: Path, tokenizer, tmp_path: Path) -> None:
    long = {"id": "long", "prompt": "word " * 900, "chosen": "Yes.", "rejected": "No."}
    file, _ = preferences(pair, tmp_path, long)
    config = DataConfig(max_length=2000, max_prompt_length=800, long_prompts="drop")
    dataset = build_dataset([file], config, tokenizer, None, tmp_path / "cache", pairs=True)
    assert dataset.summary.dropped == {"with a prompt over max_prompt_length": 1}
    assert dataset.summary.records == 24 and len(dataset) == 48
    assert [dataset[i].is_rejected for i in range(4)] == [False, True, False, True]


def test_pairs_want_both_responses(pair: Path, tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl:1: record \S+ has no chosen and rejected.*--pair-with"):
        build_dataset([str(pair / "train.jsonl")], DataConfig(), tokenizer, None, tmp_path, pairs=True)
    file, _ = preferences(pair, tmp_path, {"id": "half", "prompt": "Say.", "chosen": "Yes."})
    with pytest.raises(UserError, match=r"pairs\.jsonl:25: missing field: rejected"):
        build_dataset([file], DataConfig(), tokenizer, None, tmp_path, pairs=True)
    file, _ = preferences(pair, tmp_path, {"id": "half", "prompt": "Say.", "chosen": "Yes.", "rejected": None})
    with pytest.raises(UserError, match=r"pairs\.jsonl:25: record half has nothing in rejected; "):
        build_dataset([file], DataConfig(), tokenizer, None, tmp_path, pairs=True)
