"""One record of a span store in a terminal and on a page, whatever its text holds."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support import run_command

from mta_ds.data import Record, SpanStore, UnitConfig, Units
from mta_ds.errors import UsageError, UserError
from mta_ds.evaluation import tree
from mta_ds.evaluation.inspect import InspectedField, Inspection, describe, inspect, write_page
from mta_ds.evaluation.tree import ParsedExample
from mta_ds.evaluation.weights import RecordWeights, Token, record_weights
from mta_ds.spans.parse import ParseConfig, parse

RECORD = "demo-train-000"
HOSTILE = "</p></svg><script>alert(1)</script>\x00\x1b[31m\u202e\u2067{{ 7*7 }} & \"quoted\" 'too' 😀"


class Page(HTMLParser):
    """Tags, attributes and words of a page in which every tag closes what it should and nothing is loaded."""

    VOID = frozenset({"meta", "br", "rect", "use", "path", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        assert not {name for name, _ in attributes} & {"src", "href", "onload", "onclick", "onerror", "srcset"}
        assert not any("url(" in (value or "") for name, value in attributes if name == "style")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def records_of(pair: Path) -> list[str]:
    return [str(pair / "train.jsonl"), str(pair / "heldout.jsonl")]


def hostile() -> Inspection:
    units = Units(
        text_hash=b"0" * 16,
        num_chars=len(HOSTILE),
        sentences=np.array([0, 1], dtype=np.int32),
        words=np.array([[0, len(HOSTILE)]], dtype=np.int32),
        tags=[HOSTILE],
        constituents=np.array([[0, 1, 1]], dtype=np.int32),
        labels=[HOSTILE],
    )
    whole = np.array([[0, len(HOSTILE)]])
    record = Record(HOSTILE, "text", {HOSTILE: HOSTILE}, (), (), "file.jsonl:1")
    fields = (InspectedField(HOSTILE, ParsedExample(HOSTILE, units, whole, whole)),)
    return Inspection(record, Path("store"), UnitConfig(labels=(HOSTILE,)), fields)


def test_the_terminal_shows_every_field_its_trees_and_what_is_chosen(pair):
    inspection = inspect(pair / "spans", RECORD, records_of(pair))
    text = describe(inspection)
    assert [name for name, _ in inspection.fields] == ["instruction", "output"]
    for words in (
        f"{RECORD} · instruction · 1 sentence\n",
        f"{RECORD} · output · 3 sentences\n",
        "1  Sunlight contains all the colours of the rainbow.",
        "   │     └─ PP\n   │        ├─ of\n   │        └─ NP *  the rainbow\n",
        "   phrases: Sunlight | contains all the colours of the rainbow | all the colours | the rainbow\n",
        "   words:   Sunlight | contains | all | the | colours | of | the | rainbow\n",
    ):
        assert words in text, text


def test_one_field_and_other_units(pair):
    units = UnitConfig(choose="maximal", labels=("PP",))
    text = describe(inspect(pair / "spans", RECORD, records_of(pair), "output", units))
    assert "instruction" not in text
    assert "PP *" in text and "NP *" not in text
    assert "phrases: of the rainbow\n" in text


def test_every_word_of_every_record_stands_in_its_tree(pair):
    for line in (pair / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        record_id = json.loads(line)["id"]
        inspection = inspect(pair / "spans", record_id, records_of(pair))
        shown = describe(inspection)
        for _, example in inspection.fields:
            for start, end in example.units.words.tolist():
                assert "".join(example.text[start:end].split()) in shown


def test_the_page_keeps_the_text_and_can_be_filtered(pair, tmp_path):
    inspection = inspect(pair / "spans", RECORD, records_of(pair))
    page = read(write_page(tmp_path / "new" / "page.html", inspection))
    for _, example in inspection.fields:
        assert example.text in page.words
    fields = [attributes for _, attributes in page.attributes if attributes.get("class") == "field"]
    assert len(fields) == 2
    for attributes, (_, example) in zip(fields, inspection.fields, strict=True):
        constituents = json.loads(attributes["data-constituents"])
        assert [c["height"] for c in constituents] == example.units.constituents[:, 2].tolist()
        assert ["::".join(c["labels"]) for c in constituents] == example.units.labels
        assert sum(c["chosen"] for c in constituents) == len(example.phrases)
    assert page.tags.count("svg") == 4 and page.tags.count("script") == 1
    boxes = {a.get("value") for tag, a in page.attributes if tag == "input" and a.get("type") == "checkbox"}
    assert {"NP", "VP", "S", "PP"} <= boxes
    nodes = [attributes for _, attributes in page.attributes if "data-labels" in attributes]
    assert len(nodes) == sum(len(example.units.labels) for _, example in inspection.fields)


def test_pieces_of_the_text_refer_to_the_constituents_over_them(pair, tmp_path):
    inspection = inspect(pair / "spans", RECORD, records_of(pair), "output")
    html = write_page(tmp_path / "page.html", inspection).read_text(encoding="utf-8")
    (_, example), labels = inspection.fields[0], inspection.fields[0].example.units.labels
    piece = re.search(r'<span class="([^"]*)" data-c="([^"]*)">rainbow</span>', html)
    assert piece is not None
    over = [labels[int(i)] for i in piece[2].split()]
    assert over == ["S", "VP", "NP", "PP", "NP"]
    assert piece[1].split() == ["phrase", "depth-2", "closes", "word"]
    assert example.text.startswith("Sunlight")


def test_a_long_record_is_shown_sentence_by_sentence(tmp_path, monkeypatch):
    """Each sentence with its own units alone, found without a look at all the others'."""
    text = "".join(f"Number {i} is here.\n" for i in range(5_000))  # 100 kB
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "r", "text": text}))
    parse(ParseConfig(inputs=(str(tmp_path / "a.jsonl"),), output=tmp_path / "s", parser="none"))
    calls, ranges = [], tree._ranges
    monkeypatch.setattr(tree, "_ranges", lambda *arguments: calls.append(1) or ranges(*arguments))
    inspection = inspect(tmp_path / "s", "r", [], units=UnitConfig(words="all"))
    shown = describe(inspection).splitlines()
    assert shown[0] == "r · text · 5000 sentences"
    assert shown.count("   phrases: (none)") == 5_000
    chosen = [line for line in shown if line.startswith("   words:")]
    assert len(chosen) == 5_000 and chosen[4_321] == "   words:   Number | 4321 | is | here | ."
    page = read(write_page(tmp_path / "page.html", inspection))
    assert page.tags.count("svg") == 5_000 and text.strip() in page.words
    assert len(calls) == 6  # words and phrases: for the terminal, the marked text, the trees


def test_the_page_runs_its_own_script_only(pair, tmp_path):
    html = write_page(tmp_path / "page.html", hostile()).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and policy[1].startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}'", policy[1])
    assert "http://" not in html and "https://" not in html


def test_hostile_text_becomes_neither_markup_nor_terminal_commands(tmp_path):
    inspection = hostile()
    weights = RecordWeights(HOSTILE, 1, [Token(HOSTILE, HOSTILE, 0, len(HOSTILE), 1.0)])
    page = read(write_page(tmp_path / "page.html", inspection, weights))
    assert page.tags.count("script") == 1
    assert "<script>alert(1)</script>" in page.words and "{{ 7*7 }}" in page.words
    assert "\x00" not in page.words and "\x1b" not in page.words
    shown = describe(inspection, weights)
    assert "<script>alert(1)</script>" in shown
    assert not set(shown) & {"\x00", "\x1b", "\u202e", "\u2067"}


def test_an_unknown_record_names_the_nearest(pair):
    with pytest.raises(UserError, match=r"record demo-trian-000: not in .*did you mean 'demo-train-000'\?"):
        inspect(pair / "spans", "demo-trian-000", records_of(pair))
    with pytest.raises(UserError, match=r"record #: not in [^;]*$"):
        inspect(pair / "spans", "#", records_of(pair))


def test_a_record_of_another_file_is_told_apart_from_an_unknown_one(pair):
    with pytest.raises(UserError, match=r"the store has it, but not .*heldout\.jsonl"):
        inspect(pair / "spans", RECORD, [str(pair / "heldout.jsonl")])


def test_a_record_that_was_never_parsed(pair, tmp_path):
    file = tmp_path / "more.jsonl"
    file.write_text('{"id": "demo-train-0000", "text": "New."}\n')
    with pytest.raises(UserError, match=r"more.jsonl:1: record demo-train-0000 .* not in .*did you mean 'demo-train-"):
        inspect(pair / "spans", "demo-train-0000", [str(file)])


def test_changed_text_is_refused(pair, tmp_path):
    file = tmp_path / "train.jsonl"
    row = json.loads((pair / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    file.write_text(json.dumps(row | {"output": row["output"] + " More."}) + "\n")
    with pytest.raises(UserError, match=f"record {RECORD}: its field 'output' is not the text"):
        inspect(pair / "spans", RECORD, [str(file)])
    assert describe(inspect(pair / "spans", RECORD, [str(file)], "instruction"))


def test_without_records_the_text_is_where_it_was_parsed(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "heldout"):
        shutil.copy(pair / f"{name}.jsonl", tmp_path)
    parse(ParseConfig(inputs=("heldout.jsonl", "train.jsonl"), output=Path("spans"), parser="none"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert describe(inspect(tmp_path / "spans", RECORD, [])).startswith(RECORD)
    (tmp_path / "heldout.jsonl").unlink()
    assert describe(inspect(tmp_path / "spans", RECORD, [])).startswith(RECORD)
    with pytest.raises(UserError, match=r"the store has it, but not .*train\.jsonl; name its file with --records"):
        inspect(tmp_path / "spans", "demo-heldout-000", [])
    (tmp_path / "train.jsonl").unlink()
    gone = r"heldout\.jsonl: .*spans was parsed from it, but it is gone; name the text with --records"
    with pytest.raises(UserError, match=gone):
        inspect(tmp_path / "spans", RECORD, [])
    shutil.rmtree(tmp_path / "spans" / "log")
    with pytest.raises(UserError, match="a span store holds no text; give the record files with --records"):
        inspect(tmp_path / "spans", RECORD, [])


def test_other_mistakes(pair, tmp_path):
    with pytest.raises(UserError, match="no field 'ouput'; it has instruction, output"):
        inspect(pair / "spans", RECORD, records_of(pair), "ouput")
    with pytest.raises(UserError, match="no such span store"):
        inspect(tmp_path / "none", RECORD, records_of(pair))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_page(tmp_path / "file" / "page.html", hostile())


def test_token_weights_are_those_of_the_layer(pair, tmp_path):
    inspection = inspect(pair / "spans", RECORD, records_of(pair))
    last = record_weights(inspection.record, str(pair / "student"))
    assert last.layer == 3 and sum(token.weight for token in last.tokens) == pytest.approx(1, abs=1e-4)
    for token in last.tokens:
        if token.field:
            assert inspection.record.fields[token.field][token.start : token.end] == token.text
    for name, example in inspection.fields:
        covered = {i for token in last.tokens if token.field == name for i in range(token.start, token.end)}
        assert covered == set(range(len(example.text)))
    first = record_weights(inspection.record, str(pair / "student"), 1)
    assert [t.weight for t in first.tokens] != [t.weight for t in last.tokens]
    plain = record_weights(inspection.record, str(pair / "student"), template="plain")
    assert len(plain.tokens) < len(last.tokens)
    with pytest.raises(UsageError, match=r"--layer 4: .* has layers 1 to 3"):
        record_weights(inspection.record, str(pair / "student"), 4)
    assert "token weights, layer 3 of student" in describe(inspection, last)
    page = read(write_page(tmp_path / "page.html", inspection, last))
    shaded = [a for _, a in page.attributes if a.get("class") == "token"]
    assert len(shaded) == sum(1 for token in last.tokens if token.field)


def test_weights_under_a_chat_template(pair, tmp_path):
    from mta_ds.data import DataConfig, encode
    from mta_ds.models import load_tokenizer

    chatty = Path(shutil.copytree(pair / "student", tmp_path / "chatty"))
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    record = inspect(pair / "spans", RECORD, records_of(pair)).record
    weights = record_weights(record, str(chatty), template="chat")
    whole = "".join(token.text for token in weights.tokens)
    instruction, output = record.fields.values()
    assert whole == f"<user>{instruction}<|end|>\n<assistant>{output}<|end|>"
    config = DataConfig(template="chat", max_length=4096, max_prompt_length=4096)
    ids = encode(record, config, load_tokenizer(chatty), None).input_ids
    assert weights.num_tokens == len(ids) and sum(t.weight for t in weights.tokens) == pytest.approx(1, abs=1e-4)
    for name in record.fields:
        covered = {i for token in weights.tokens if token.field == name for i in range(token.start, token.end)}
        assert covered == set(range(len(record.fields[name])))
    page = tmp_path / "page.html"
    shown = run_command("inspect", pair / "spans", RECORD, "--model", chatty, "--template", "chat", "--html", page)
    assert f"token weights, layer 3 of chatty, {len(ids)} tokens" in shown.stdout
    shaded = [a for _, a in read(page).attributes if a.get("class") == "token"]
    assert len(shaded) == sum(1 for token in weights.tokens if token.field)


def test_weights_agree_with_the_definition(pair):
    import torch
    from transformers import AutoModelForCausalLM

    from mta_ds.data import DataConfig, encode
    from mta_ds.models import load_tokenizer
    from mta_ds.ops import reference

    record = inspect(pair / "spans", RECORD, records_of(pair)).record
    found = record_weights(record, str(pair / "teacher"), 2)
    config = DataConfig(max_length=4096, max_prompt_length=4096)
    ids = torch.tensor(encode(record, config, load_tokenizer(pair / "teacher"), None).input_ids)[None].long()
    model = AutoModelForCausalLM.from_pretrained(pair / "teacher", dtype=torch.float32)
    hidden = model(ids, output_hidden_states=True).hidden_states[2][0]
    expected = reference.token_weights(hidden, torch.tensor([0, ids.shape[1]]))
    torch.testing.assert_close(torch.tensor([t.weight for t in found.tokens]), expected, rtol=1e-4, atol=1e-7)


def test_a_record_that_training_drops_has_no_weights(pair):
    record = Record("r", "prompt", {"prompt": "Only a question?"}, (), (), "file.jsonl:1")
    with pytest.raises(UserError, match="without a response"):
        record_weights(record, str(pair / "student"))


def test_tokens_of_one_character_are_shaded_together(tmp_path):
    inspection = hostile()
    at = HOSTILE.index("😀")
    name = inspection.fields[0].name
    tokens = [Token("😀", name, at, at + 1, 0.25)] * 4
    page = read(write_page(tmp_path / "page.html", inspection, RecordWeights("m", 1, tokens)))
    (shaded,) = [a for _, a in page.attributes if a.get("class") == "token"]
    assert shaded["title"].startswith("1.00000")


def test_the_command_end_to_end(pair, tmp_path):
    store = Path(shutil.copytree(pair / "spans", tmp_path / "spans"))
    arguments = ["inspect", store, RECORD, "--records", pair / "train.jsonl"]
    page, report = tmp_path / "page.html", tmp_path / "report.html"
    done = run_command(*arguments, "--html", page, "--report", report, "--labels", "NP", "--model", pair / "student")
    assert "NP *  the rainbow" in done.stdout and "VP *" not in done.stdout
    assert "token weights, layer 3 of student" in done.stdout
    assert "rainbow" in read(page).words and "29 records" in read(report).words
    assert len(SpanStore.open(store)) == 65


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([RECORD, "--model", "STUDENT", "--template", "chat"], 1, "no chat template"),
        ([], 2, "give a RECORD"),
        (["--report", "page.html", "--html", "page.html"], 2, "give a RECORD"),
        ([RECORD, "--choose", "outermost"], 2, "choose"),
        ([RECORD, "--template", "chta"], 2, "template"),
        (["demo-train-00", "--records", "TRAIN"], 1, "did you mean 'demo-train-0"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(pair, monkeypatch, capfd, arguments, code, words):
    import sys

    from mta_ds.cli import main

    paths = {"TRAIN": str(pair / "train.jsonl"), "STUDENT": str(pair / "student")}
    arguments = [paths.get(a, a) for a in arguments]
    monkeypatch.setattr(sys, "argv", ["mta-ds", "inspect", str(pair / "spans"), *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capfd.readouterr().err
    assert ended.value.code == code and words in error, error
    assert error.count("mta-ds: error:") == 1 and "Traceback" not in error
