from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from mta_ds.data import Units
from mta_ds.evaluation import tree as module
from mta_ds.evaluation.tree import ParsedExample, marked_text, trees

TEXT = "The old dog sleeps. A <b>cat</b> & I watch!"
WORDS = ["The", "old", "dog", "sleeps", ".", "A", "<b>cat</b>", "&", "I", "watch", "!"]
CONSTITUENTS = [
    (0, 5, 2, "S"), (0, 3, 1, "NP"), (3, 4, 1, "VP"),
    (5, 11, 3, "S"), (5, 9, 2, "NP"), (5, 7, 1, "NP"), (8, 9, 1, "NP"), (9, 10, 1, "S::VP"),
]  # fmt: skip


def units_of(text: str, words: list[str], sentences: list[int], constituents: list[tuple[int, int, int, str]]) -> Units:
    ranges, position = [], 0
    for word in words:
        start = text.index(word, position)
        position = start + len(word)
        ranges.append((start, position))
    return Units(
        text_hash=b"0" * 16,
        num_chars=len(text),
        sentences=np.array(sentences, dtype=np.int32),
        words=np.array(ranges, dtype=np.int32).reshape(-1, 2),
        tags=["T"] * len(words),
        constituents=np.array([c[:3] for c in constituents], dtype=np.int32).reshape(-1, 3),
        labels=[c[3] for c in constituents],
    )


@pytest.fixture
def example() -> ParsedExample:
    units = units_of(TEXT, WORDS, [0, 5, 11], CONSTITUENTS)
    words = np.array([(0, 4), (4, 8), (8, 12)])  # with the space after each, as the released code has them
    phrases = np.array([(0, 11), (20, 36), (22, 32)])  # "The old dog"; two that nest
    return ParsedExample(TEXT, units, words, phrases)


def without_tags(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_marked_text_keeps_every_character_and_escapes_it(example):
    html = str(marked_text(example))
    assert without_tags(html) == TEXT
    assert "<b>" not in html


def test_marked_text_marks_phrases_and_words(example):
    html = str(marked_text(example))
    assert '<span class="phrase depth-1 opens word">The</span>' in html
    assert '<span class="phrase depth-1 closes word">dog</span> sleeps' in html
    assert '<span class="phrase depth-2 opens closes">&lt;b&gt;cat&lt;/b&gt;</span>' in html


def test_marked_text_without_units(example):
    empty = np.zeros((0, 2), dtype=np.int64)
    assert str(marked_text(example._replace(words=empty, phrases=empty))) == (
        "The old dog sleeps. A &lt;b&gt;cat&lt;/b&gt; &amp; I watch!"
    )
    assert str(marked_text(ParsedExample("", units_of("", [], [0], []), empty, empty))) == ""


def test_pieces_of_marked_text_tell_the_constituents_over_them(example):
    words = example.units.words.tolist()
    ranges = [(words[start][0], words[end - 1][1]) for start, end, *_ in CONSTITUENTS]
    html = str(marked_text(example, ranges))
    assert without_tags(html) == TEXT
    place, over = 0, []
    for numbers, text in re.findall(r'<span class="[^"]*" data-c="([^"]*)">([^<]*)</span>', html):
        length = len(without_tags(text))
        over += [list(map(int, numbers.split()))] * length
        place += length
    expected = [[i for i, (start, end) in enumerate(ranges) if start <= at < end] for at in range(len(TEXT))]
    assert place == len(TEXT) and over == expected
    assert '<span class="phrase depth-1 closes word" data-c="0 1">dog</span>' in html


def test_a_text_is_gone_through_once_however_many_sentences_it_has(monkeypatch):
    words = [f"w{i}" for i in range(600)]
    text, bounds = " ".join(words), list(range(0, 601, 3))
    constituents = [(start, start + 3, 1, "NP") for start in bounds[:-1]]
    units = units_of(text, words, bounds, constituents)
    chosen = np.stack([units.words[0:600:3, 0], units.words[2:600:3, 1]], axis=1)
    calls, ranges = [], module._ranges
    monkeypatch.setattr(module, "_ranges", lambda *arguments: calls.append(1) or ranges(*arguments))
    drawn = trees(ParsedExample(text, units, units.words, chosen))
    assert len(drawn) == 200 and len(calls) == 2  # of words and of phrases
    for number in (0, 117, 199):
        own = words[3 * number : 3 * number + 3]
        root = parsed(drawn[number])
        assert [word for word, _, _ in groups(root, "leaf")] == own
        assert groups(root, "label") == [("NP", " ".join(own), True)]


def parsed(svg) -> ElementTree.Element:
    return ElementTree.fromstring(str(svg))  # well-formed, so nothing of the text broke out


def groups(root: ElementTree.Element, kind: str) -> list[tuple[str, str, bool]]:
    """(drawn label, its text, chosen) of every word ("leaf") or constituent ("label")."""
    found = []
    for group in root.iter("g"):
        classes = group.get("class", "").split()
        if kind in classes:
            found.append((group.find("text").text, group.find("title").text, "chosen" in classes))
    return found


def test_one_tree_a_sentence_words_in_order(example):
    first, second = map(parsed, trees(example, max_sentences=3))
    assert [word for word, _, _ in groups(first, "leaf")] == WORDS[:5]
    assert [word for word, _, _ in groups(second, "leaf")] == WORDS[5:]
    assert len(trees(example, max_sentences=1)) == 1


def test_constituents_carry_their_words_and_whether_they_are_chosen(example):
    first, second = map(parsed, trees(example, max_sentences=3))
    assert set(groups(first, "label")) == {
        ("S", "The old dog sleeps.", False),
        ("NP", "The old dog", True),
        ("VP", "sleeps", False),
    }
    assert ("S·VP", "watch", False) in groups(second, "label")
    assert [chosen for _, _, chosen in groups(first, "leaf")] == [True, True, True, False, False]


def test_parents_stand_above_and_between_their_children(example):
    (tree, _) = map(parsed, trees(example, max_sentences=2))
    place = {
        group.find("title").text: (float(group.find("text").get("x")), float(group.find("text").get("y")))
        for group in tree.iter("g")
    }
    assert place["The"][0] < place["The old dog"][0] < place["dog"][0]
    assert place["The"][0] < place["old"][0] < place["dog"][0]
    assert place["The old dog sleeps."][1] < place["The old dog"][1] < place["The"][1]


def test_a_sentence_of_bare_words_is_drawn_too():
    example = ParsedExample("a b", units_of("a b", ["a", "b"], [0, 2], []), np.zeros((0, 2)), np.zeros((0, 2)))
    assert [w for w, _, _ in groups(parsed(trees(example, 1)[0]), "leaf")] == ["a", "b"]


def test_a_very_long_word_is_shortened_but_kept_in_its_tooltip():
    word = "https://example.org/" + "x" * 200
    units = units_of(word, [word], [0, 1], [(0, 1, 1, "NP")])
    (tree,) = trees(ParsedExample(word, units, np.zeros((0, 2)), np.array([[0, len(word)]])), 1)
    ((shown, title, _),) = groups(parsed(tree), "leaf")
    assert len(shown) < 30 and shown.endswith("…") and title == word
