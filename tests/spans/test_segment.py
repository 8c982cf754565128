from __future__ import annotations

import itertools
import time
import zlib

import pytest
import spacy
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
    "\"'" * 50_000,
    "lone \ud800 and \udfff\ud800. Next",
    "क्‍षि é̂ ក្រុម 🏳️‍🌈👨🏽‍🚒 ! Ünï",
    "www.a-b.org/x(y)_z;q=%20#f, x.y+z@a-b.co.uk; ftp://[::1]/~u/",
    "قال: «نعم؟» ثم ذهب۔ यह है॥ ሰላም። 你好！真的？「はい。」ne?",
    "```\nnever closed\n" * 3,
    "|\n|-|\n||\n",
    "|-" + " " * 100_000 + "x",
    " " * 100_000 + "|-x",
]


def words(text: str) -> list[list[str]]:
    return [list(found.sentence.words) for found in segment(text)]


def check_invariants(text: str) -> None:
    ranges = [r for found in segment(text) for r in found.ranges]
    names = [w for found in segment(text) for w in found.sentence.words]
    assert [text[start:end] for start, end in ranges] == names
    assert all(name and not any(c.isspace() for c in name) for name in names)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(ranges))
    assert "".join(names) == "".join(text.split())  # nothing lost, nothing twice
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


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=80).map("".join)))
def test_offsets_name_the_words(text: str) -> None:
    check_invariants(text)


@settings(max_examples=10)
@given(st.text(min_size=1, max_size=30))
def test_offsets_name_the_words_of_long_lines(text: str) -> None:
    check_invariants(text * (30_000 // len(text)))


MARKUP = [
    *("```", "~~~", "```python", "    x = f(1);", "\tx += 1", "| a | b |", "|---|:-:|", "a | b", "-----", "+--+--+"),
    *("- item", "1. one", "  b) two", "> said", "# Title", "`x` is.", "A long line that is wrapped somewhere in its"),
    *("middle.", "", "3.14 | 15.9 | 26.5", "你好。再见！", "هل هذا؟ نعم۔", "यह है। वह॥", "\ud800", "\0\x1b[0m"),
]
LINES = st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=20)), max_size=12)
BREAKS = st.sampled_from(["\n", "\n", "\r\n", "\n\n", "\r", "\u2028", " "])
LONG_RUNS = st.builds(lambda unit, times: unit * times, st.text(min_size=1, max_size=4), st.integers(400, 1200))
ANY_CHARACTERS = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")), max_size=100)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Prose, markup, scripts, control characters and very long runs, mixed."""
    text = draw(BREAKS).join(draw(LINES))
    parts = [text, draw(ANY_CHARACTERS), draw(st.lists(PIECES, max_size=20).map("".join))]
    if draw(st.integers(0, 4)) == 0:
        parts.append(draw(LONG_RUNS))
    return draw(BREAKS).join(draw(st.permutations(parts)))


@settings(max_examples=300)
@given(texts(), st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_any_text_and_any_parser(text: str, seed: int, longest: int) -> None:
    check_invariants(text)

    def fits(sentence: Sentence) -> bool:
        taken = all(zlib.crc32(word.encode("utf-8", "surrogatepass"), seed) % 7 for word in sentence.words)
        return taken and len(sentence.words) <= longest

    for found in segment(text):
        parts = split_to_fit(found, fits)
        assert sum((part.ranges for part, _ in parts), ()) == found.ranges
        assert sum((part.sentence.words for part, _ in parts), ()) == found.sentence.words
        assert all(part.is_prose == found.is_prose for part, _ in parts)
        assert all(fit == (part.is_prose and fits(part.sentence)) for part, fit in parts)


def test_sentences_end_at_punctuation_lines_and_list_items() -> None:
    assert words("It rains. We stay!") == [["It", "rains", "."], ["We", "stay", "!"]]
    assert words("Title\n\nBody text") == [["Title"], ["Body", "text"]]
    assert words("milk\neggs\r\nbread") == [["milk"], ["eggs"], ["bread"]]
    assert words("- One thing\n- Another") == [["-", "One", "thing"], ["-", "Another"]]


@pytest.mark.parametrize("marks", ["- -", "* *", "• •", "1. 2.", "1) 2)", "(a) (b)", "a) b)", "iii. iv."])
def test_list_items_are_not_glued(marks: str) -> None:
    first, second = marks.split()
    text = f"{first} a long item of many words which is followed by\n  {second} another one"
    ends = [found.ranges[-1][1] for found in segment(text)]
    assert text.index("\n") in ends


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("你好！真的？是。", ["你好！", "真的？", "是。"]),
        ("「はい。」そうです。", ["「はい。」", "そうです。"]),
        ("هل هذا؟ نعم۔ لا", ["هل هذا؟", "نعم۔", "لا"]),
        ("यह है। वह है॥ और", ["यह है।", "वह है॥", "और"]),
        ("ሰላም። ደህና።", ["ሰላም።", "ደህና።"]),
        ("He said 你好。Then he left. 再见！Bye!", ["He said 你好。", "Then he left.", "再见！", "Bye!"]),
        ("多少？！没有……真的", ["多少？！", "没有……真的"]),
    ],
)
def test_sentence_ends_of_other_scripts(text: str, sentences: list[str]) -> None:
    assert [text[found.ranges[0][0] : found.ranges[-1][1]] for found in segment(text)] == sentences


def test_names_of_the_net_stay_whole() -> None:
    assert [w for s in words("https://example.org/a?b=c&d=e#f") for w in s] == ["https://example.org/a?b=c&d=e#f"]
    assert words("mail a.b@c.de today") == [["mail", "a.b@c.de", "today"]]


def test_code_and_tables_have_words_and_are_no_prose() -> None:
    code = "```python\ndef f(x):\n    return x. # a\n```\n"
    text = f"Run `f(x)` first.\n\n{code}Then read\n\n| a | b |\n|---|---|\n| 1. | 2 |\n"
    found = segment(text)
    assert [" ".join(one.sentence.words) for one in found if one.is_prose] == ["Run ` f(x ) ` first .", "Then read"]
    assert len([one for one in found if not one.is_prose]) == 7  # a line each
    check_invariants(text)


def test_parser_is_not_asked_about_what_is_no_prose() -> None:
    (line,) = segment("+-----+-----+")
    assert not line.is_prose

    def fits(sentence: Sentence) -> bool:
        raise AssertionError(sentence)

    assert split_to_fit(line, fits) == [(line, False)]
    assert not line.part(0, 1).is_prose


def unsparing_ranges(text: str) -> list[tuple[int, int]]:
    """The words of a text of one piece, with a look for every script's signs at each of its characters."""
    tokenizer, _ = module._pipeline()
    return [
        (token.idx + match.start(), token.idx + match.end())
        for token in tokenizer(text)
        for match in module._WORDS.finditer(token.text)
    ]


@settings(max_examples=300)
@given(st.text(st.characters(max_codepoint=127, exclude_characters="\n\r\v\f"), max_size=80))
def test_words_of_ascii_are_those_of_any_text(line: str) -> None:
    assert [r for found in segment(line) for r in found.ranges] == unsparing_ranges(line)


def test_lone_surrogates_are_no_prose() -> None:
    assert [one.is_prose for one in segment("It \ud800 was. It is")] == [False, True]


def test_suffixes_are_those_of_spacy() -> None:
    ours, plain = module._pipeline()[0].suffix_search, spacy.blank("en").tokenizer.suffix_search
    endings = [
        "",
        ".",
        "...",
        "." * 31,
        "." * 200,
        "km/h",
        "'s",
        "!?",
        "\"'" * 40,
        "°C.",
        "5€",
        "AB.",
        "9kg",
        "a…",
        "x)",
    ]
    for start in ("", "a", "word " * 9, "7" * 40, "(" * 50):
        for ending in endings:
            lengths = [m and m.end() - m.start() for m in (ours(start + ending), plain(start + ending))]
            assert lengths[0] == lengths[1], start + ending


def test_alternating_quotes_take_no_long_time() -> None:
    segment("warm")
    began = time.process_time()
    segment("\"'" * 50_000)
    assert time.process_time() - began < 4  # under 1 s on a free machine; 13 s with spaCy's own suffix search


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
