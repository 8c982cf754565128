"""Text to sentences of words, each word with its exact character range: spaCy's tokenizer and sentence rules, no model.

Offsets always hold: ``text[start:end]`` is the word. White space is never a word.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mta_ds.spans.parser import Sentence

# A line ends a sentence, unless the next one goes on in lower case: hard-wrapped prose.
_LINES = re.compile(r"[^\r\n]*(?:(?:\r\n|\r|\n)(?=[^\S\r\n]*[a-z])[^\r\n]*)*")
# spaCy's tokenizer is linear, but its Doc holds the text twice: long lines go through it in pieces.
_MAX_CHARS = 20_000
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

    Cuts after the clause punctuation nearest to the middle, else in the middle. A single word that still does not fit
    comes back with False: it gets no constituents.
    """
    num_words = len(whole.ranges)
    if fits(whole.sentence):
        return [(whole, True)]
    if num_words == 1:
        return [(whole, False)]
    middle = num_words // 2
    ends = [i for i in range(1, num_words) if whole.sentence.words[i - 1] in _CLAUSE_ENDS]
    # near the edge a cut leaves nearly the whole sentence to cut again
    ends = [i for i in ends if num_words // 4 <= i <= num_words - num_words // 4]
    cut = min(ends, key=lambda i: abs(i - middle), default=middle)
    return split_to_fit(whole.part(0, cut), fits) + split_to_fit(whole.part(cut, num_words), fits)


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Character ranges that hold whole sentences: lines, long ones cut at white space where there is any."""
    for match in _LINES.finditer(text):
        start, end = match.span()
        while end - start > _MAX_CHARS:
            cut = max(text.rfind(c, start + _MAX_CHARS // 2, start + _MAX_CHARS) for c in " \t") + 1
            cut = cut or start + _MAX_CHARS
            yield start, cut
            start = cut
        if start < end:
            yield start, end


def _segment_piece(text: str, start: int, end: int) -> Iterator[Segment]:
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
