"""A spaCy model as parser: noun chunks as NP and verb groups as VP, the units of the paper's released code.

Its words are ours: the model's components run on a Doc made of a sentence's words, not on the model's own tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mta_ds.errors import UserError
from mta_ds.files import sha256
from mta_ds.spans.parser import Constituent, Parse, Sentence

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc

PREFIX = "spacy:"
"""What a user writes before a model's path or package name."""

VERB_GROUP = (("AUX", "*"), ("ADV", "*"), ("VERB", "+"), ("ADV", "*"))
"""Part of speech and how often, in order."""

# Every match of the pattern counts, so a run of n verbs gives n²/2 of them: longer sentences are cut.
_MAX_WORDS = 256
_BATCH_SENTENCES = 256
_NOT_NEEDED = ("ner", "entity_linker", "entity_ruler", "lemmatizer", "trainable_lemmatizer", "textcat")


class LoadedModel(NamedTuple):
    """A spaCy pipeline with what tells it from others."""

    nlp: Language
    name: str
    fingerprint: str
    """SHA-256 over the model's name and version and, for a folder, its files."""


def load_model(model: str) -> LoadedModel:
    """Load a folder that spaCy saved, or an installed model package.

    Raises:
        UserError: ``model`` is neither, or it cannot be loaded, or its pipeline is empty.
    """
    from spacy.util import get_installed_models

    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):
        files = [path / name for name in ("config.cfg", "meta.json")]
        for file in files:
            if not file.is_file():
                raise UserError(f"parser {PREFIX}{model}: no spaCy model folder, it has no {file.name}{_inside(path)}")
        nlp = _load(model, path)
        name, digest = path.resolve().name, _hash([*_identity(nlp), *_hashes(path)])
    elif (installed := sorted(get_installed_models())) and model in installed:
        nlp = _load(model, model)
        name, digest = model, _hash(_identity(nlp))
    else:
        raise UserError(
            f"parser {PREFIX}{model}: no folder and no installed spaCy model of that name; {_nearest(model, installed)}"
        )
    if not nlp.pipe_names:
        raise UserError(f"parser {PREFIX}{model}: its pipeline is empty; give a model with a tagger and a parser")
    return LoadedModel(nlp, PREFIX + name, digest)


def _load(model: str, place: Path | str) -> Language:
    import spacy

    try:
        return spacy.load(place, exclude=_NOT_NEEDED)
    # Everything here is the content of the user's files, and what is wrong with them can surface as anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or "no reason given"
        raise UserError(
            f"parser {PREFIX}{model}: cannot be loaded by spaCy {version('spacy')}: {type(error).__name__}: {reason}"
        ) from None


def _inside(path: Path) -> str:
    """The nearest fix: an unpacked package holds the model's folder somewhere inside."""
    found = next(iter(sorted(path.glob("**/config.cfg"))), None)
    return f"; did you mean {found.parent}?" if found else "; give a folder that spaCy's to_disk wrote"


def _nearest(model: str, installed: list[str]) -> str:
    near = difflib.get_close_matches(model, installed, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"installed: {', '.join(installed) or 'none'} (python -m spacy download en_core_web_sm gets one)"


def _identity(nlp: Language) -> list[str]:
    return [f"{key} {nlp.meta.get(key, '')}" for key in ("lang", "name", "version")]


def _hashes(path: Path) -> list[str]:
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return [f"{file} {sha256(path / file)}" for file in files]


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class SpacyParser:
    """Tags, noun chunks and verb groups of a spaCy model, in the span store's schema.

    Noun chunks need a model with a dependency parser in a language that has rules for them; verb groups need
    universal part-of-speech tags. Where a model lacks either there are no such constituents. Tags are the model's own
    or, where it has none, the universal ones.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        from spacy.matcher import Matcher

        self._nlp, self.name, self.fingerprint = loaded
        meta = self._nlp.meta
        self.versions: dict[str, str] = {
            "spacy": version("spacy"),
            f"{meta.get('lang')}_{meta.get('name')}": str(meta.get("version")),
        }
        self._verb_groups = Matcher(self._nlp.vocab)
        self._verb_groups.add("VP", [[{"POS": pos, "OP": times} for pos, times in VERB_GROUP]])

    def fits(self, sentence: Sentence) -> bool:
        """False over 256 words, for no words at all, and where one is empty or no valid Unicode."""
        return 0 < len(sentence.words) <= _MAX_WORDS and all(map(_is_valid, sentence.words))

    def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
        """Parse sentences that fit; results in their order.

        Raises:
            ValueError: a sentence does not fit.
            UserError: a component of the model merges or splits words.
        """
        from spacy.tokens import Doc

        for number, sentence in enumerate(sentences):
            if not self.fits(sentence):
                raise ValueError(f"sentences must fit (ask fits() first): number {number} does not")
        parses = []
        for first in range(0, len(sentences), _BATCH_SENTENCES):
            batch = sentences[first : first + _BATCH_SENTENCES]
            # spaCy remembers every word it ever met, but forgets those met in a memory zone.
            with self._nlp.memory_zone():
                docs = [Doc(self._nlp.vocab, list(s.words), list(s.space_after)) for s in batch]
                for sentence, doc in zip(batch, self._nlp.pipe(docs), strict=True):
                    if [token.text for token in doc] != list(sentence.words):
                        raise UserError(f"parser {self.name}: a component of it merges or splits words; take that out")
                    parses.append(self._read(doc))
        return parses

    def _read(self, doc: Doc) -> Parse:
        spans: set[tuple[int, int, str]] = set()
        if doc.has_annotation("DEP") and self._nlp.vocab.get_noun_chunks is not None:
            spans.update((chunk.start, chunk.end, "NP") for chunk in doc.noun_chunks)
        if doc.has_annotation("POS"):
            spans.update((start, end, "VP") for _, start, end in self._verb_groups(doc))
        return Parse(tuple(token.tag_ or token.pos_ for token in doc), nest(spans, len(doc)))


def nest(spans: Iterable[tuple[int, int, str]], num_words: int) -> tuple[Constituent, ...]:
    """Labelled ranges of words, which may overlap, as constituents: sorted, with their heights.

    A range of words under two labels is one unary chain ("NP::VP"), as in a tree.
    """
    labels: dict[tuple[int, int], str] = {}
    for start, end, label in sorted(spans):
        labels[start, end] = f"{labels[start, end]}::{label}" if (start, end) in labels else label
    if not labels:
        return ()
    heights: dict[tuple[int, int], int] = {}
    highest = [0] * (num_words + 1)  # inside the words from the current start to each end
    for start in range(num_words - 1, -1, -1):
        for end in range(start + 1, num_words + 1):
            highest[end] = max(highest[end], highest[end - 1] if end - 1 > start else 0)
            if (start, end) in labels:
                highest[end] += 1
                heights[start, end] = highest[end]
    ordered = sorted(labels, key=lambda r: (r[0], -r[1]))
    return tuple(Constituent(start, end, labels[start, end], heights[start, end]) for start, end in ordered)


def _is_valid(word: str) -> bool:
    return bool(word) and not any("\ud800" <= character <= "\udfff" for character in word)
