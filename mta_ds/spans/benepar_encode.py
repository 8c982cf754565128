"""Words to the padded tensors that a Benepar model reads, many sentences at a time.

Computes what ``benepar.retokenization.Retokenizer`` computes one sentence at a time: sub-words of the sentence's
text, and for each word the index of the sub-word whose vector stands for it.
"""

from __future__ import annotations

import itertools
import string
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from benepar.integrations.spacy_plugin import SentenceWrapper
from benepar.parse_chart import ChartParser
from numpy.typing import NDArray

from mta_ds.spans.decode import compiled

_NORMALIZED: dict[str, str] = SentenceWrapper.TEXT_NORMALIZATION_MAPPING


class Encoded(NamedTuple):
    """One sentence for the model; ``subwords`` and ``types`` are empty for a character model."""

    words: list[str]  # normalised as benepar's spaCy component does
    subwords: list[int]
    types: list[int]
    last_subword: NDArray[np.int64]  # [words + 2]: of start token, words, stop token

    @property
    def cost(self) -> int:
        """Positions that the encoder computes for this sentence."""
        return len(self.subwords) or len(self.words) + 2


class SentenceEncoder:
    """Encodes sentences for one model and knows which sentences the model can take."""

    def __init__(self, model: ChartParser) -> None:
        self._retokenizer = model.retokenizer
        self._characters = model.char_encoder is not None
        # The start and stop tokens take two of the positions.
        self._max_words = len(model.add_timing.timing_table) - 2 if model.encoder is not None else sys.maxsize
        if not self._characters:
            self._tokenizer = self._retokenizer.tokenizer
            self._max_subwords = self._subword_limit(model)
            self._num_special = len(self._tokenizer("")["input_ids"]) + 2
            self._plain = self._plain_characters()

    def _subword_limit(self, model: ChartParser) -> int:
        """The smaller of the tokenizer's limit and the encoder's positions."""
        limit: int = self._tokenizer.model_max_length
        positions = getattr(model.pretrained_model.config, "max_position_embeddings", None)
        table = getattr(getattr(model.pretrained_model, "embeddings", None), "position_embeddings", None)
        # RoBERTa counts positions from the one after padding's.
        first = getattr(table, "padding_idx", None)
        return min(limit, positions - (0 if first is None else first + 1)) if positions else limit

    def _plain_characters(self) -> frozenset[str]:
        """ASCII characters that this tokenizer never drops, so that words made of them need no closer look."""
        candidates = string.ascii_letters + string.digits + string.punctuation
        offsets = self._tokenizer(list(candidates), return_offsets_mapping=True)["offset_mapping"]
        kept = [any(end > start for start, end in pairs) for pairs in offsets]
        return frozenset(character for character, keep in zip(candidates, kept, strict=True) if keep)

    def fits(self, words: Sequence[str], space_after: Sequence[bool]) -> bool:
        """Whether the model can take the sentence: each word has a sub-word, and all fit into its positions."""
        if not words or any(not word or word.isspace() for word in words):
            return False
        normalized = [_NORMALIZED.get(word, word) for word in words]
        return self._clearly_fits(normalized) or self.takes(self.encode([(words, space_after)])[0])

    def _clearly_fits(self, words: Sequence[str]) -> bool:
        """Whether plain words (normalised ones) are so few that it can be told without the tokenizer."""
        if self._characters or len(words) > self._max_words:
            return False
        # A sub-word has at least one character, or stands for the space before a word.
        most = sum(map(len, words)) + len(words) + self._num_special
        return most <= self._max_subwords and self._plain.issuperset("".join(words))

    def takes(self, sentence: Encoded) -> bool:
        """The part of :meth:`fits` that can be told from the encoded sentence."""
        if len(sentence.words) > self._max_words:
            return False
        if self._characters:
            return True
        # T5's decoder reads one token more than the text has, which benepar counts.
        positions = len(sentence.subwords) + self._retokenizer.is_t5
        return positions <= self._max_subwords and bool(sentence.last_subword.min() >= 0)

    def encode(self, sentences: Sequence[tuple[Sequence[str], Sequence[bool]]]) -> list[Encoded]:
        """Encode (words, space_after) pairs; words that leave none at the end get -1 in ``last_subword``."""
        normalized = [[_NORMALIZED.get(word, word) for word in words] for words, _ in sentences]
        if self._characters:
            return [Encoded(words, [], [], np.arange(len(words) + 2)) for words in normalized]
        texts = [
            "".join(word + " " if space else word for word, space in zip(words, spaces, strict=True))
            for words, (_, spaces) in zip(normalized, sentences, strict=True)
        ]
        tokens = self._tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        types = tokens.get("token_type_ids") or [[]] * len(texts)
        return [
            self._align(words, spaces, *row)
            for words, (_, spaces), *row in zip(
                normalized, sentences, tokens["input_ids"], types, tokens["offset_mapping"], strict=True
            )
        ]

    def _align(
        self, words: list[str], spaces: Sequence[bool], subwords: list[int], types: list[int], offsets: list[Any]
    ) -> Encoded:
        if self._retokenizer.is_gpt2:
            subwords = [*subwords, self._tokenizer.eos_token_id]
        # T5's vectors are the decoder's, which reads the text shifted by one.
        shift = int(self._retokenizer.is_t5)
        total = len(subwords) + shift
        lengths = np.array([len(word) for word in words], np.int64)
        starts = np.zeros(len(words), np.int64)
        starts[1:] = np.cumsum(lengths + np.asarray(spaces, np.int64))[:-1]
        last = np.empty(len(words) + 2, np.int64)
        last[1:-1] = _last_subwords(np.asarray(offsets, np.int64).reshape(-1, 2), starts, starts + lengths)
        last[1:-1][last[1:-1] >= 0] += shift
        last[0], last[-1] = self._retokenizer.start_token_idx % total, self._retokenizer.stop_token_idx % total
        return Encoded(words, subwords, types, last)

    def samples(self) -> list[Encoded]:
        """A few dozen sentences of 1 to 32 words, taken from all over the tokenizer's vocabulary: they mean nothing."""
        vocabulary = self._tokenizer.get_vocab()
        names = sorted(vocabulary, key=vocabulary.__getitem__)
        words = [self._tokenizer.convert_tokens_to_string([name]).strip() for name in names]
        words = [word for word in words if word.isalpha()]
        sizes = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32] * 3
        total = sum(sizes)
        words = [words[number * len(words) // total] for number in range(total)] if words else []
        bounds = np.cumsum([0, *sizes]).tolist()
        parts = [tuple(words[first:last]) for first, last in itertools.pairwise(bounds)]
        encoded = self.encode([(part, (True,) * len(part)) for part in parts if part])
        return [one for one in encoded if self.takes(one)]

    def collate(self, sentences: Sequence[Encoded]) -> dict[str, Any]:
        """The padded batch that ``ChartParser.forward`` would read."""
        if self._characters:
            rows = [self._retokenizer(sentence.words, return_tensors="np") for sentence in sentences]
            return dict(self._retokenizer.pad(rows, return_tensors="pt"))
        left = self._tokenizer.padding_side == "left"
        batch = {"input_ids": _pad([s.subwords for s in sentences], self._tokenizer.pad_token_id, left)}
        batch["attention_mask"] = _pad([[1] * len(s.subwords) for s in sentences], 0, left)
        if sentences[0].types:
            batch["token_type_ids"] = _pad([s.types for s in sentences], self._tokenizer.pad_token_type_id, left)
        longest = batch["input_ids"].shape[1]
        shifts = [longest - len(s.subwords) if left else 0 for s in sentences]
        last = [s.last_subword + shift for s, shift in zip(sentences, shifts, strict=True)]
        batch["words_from_tokens"] = _pad(last, -100, left=False)
        batch["valid_token_mask"] = batch["words_from_tokens"] != -100
        if self._retokenizer.is_t5:
            for name, first in (("input_ids", self._tokenizer.pad_token_id), ("attention_mask", 1)):
                batch[f"decoder_{name}"] = torch.nn.functional.pad(batch[name], (1, 0), value=first)
        return batch


def _pad(rows: Sequence[Sequence[int] | NDArray[np.int64]], value: int, left: bool) -> torch.Tensor:
    longest = max(map(len, rows))
    padded = np.full((len(rows), longest), value, np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[longest - len(row) if left else 0 : longest if left else len(row)] = row
    return torch.from_numpy(padded)


@compiled
def _last_subwords(offsets, starts, ends):  # type: ignore[no-untyped-def]
    """For each word the sub-word that stands for it, or -1 where it has none: int64 [words].

    As in benepar: the last sub-word that ends inside the word, else the next one that ends behind it. It reaches across
    the word's end or, where the tokenizer makes nothing of the word (zero-width characters, an emoji's variation
    selector), belongs to a later word; behind the last there is none, and benepar fails.
    """
    last = np.full(len(starts), -1, np.int64)
    token = 0
    for word in range(len(starts)):
        while token < len(offsets) and (offsets[token, 0] == offsets[token, 1] or offsets[token, 1] <= starts[word]):
            token += 1
        if token < len(offsets) and offsets[token, 1] > ends[word]:
            last[word] = token
        while token < len(offsets) and offsets[token, 1] <= ends[word]:
            if offsets[token, 0] != offsets[token, 1]:
                last[word] = token
            token += 1
    return last
