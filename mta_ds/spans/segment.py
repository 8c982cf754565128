"""Text to sentences of words, each word with its exact character range: spaCy's tokenizer and sentence rules, no model.

Offsets always hold: ``text[start:end]`` is the word. White space is never a word. Code and tables have words too,
a line being a sentence of its own that is no prose.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mta_ds.spans.markup import regions
from mta_ds.spans.parser import Sentence

# Raise it when other sentences or words come out: a store is made by one set of rules.
SEGMENTATION = 3
# A line ends a sentence, unless it is long and the next one goes on in lower case: hard-wrapped prose. "b)" and "iv."
# begin an item of a list.
_NEWLINES = r"\n\r\v\f\x85\u2028\u2029"
_LINES = re.compile(
    rf"[^{_NEWLINES}]*(?:(?<=[^{_NEWLINES}]{{40}})(?:\r\n|[{_NEWLINES}])(?=[^\S{_NEWLINES}]*[a-z])"
    rf"(?![^\S{_NEWLINES}]*(?:[a-z]|[ivx]{{2,5}})[.)]\s)[^{_NEWLINES}]*)*"
)
# Sentence ends that need no white space after them, and what may close a quotation behind them. spaCy's English rules
# leave most of them inside a word.
_ENDS = "。｡！？؟۔।॥።፧፨։။។៕།‼⁇⁈⁉"
_CLOSERS = "」』）】》〉〕”’»›\"'"
_WORDS = re.compile(rf"[{_ENDS}]+|(?<=[{_ENDS}])[{_CLOSERS}]+|[^\s{_ENDS}]+")
_SURROGATES = re.compile("[\ud800-\udfff]")
# A suffix rule looks at this many characters before the end at most, only runs of dots have no limit.
_SUFFIX_CHARS = 16
_SUFFIX_MARGIN = 4
# spaCy's tokenizer costs the square of what stands between two spaces, so very long runs are cut ...
_MAX_RUN = 500
_RUNS = re.compile(rf"\S{{{_MAX_RUN}}}(?=\S)")
# ... and its Doc holds the text twice: long lines go through it in pieces.
_MAX_CHARS = 20_000
# It remembers every distinct word; a fresh one now and then keeps memory flat over any corpus.
_MAX_VOCABULARY = 50_000
_CLAUSE_ENDS = frozenset(
    {",", ";", ":", "-", "--", "–", "—", "…", "...", ")", "(", "|", "/", "•", "·", "，", "；", "："}
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sentence and where its words stand in the text."""

    sentence: Sentence
    ranges: tuple[tuple[int, int], ...]
    """Character range of each word."""
    is_prose: bool = True
    """False for code, tables and the like, which no parser is asked about."""

    def part(self, first: int, last: int) -> Segment:
        """Words ``first`` to ``last`` (exclusive) as a segment of their own."""
        words, spaces = self.sentence.words[first:last], self.sentence.space_after[first:last]
        return Segment(Sentence(words, spaces), self.ranges[first:last], self.is_prose)


def segment(text: str) -> list[Segment]:
    """The sentences of ``text``, in order; every character that is not white space is in exactly one word."""
    return [
        found
        for first, last, is_prose in regions(text)
        for start, end in _pieces(text, first, last)
        for found in _segment_piece(text, start, end, is_prose)
    ]


def split_to_fit(whole: Segment, fits: Callable[[Sentence], bool]) -> list[tuple[Segment, bool]]:
    """Cut a sentence that a parser does not take into parts that it takes; (part, whether it fits).

    Words that do not even fit alone are cut out and come back with False: they get no constituents. What is left is
    cut after the clause punctuation nearest to the middle, else in the middle, until it fits. What is no prose does not
    fit, whatever the parser says.
    """
    if not whole.is_prose:
        return [(whole, False)]
    if fits(whole.sentence):
        return [(whole, True)]
    alone = [fits(whole.part(i, i + 1).sentence) for i in range(len(whole.ranges))]
    parts: list[tuple[Segment, bool]] = []
    for fit, run in itertools.groupby(range(len(alone)), key=alone.__getitem__):
        numbers = list(run)
        part = whole.part(numbers[0], numbers[-1] + 1)
        parts += _halve(part, fits) if fit else [(part, False)]
    return parts


def _halve(whole: Segment, fits: Callable[[Sentence], bool]) -> list[tuple[Segment, bool]]:
    if fits(whole.sentence):
        return [(whole, True)]
    num_words = len(whole.ranges)
    assert num_words > 1, "a word that fits alone fits"
    middle = num_words // 2
    ends = [i for i in range(1, num_words) if whole.sentence.words[i - 1] in _CLAUSE_ENDS]
    # near the edge a cut leaves nearly the whole sentence to cut again
    ends = [i for i in ends if num_words // 4 <= i <= num_words - num_words // 4]
    cut = min(ends, key=lambda i: abs(i - middle), default=middle)
    return _halve(whole.part(0, cut), fits) + _halve(whole.part(cut, num_words), fits)


def _pieces(text: str, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Character ranges that hold whole sentences: lines, long ones cut at white space where there is any."""
    for match in _LINES.finditer(text, first, last):
        start, end = match.span()
        ends = [run.end() for run in _RUNS.finditer(text, start, end)] if end - start > _MAX_RUN else []
        for stop in (*ends, end):
            while stop - start > _MAX_CHARS:
                cut = next(i for i in range(start + _MAX_CHARS, start, -1) if text[i - 1].isspace())
                yield start, cut
                start = cut
            if start < stop:
                yield start, stop
            start = stop


def _segment_piece(text: str, start: int, end: int, is_prose: bool) -> Iterator[Segment]:
    tokenizer, sentencizer = _pipeline()
    if len(tokenizer.vocab) > _MAX_VOCABULARY:
        _pipeline.cache_clear()
        tokenizer, sentencizer = _pipeline()
    piece = text[start:end]
    is_ascii = piece.isascii()
    has_surrogates = not is_ascii and _SURROGATES.search(piece) is not None
    # spaCy cannot hold a lone surrogate; its stand-in is as long.
    document = tokenizer(_SURROGATES.sub("\ufffd", piece) if has_surrogates else piece)
    for sentence in sentencizer(document).sents if is_prose else (document,):
        ranges = list(_word_ranges(sentence, start, is_ascii))
        for part in _cut_at_ends(text, ranges) if is_prose and not is_ascii else [ranges]:
            if part:
                yield _to_segment(text, tuple(part), is_prose, has_surrogates)


def _word_ranges(tokens: Iterable[Any], start: int, is_ascii: bool) -> Iterator[tuple[int, int]]:
    """Where words stand in a text whose piece from ``start`` on the tokens are of."""
    for token in tokens:
        first = start + token.idx
        if not is_ascii:
            yield from ((first + match.start(), first + match.end()) for match in _WORDS.finditer(token.text))
        elif not token.is_space:  # no sentence end of another script is in it
            yield first, first + len(token)


def _cut_at_ends(text: str, ranges: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """One sentence's words, cut behind the sentence ends of other scripts."""
    begin = 0
    ended = False
    for number, (start, end) in enumerate(ranges):
        is_end = text[start] in _ENDS
        if ended and not is_end and not all(character in _CLOSERS for character in text[start:end]):
            yield ranges[begin:number]
            begin = number
            ended = False
        ended = ended or is_end
    yield ranges[begin:]


def _to_segment(text: str, ranges: tuple[tuple[int, int], ...], is_prose: bool, has_surrogates: bool) -> Segment:
    words = tuple(text[start:end] for start, end in ranges)
    spaces = tuple(end >= len(text) or text[end].isspace() for _, end in ranges)
    # A parser's tokenizer cannot hold a lone surrogate either.
    is_prose = is_prose and not (has_surrogates and any(map(_SURROGATES.search, words)))
    return Segment(Sentence(words, spaces), ranges, is_prose)


@functools.cache
def _pipeline() -> tuple[Any, Any]:
    import spacy

    nlp = spacy.blank("en")
    nlp.tokenizer.suffix_search = _near_the_end(nlp.tokenizer.suffix_search)
    return nlp.tokenizer, nlp.add_pipe("sentencizer")


def _near_the_end(search: Callable[[str], re.Match[str] | None]) -> Callable[[str], re.Match[str] | None]:
    """A search for suffixes, of whose match the length counts, that does not try the whole string for each."""

    def search_end(string: str) -> re.Match[str] | None:
        if len(string) <= _SUFFIX_CHARS:
            return search(string)
        match = search(string[-_SUFFIX_CHARS:])
        return match if match is None or match.start() >= _SUFFIX_MARGIN else search(string)

    return search_end
