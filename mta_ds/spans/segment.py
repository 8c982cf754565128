"""Text to sentences of words, each word with its exact character range: spaCy's tokenizer and sentence rules, no model.

Offsets always hold: ``text[start:end]`` is the word. White space is never a word.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mta_ds.spans.parser import Sentence

# A line ends a sentence, unless it is long and the next one goes on in lower case: hard-wrapped prose.
_NEWLINES = r"\n\r\v\f\x85\u2028\u2029"
_LINES = re.compile(
    rf"[^{_NEWLINES}]*(?:(?<=[^{_NEWLINES}]{{40}})(?:\r\n|[{_NEWLINES}])(?=[^\S{_NEWLINES}]*[a-z])[^{_NEWLINES}]*)*"
)
# spaCy's tokenizer costs the square of what stands between two spaces, so very long runs are cut ...
_MAX_RUN = 500
_RUNS = re.compile(rf"\S{{{_MAX_RUN}}}(?=\S)")
# ... and its Doc holds the text twice: long lines go through it in pieces.
_MAX_CHARS = 20_000
# It remembers every distinct word; a fresh one now and then keeps memory flat over any corpus.
_MAX_VOCABULARY = 300_000
_CLAUSE_ENDS = frozenset(
    {",", ";", ":", "-", "--", "–", "—", "…", "...", ")", "(", "|", "/", "•", "·", "，", "；", "："}
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One sentence and where its words stand in the text."""

    sentence: Sentence
    ranges: tuple[tuple[int, int], ...]
    """Character range of each word."""

    def part(self, first: int, last: int) -> Segment:
        """Words ``first`` to ``last`` (exclusive) as a segment of their own."""
        words, spaces = self.sentence.words[first:last], self.sentence.space_after[first:last]
        return Segment(Sentence(words, spaces), self.ranges[first:last])


def segment(text: str) -> list[Segment]:
    """The sentences of ``text``, in order; every character that is not white space is in exactly one word."""
    return [found for start, end in _pieces(text) for found in _segment_piece(text, start, end)]


def split_to_fit(whole: Segment, fits: Callable[[Sentence], bool]) -> list[tuple[Segment, bool]]:
    """Cut a sentence that a parser does not take into parts that it takes; (part, whether it fits).

    Words that do not even fit alone are cut out and come back with False: they get no constituents. What is left is
    cut after the clause punctuation nearest to the middle, else in the middle, until it fits.
    """
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


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Character ranges that hold whole sentences: lines, long ones cut at white space where there is any."""
    for match in _LINES.finditer(text):
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


def _segment_piece(text: str, start: int, end: int) -> Iterator[Segment]:
    tokenizer, sentencizer = _pipeline()
    if len(tokenizer.vocab) > _MAX_VOCABULARY:
        _pipeline.cache_clear()
        tokenizer, sentencizer = _pipeline()
    piece = text[start:end]
    for sentence in sentencizer(tokenizer(piece)).sents:
        words, spaces, ranges = [], [], []
        for token in sentence:
            for first, last in _without_space(token.text, start + token.idx):
                words.append(text[first:last])
                spaces.append(last >= len(text) or text[last].isspace())
                ranges.append((first, last))
        if words:
            yield Segment(Sentence(tuple(words), tuple(spaces)), tuple(ranges))


def _without_space(token: str, start: int) -> Iterator[tuple[int, int]]:
    """A token's character range without white space; spaCy makes tokens of some spaces, alone or inside others."""
    if token.isspace():
        return
    for match in re.finditer(r"\S+", token):
        yield start + match.start(), start + match.end()


@functools.cache
def _pipeline() -> tuple[Any, Any]:
    import spacy

    nlp = spacy.blank("en")
    return nlp.tokenizer, nlp.add_pipe("sentencizer")
