"""Sentences to constituents: the parser protocol, Benepar behind it, and the fallback that knows words only.

:func:`load_parser` gives the parser that a user names. :class:`BeneparParser` gives the trees of benepar's own
``parse`` (``ChartParser.parse`` on the words as its spaCy component normalises them), but batches over all
sentences it is handed, scores each fencepost once instead of each span, and decodes without autograd or trees.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from benepar.parse_chart import ChartParser
from torch import Tensor

from mta_ds.errors import UserError
from mta_ds.spans.benepar_encode import Encoded, SentenceEncoder
from mta_ds.spans.benepar_model import LoadedModel, annotate, fencepost_features, label_scores, load_model
from mta_ds.spans.decode import Constituent, decode, span_fenceposts
from mta_ds.spans.partitioned import FastPartitionedEncoder

__all__ = ["BeneparParser", "Constituent", "Parse", "Parser", "Sentence", "WordsOnly", "load_parser"]

BUNDLED = Path(__file__).parent.parent / "assets" / "parser"
WORDS_ONLY = "none"
BF16 = "bf16:"
_ROOTS = frozenset({"ROOT", "TOP", "S1", "VROOT"})
# Positions (sub-words with padding) of one encoder batch, and spans scored at once. On a CPU what fits its caches: a
# small batch has little padding and runs as fast as a large one.
_BATCH_POSITIONS = {"cpu": 512, "cuda": 16_384}
_CHUNK_SPANS = {"cpu": 2048, "cuda": 65_536}
_SLICE = 1024  # sentences tokenized at once


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words as they stand in the text, none empty, and whether white space follows each."""

    words: tuple[str, ...]
    space_after: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.words) != len(self.space_after):
            raise ValueError(f"space_after must have one value a word: {len(self.space_after)}, not {len(self.words)}")


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
            a folder in ``benepar_en3``'s format or a single-file training checkpoint. "bf16:" before a Benepar
            model's path, or alone for the bundled model, runs its encoder in bf16: faster on a CPU that has such
            instructions, and another parser, since some trees change.
        device: where a Benepar model runs: "cpu" or "cuda"; the others know the CPU only.

    Raises:
        UserError: nothing is there, it is no model that can be loaded safely, or the CPU has no fast bf16.
    """
    from mta_ds.spans import spacy_parser

    if spec == WORDS_ONLY:
        return WordsOnly()
    if spec is None:
        return BeneparParser(_load_benepar(""), device)
    if spec.startswith(spacy_parser.PREFIX):
        return spacy_parser.SpacyParser(spacy_parser.load_model(spec.removeprefix(spacy_parser.PREFIX)))
    if spec.startswith(BF16):
        if device == "cpu" and not _cpu_has_bf16():
            raise UserError(
                f"parser {spec}: this CPU multiplies bf16 over a hundred times slower than fp32; leave {BF16} out"
            )
        return BeneparParser(_in_bfloat16(_load_benepar(spec.removeprefix(BF16))), device)
    return BeneparParser(_load_benepar(spec), device)


def _load_benepar(path: str) -> LoadedModel:
    return load_model(Path(os.path.expanduser(path))) if path else load_model(BUNDLED)._replace(name="bundled")


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _in_bfloat16(loaded: LoadedModel) -> LoadedModel:
    encoder = loaded.model.pretrained_model
    if encoder is None:
        raise UserError(f"parser {loaded.name}: has no encoder that {BF16} could run in bf16; leave {BF16} out")
    encoder.bfloat16()
    return loaded._replace(name=f"{BF16}{loaded.name}", fingerprint=f"{BF16}{loaded.fingerprint}")


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


class BeneparParser:
    """A Benepar chart parser (Kitaev, Cao and Klein 2019); scores, norms and sums always in fp32."""

    def __init__(self, loaded: LoadedModel, device: str = "cpu") -> None:
        self.model, self.name, self.fingerprint = loaded
        self.model.to(device)
        self._device = device
        packages = ("benepar", "torch", "transformers", "tokenizers")
        self.versions: dict[str, str] = {package: version(package) for package in packages}
        self.encoder = SentenceEncoder(self.model)
        self._transformer = _transformer(self.model)
        chains = (name.split("::") for name in _names(self.model.label_vocab))
        self._labels = ["::".join(label for label in chain if label not in _ROOTS) for chain in chains]
        self._tags = _names(self.model.tag_vocab) if self.model.f_tag is not None else None
        self._force_root: bool = self.model.decoder.force_root_constituent

    def fits(self, sentence: Sentence) -> bool:
        """False over the encoder's limit, for white space, and where the last word is nothing to the encoder."""
        return self.encoder.fits(sentence.words, sentence.space_after)

    def parse(self, sentences: Sequence[Sentence]) -> list[Parse]:
        """Parse sentences that fit, in batches of like length; results in the order of ``sentences``.

        Raises:
            ValueError: a sentence does not fit.
        """
        pairs = [(sentence.words, sentence.space_after) for sentence in sentences]
        # In slices, because a tokenizer's output is many times larger than what is kept of it.
        slices = (pairs[first : first + _SLICE] for first in range(0, len(pairs), _SLICE))
        encoded = [one for part in slices for one in self.encoder.encode(part)]
        for number, one in enumerate(encoded):
            if not self.encoder.takes(one):
                raise ValueError(f"sentences must fit (ask fits() first): number {number} does not")
        parses: list[Parse | None] = [None] * len(encoded)
        for numbers in self.batches(encoded):
            found = self._parse_batch([encoded[number] for number in numbers])
            for number, parse in zip(numbers, found, strict=True):
                parses[number] = parse
        return [parse for parse in parses if parse is not None]

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Numbers of the sentences that go through the encoder together, batch by batch."""
        return _batches([sentence.cost for sentence in encoded], _BATCH_POSITIONS[self._device])

    @torch.inference_mode()
    def _parse_batch(self, sentences: Sequence[Encoded]) -> list[Parse]:
        lengths = np.array([len(sentence.words) for sentence in sentences], np.int64)
        batch = {name: value.to(self._device) for name, value in self.encoder.collate(sentences).items()}
        annotations = annotate(self.model, batch, self._transformer)
        scores, labels = self._best_labels(annotations, lengths)
        constituents = decode(scores.numpy(), labels.numpy(), lengths, self._labels)
        tags = self._best_tags(annotations, lengths)
        return [Parse(*pair) for pair in zip(tags, constituents, strict=True)]

    def _best_labels(self, annotations: Tensor, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Score and number of the best label of every chart cell, packed as decode.py says: [M] each."""
        features = fencepost_features(self.model, annotations)
        fenceposts = span_fenceposts(lengths, features.shape[1])
        left, right = (torch.from_numpy(side).to(self._device) for side in fenceposts)
        features = features.flatten(0, 1)
        scores, labels = features.new_empty(len(left)), left.new_empty(len(left))
        for first in range(0, len(left), _CHUNK_SPANS[self._device]):
            chunk = slice(first, first + _CHUNK_SPANS[self._device])
            of_labels = label_scores(self.model, features[left[chunk]], features[right[chunk]])
            torch.max(of_labels, 1, out=(scores[chunk], labels[chunk]))
        scores, labels = scores.cpu(), labels.cpu() + 1
        # The empty label scores 0 and wins a tie, as the first of all; the whole sentence may have to bear a label.
        empty = scores <= 0
        if self._force_root:
            cells = lengths * (lengths + 1) // 2
            empty[torch.from_numpy(np.cumsum(cells) - cells + lengths - 1)] = False
        return scores.masked_fill_(empty, 0), labels.masked_fill_(empty, 0)

    def _best_tags(self, annotations: Tensor, lengths: np.ndarray) -> Iterator[tuple[str, ...]]:
        if self._tags is None:
            yield from (("",) * int(length) for length in lengths)
            return
        for row, length in zip(self.model.f_tag(annotations).argmax(-1).tolist(), lengths.tolist(), strict=True):
            yield tuple(self._tags[tag] for tag in row[1 : length + 1])


def _transformer(model: ChartParser) -> FastPartitionedEncoder | None:
    """The layers above the pretrained encoder, with matrix products in its type."""
    if model.encoder is None:
        return None
    pretrained = model.pretrained_model
    return FastPartitionedEncoder(model.encoder, torch.float32 if pretrained is None else pretrained.dtype)


def _names(vocabulary: dict[str, int]) -> list[str]:
    """Names by number; numbers that are not used have no name."""
    names = [""] * (max(vocabulary.values()) + 1)
    for name, number in vocabulary.items():
        names[number] = name
    return names


def _batches(costs: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Numbers of items in order of cost, cut so that items x highest cost stays within ``budget`` (or one item)."""
    batch: list[int] = []
    for number in sorted(range(len(costs)), key=costs.__getitem__):
        if batch and costs[number] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
