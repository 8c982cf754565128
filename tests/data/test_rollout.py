"""A student's answer as an example: every generated id's place in the text, on every family of tokenizer."""

from __future__ import annotations

import json
import re
import string
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import gpt2_backend
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mta_ds.data import (
    GRANULARITIES,
    Example,
    ParsedResponse,
    UnitConfig,
    Units,
    collate,
    decode_with_offsets,
    rollout_example,
)

FAMILIES = ("gpt2", "byte-level", "metaspace", "metaspace-bare", "unigram", "wordpiece", "suffix")
STRAY = "\ufffd"
EOS, ROLE = "<|end|>", "<|role|>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It costs $5.00 (five dollars).",
    "naïve café coöperate 😀 👩‍👩‍👧 שלום עולם 漢字かな line\nbreak\ttab  two spaces",
] * 30


@cache
def tokenizer(family: str) -> PreTrainedTokenizerFast:
    """With the decoder that belongs to its family, an EOS, and a special token that has no role."""
    backend = gpt2_backend() if family == "gpt2" else train(family)
    backend.add_special_tokens([EOS, ROLE])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=EOS)


def train(family: str) -> Tokenizer:
    trainer, options = trainers.BpeTrainer, {"special_tokens": ["<unk>"]}
    if family == "byte-level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif family.startswith("metaspace"):  # as Llama 2: characters out of the vocabulary fall back to their bytes
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        scheme = "never" if family.endswith("bare") else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps[:3] if family.endswith("bare") else steps)
        options = {"special_tokens": ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]}
        options |= {"initial_alphabet": list(string.ascii_letters), "limit_alphabet": 60}
    elif family == "unigram":  # as T5
        backend, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        options |= {"unk_token": "<unk>"}
    elif family == "wordpiece":  # as BERT
        backend, trainer = Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
        backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else:  # as GPT-1: a mark at each word's end
        backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
        options |= {"end_of_word_suffix": "</w>"}
    backend.train_from_iterator(CORPUS, trainer(vocab_size=600, show_progress=False, **options))
    if family.startswith("metaspace"):  # trained as special so that they exist; they are bytes of text
        state = json.loads(backend.to_str())
        state["added_tokens"] = [entry for entry in state["added_tokens"] if entry["content"] == "<unk>"]
        backend = Tokenizer.from_str(json.dumps(state))
    return backend


def encode(family: str, text: str) -> list[int]:
    ids: list[int] = tokenizer(family).backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def byte_ids(family: str, raw: bytes) -> list[int]:
    """One token for each byte; where bytes are only a fallback, ASCII has tokens of its own."""
    if family.startswith("metaspace"):
        names = {byte: chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in range(256)} | {32: "▁"}
    else:
        names = {ord(c): c for c in pre_tokenizers.ByteLevel.alphabet() if ord(c) < 256}
        names |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in names)}
    return [tokenizer(family).backend_tokenizer.token_to_id(names[byte]) for byte in raw]


def whole_text(family: str, ids: list[int]) -> str:
    """The tokenizer's own text."""
    text: str = tokenizer(family).backend_tokenizer.decode(ids, skip_special_tokens=True)
    return text


def by_prefixes(family: str, ids: list[int]) -> list[tuple[int, int]]:
    """By definition: where the text of all ids so far ends, once with and once without the id."""
    ranges, first, done = [], 0, 0
    for i in range(len(ids)):
        so_far = whole_text(family, ids[: i + 1])
        if not so_far.endswith(STRAY):  # all of its characters are complete
            ranges += [(done, len(so_far))] * (i + 1 - first)
            first, done = i + 1, len(so_far)
    assert first == len(ids)
    return ranges


def assert_well_formed(family: str, ids: list[int], text: str, offsets: np.ndarray) -> None:
    assert offsets.shape == (len(ids), 2) and offsets.dtype == np.int64
    starts, ends = offsets[:, 0].tolist(), offsets[:, 1].tolist()
    assert all(0 <= a <= b <= len(text) for a, b in zip(starts, ends, strict=True))
    assert all(a <= b for a, b in pairwise(starts))
    placed = [(a, b) for a, b in zip(starts, ends, strict=True) if a < b]
    assert all(b == c or (a, b) == (c, d) for (a, b), (c, d) in pairwise(placed))  # side by side, or shared
    assert (placed[0][0], placed[-1][1]) == (0, len(text)) if placed else text == ""
    special = set(tokenizer(family).convert_tokens_to_ids([EOS, ROLE]))
    assert all(a == b for token, a, b in zip(ids, starts, ends, strict=True) if token in special)
    assert STRAY not in text


WORDS = st.sampled_from(
    ["The", "fox", "it's", "naïve", "😀", "é", "👩‍👩‍👧", "שלום", "漢字", "$5.00", "ﬁne", "①", "x", "cafe\u0301", "🦖"]
)
GAPS = st.sampled_from([" ", "  ", "\n", "\t", "", " \r\n", "\u200b", "\u00a0", ", ", " . "])
CHARACTERS = st.characters(exclude_characters=STRAY, exclude_categories=["Cs"])
TEXTS = st.one_of(
    st.text(CHARACTERS, max_size=25),
    st.lists(st.tuples(WORDS, GAPS), max_size=8).map(lambda pairs: "".join(w + g for w, g in pairs)),
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=120)
@given(text=TEXTS)
def test_encoded_text(family: str, text: str) -> None:
    ids = encode(family, text)
    found, offsets = decode_with_offsets(ids, tokenizer(family))
    assert found == whole_text(family, ids)
    if family in ("gpt2", "byte-level", "metaspace-bare"):  # the others normalise
        assert found == text
    assert_well_formed(family, ids, found, offsets)
    for (start, end), expected in zip(offsets.tolist(), by_prefixes(family, ids), strict=True):
        assert (start, end) == expected


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150)
@given(data=st.data())
def test_any_ids(family: str, data: st.DataObject) -> None:
    """What an untrained student writes; also ids in the padding of its head, which are no tokens."""
    size = len(tokenizer(family))
    tokens = st.integers(0, size + 3)
    if family in ("gpt2", "byte-level", "metaspace", "metaspace-bare"):
        loose = byte_ids(family, "é漢😀".encode() + b"\xff\xc3")
        tokens = st.one_of(tokens, st.sampled_from([*loose, *tokenizer(family).convert_tokens_to_ids([EOS, ROLE])]))
    ids = data.draw(st.lists(tokens, max_size=30))
    text, offsets = decode_with_offsets(ids, tokenizer(family))
    assert_well_formed(family, ids, text, offsets)
    expected = whole_text(family, ids)
    if not family.startswith("metaspace") or STRAY not in expected:  # there, one stray byte spoils its neighbours
        assert text == expected.replace(STRAY, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_word_is_where_its_ids_are(family: str) -> None:
    ids = encode(family, "The fox costs five dollars")
    text, offsets = decode_with_offsets(np.array(ids, dtype=np.int32), tokenizer(family))
    assert text.lower() == "the fox costs five dollars"
    for token, (start, end) in zip(ids, offsets.tolist(), strict=True):
        written = tokenizer(family).convert_ids_to_tokens(token)
        assert text[start:end].strip() == re.sub("▁|Ġ|##|</w>", "", written)


@pytest.mark.parametrize("family", ["gpt2", "byte-level", "metaspace-bare"])
def test_bytes_of_one_character_share_its_range(family: str) -> None:
    ids = byte_ids(family, "a🦖é".encode())
    text, offsets = decode_with_offsets(ids, tokenizer(family))
    assert text == "a🦖é"
    assert offsets.tolist() == [[0, 1], *[[1, 2]] * 4, *[[2, 3]] * 2]


@pytest.mark.parametrize("family", ["gpt2", "byte-level", "metaspace-bare"])
@pytest.mark.parametrize(
    ("raw", "text", "ranges"),
    [
        (b"a\xf0\x9f\xa6", "a", [(0, 1), (1, 1), (1, 1), (1, 1)]),  # the answer was cut off
        (b"\xc3", "", [(0, 0)]),
        (b"\xffa", "a", [(0, 0), (0, 1)]),
        (b"a\xff\xffb", "ab", [(0, 1), (1, 1), (1, 1), (1, 2)]),
        (b"a\xe6\xbc b", "a b", [(0, 1), (1, 1), (1, 1), (1, 2), (2, 3)]),
        ("a\ufffdb".encode(), "ab", [(0, 1), (1, 1), (1, 1), (1, 1), (1, 2)]),  # what stands for no character
    ],
)
def test_bytes_that_make_no_character_have_no_place(family: str, raw: bytes, text: str, ranges: list) -> None:
    found, offsets = decode_with_offsets(byte_ids(family, raw), tokenizer(family))
    assert found == text
    assert [tuple(row) for row in offsets.tolist()] == ranges


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_no_text(family: str) -> None:
    end, role = tokenizer(family).convert_tokens_to_ids([EOS, ROLE])
    first, second = encode(family, "The fox"), encode(family, "costs")
    plain, where = decode_with_offsets([*first, *second], tokenizer(family))
    text, offsets = decode_with_offsets([role, *first, end, role, *second, end], tokenizer(family))
    assert text == plain and EOS not in text
    last = where[len(first) - 1, 1]
    at = [[0, 0]], [[last, last]] * 2, [[len(text)] * 2]
    assert offsets.tolist() == [*at[0], *where[: len(first)].tolist(), *at[1], *where[len(first) :].tolist(), *at[2]]
    for nothing in ([], [end], [end, end]):
        text, offsets = decode_with_offsets(nothing, tokenizer(family))
        assert text == "" and offsets.tolist() == [[0, 0]] * len(nothing)


def units_of(text: str, *phrases: tuple[str, str]) -> Units:
    """Every word of the text, and constituents by label and words."""
    words = np.array([match.span() for match in re.finditer(r"\S+", text)], dtype=np.int32).reshape(-1, 2)
    rows = []
    for _, phrase in phrases:
        start = text.index(phrase)
        inside = [i for i, (a, b) in enumerate(words.tolist()) if start <= a and b <= start + len(phrase)]
        rows.append([inside[0], inside[-1] + 1, 1])
    bounds, labels = np.array([0, len(words)]), [label for label, _ in phrases]
    return Units(b"", len(text), bounds, words, [""] * len(words), np.array(rows).reshape(-1, 3), labels)


def parse_of(response: list[int], units: Units) -> ParsedResponse:
    return ParsedResponse(*decode_with_offsets(response, tokenizer("byte-level")), units)


def make_asked() -> Example:
    """Five tokens of a prompt and a response of its own, with spans in both and one across."""
    ids = np.arange(10, 18, dtype=np.int32)
    labels = np.where(np.arange(8) < 5, -100, ids).astype(np.int32)
    spans = {
        "word": np.array([[0, 1], [2, 5], [5, 6]], dtype=np.int32),
        "phrase": np.array([[0, 3], [3, 5], [4, 7], [6, 8]], dtype=np.int32),
    }
    return Example("r7", ids, labels, spans, 5)


CONFIG = UnitConfig()


def test_spans_lie_on_the_generated_ids() -> None:
    """The ids are not those that encoding the text gives: a letter at a time."""
    written = "the big 🦖 ate two dogs"
    end = tokenizer("byte-level").eos_token_id
    response = [*byte_ids("byte-level", written.encode()), end]
    assert response[:-1] != encode("byte-level", written)
    units = units_of(written, ("NP", "the big 🦖"), ("VP", "ate two dogs"), ("NP", "two dogs"))
    asked = make_asked()
    example = rollout_example(asked, response, parse_of(response, units), CONFIG)

    assert (example.record_id, example.prompt_length, example.is_rejected) == ("r7", 5, False)
    assert example.input_ids.tolist() == [10, 11, 12, 13, 14, *response]
    assert example.labels.tolist() == [-100] * 5 + response
    assert example.input_ids.dtype == example.labels.dtype == np.int32
    texts = {}
    for name in GRANULARITIES:
        spans = example.spans[name]
        assert spans.dtype == np.int32
        before = spans[spans[:, 1] <= 5].tolist()
        assert before == [row for row in asked.spans[name].tolist() if row[1] <= 5]
        texts[name] = [
            whole_text("byte-level", example.input_ids[a:b].tolist()).strip() for a, b in spans[len(before) :].tolist()
        ]
    assert texts["phrase"] == ["the big 🦖", "ate two dogs", "two dogs"]
    assert texts["word"] == ["the", "big", "🦖", "ate", "two", "dogs"]
    dinosaur = example.spans["word"][len(asked.spans["word"]) - 1 + 2]
    assert dinosaur[1] - dinosaur[0] in (4, 5)  # its four bytes, and the space before them or not
    assert asked.input_ids.tolist() == list(range(10, 18))  # the record's own example is left as it was

    batch = collate([example, asked], pad_id=0)
    assert batch.counts.tokens == len(response) + 3 and batch.counts.covered == {"word": 2, "phrase": 2}


def test_units_on_the_same_ids_are_one_span() -> None:
    """As for records: the longer phrase's last word lies in an id that reaches beyond it, so that both end alike."""
    pair = next(token for token in sorted(tokenizer("byte-level").get_vocab()) if re.fullmatch("[a-z]{2}", token))
    response = [*byte_ids("byte-level", b"a b "), tokenizer("byte-level").backend_tokenizer.token_to_id(pair)]
    words = np.array([[0, 1], [2, 3], [4, 5], [5, 6]], dtype=np.int32)
    phrases = np.array([[0, 3, 2], [0, 2, 1], [2, 3, 1]])
    units = Units(b"", 6, np.array([0, 4]), words, [""] * 4, phrases, ["VP", "NP", "NP"])
    example = rollout_example(make_asked(), response, parse_of(response, units), CONFIG)
    assert example.spans["phrase"].tolist() == [[0, 3], [3, 5], [5, 8]]
    assert example.spans["word"].tolist() == [[0, 1], [2, 5], [5, 6], [7, 8]]


def test_the_configured_units_are_chosen() -> None:
    written = "the dog ate"
    response = byte_ids("byte-level", written.encode())
    units = units_of(written, ("NP", "the dog"))
    every = rollout_example(make_asked(), response, parse_of(response, units), UnitConfig(words="all"))
    none = rollout_example(make_asked(), response, parse_of(response, units), UnitConfig(labels=("VP",)))
    assert len(every.spans["word"]) == 2 + 3 and len(every.spans["phrase"]) == 2 + 1
    assert {name: len(spans) for name, spans in none.spans.items()} == {"word": 2, "phrase": 2}


def test_without_a_parse_there_are_no_spans() -> None:
    response = byte_ids("byte-level", b"the dog")
    example = rollout_example(make_asked(), response, None, CONFIG)
    for spans in example.spans.values():
        assert spans.shape == (0, 2) and spans.dtype == np.int32
    assert example.labels.tolist() == [-100] * 5 + response
    assert collate([example], pad_id=0).counts.covered == {"word": 0, "phrase": 0}


def test_an_answer_of_eos_alone() -> None:
    end = tokenizer("byte-level").eos_token_id
    example = rollout_example(make_asked(), [end], parse_of([end], units_of("")), CONFIG)
    assert example.input_ids.tolist() == [10, 11, 12, 13, 14, end]
    assert example.spans["word"].tolist() == [[0, 1], [2, 5]]
    assert example.spans["phrase"].tolist() == [[0, 3], [3, 5]]
    assert collate([example], pad_id=0).counts.tokens == 1
