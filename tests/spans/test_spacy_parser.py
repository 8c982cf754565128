"""spaCy models as parsers: a tiny one, trained here in seconds, since none can be downloaded."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import spacy
from hypothesis import given
from hypothesis import strategies as st
from spacy.language import Language
from spacy.tokens import Doc
from spacy.training import Example

from mta_ds.errors import UserError
from mta_ds.spans import spacy_parser
from mta_ds.spans.parser import Constituent, Parse, Sentence, load_parser
from mta_ds.spans.spacy_parser import SpacyParser, nest

TAGS = {"the": "DT", "a": "DT", "old": "JJ", "dog": "NN", "cat": "NN", "house": "NN", "sees": "VBZ", "will": "MD"}
TAGS |= {"have": "VB", "seen": "VBN", "quickly": "RB", "not": "RB", "keep": "VB", "running": "VBG", ".": "."}
POS = {"DT": "DET", "JJ": "ADJ", "NN": "NOUN", "VBZ": "VERB", "VB": "VERB", "VBN": "VERB", "VBG": "VERB"}
POS |= {"RB": "ADV", "MD": "AUX", ".": "PUNCT"}
# words, heads, dependencies
TREES = [
    ("the dog sees a cat .", [1, 2, 2, 4, 2, 2], ["det", "nsubj", "ROOT", "det", "dobj", "punct"]),
    ("a cat sees the old house .", [1, 2, 2, 5, 5, 2, 2], ["det", "nsubj", "ROOT", "det", "amod", "dobj", "punct"]),
    ("the old dog sees a house .", [2, 2, 3, 3, 5, 3, 3], ["det", "amod", "nsubj", "ROOT", "det", "dobj", "punct"]),
]


def sentence(text: str) -> Sentence:
    words = tuple(text.split())
    return Sentence(words, (True,) * len(words))


def add_rules(nlp: Language) -> None:
    rules = nlp.add_pipe("attribute_ruler")
    for word, tag in TAGS.items():
        rules.add(patterns=[[{"LOWER": word}]], attrs={"TAG": tag, "POS": POS[tag]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a rule-based tagger and a dependency parser that knows three sentences."""
    nlp = spacy.blank("en")
    parser = nlp.add_pipe("parser", config={"model": {"@architectures": "spacy.TransitionBasedParser.v2",
        "state_type": "parser", "extra_state_tokens": False, "hidden_width": 16, "maxout_pieces": 1, "use_upper": True,
        "tok2vec": {"@architectures": "spacy.HashEmbedCNN.v2", "width": 16, "depth": 1, "embed_size": 50,
        "window_size": 1, "maxout_pieces": 1, "subword_features": False, "pretrained_vectors": None}}})  # fmt: skip
    examples = []
    for text, heads, deps in TREES:
        for label in deps:
            parser.add_label(label)
        words = text.split()
        gold = Doc(nlp.vocab, words=words, heads=heads, deps=deps)
        examples.append(Example(Doc(nlp.vocab, words=words), gold))
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(60):
        random.Random(0).shuffle(examples)
        nlp.update(examples, sgd=optimizer)
    add_rules(nlp)
    nlp.meta["name"], nlp.meta["version"] = "tiny", "1.2.3"
    path = tmp_path_factory.mktemp("models") / "en_tiny"
    nlp.to_disk(path)
    return path


@pytest.fixture(scope="module")
def parser(model: Path) -> SpacyParser:
    loaded = load_parser(f"spacy:{model}")
    assert isinstance(loaded, SpacyParser)
    return loaded


def groups(found: Parse, label: str) -> list[tuple[int, int]]:
    return [(c.start_word, c.end_word) for c in found.constituents if c.label == label]


def test_noun_chunks_and_tags(parser: SpacyParser) -> None:
    (found,) = parser.parse([sentence("a cat sees the old house .")])
    assert found.tags == ("DT", "NN", "VBZ", "DT", "JJ", "NN", ".")
    assert found.constituents == (
        Constituent(0, 2, "NP", 1),
        Constituent(2, 3, "VP", 1),
        Constituent(3, 6, "NP", 1),
    )


def test_verb_groups_are_every_match(parser: SpacyParser) -> None:
    (found,) = parser.parse([sentence("will not keep running quickly")])
    ranges = groups(found, "VP")
    # from will, not, keep or running; up to keep, running or quickly; never without a verb
    assert ranges == [(0, 5), (0, 4), (0, 3), (1, 5), (1, 4), (1, 3), (2, 5), (2, 4), (2, 3), (3, 5), (3, 4)]
    heights = {(c.start_word, c.end_word): c.height for c in found.constituents}
    assert heights[2, 3] == heights[3, 4] == 1
    assert heights[0, 5] == 1 + max(heights[0, 4], heights[1, 5]) == 5


@given(st.lists(st.sampled_from(sorted(TAGS)), min_size=1, max_size=8))
def test_verb_groups_by_brute_force(words: list[str]) -> None:
    codes = {"AUX": "A", "ADV": "D", "VERB": "V"}
    code = "".join(codes.get(POS[TAGS[word]], "-") for word in words)
    ends = range(len(code) + 1)
    expected = {(a, b) for b in ends for a in range(b) if re.fullmatch("A*D*V+D*", code[a:b])}
    (found,) = rules_only().parse([Sentence(tuple(words), (False,) * len(words))])
    assert set(groups(found, "VP")) == expected


@functools.cache
def rules_only() -> SpacyParser:
    """Tags and no dependencies."""
    nlp = spacy.blank("en")
    add_rules(nlp)
    return SpacyParser(spacy_parser.LoadedModel(nlp, "rules", "0"))


def test_without_dependencies_or_tags() -> None:
    (found,) = rules_only().parse([sentence("the dog sees a cat .")])
    assert {c.label for c in found.constituents} == {"VP"}
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    assert SpacyParser(spacy_parser.LoadedModel(nlp, "x", "0")).parse([sentence("a b")]) == [Parse(("", ""), ())]


def test_words_stay_ours_whatever_they_are(parser: SpacyParser) -> None:
    odd = [
        Sentence(("don't", "sees.the", "\u200b", "\0", "👩‍👩‍👧", "שלום"), (False,) * 6),
        Sentence(("x" * 10_000,), (True,)),
        sentence("the " * 255 + "dog"),
    ]
    assert all(map(parser.fits, odd))
    assert [len(found.tags) for found in parser.parse(odd)] == [6, 1, 256]


def test_what_does_not_fit(parser: SpacyParser) -> None:
    bad = [Sentence((), ()), Sentence(("a", ""), (True, True)), Sentence(("\ud800",), (True,)), sentence("go " * 257)]
    assert not any(map(parser.fits, bad))
    with pytest.raises(ValueError, match="number 1 does not"):
        parser.parse([sentence("a dog"), bad[0]])


def test_order_and_company_do_not_matter(parser: SpacyParser) -> None:
    sentences = [sentence(text) for text, *_ in TREES] * 100
    alone = [parser.parse([one])[0] for one in sentences[:3]]
    assert parser.parse(sentences) == alone * 100
    assert parser.parse([]) == []


def test_identity(parser: SpacyParser, model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copied"))
    same = load_parser(f"spacy:{copy}")
    assert (parser.name, same.name, same.fingerprint) == ("spacy:en_tiny", "spacy:copied", parser.fingerprint)
    assert same.versions == {"spacy": spacy.__version__, "en_tiny": "1.2.3"}
    meta = json.loads((copy / "meta.json").read_text(encoding="utf-8"))
    (copy / "meta.json").write_text(json.dumps({**meta, "version": "1.2.4"}), encoding="utf-8")
    newer = load_parser(f"spacy:{copy}")
    assert newer.fingerprint != parser.fingerprint and newer.versions["en_tiny"] == "1.2.4"
    shutil.copy(model / "meta.json", copy / "meta.json")
    nlp = spacy.load(model)
    weights = nlp.get_pipe("parser").model.get_ref("lower")
    weights.set_param("b", weights.get_param("b") + 1)
    nlp.to_disk(copy)
    assert load_parser(f"spacy:{copy}").fingerprint != parser.fingerprint


def test_installed_package(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = spacy.load(model)
    monkeypatch.setattr("spacy.util.get_installed_models", lambda: ["en_tiny"])
    monkeypatch.setattr("spacy.load", lambda name, exclude: {"en_tiny": whole}[name])
    monkeypatch.chdir(model.parent.parent)  # no folder of that name
    loaded = load_parser("spacy:en_tiny")
    assert loaded.name == "spacy:en_tiny" and len(loaded.fingerprint) == 64
    whole.meta["version"] = "2.0.0"
    assert load_parser("spacy:en_tiny").fingerprint != loaded.fingerprint


def refused(spec: str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_parser(spec)
    message = str(caught.value)
    assert spec in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_bad_models(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("spacy:", "no installed spaCy model", "spacy download")
    refused("spacy:numpy", "no installed spaCy model")
    refused(f"spacy:{tmp_path / 'gone'}", "no folder")
    refused(f"spacy:{tmp_path}", "no config.cfg", "to_disk")
    refused(f"spacy:{model.parent}", f"did you mean {model}?")
    monkeypatch.setattr("spacy.util.get_installed_models", lambda: ["en_core_web_sm"])
    refused("spacy:en_core_web_md", "did you mean en_core_web_sm?")
    spacy.blank("en").to_disk(tmp_path / "blank")
    refused(f"spacy:{tmp_path / 'blank'}", "pipeline is empty")


@pytest.mark.parametrize("file", ["config.cfg", "meta.json", "parser/model", "parser/moves", "vocab/strings.json"])
def test_damaged_models(model: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copied"))
    (copy / file).write_bytes(b"[\0\xff")
    refused(f"spacy:{copy}", "cannot be loaded by spaCy")


def test_a_component_of_unknown_code(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copied"))
    config = (copy / "config.cfg").read_text(encoding="utf-8")
    (copy / "config.cfg").write_text(config.replace('"attribute_ruler"', '"own_component"'), encoding="utf-8")
    (copy / "own_component.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    refused(f"spacy:{copy}", "own_component")
    assert not (tmp_path / "ran").exists()


def test_component_that_merges_words(model: Path) -> None:
    nlp = spacy.load(model)
    nlp.add_pipe("merge_noun_chunks")
    parser = SpacyParser(spacy_parser.LoadedModel(nlp, "spacy:merging", "0"))
    with pytest.raises(UserError, match="spacy:merging: a component of it merges or splits words"):
        parser.parse([sentence("the dog sees a cat .")])


@given(
    st.sets(
        st.tuples(st.integers(0, 6), st.integers(1, 7), st.sampled_from(["NP", "VP"])).filter(lambda s: s[0] < s[1])
    )
)
def test_heights_by_brute_force(spans: set[tuple[int, int, str]]) -> None:
    found = nest(spans, 7)
    assert [c[:2] for c in found] == sorted({s[:2] for s in spans}, key=lambda r: (r[0], -r[1]))
    for one in found:
        assert set(one.label.split("::")) == {label for a, b, label in spans if (a, b) == one[:2]}
        inside = [c.height for c in found if one[0] <= c[0] and c[1] <= one[1] and c is not one]
        assert one.height == 1 + max(inside, default=0)
