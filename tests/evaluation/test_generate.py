"""Answered records: the same whatever the shards, whatever was killed, and good to parse, to pair and to train on."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mta_ds.data import DataConfig, Record, SpanStore, build_dataset, encode_prompt, input_files, read_records
from mta_ds.data.responses import write_pairs
from mta_ds.errors import UsageError, UserError
from mta_ds.evaluation import GenerateConfig, GenerationConfig, generate, respond, write_responses
from mta_ds.models import load_pretrained, load_tokenizer
from mta_ds.spans.parse import ParseConfig, parse

DATA = DataConfig(max_length=400, max_prompt_length=300)
CONFIG = GenerateConfig(max_length=400, max_prompt_length=300, max_new_tokens=6, num_shards=3, batch_size=4, seed=5)


def run(pair: Path, output: Path, model: str = "student", data: DataConfig = DATA, **changes: object):
    """Answer the pair's training records, or ``inputs``, in ``output``."""
    shard_index = changes.pop("shard_index", None)
    inputs = changes.pop("inputs", (str(pair / "train.jsonl"),))
    config = GenerateConfig.model_validate(CONFIG.model_dump() | changes)
    return write_responses(pair / model, inputs, output, config=config, data=data, shard_index=shard_index)


def rows(path: Path) -> list[dict]:
    files = sorted(path.glob("part-*.jsonl")) if path.is_dir() else [path]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def answered(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student's answers to the training records; read only."""
    output = tmp_path_factory.mktemp("answers") / "student"
    run(pair, output)
    return output


def records(path: Path) -> list[Record]:
    return [r for r in read_records([str(path)]) if isinstance(r, Record)]


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_each_answer_is_what_the_record_alone_would_get(pair: Path, answered: Path) -> None:
    model, tokenizer = load_pretrained(pair / "student", "float32"), load_tokenizer(pair / "student")
    original = {row["id"]: row for row in rows(pair / "train.jsonl")}
    made = rows(answered)
    assert Counter(row["id"] for row in made) == Counter(original.keys())
    assert len({row["output"] for row in made}) > 20
    config = GenerationConfig(**CONFIG.model_dump(include=set(GenerationConfig.model_fields)))
    for record in records(pair / "train.jsonl")[:5]:
        row = next(row for row in made if row["id"] == record.id)
        alone = respond(model, tokenizer, [encode_prompt(record, DATA, tokenizer)], [record.id], config)[0]
        assert row == original[record.id] | {"output": alone.text, "ended": alone.ended}
        assert tokenizer.eos_token not in alone.text and 1 <= len(alone.ids) <= 6
        assert alone.ended == (alone.ids[-1] == tokenizer.eos_token_id)


def test_answers_depend_on_seed_and_record_not_on_shards_batches_or_order(
    pair: Path, answered: Path, tmp_path: Path
) -> None:
    reversed_rows = write(tmp_path / "records.jsonl", *reversed(rows(pair / "train.jsonl")))
    run(pair, tmp_path / "one", num_shards=1, batch_size=16, inputs=(reversed_rows,))
    by_id = {row["id"]: row for row in rows(answered)}
    assert [by_id[row["id"]] for row in reversed(rows(tmp_path / "one"))] == [
        by_id[record.id] for record in records(pair / "train.jsonl")
    ]
    assert all(row == by_id[row["id"]] for row in rows(tmp_path / "one"))
    run(pair, tmp_path / "other", num_shards=1, seed=6)
    assert sum(row != by_id[row["id"]] for row in rows(tmp_path / "other")) > 20


def test_manifest_says_all_that_made_the_texts(pair: Path, answered: Path) -> None:
    manifest = json.loads((answered / "manifest.json").read_text())
    assert manifest["settings"] == {
        "do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "no_repeat_ngram_size": None,
        "max_length": 400, "max_new_tokens": 6, "max_prompt_length": 300, "seed": 5,
        "template": "minillm", "long_prompts": "truncate", "dtype": "float32",
    }  # fmt: skip
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(manifest["model"]["sha256"])
    assert manifest["versions"]["torch"] and manifest["inputs"][str(pair / "train.jsonl")]
    made, counts = rows(answered), manifest["counts"]
    assert (counts["records"], counts["written"], counts["empty"]) == (24, 24, 0)
    assert counts["cut_responses"] == sum(not row["ended"] for row in made)
    assert 24 < counts["tokens"] <= 24 * 6
    assert [part["file"] for part in manifest["parts"]] == [f"part-0000{i}-of-00003.jsonl" for i in range(3)]


def test_every_kind_of_record_keeps_its_prompt_and_the_rest(pair: Path, tmp_path: Path) -> None:
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Hi", "name": "Ada"}]
    file = write(
        tmp_path / "records.jsonl",
        {"id": 7, "prompt": "Say.", "completion": "Old.", "topic": "x"},
        {"id": "m", "messages": [*turns, {"role": "assistant", "content": "Old."}]},
        {"id": "p", "instruction": "Go.", "input": "", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "No id."},
        {"id": "t", "text": "No prompt."},
    )
    manifest = run(pair, tmp_path / "out", inputs=(file,), num_shards=1)
    completion, conversation, instruction, without_id = rows(tmp_path / "out")
    assert completion.keys() == {"id", "prompt", "completion", "topic", "ended"} and completion["topic"] == "x"
    assert completion["id"] == "7" and completion["completion"] not in ("", "Old.")
    assert conversation["messages"][0] == turns[1] and conversation["messages"][1]["role"] == "assistant"
    assert conversation["messages"][1]["content"] not in ("", "Old.") and len(conversation["messages"]) == 2
    assert instruction.keys() == {"id", "instruction", "input", "output", "ended"}
    assert without_id["id"] == records(Path(file))[3].id and without_id["response"]
    assert [r.id for r in records(tmp_path / "out")] == ["7", "m", "p", without_id["id"]]
    assert (manifest.counts.records, manifest.counts.written, manifest.counts.no_prompt) == (5, 4, 1)
    (rejected,) = rows(tmp_path / "out" / "rejects-00000-of-00001.jsonl")
    assert rejected == {"where": f"{file}:5", "reason": "no prompt to answer", "record_id": "t"}


@pytest.mark.parametrize("template", ["minillm", "plain", "chat"])
def test_any_template_asks_as_training_does(pair: Path, tmp_path: Path, template: str) -> None:
    folder = Path(shutil.copytree(pair / "student", tmp_path / "student"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    data = DATA.model_copy(update={"template": template})
    run(tmp_path, tmp_path / "out", data=data, inputs=(str(pair / "train.jsonl"),), do_sample=False, num_shards=1)
    model, tokenizer = load_pretrained(folder, "float32"), load_tokenizer(folder)
    for record, row in zip(records(pair / "train.jsonl")[:4], rows(tmp_path / "out"), strict=False):
        prompt = encode_prompt(record, data, tokenizer)
        (ids,) = generate(model, tokenizer, [prompt], GenerationConfig(max_new_tokens=6))
        assert row["output"] == tokenizer.decode(ids, skip_special_tokens=True)


def test_killed_at_any_line_and_run_again_gives_the_same_bytes(pair: Path, answered: Path, tmp_path: Path) -> None:
    code = """
import importlib, os, signal, sys
from pathlib import Path
g = importlib.import_module("mta_ds.evaluation.generate")
from mta_ds.data import DataConfig
kind, pair, output, config, data = sys.argv[1:]
calls = 0
def dying(original, last):
    def call(*arguments):
        global calls
        calls += 1
        if calls > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    return call
name, last = {"in a part": ("to_line", 11), "before its marker": ("write_atomic", 1)}[kind]
setattr(g, name, dying(getattr(g, name), last))
g.write_responses(
    Path(pair) / "student", (pair + "/train.jsonl",), Path(output),
    config=g.GenerateConfig.model_validate_json(config), data=DataConfig.model_validate_json(data),
)
"""
    for kind, complete in (("in a part", 1), ("before its marker", 1)):
        output = tmp_path / kind
        settings = (CONFIG.model_dump_json(), DATA.model_dump_json())
        done = subprocess.run([sys.executable, "-c", code, kind, str(pair), str(output), *settings])
        assert done.returncode == -signal.SIGKILL
        markers = list(output.glob("part-*.json"))
        assert len(markers) == complete and not (output / "manifest.json").exists()
        with pytest.raises(UserError, match="parts are missing; run 'mta-ds generate' again"):
            input_files(str(output))
        written = markers[0].stat().st_mtime_ns
        run(pair, output)
        assert contents(output) == contents(answered) and markers[0].stat().st_mtime_ns == written


def test_a_complete_folder_is_left_alone(
    pair: Path, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded for nothing")

    output = Path(shutil.copytree(answered, tmp_path / "out"))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    # the package has a function of the module's name
    monkeypatch.setattr(importlib.import_module("mta_ds.evaluation.generate"), "load_whole", refuse)
    assert run(pair, output).counts.written == 24
    assert run(pair, output, shard_index=1, batch_size=1).counts.written == 24  # a batch's size shapes no text
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_shard_by_shard_as_a_job_array(pair: Path, answered: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for index in (2, 0):
        assert run(pair, output, shard_index=index) is None
        assert not (output / "manifest.json").exists()
    assert run(pair, output, shard_index=1) is not None
    assert contents(output) == contents(answered)
    with pytest.raises(UsageError, match="--shard-index 3: want 0 to 2"):
        run(pair, output, shard_index=3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 6}, r"seed 5 \(this run has 6\)"),
        ({"temperature": 0.7, "top_k": 5}, r"temperature 1\.0 \(this run has 0\.7\), top_k 0"),
        ({"num_shards": 2}, r"3 shards \(this run has 2\)"),
        ({"model": "teacher"}, r"another model \(\S+/student, this is \S+/teacher\)"),
        ({"inputs": "heldout"}, "other inputs"),
        ({"data": DATA.model_copy(update={"template": "plain"})}, r"template minillm \(this run has plain\)"),
    ],
)
def test_a_folder_of_other_texts_is_refused_by_name(pair: Path, answered: Path, changes: dict, words: str) -> None:
    if "inputs" in changes:
        changes = {"inputs": (str(pair / "heldout.jsonl"),)}
    before = contents(answered)
    with pytest.raises(UserError, match=f"already holds texts of {words}.*choose another output"):
        run(pair, answered, **changes)
    assert contents(answered) == before


def test_a_damaged_part_is_named(pair: Path, answered: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(answered, tmp_path / "out"))
    part = output / "part-00001-of-00003.jsonl"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"part-00001-of-00003\.jsonl: part is damaged; remove it"):
        run(pair, output)
    part.unlink()
    run(pair, output)
    assert contents(output) == contents(answered)
    (output / "generation.json").write_text("{}")
    with pytest.raises(UserError, match=r"generation\.json: damaged"):
        run(pair, output)


def ending_at(pair: Path, folder: Path, ids: list[int]) -> Path:
    """A copy of the student that has more end tokens; returns its parent."""
    model = Path(shutil.copytree(pair / "student", folder / "student"))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ids}))
    return folder


def test_empty_responses_are_counted_and_left_out(pair: Path, tmp_path: Path) -> None:
    inputs = (str(pair / "train.jsonl"),)
    some = ending_at(pair, tmp_path / "some", [*range(0, 400, 3)])
    manifest = run(some, tmp_path / "out", inputs=inputs)
    counts = manifest.counts
    rejected = [row for path in (tmp_path / "out").glob("rejects-*") for row in rows(path)]
    assert 0 < counts.empty == len(rejected) and counts.empty + counts.written == counts.records == 24
    assert {row["reason"] for row in rejected} == {"an empty response"}
    assert {row["record_id"] for row in rejected}.isdisjoint(r.id for r in records(tmp_path / "out"))
    assert all(row["output"].strip() for row in rows(tmp_path / "out"))
    assert any(row["ended"] for row in rows(tmp_path / "out"))
    silent = ending_at(pair, tmp_path / "silent", [*range(400)])
    with pytest.raises(UserError, match=r"train\.jsonl: no response says anything: 24 of 24 are EOS at once"):
        run(silent, tmp_path / "nothing", inputs=inputs)


def test_long_prompts_are_cut_or_left_out(pair: Path, tmp_path: Path) -> None:
    short, long = {"id": "s", "prompt": "Say."}, {"id": "l", "prompt": "word " * 300}
    inputs = (write(tmp_path / "records.jsonl", short, long),)
    cut = run(pair, tmp_path / "cut", inputs=inputs)
    assert (cut.counts.written, cut.counts.cut_prompts) == (2, 1)
    assert next(row for row in rows(tmp_path / "cut") if row["id"] == "l")["prompt"] == long["prompt"]
    drop = DATA.model_copy(update={"long_prompts": "drop"})
    dropped = run(pair, tmp_path / "drop", data=drop, inputs=inputs)
    assert (dropped.counts.written, dropped.counts.long_prompt) == (1, 1)
    with pytest.raises(UserError, match=r"no prompt of at most max_prompt_length tokens \(2 are longer"):
        run(pair, tmp_path / "none", data=drop, inputs=inputs, max_prompt_length=1)


def test_mistakes(pair: Path, tmp_path: Path) -> None:
    text = write(tmp_path / "text.jsonl", {"text": "Only text."})
    with pytest.raises(UserError, match=r"text\.jsonl: no prompts: these are records of text alone"):
        run(pair, tmp_path / "out", inputs=(text,))
    with pytest.raises(UsageError, match=r"generation\.inputs: no prompts"):
        run(pair, tmp_path / "none", inputs=())
    with pytest.raises(UserError, match=r"bad\.jsonl:1: bad JSON.*mend or remove"):
        (tmp_path / "bad.jsonl").write_text("{oops\n")
        run(pair, tmp_path / "bad", inputs=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(UsageError, match="lies in the input folder"):
        run(pair, tmp_path / "in", inputs=(str(tmp_path),))
    with pytest.raises(UserError, match=r"generation\.max_length: 9999 tokens.*2048 positions"):
        run(pair, tmp_path / "long", max_length=9999)
    with pytest.raises(ValueError, match="must be smaller than max_length"):
        GenerateConfig(max_length=100, max_prompt_length=100)


def test_the_folder_is_parsed_and_trained_on_as_it_is(pair: Path, answered: Path, tmp_path: Path) -> None:
    assert [path.name for path in input_files(str(answered))] == [f"part-0000{i}-of-00003.jsonl" for i in range(3)]
    assert len(input_files(str(answered.parent))) == 3 and len(input_files(f"{answered}/*.jsonl")) == 3
    parse(ParseConfig(inputs=(str(answered),), output=tmp_path / "spans", workers=1))
    tokenizer = load_tokenizer(pair / "student")
    store = SpanStore.open(tmp_path / "spans")
    dataset = build_dataset([str(answered)], DATA, tokenizer, store, tmp_path / "cache")
    assert len(dataset) == 24 and dataset.summary.with_spans == 24
    made = {row["id"]: row for row in rows(answered)}
    for example in (dataset[i] for i in range(24)):
        row = made[example.record_id]
        labels = example.input_ids[example.labels != -100].tolist()
        # a response that the limit cut off does not teach the student to stop there
        assert tokenizer.decode(labels) == row["output"] + ("<|end|>" if row["ended"] else "")


def test_pairs_join_two_models_answers_by_id(
    pair: Path, answered: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = write(tmp_path / "some.jsonl", *rows(pair / "train.jsonl")[:20], *rows(pair / "heldout.jsonl")[:2])
    run(pair, tmp_path / "teacher", "teacher", inputs=(some,))
    output = tmp_path / "pairs.jsonl"
    with caplog.at_level("WARNING"):
        counts = write_pairs([str(tmp_path / "teacher")], [str(answered)], output)
    teacher, student = ({row["id"]: row for row in rows(path)} for path in (tmp_path / "teacher", answered))
    assert counts.pairs == len(teacher.keys() & student.keys()) == 20
    assert set(counts.without_chosen) == student.keys() - teacher.keys() and len(counts.without_chosen) == 4
    assert set(counts.without_rejected) == teacher.keys() - student.keys() and len(counts.without_rejected) == 2
    assert f"4 records left out without a chosen response in {tmp_path / 'teacher'}: " in caplog.text
    assert counts.without_rejected[0] in caplog.text
    assert json.loads((tmp_path / "pairs.json").read_text())["without_rejected"] == list(counts.without_rejected)
    for row in rows(output):
        chosen, rejected = teacher[row["id"]], student[row["id"]]
        assert (row["chosen"], row["rejected"]) == (chosen["output"], rejected["output"])
        assert row["ended"] == {"chosen": chosen["ended"], "rejected": rejected["ended"]}
        assert (row["instruction"], row["input"]) == (chosen["instruction"], chosen["input"]) and "output" not in row
    tokenizer = load_tokenizer(pair / "student")
    dataset = build_dataset([str(output)], DATA, tokenizer, None, tmp_path / "cache", pairs=True)
    assert (dataset.summary.records, len(dataset)) == (20, 40)
    first = rows(output)[0]
    for half, example in zip(("chosen", "rejected"), (dataset[0], dataset[1]), strict=True):
        expected = first[half] + ("<|end|>" if first["ended"][half] else "")
        assert tokenizer.decode(example.input_ids[example.labels != -100]) == expected
