"""Benepar behind the parser protocol: the trees of its own ``parse``, in a fraction of the time.

The same trees as ``ChartParser.parse`` on the words as benepar's spaCy component normalises them, but in batches over
all sentences at hand, with each fencepost scored once instead of each span, and decoded without autograd or trees. A
CPU that has bf16 multiplies in it first, and in fp32 again where rounding could have decided.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benepar.parse_chart import ChartParser
from numpy.typing import NDArray
from torch import Tensor

from mta_ds.spans.benepar_encode import Encoded, SentenceEncoder
from mta_ds.spans.benepar_model import (
    Body,
    LoadedModel,
    annotate,
    fencepost_features,
    label_scores,
    load_model,
    read_states,
)
from mta_ds.spans.bert import FastBert, is_plain_bert
from mta_ds.spans.decode import decode, span_fenceposts
from mta_ds.spans.margin import tree_margins
from mta_ds.spans.parser import BUNDLED, FP32, Parse, Sentence
from mta_ds.spans.partitioned import FastPartitionedEncoder

_ROOTS = frozenset({"ROOT", "TOP", "S1", "VROOT"})
# Positions (sub-words with padding) of one encoder batch, and spans scored at once. On a CPU what fits its caches: a
# small batch has little padding and runs as fast as a large one.
_BATCH_POSITIONS = {"cpu": 512, "cuda": 16_384}
_CHUNK_SPANS = {"cpu": 2048, "cuda": 65_536}
_SLICE = 1024  # sentences tokenized at once
# Rounding could have decided what is decided by less than this many times what it typically moves a score by
_CLOSE = 8.0


def load(spec: str | None, device: str) -> BeneparParser:
    """The Benepar model that a user names, see :func:`mta_ds.spans.parser.load_parser`."""
    in_fp32 = device != "cpu" or not _cpu_has_bf16() or (spec or "").startswith(FP32)
    path = (spec or "").removeprefix(FP32)
    loaded = load_model(Path(os.path.expanduser(path))) if path else load_model(BUNDLED)._replace(name="bundled")
    return BeneparParser(loaded, device, in_fp32)


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class BeneparParser:
    """A Benepar chart parser (Kitaev, Cao and Klein 2019); scores, norms and sums always in fp32.

    ``rounded`` is how it multiplies first, if not in fp32 at once.
    """

    def __init__(self, loaded: LoadedModel, device: str = "cpu", in_fp32: bool = True) -> None:
        """``in_fp32``: multiply in nothing but fp32."""
        self.model, self.name, self.fingerprint = loaded
        self.model.to(device)
        self._device = device
        packages = ("benepar", "torch", "transformers", "tokenizers")
        self.versions: dict[str, str] = {package: version(package) for package in packages}
        self.encoder = SentenceEncoder(self.model)
        chains = (name.split("::") for name in _names(self.model.label_vocab))
        self._labels = ["::".join(label for label in chain if label not in _ROOTS) for chain in chains]
        self._tags = _names(self.model.tag_vocab) if self.model.f_tag is not None else None
        self._force_root: bool = self.model.decoder.force_root_constituent
        self._exact = _body(self.model, torch.float32)
        self.rounded = None if in_fp32 or self.model.pretrained_model is None else self._rounded_body()

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
        parses = self._parse_all(encoded, self.rounded)
        close = [number for number, parse in enumerate(parses) if parse is None]
        for number, parse in zip(close, self._parse_all([encoded[number] for number in close], None), strict=True):
            parses[number] = parse
        return [parse for parse in parses if parse is not None]

    def _parse_all(self, encoded: Sequence[Encoded], rounded: Rounded | None) -> list[Parse | None]:
        parses: list[Parse | None] = [None] * len(encoded)
        for numbers in self.batches(encoded):
            found = self._parse_batch([encoded[number] for number in numbers], rounded)
            for number, parse in zip(numbers, found, strict=True):
                parses[number] = parse
        return parses

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[list[int]]:
        """Numbers of the sentences that go through the encoder together, batch by batch."""
        return _batches([sentence.cost for sentence in encoded], _BATCH_POSITIONS[self._device])

    @torch.inference_mode()
    def _parse_batch(self, sentences: Sequence[Encoded], rounded: Rounded | None) -> list[Parse | None]:
        """Each sentence's parse; where products were rounded, None for those that rounding could have decided."""
        scored = self._score(sentences, rounded.body if rounded else self._exact)
        scores, labels = self._with_empty_labels(scored)
        constituents = decode(scores.numpy(), labels.numpy(), scored.lengths, self._labels)
        tags = self._best_tags(scored)
        parses: list[Parse | None] = [Parse(*pair) for pair in zip(tags, constituents, strict=True)]
        if rounded is not None:
            for number in self._too_close(scored, scores, labels, rounded).tolist():
                parses[number] = None
        return parses

    def _score(self, sentences: Sequence[Encoded], body: Body) -> _Scored:
        """All that decoding reads, packed as decode.py says."""
        lengths = np.array([len(sentence.words) for sentence in sentences], np.int64)
        batch = {name: value.to(self._device) for name, value in self.encoder.collate(sentences).items()}
        annotations = annotate(self.model, batch, body)
        features = fencepost_features(self.model, annotations)
        fenceposts = span_fenceposts(lengths, features.shape[1])
        left, right = (torch.from_numpy(side).to(self._device) for side in fenceposts)
        features = features.flatten(0, 1)
        scores, labels = features.new_empty(len(left)), left.new_empty(len(left))
        for first in range(0, len(left), _CHUNK_SPANS[self._device]):
            chunk = slice(first, first + _CHUNK_SPANS[self._device])
            of_labels = label_scores(self.model, features[left[chunk]], features[right[chunk]])
            torch.max(of_labels, 1, out=(scores[chunk], labels[chunk]))
        tags = None if self.model.f_tag is None else self.model.f_tag(annotations)
        return _Scored(lengths, features, left, right, scores.cpu(), labels.cpu() + 1, tags)

    def _with_empty_labels(self, scored: _Scored) -> tuple[Tensor, Tensor]:
        """Score and number of the best label of every chart cell, which may be the empty one: [M] each."""
        # The empty label scores 0 and wins a tie, as the first of all; the whole sentence may have to bear a label.
        empty = scored.scores <= 0
        if self._force_root:
            cells = scored.lengths * (scored.lengths + 1) // 2
            empty[torch.from_numpy(np.cumsum(cells) - cells + scored.lengths - 1)] = False
        return scored.scores.masked_fill(empty, 0), scored.labels.masked_fill(empty, 0)

    def _best_tags(self, scored: _Scored) -> Iterator[tuple[str, ...]]:
        if self._tags is None or scored.tags is None:
            yield from (("",) * int(length) for length in scored.lengths)
            return
        for row, length in zip(scored.tags.argmax(-1).tolist(), scored.lengths.tolist(), strict=True):
            yield tuple(self._tags[tag] for tag in row[1 : length + 1])

    def _too_close(self, scored: _Scored, scores: Tensor, labels: Tensor, rounded: Rounded) -> NDArray[np.int64]:
        """Numbers of the sentences of which another tree, or other tags, would score about as much."""
        margins, cells, of = tree_margins(scores.numpy(), scored.scores.numpy(), scored.lengths, self._force_root)
        at = torch.from_numpy(cells)
        of_labels = label_scores(self.model, scored.features[scored.left[at]], scored.features[scored.right[at]])
        of_labels.scatter_(1, labels[at, None] - 1, -torch.inf)
        np.minimum.at(margins, of, (scores[at] - of_labels.amax(1)).numpy())
        close = ~(margins >= rounded.close_score)
        if scored.tags is not None and scored.tags.shape[-1] > 1:
            best, second = scored.tags.topk(2, -1).values.unbind(-1)
            close |= (best - second).masked_fill_(~scored.is_word, torch.inf).amin(1).numpy() < rounded.close_tag
        return close.nonzero()[0]

    @torch.inference_mode()
    def _rounded_body(self) -> Rounded | None:
        """Products in bf16, and what that moves scores by, measured on sentences of words from the vocabulary; None
        where nothing can be measured.
        """
        body, encoded = _body(self.model, torch.bfloat16), self.encoder.samples()
        of_scores, of_tags = [], [torch.zeros(1)]
        for numbers in self.batches(encoded):
            batch = [encoded[number] for number in numbers]
            exact, rounded = self._score(batch, self._exact), self._score(batch, body)
            of_scores.append(rounded.scores - exact.scores)
            if exact.tags is not None and rounded.tags is not None:
                of_tags.append((rounded.tags.amax(-1) - exact.tags.amax(-1))[exact.is_word])
        if not of_scores:
            return None
        score, tag = (_CLOSE * float(torch.cat(moved).square().mean().sqrt()) for moved in (of_scores, of_tags))
        return Rounded(body, score, tag) if np.isfinite([score, tag]).all() else None


class Rounded(NamedTuple):
    """The model's layers with products in bf16, and the differences of scores that rounding could have made."""

    body: Body
    close_score: float
    close_tag: float


class _Scored(NamedTuple):
    """A batch of B sentences, M chart cells in all."""

    lengths: NDArray[np.int64]  # [B]
    features: Tensor  # of fenceposts
    left: Tensor  # [M], rows of features
    right: Tensor
    scores: Tensor  # [M], best of the labels that are not empty, on the CPU
    labels: Tensor  # [M]
    tags: Tensor | None  # scores [B, longest + 2, tags]

    @property
    def is_word(self) -> Tensor:
        """Which positions of ``tags`` are words, and not start, stop or padding: [B, longest + 2]."""
        position = torch.arange(int(self.lengths.max()) + 2)
        return (position > 0) & (position <= torch.from_numpy(self.lengths)[:, None])


def _body(model: ChartParser, dtype: torch.dtype) -> Body:
    """The model's layers with matrix products in ``dtype``."""
    pretrained: Callable[[dict[str, Any], Tensor], Tensor] | None = None
    if is_plain_bert(model.pretrained_model):
        pretrained = FastBert(model.pretrained_model, dtype)
    elif model.pretrained_model is not None and dtype != torch.float32:
        pretrained = partial(read_states, copy.deepcopy(model.pretrained_model).to(dtype))
    return Body(pretrained, None if model.encoder is None else FastPartitionedEncoder(model.encoder, dtype))


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
