"""The bundled parser through load_parser: benepar's own trees, its scores, hostile sentences."""

from __future__ import annotations

import shutil
from pathlib import Path

import nltk
import pytest
import torch
from benepar.decode_chart import ChartDecoder
from benepar_cases import LETTERS, benepar_parses, bert, plain, sentence
from transformers import BertModel, BertTokenizer, PreTrainedTokenizerBase

from mta_ds.spans import benepar_parser as module
from mta_ds.spans.benepar_parser import BeneparParser
from mta_ds.spans.parser import (
    BUNDLED,
    Constituent,
    Parse,
    Sentence,
    WordsOnly,
    best_device,
    load_parser,
)

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

SENTENCES = [sentence(text) for text in TEXTS]


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
    def test_on_a_gpu(self) -> None:
        assert load_parser(None, "cuda").parse(SENTENCES) == load_parser(None).parse(SENTENCES)

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


@needs_treebank
@pytest.mark.skipif(not module._cpu_has_bf16(), reason="no bf16 instructions: over a hundred times slower")
def test_rounded_products_change_no_tree(examples: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from treebank import example_from_tree, read_trees

    found = [example_from_tree(tree) for tree in read_trees(TREEBANK / "gum_dev.mrg")[::3]]
    sentences = [Sentence(tuple(e.tree.leaves()), tuple(e.space_after)) for e in found]
    checked, exact = load_parser(None), load_parser("fp32:")
    assert isinstance(checked, BeneparParser) and isinstance(exact, BeneparParser)
    assert (checked.name, checked.fingerprint) == (exact.name, exact.fingerprint) and exact.rounded is None
    expected = exact.parse(sentences)
    assert checked.parse(sentences) == expected
    # and that is the work of the second look, which few need
    sizes: list[int] = []
    batch = checked._parse_batch
    monkeypatch.setattr(
        checked, "_parse_batch", lambda some, of: sizes.append(0 if of else len(some)) or batch(some, of)
    )
    checked.parse(sentences)
    assert 0 < sum(sizes) < 0.3 * len(sentences)
    assert checked.rounded is not None
    checked.rounded = checked.rounded._replace(close_score=0.0, close_tag=0.0)
    assert 0 < sum(a != b for a, b in zip(checked.parse(sentences), expected, strict=True)) < 0.1 * len(sentences)


def test_fp32_alone_where_a_cpu_has_no_bf16_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, has, lambda: False)
    alone = load_parser(None)
    assert isinstance(alone, BeneparParser) and alone.rounded is None
    monkeypatch.setattr(module, "_cpu_has_bf16", lambda: True)
    monkeypatch.setattr(module, "BeneparParser", lambda loaded, device, in_fp32: (loaded.name, device, in_fp32))
    assert load_parser(None, "cuda") == ("bundled", "cuda", True)
    assert load_parser("fp32:") == ("bundled", "cpu", True)
    assert load_parser(None) == ("bundled", "cpu", False)


def test_a_gpu_is_for_benepar_models(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = (None, "some/model", "fp32:", "none", "spacy:en_core_web_sm")
    assert {best_device(spec) for spec in specs[3:]} == {"cpu"}
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=available: there)
        assert [best_device(spec) for spec in specs] == [device] * 3 + ["cpu"] * 2
