"""What benepar itself answers, and tiny random models of the kinds that it releases and trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from benepar.integrations.spacy_plugin import SentenceWrapper
from benepar.nkutil import HParams
from benepar.parse_base import BaseInputExample
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5Tokenizer,
)

from mta_ds.spans.benepar_model import build_chart_parser
from mta_ds.spans.benepar_parser import BeneparParser
from mta_ds.spans.parser import Parse, Sentence


def sentence(text: str) -> Sentence:
    """Words between spaces; no white space before closing punctuation."""
    words = tuple(text.split(" "))
    return Sentence(words, tuple(following not in ".,?!" for following in (*words[1:], ".")))


class Example(BaseInputExample):
    """A sentence as benepar's spaCy component would hand it to the model."""

    tree = None

    def __init__(self, given: Sentence) -> None:
        self.words = [SentenceWrapper.TEXT_NORMALIZATION_MAPPING.get(word, word) for word in given.words]
        self.space_after = list(given.space_after)

    def leaves(self) -> list[str]:
        return self.words

    def pos(self) -> list[tuple[str, str]]:
        return [(word, "UNK") for word in self.words]


def benepar_parses(parser: BeneparParser, sentences: Sequence[Sentence]) -> list[tuple[list[str], set]]:
    """Tags and (start, end, label) that benepar's own parse() finds."""
    model = parser.model
    outputs = model.parse([Example(s) for s in sentences], return_compressed=True, subbatch_max_tokens=1000)
    labels, tags = model.decoder.label_from_index, model.tag_from_index
    return [
        (
            [tags[tag] for tag in output.tags] if tags else [""] * len(s.words),
            {(b, e, labels[n]) for b, e, n in zip(output.starts, output.ends, output.labels, strict=True) if labels[n]},
        )
        for s, output in zip(sentences, outputs, strict=True)
    ]


def plain(parses: Sequence[Parse]) -> list[tuple[list[str], set]]:
    return [(list(p.tags), {(c.start_word, c.end_word, c.label) for c in p.constituents}) for p in parses]


# Tiny random models of the kinds that Benepar's releases and training script write.

LETTERS = [chr(code) for code in range(33, 127)]
LABELS = {"": 0, "NP": 1, "S": 2, "S::VP": 3, "VP": 4}


def bert() -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{x}" for x in LETTERS), "the", "cannot"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, model_max_length=64)
    return tokenizer, BertConfig(vocab_size=len(pieces), max_position_embeddings=64, **sizes)


def t5() -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁the", "▁cannot", *LETTERS, *(f"▁{x}" for x in LETTERS)]
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    vocabulary = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)
    return tokenizer, T5Config(vocab_size=len(pieces), decoder_start_token_id=0, **sizes)


def gpt2() -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = GPT2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], model_max_length=64
    )
    return tokenizer, GPT2Config(vocab_size=len(pieces), n_embd=16, n_layer=1, n_head=2, n_positions=64)


ENCODERS = {"bert": bert, "t5": t5, "gpt2": gpt2}


def hparams(encoder: str | None, use_encoder: bool = True, predict_tags: bool = True) -> dict:
    """Benepar's hyper-parameters of a tiny model."""
    return {
        "d_model": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "d_label_hidden": 12,
        "d_tag_hidden": 12, "attention_dropout": 0.1, "residual_dropout": 0.1, "relu_dropout": 0.1,
        "morpho_emb_dropout": 0.1, "encoder_max_len": 40, "use_chars_lstm": encoder is None, "d_char_emb": 8,
        "char_lstm_input_dropout": 0.1, "use_pretrained": encoder is not None, "pretrained_model": encoder,
        "use_encoder": use_encoder, "predict_tags": predict_tags, "tag_loss_scale": 5.0,
    }  # fmt: skip


def parser_config(values: dict, characters: dict[str, int] | None = None) -> dict:
    tags = {"UNK": 0, "NN": 1, "VB": 2}
    return {"tag_vocab": tags, "label_vocab": LABELS, "char_vocab": characters, "hparams": values}


def built(config: dict, **extra: str) -> torch.nn.Module:
    torch.manual_seed(0)
    hparams_object = HParams(**config["hparams"], force_root_constituent=True)
    model = build_chart_parser({**config, "hparams": hparams_object, **extra})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that trees differ from sentence to sentence
    return model


def save_encoder(kind: str, folder: Path) -> None:
    tokenizer, config = ENCODERS[kind]()
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def save_folder(folder: Path, kind: str = "bert", **options: bool) -> Path:
    """A model in the folder format of Benepar's releases."""
    save_encoder(kind, folder)
    config = parser_config(hparams("somewhere/encoder", **options))
    model = built(config, pretrained_model_path=str(folder))
    torch.save(model.state_dict(), folder / "benepar_model.bin")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, "benepar": config}), encoding="utf-8")
    return folder


SIMPLE = [
    sentence("the dog saw Running cats ."),
    sentence("cannot"),
    Sentence(("can", "not", "go", "(", "on", ")"), (False, True, True, False, False, False)),
    sentence("“ a ’ b ” — « c »"),
    sentence("thing " * 8 + "end"),
]
