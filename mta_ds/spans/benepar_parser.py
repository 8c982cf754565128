"""Benepar behind the parser protocol: the trees of its own ``parse``, in a fraction of the time.

The same trees as ``ChartParser.parse`` on the words as benepar's spaCy component normalises them, but in batches over
all sentences at hand, with each fencepost scored once instead of each span, and decoded without autograd or trees.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from benepar.parse_chart import ChartParser
from torch import Tensor

from mta_ds.errors import UserError
from mta_ds.spans.benepar_encode import Encoded, SentenceEncoder
from mta_ds.spans.benepar_model import LoadedModel, annotate, fencepost_features, label_scores, load_model
from mta_ds.spans.decode import decode, span_fenceposts
from mta_ds.spans.parser import BF16, BUNDLED, Parse, Sentence
from mta_ds.spans.partitioned import FastPartitionedEncoder

_ROOTS = frozenset({"ROOT", "TOP", "S1", "VROOT"})
# Positions (sub-words with padding) of one encoder batch, and spans scored at once. On a CPU what fits its caches: a
# small batch has little padding and runs as fast as a large one.
_BATCH_POSITIONS = {"cpu": 512, "cuda": 16_384}
_CHUNK_SPANS = {"cpu": 2048, "cuda": 65_536}
_SLICE = 1024  # sentences tokenized at once


def load(spec: str | None, device: str) -> LoadedModel:
    """The Benepar model that a user names, see :func:`mta_ds.spans.parser.load_parser`."""
    in_bfloat16 = spec is not None and spec.startswith(BF16)
    if in_bfloat16 and device == "cpu" and not _cpu_has_bf16():
        raise UserError(
            f"parser {spec}: this CPU multiplies bf16 over a hundred times slower than fp32; leave {BF16} out"
        )
    path = (spec or "").removeprefix(BF16)
    loaded = load_model(Path(os.path.expanduser(path))) if path else load_model(BUNDLED)._replace(name="bundled")
    return _in_bfloat16(loaded) if in_bfloat16 else loaded


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _in_bfloat16(loaded: LoadedModel) -> LoadedModel:
    encoder = loaded.model.pretrained_model
    if encoder is None:
        raise UserError(f"parser {loaded.name}: has no encoder that {BF16} could run in bf16; leave {BF16} out")
    encoder.bfloat16()
    return loaded._replace(name=f"{BF16}{loaded.name}", fingerprint=f"{BF16}{loaded.fingerprint}")


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
