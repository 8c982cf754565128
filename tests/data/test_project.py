"""Character ranges to token ranges, against the definition, on every family of fast tokenizer."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gpt2_backend
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mta_ds.data import project

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It costs $5.00 (five dollars).",
    "naïve café coöperate 😀 👩‍👩‍👧 שלום עולם 漢字かな line\nbreak\ttab  two spaces",
] * 30
FAMILIES = ("byte-level", "byte-level-prefix", "metaspace", "metaspace-bare", "unigram", "wordpiece", "gpt2")


@cache
def tokenizer(family: str) -> Tokenizer:
    if family == "gpt2":
        return gpt2_backend()
    if family.startswith("byte-level"):
        backend, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=family.endswith("prefix"))
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif family.startswith("metaspace"):
        backend, trainer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>")), trainers.BpeTrainer
        scheme = "never" if family.endswith("bare") else "always"  # a space before the text, or none
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        options = {"special_tokens": ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]}
    elif family == "unigram":
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        options = {"special_tokens": ["<unk>"], "unk_token": "<unk>"}
    else:
        backend, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        options = {"special_tokens": ["[UNK]"]}
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainer(vocab_size=600, show_progress=False, **options))
    return backend


def offsets_of(family: str, text: str) -> np.ndarray:
    return np.array(tokenizer(family).encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)


def by_definition(text: str, offsets: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First to last of the tokens that, leading white space aside, are something and lie inside the unit."""
    inside = []
    for i, (a, b) in enumerate(offsets.tolist()):
        while a < b and text[a].isspace():
            a += 1
        if a < b and start <= a and b <= end:
            inside.append(i)
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


WORDS = st.sampled_from(
    [
        "The",
        "fox",
        "it's",
        "naïve",
        "😀",
        "é",
        "👩\u200d👩\u200d👧",
        "שלום",
        "漢字",
        "$5.00",
        "ﬁne",
        "①",
        "x",
        "cafe\u0301",
        "a\u0308\u0323",
    ]
)
GAPS = st.sampled_from([" ", "  ", "\n", "\t", "", " \r\n", "\u200b", "\u00a0"])
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(st.tuples(WORDS, GAPS), max_size=10).map(lambda p: "".join(w + g for w, g in p))
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150)
@given(text=TEXTS, data=st.data())
def test_equals_the_definition(family: str, text: str, data: st.DataObject) -> None:
    offsets = offsets_of(family, text)
    edges = st.integers(0, len(text))
    drawn = data.draw(st.lists(st.tuples(edges, edges), max_size=6))
    units = np.array([(min(u), max(u)) for u in drawn], dtype=np.int64).reshape(-1, 2)
    found = project(text, offsets, units)
    assert found.dtype == np.int32 and found.shape == (len(units), 2)
    for (start, end), (first, last) in zip(units.tolist(), found.tolist(), strict=True):
        expected = by_definition(text, offsets, start, end)
        assert (first, last) == expected or (first >= last and expected == (0, 0))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_their_own_tokens(family: str) -> None:
    text = "It costs $5.00, doesn't it? naïve 😀 dog"
    offsets = offsets_of(family, text)
    for word in ("It", "costs", "naïve", "dog"):
        start = text.index(word)
        ((first, last),) = project(text, offsets, np.array([[start, start + len(word)]]))
        assert first < last
        assert text[offsets[first, 0] : offsets[last - 1, 1]].strip() == word


@pytest.mark.parametrize("family", ["byte-level", "gpt2"])
def test_bytes_of_one_character_all_belong(family: str) -> None:
    text = "a 🦖 b"
    offsets = offsets_of(family, text)
    ((first, last),) = project(text, offsets, np.array([[2, 3]]))
    assert last - first == sum(1 for a, b in offsets.tolist() if b == 3 and a <= 2) >= 3


def test_a_straddling_token_belongs_to_neither_side() -> None:
    text = "ab cd"
    offsets = np.array([[0, 1], [1, 4], [4, 5]])
    assert project(text, offsets, np.array([[0, 2], [3, 5], [0, 5]])).tolist() == [[0, 1], [2, 3], [0, 3]]


def test_nothing_to_project() -> None:
    assert project("", np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int64)).shape == (0, 2)
    assert project("ab", np.zeros((0, 2), np.int64), np.array([[0, 2]])).tolist() == [[0, 0]]
