"""Benepar through load_parser: benepar's own trees, every kind of model, hostile sentences, hostile files."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import nltk
import pytest
import torch
from benepar import char_lstm
from benepar.decode_chart import ChartDecoder
from benepar.integrations.spacy_plugin import SentenceWrapper
from benepar.nkutil import HParams
from benepar.parse_base import BaseInputExample
from tokenizers import pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
    T5Tokenizer,
)

from mta_ds.errors import UserError
from mta_ds.spans.benepar_model import build_chart_parser
from mta_ds.spans.parser import BUNDLED, BeneparParser, Constituent, Parse, Sentence, WordsOnly, load_parser

ROOT = Path(__file__).parents[2]
TREEBANK = ROOT.parent / "shared" / "data" / "treebank"
needs_treebank = pytest.mark.skipif(not TREEBANK.is_dir(), reason=f"no treebank at {TREEBANK}")

TEXTS = [
    "The quick brown fox jumps over the lazy dog .",
    "Yes",
    "!",
    "What is the capital of France , and why did she say “ I do n't know ” ?",
    "« Naïve » cafés — 50 % of them [ sic ] { more or less } ( closed ) ` then ’ .",
    "Write a Python function that adds two numbers and returns the result to whoever calls it .",
    "👩‍👩‍👧 said : 你好 , ßtraße supercalifragilisticexpialidocious !!! a.b.c@d.example http://x.y/z?q=1",
    "He gave the report that the committee had asked for to the woman who runs the office in Leeds .",
]


def sentence(text: str) -> Sentence:
    """Words between spaces; no white space before closing punctuation."""
    words = tuple(text.split(" "))
    return Sentence(words, tuple(following not in ".,?!" for following in (*words[1:], ".")))


SENTENCES = [sentence(text) for text in TEXTS]


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


@pytest.fixture(scope="module")
def bundled() -> BeneparParser:
    parser = load_parser(None)
    assert isinstance(parser, BeneparParser)
    return parser


@pytest.fixture(scope="module")
def examples() -> Iterator[None]:
    """examples/parser importable, as when its scripts run."""
    sys.path.insert(0, str(ROOT / "examples" / "parser"))
    yield
    sys.path.remove(str(ROOT / "examples" / "parser"))


class TestBundledModel:
    def test_trees_are_benepars(self, bundled: BeneparParser) -> None:
        assert plain(bundled.parse(SENTENCES)) == benepar_parses(bundled, SENTENCES)

    @needs_treebank
    def test_trees_are_benepars_on_the_treebank(self, bundled: BeneparParser, examples: None) -> None:
        from treebank import example_from_tree, read_trees

        found = [example_from_tree(tree) for tree in read_trees(TREEBANK / "gum_dev.mrg")[::3]]
        sentences = [Sentence(tuple(e.tree.leaves()), tuple(e.space_after)) for e in found]
        assert plain(bundled.parse(sentences)) == benepar_parses(bundled, sentences)

    @needs_treebank
    def test_scores(self, bundled: BeneparParser, examples: None) -> None:
        from bracket_f1 import score
        from silver import bracketed
        from treebank import example_from_tree, read_trees

        gold = [example_from_tree(tree) for tree in read_trees(TREEBANK / "gum_dev.mrg")]
        sentences = [Sentence(tuple(example.words), tuple(example.space_after)) for example in gold]
        lines = [bracketed(s, parse) for s, parse in zip(sentences, bundled.parse(sentences), strict=True)]
        counts = score([example.tree for example in gold], [nltk.Tree.fromstring(line) for line in lines])
        assert counts.f1() >= 80
        assert counts.f1("NP") >= 85
        assert counts.f1("VP") >= 85

    def test_a_parse(self, bundled: BeneparParser) -> None:
        (parse,) = bundled.parse([sentence("The old man saw a dog in the park .")])
        assert parse.tags == ("DT", "JJ", "NN", "VBD", "DT", "NN", "IN", "DT", "NN", ".")
        assert parse.constituents[0] == Constituent(0, 10, "S", parse.constituents[0].height)
        assert Constituent(0, 3, "NP", 1) in parse.constituents
        assert Constituent(7, 9, "NP", 1) in parse.constituents
        assert Constituent(6, 9, "PP", 2) in parse.constituents

    def test_order_and_company_do_not_matter(self, bundled: BeneparParser) -> None:
        alone = [bundled.parse([one])[0] for one in SENTENCES]
        assert bundled.parse(SENTENCES) == alone
        assert bundled.parse(SENTENCES[::-1] * 20) == alone[::-1] * 20
        assert bundled.parse([]) == []

    def test_longest_sentence(self, bundled: BeneparParser) -> None:
        assert bundled.fits(sentence("a " * 509 + "b"))
        assert not bundled.fits(sentence("a " * 510 + "b"))
        (parse,) = bundled.parse([sentence("dogs and " * 254 + "cats .")])
        assert len(parse.tags) == 510

    @pytest.mark.parametrize("word", ["\u200b\u200b", " ", "\n\t", "\u00a0", "\x00", "\ufeff", ""])
    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_white_space_and_last_words_that_vanish_do_not_fit(
        self, bundled: BeneparParser, word: str, place: int
    ) -> None:
        words = ["one", "two"]
        words.insert(place, word)
        takes = word != "" and not word.isspace() and place < 2
        assert bundled.fits(Sentence(tuple(words), (True,) * 3)) == takes

    def test_words_that_vanish_stand_for_the_next_as_in_benepar(self, bundled: BeneparParser) -> None:
        # an emoji with its variation selector, which spaCy makes two words of and BERT's tokenizer drops
        rest = sentence("After a cloudy dawn the sun will take over .")
        sun = Sentence(("\u2600", "\ufe0f", *rest.words), (False, True, *rest.space_after))
        within = sentence("We love \u200b\u200b \ufeff \ufe0f warm days .")
        assert bundled.fits(sun) and bundled.fits(within)
        assert plain(bundled.parse([sun, within])) == benepar_parses(bundled, [sun, within])

    def test_what_does_not_fit_is_refused_by_number(self, bundled: BeneparParser) -> None:
        for hostile in (Sentence(("a", "\u200b\u200b"), (True, True)), sentence("a " * 510 + "b")):
            with pytest.raises(ValueError, match="number 1 does not"):
                bundled.parse([SENTENCES[0], hostile])

    def test_odd_words_fit(self, bundled: BeneparParser) -> None:
        odd = [*SENTENCES, sentence("a\u200bb e\u0301 \U0001f600 שלום x" + "\u0301" * 20)]
        assert all(bundled.fits(one) for one in odd)
        assert [len(parse.tags) for parse in bundled.parse(odd)] == [len(one.words) for one in odd]

    def test_nothing_does_not_fit(self, bundled: BeneparParser) -> None:
        assert not bundled.fits(Sentence((), ()))

    def test_size(self) -> None:
        assert sum(file.stat().st_size for file in BUNDLED.rglob("*")) <= 25e6

    def test_identity(self, bundled: BeneparParser, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(BUNDLED, tmp_path / "copied"))
        other = load_parser(str(copy))
        assert (other.name, other.fingerprint) == ("copied", bundled.fingerprint)
        assert set(bundled.versions) == {"benepar", "torch", "transformers", "tokenizers"}
        weights = torch.load(copy / "benepar_model.bin", weights_only=True)
        weights["f_label.3.bias"] += 1
        torch.save(weights, copy / "benepar_model.bin")
        assert load_parser(str(copy)).fingerprint != bundled.fingerprint

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("spec", ["", "bf16:"])
    def test_on_a_gpu(self, spec: str) -> None:
        on_gpu, on_cpu = load_parser(spec or None, "cuda").parse(SENTENCES), load_parser(spec or None).parse(SENTENCES)
        differing = sum(a != b for a, b in zip(on_gpu, on_cpu, strict=True))
        assert differing <= (1 if spec else 0)

    def test_computed_in_single_precision(self, bundled: BeneparParser) -> None:
        assert {p.dtype for p in bundled.model.parameters()} == {torch.float32}

    def test_transformers_is_left_as_it_was(self, bundled: BeneparParser) -> None:
        assert not hasattr(PreTrainedTokenizerBase, "build_inputs_with_special_tokens")


class TestWordsOnly:
    def test_words_without_constituents(self) -> None:
        parser = load_parser("none")
        assert isinstance(parser, WordsOnly)
        hostile = Sentence(("\u200b\u200b", "a" * 10000), (False, True))
        assert parser.fits(hostile)
        assert parser.parse([hostile]) == [Parse(("", ""), ())]

    def test_sentence_lengths_must_agree(self) -> None:
        with pytest.raises(ValueError, match="space_after"):
            Sentence(("a", "b"), (True,))


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


class TestOtherModels:
    @pytest.mark.parametrize("kind", ENCODERS)
    @pytest.mark.parametrize("use_encoder", [True, False])
    def test_folder(self, kind: str, use_encoder: bool, tmp_path: Path) -> None:
        parser = load_parser(str(save_folder(tmp_path / kind, kind, use_encoder=use_encoder)))
        assert isinstance(parser, BeneparParser)
        assert parser.name == kind
        found = plain(parser.parse(SIMPLE))
        assert found == benepar_parses(parser, SIMPLE)
        assert all(constituents for _, constituents in found)

    def test_no_tags(self, tmp_path: Path) -> None:
        parser = load_parser(str(save_folder(tmp_path, predict_tags=False)))
        assert parser.parse(SIMPLE)[0].tags == ("",) * 6

    def test_limits(self, tmp_path: Path) -> None:
        parser = load_parser(str(save_folder(tmp_path)))
        assert parser.fits(sentence("a " * 37 + "b"))
        assert not parser.fits(sentence("a " * 38 + "b"))  # words: encoder_max_len
        assert parser.fits(sentence("z" * 62))
        assert not parser.fits(sentence("z" * 63))  # sub-words: max_position_embeddings

    def test_limit_of_t5(self, tmp_path: Path) -> None:
        parser = load_parser(str(save_folder(tmp_path, "t5")))
        longest = next(n for n in range(70, 0, -1) if parser.fits(sentence("z" * n)))
        parser.parse([sentence("z" * longest)])
        assert isinstance(parser, BeneparParser)
        benepar_parses(parser, [sentence("z" * longest)])
        with pytest.raises(ValueError, match="exceeds"):
            benepar_parses(parser, [sentence("z" * (longest + 1))])

    def test_padding_on_the_left(self, tmp_path: Path) -> None:
        parser = load_parser(str(save_folder(tmp_path)))
        assert isinstance(parser, BeneparParser)
        expected = parser.parse(SIMPLE)
        parser.model.retokenizer.tokenizer.padding_side = "left"
        # BERT's positions shift with the padding: compare with benepar under the same padding, batch by batch.
        assert plain(parser.parse(SIMPLE[2:3])) == benepar_parses(parser, SIMPLE[2:3])
        assert parser.parse(SIMPLE[2:3]) == expected[2:3]

    def test_weights_that_transformers_dropped(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        weights = torch.load(folder / "benepar_model.bin", weights_only=True)
        weights["pretrained_model.embeddings.position_ids"] = torch.arange(64)[None]
        torch.save(weights, folder / "benepar_model.bin")
        assert load_parser(str(folder)).parse(SIMPLE)

    def test_checkpoint_of_a_character_model(self, tmp_path: Path) -> None:
        characters = char_lstm.RetokenizerForCharLSTM.build_vocab([("abc",)])
        config = parser_config(hparams(None), characters)
        torch.save({"config": config, "state_dict": built(config).state_dict()}, tmp_path / "model.pt")
        parser = load_parser(str(tmp_path / "model.pt"))
        assert isinstance(parser, BeneparParser)
        assert parser.name == "model.pt"
        assert plain(parser.parse(SIMPLE)) == benepar_parses(parser, SIMPLE)
        assert parser.fits(sentence("a " * 37 + "b")) and not parser.fits(sentence("a " * 38 + "b"))

    def test_checkpoint_with_its_encoder_beside_it(self, tmp_path: Path) -> None:
        save_encoder("bert", tmp_path / "encoder")
        config = parser_config(hparams("encoder"))
        model = built(config, pretrained_model_path=str(tmp_path / "encoder"))
        torch.save({"config": config, "state_dict": model.state_dict()}, tmp_path / "model.pt")
        parser = load_parser(str(tmp_path / "model.pt"))
        assert isinstance(parser, BeneparParser)
        assert plain(parser.parse(SIMPLE)) == benepar_parses(parser, SIMPLE)

    def test_root_labels_are_left_out(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        values["benepar"]["label_vocab"] = {"": 0, "ROOT": 1, "TOP::S": 2, "S::VP": 3, "VP": 4}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        labels = {c.label for parse in load_parser(str(folder)).parse(SIMPLE * 3) for c in parse.constituents}
        assert labels <= {"S", "S::VP", "VP"}


class TestBadModels:
    def refused(self, path: Path, *parts: str) -> None:
        with pytest.raises(UserError) as caught:
            load_parser(str(path))
        message = str(caught.value)
        assert str(path) in message and "\n" not in message
        assert all(part in message for part in parts), message

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "benepar_en3", "no such file or folder", "bundled")

    def test_folder_without_config(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "config.json")

    def test_folder_without_weights(self, tmp_path: Path) -> None:
        (save_folder(tmp_path) / "benepar_model.bin").unlink()
        self.refused(tmp_path, "benepar_model.bin")

    def test_folder_of_a_plain_encoder(self, tmp_path: Path) -> None:
        save_encoder("bert", tmp_path)
        torch.save({}, tmp_path / "benepar_model.bin")
        self.refused(tmp_path, "no 'benepar' section")

    def test_config_is_not_json(self, tmp_path: Path) -> None:
        (save_folder(tmp_path) / "config.json").write_text("{", encoding="utf-8")
        self.refused(tmp_path, "not valid JSON")

    def test_config_lacks_a_setting(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del values["benepar"]["hparams"]["d_model"]
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        self.refused(tmp_path, "not a complete Benepar model", "d_model")

    def test_folder_without_tokenizer(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        for file in folder.glob("tokenizer*"):
            file.unlink()
        self.refused(tmp_path, "no tokenizer in", "tokenizer.json")

    @pytest.mark.parametrize("in_folder", [True, False])
    def test_code_instead_of_weights(self, in_folder: bool, tmp_path: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple:
                return (Path.touch, (tmp_path / "pwned",))

        target = save_folder(tmp_path) / "benepar_model.bin" if in_folder else tmp_path / "model.pt"
        torch.save({"config": {}, "state_dict": Malicious()}, target)
        self.refused(tmp_path if in_folder else target, "refused")
        assert not (tmp_path / "pwned").exists()

    @pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
    def test_an_encoder_with_code_of_its_own(self, file: str, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        values = json.loads((folder / file).read_text(encoding="utf-8"))
        code = {"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model", "AutoTokenizer": ["own.T", None]}}
        (folder / file).write_text(json.dumps({**values, **code}), encoding="utf-8")
        (folder / "own.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
        self.refused(tmp_path, "refused", file, "auto_map")
        assert not (tmp_path / "pwned").exists()

    def test_config_without_an_end(self, tmp_path: Path) -> None:
        (save_folder(tmp_path) / "config.json").write_text("[" * 100_000)
        self.refused(tmp_path, "config.json: not valid JSON")

    def test_a_name_that_is_too_long(self, tmp_path: Path) -> None:
        self.refused(tmp_path / ("x" * 300), "no such file or folder")
        with pytest.raises(UserError, match="no folder and no installed spaCy model"):
            load_parser("spacy:" + "x" * 300)

    def test_checkpoint_whose_encoder_is_a_number(self, tmp_path: Path) -> None:
        config = {"hparams": {"use_pretrained": True, "pretrained_model": 5}}
        torch.save({"config": config, "state_dict": {}}, tmp_path / "model.pt")
        self.refused(tmp_path / "model.pt", "'5' is no local folder")

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        weights = torch.load(folder / "benepar_model.bin", weights_only=True)
        weights["f_label.0.weight"][0, 0] = float("nan")
        torch.save(weights, folder / "benepar_model.bin")
        self.refused(tmp_path, "f_label.0.weight has values that are no finite numbers")

    @pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
    def test_other_files(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(content)
        self.refused(tmp_path / "model.pt")

    @pytest.mark.parametrize("value", [{"a": torch.zeros(1)}, [1, 2], torch.zeros(1)], ids=["dict", "list", "tensor"])
    def test_weights_of_something_else(self, value: object, tmp_path: Path) -> None:
        torch.save(value, tmp_path / "model.pt")
        self.refused(tmp_path / "model.pt", "not a Benepar")

    def test_checkpoint_whose_encoder_is_elsewhere(self, tmp_path: Path) -> None:
        config = parser_config(hparams("bert-base-uncased"))
        torch.save({"config": config, "state_dict": {}}, tmp_path / "model.pt")
        self.refused(tmp_path / "model.pt", "'bert-base-uncased' is no local folder")

    def test_another_encoder(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**values, "intermediate_size": 24}), encoding="utf-8")
        self.refused(tmp_path, "do not match its encoder")

    def test_fewer_layers_than_weights(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 0}), encoding="utf-8")
        self.refused(tmp_path, "has besides pretrained_model.encoder.layer.0")

    def test_weights_are_missing(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        weights = torch.load(folder / "benepar_model.bin", weights_only=True)
        del weights["f_label.0.weight"]
        torch.save(weights, folder / "benepar_model.bin")
        self.refused(tmp_path, "lacks f_label.0.weight")

    def test_a_tokenizer_larger_than_the_encoder(self, tmp_path: Path) -> None:
        folder = save_folder(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([f"new{number}" for number in range(400)])
        tokenizer.save_pretrained(folder)
        self.refused(tmp_path, "more entries than the encoder")


def test_training_loss_is_benepars(bundled: BeneparParser, examples: None) -> None:
    from margin_loss import compute_loss
    from treebank import example_from_tree

    lines = [
        "(ROOT (S (NP (NN dogs)) (VP (VBP bark) (PP (IN at) (NP (NNS cats)))) (. .)))",
        "(ROOT (NP (DT the) (NN end)))",
        "(ROOT (S (NP (NN it)) (VP (VBZ is) (ADJP (JJ red)))))",
    ]
    model = bundled.model
    encoded = [model.encode(example_from_tree(nltk.Tree.fromstring(line))) for line in lines]
    batch = {**model.pad_encoded(encoded), "batch_size": 3, "batch_num_tokens": 11}
    head = [*model.f_label.parameters(), *model.encoder.parameters(), *model.f_tag.parameters()]
    for parameter in head:
        parameter.requires_grad_(True)
    expected, found = model.compute_loss(batch), compute_loss(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    pairs = zip(torch.autograd.grad(found, head), torch.autograd.grad(expected, head), strict=True)
    for parameter, (gradient, benepars) in zip(head, pairs, strict=True):
        torch.testing.assert_close(gradient, benepars, rtol=1e-3, atol=1e-5)
        parameter.requires_grad_(False)


def test_cut_encoder_computes_the_same(examples: None, tmp_path: Path) -> None:
    from encoder import cut_encoder, pieces_to_keep

    tokenizer, config = bert()
    tokenizer.save_pretrained(tmp_path / "whole")
    config.num_hidden_layers = 3
    whole = BertModel(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    keep = pieces_to_keep(tokenizer, ["the dog"], [], min_count=1)
    assert "the" in keep and "cannot" not in keep and set(LETTERS) <= set(keep)
    cut_encoder(tmp_path / "whole", tmp_path / "cut", 2, keep)
    cut, cut_tokenizer = (
        BertModel.from_pretrained(tmp_path / "cut").eval(),
        BertTokenizer.from_pretrained(tmp_path / "cut"),
    )
    assert cut_tokenizer.tokenize("the cannot") == ["the", "c", "##a", "##n", "##n", "##o", "##t"]
    with torch.inference_mode():
        expected = whole(**tokenizer("the dog?", return_tensors="pt"), output_hidden_states=True).hidden_states[2]
        found = cut(**cut_tokenizer("the dog?", return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_label_vocabulary_of_the_decoder() -> None:
    """The assumption behind scoring only labels 1..: benepar numbers the empty label 0."""
    assert ChartDecoder.build_vocab([nltk.Tree.fromstring("(ROOT (S (NP (NN a)) (VB b)))")])[""] == 0


def test_in_bf16_it_is_another_parser_that_mostly_agrees(bundled: BeneparParser) -> None:
    low = load_parser("bf16:")
    assert low.name == "bf16:bundled" and low.fingerprint == f"bf16:{bundled.fingerprint}"
    (exact,), (rounded,) = bundled.parse(SIMPLE[:1]), low.parse(SIMPLE[:1])
    shared = set(exact.constituents) & set(rounded.constituents)
    assert len(shared) > 0.5 * len(exact.constituents) > 0
