"""Other models through load_parser: benepar's own trees, their limits, and files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benepar import char_lstm
from benepar_cases import (
    ENCODERS,
    SIMPLE,
    benepar_parses,
    built,
    hparams,
    parser_config,
    plain,
    save_encoder,
    save_folder,
    sentence,
)
from transformers import AutoTokenizer

from mta_ds.errors import UserError
from mta_ds.spans.benepar_parser import BeneparParser
from mta_ds.spans.parser import load_parser


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

    def test_in_the_home_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        save_folder(tmp_path / "model")
        assert load_parser("~/model").name == "model"
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match="no spaCy model folder"):
            load_parser("spacy:~/empty")

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
