from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mta_ds.spans import segment as module
from mta_ds.spans.parser import Sentence
from mta_ds.spans.segment import Segment, segment, split_to_fit

HOSTILE = [
    "",
    " \t\n\u00a0\u3000 ",
    "nul \0 in\0side \0\0",
    "emoji 👩‍👩‍👧‍👦 and 🇩🇪, e\u0301tude. Z̷̢a̴l̶g̸o̵! Next?",
    "zero\u200bwidth \u200b\u200b joined\u2060words \ufeff",
    "עברית וגם العربية. \u202eoverride\u202c done.",
    "a\r\nb\rc\n\n\nd\u2028e\x85f\vg\fh",
    "- one\n- two\n\n1. first\n2. second\n\n| a | b |\n|---|---|\n",
    "```python\ndef f(x):\n    return x  # don't\n```",
    "see https://example.org/a?b=c&d=e#f or mail a.b@c.de!",
    "日本語の文です。もう一つ。",
    "don't can't I'll U.S.A. e.g. $5.00 10,000 3-4 'quoted' \"double\" -- dash",
    "x" * 100_000,
    "word " * 20_000,
    "a, b; " * 3_000 + "end.",
    "(" * 3_000,
    "🙂" * 3_000,
    "ab\n" * 3_000,
]


def words(text: str) -> list[list[str]]:
    return [list(found.sentence.words) for found in segment(text)]


def check_invariants(text: str) -> None:
    ranges = [r for found in segment(text) for r in found.ranges]
    names = [w for found in segment(text) for w in found.sentence.words]
    assert [text[start:end] for start, end in ranges] == names
    assert all(name and not any(c.isspace() for c in name) for name in names)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    assert "".join(names) == "".join(text.split())  # nothing lost
    for found in segment(text):
        spaces = [end >= len(text) or text[end].isspace() for _, end in found.ranges]
        assert list(found.sentence.space_after) == spaces


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts(text: str) -> None:
    check_invariants(text)


PIECES = st.sampled_from(
    [
        *"aZé.,;:!?()'\"-/@#$%&*_=+|<>[]{}0 \t\n\r\0\v\f\x1c\x85\xa0\xad\u0301\u200b\u200d\u2028\ufeff\u202e",
        *("שלום", "مرحبا", "你好", "👩‍👧", "🇩🇪", "don't", "http://a.b/c", "e.g.", "U.S.", "...", "\r\n", "the cat"),
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=80).map("".join)))
def test_offsets_name_the_words(text: str) -> None:
    check_invariants(text)


@settings(max_examples=10, deadline=None)
@given(st.text(min_size=1, max_size=30))
def test_offsets_name_the_words_of_long_lines(text: str) -> None:
    check_invariants(text * (30_000 // len(text)))


def test_sentences_end_at_punctuation_lines_and_list_items() -> None:
    assert words("It rains. We stay!") == [["It", "rains", "."], ["We", "stay", "!"]]
    assert words("Title\n\nBody text") == [["Title"], ["Body", "text"]]
    assert words("milk\neggs\r\nbread") == [["milk"], ["eggs"], ["bread"]]
    assert words("- One thing\n- Another") == [["-", "One", "thing"], ["-", "Another"]]


def test_hard_wrapped_prose_is_one_sentence() -> None:
    text = "The committee that met on Tuesday afternoon in the\nlarge hall decided nothing.\nIt will meet again."
    assert [len(sentence) for sentence in words(text)] == [14, 5]


def test_tokens_are_those_of_the_treebank_style() -> None:
    assert words("I can't go; it's $5.") == [["I", "ca", "n't", "go", ";", "it", "'s", "$", "5", "."]]


def test_fresh_vocabulary_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "One word. Some other words, and 3 more.\nNew line"
    before = segment(text)
    monkeypatch.setattr(module, "_MAX_VOCABULARY", 0)
    assert segment(text) == before


def whole(text: str) -> Segment:
    names = text.split()
    starts = list(itertools.accumulate((len(n) + 1 for n in names), initial=0))
    ranges = tuple((start, start + len(name)) for start, name in zip(starts, names, strict=False))
    return Segment(Sentence(tuple(names), (True,) * len(names)), ranges)


def test_split_prefers_clause_punctuation_near_the_middle() -> None:
    sentence = whole("a b c d , e f g h i")
    parts = split_to_fit(sentence, lambda s: len(s.words) <= 6)
    assert [(part.sentence.words, fits) for part, fits in parts] == [
        (("a", "b", "c", "d", ","), True),
        (("e", "f", "g", "h", "i"), True),
    ]
    assert sum((part.ranges for part, _ in parts), ()) == sentence.ranges


def test_split_halves_where_there_is_no_punctuation() -> None:
    parts = split_to_fit(whole("a b c d e f g h"), lambda s: len(s.words) <= 3)
    assert [len(part.ranges) for part, _ in parts] == [2, 2, 2, 2]


def test_words_that_do_not_fit_alone_are_cut_out_once() -> None:
    parts = split_to_fit(whole("a b ?? ?? c d"), lambda s: "??" not in s.words)
    assert [(part.sentence.words, fits) for part, fits in parts] == [
        (("a", "b"), True),
        (("??", "??"), False),
        (("c", "d"), True),
    ]


def test_sentence_that_fits_is_left_alone() -> None:
    sentence = whole("a b c")
    assert split_to_fit(sentence, lambda s: True) == [(sentence, True)]
    assert split_to_fit(sentence, lambda s: False) == [(sentence, False)]
