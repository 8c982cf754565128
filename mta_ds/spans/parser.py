"""Sentences to constituents: the parser protocol, what it speaks of, and the fallback that knows words only.

:func:`load_parser` gives the parser that a user names; what that one is made of is imported then, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

BUNDLED = Path(__file__).parent.parent / "assets" / "parser"
WORDS_ONLY = "none"
FP32 = "fp32:"


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words as they stand in the text, none empty, and whether white space follows each."""

    words: tuple[str, ...]
    space_after: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.space_after):
            raise ValueError(f"space_after must have one value a word: {len(self.space_after)}, not {len(self.words)}")


class Constituent(NamedTuple):
    """Words ``start_word:end_word`` of a sentence under one label, a unary chain being one label ("S::VP").

    ``height`` is 1 where the constituent directly dominates only words, else one more than the highest inside it.
    """

    start_word: int
    end_word: int
    label: str
    height: int


@dataclass(frozen=True, slots=True)
class Parse:
    """One sentence's part-of-speech tags, one a word ("" where the parser has none), and constituents, sorted by
    (start_word, -end_word)."""

    tags: tuple[str, ...]
    constituents: tuple[Constituent, ...]


class Parser(Protocol):
    """What the parse stage asks of a parser."""

    @property
    def name(self) -> str:
        """Short, for manifests."""

    @property
    def fingerprint(self) -> str:
        """Another fingerprint is another parser: its trees may differ."""

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that take part."""

    def fits(self, sentence: Sentence) -> bool:
        """Whether :meth:`parse` takes the sentence."""

    def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
        """Parse any number of sentences, each of which fits; results in their order."""


def best_device(spec: str | None) -> str:
    """Where the parser that a user names runs in the parse stage: a Benepar model on a GPU if there is one ("cuda")."""
    from mta_ds.spans import spacy_parser

    is_benepar = spec != WORDS_ONLY and not (spec or "").startswith(spacy_parser.PREFIX)
    return "cuda" if is_benepar and torch.cuda.is_available() else "cpu"


def load_parser(spec: str | None, device: str = "cpu") -> Parser:
    """The parser a user names.

    Args:
        spec: None for the bundled model; "none" for words without constituents; "spacy:MODEL" for the noun chunks and
            verb groups of a spaCy model, a folder or an installed package; else the path of a Benepar model:
            a folder in ``benepar_en3``'s format or a single-file training checkpoint. "fp32:" before a Benepar
            model's path, or alone for the bundled model, makes its products in fp32 only; without it, a CPU that has
            instructions for bf16 parses in bf16 first, and again in fp32 what rounding could have decided.
        device: where a Benepar model runs: "cpu" or "cuda"; the others know the CPU only.

    Raises:
        UserError: nothing is there, or it is no model that can be loaded safely.
    """
    from mta_ds.spans import spacy_parser

    if spec == WORDS_ONLY:
        return WordsOnly()
    if spec is not None and spec.startswith(spacy_parser.PREFIX):
        return spacy_parser.SpacyParser(spacy_parser.load_model(spec.removeprefix(spacy_parser.PREFIX)))
    from mta_ds.spans import benepar_parser

    return benepar_parser.load(spec, device)


class WordsOnly:
    """Gives words and no constituents, for text that no parser fits; takes every sentence."""

    name = WORDS_ONLY
    fingerprint = WORDS_ONLY

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}

    def fits(self, sentence: Sentence) -> bool:
        """Always true."""
        return True

    def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
        """Empty tags and no constituents for every sentence."""
        return [Parse(("",) * len(sentence.words), ()) for sentence in sentences]
