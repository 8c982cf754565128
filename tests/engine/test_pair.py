"""What is found wrong with two models, or with records for them, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from own_code import keep_code_in, with_own_code
from support import write_config
from transformers import AutoConfig

from mta_ds.config import load
from mta_ds.engine import RunConfig, check
from mta_ds.engine.pair import prepare_pair
from mta_ds.errors import UserError
from mta_ds.models import load_tokenizer
from mta_ds.spans.parse import ParseConfig, parse
from mta_ds.tuning.shapes import workload


def narrow_opt(pair: Path, folder: Path) -> dict[str, object]:
    """A pair of the shape of OPT-350M: states wider than the head, and no final norm."""
    tokenizer = load_tokenizer(pair / "student")
    for name, layers in (("teacher", 6), ("student", 3)):
        config = AutoConfig.for_model(
            "opt",
            vocab_size=len(tokenizer),
            hidden_size=16,
            word_embed_proj_dim=8,
            do_layer_norm_before=False,
            ffn_dim=24,
            num_attention_heads=2,
            num_hidden_layers=layers,
            bos_token_id=0,
            eos_token_id=0,
        )
        config.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {f"{name}": {"path": str(folder / name)} for name in ("teacher", "student")}


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"method": "fdd"}, "loss: the student's layer 1 is 16 wide and its LM head takes 8"),
        ({"method": "fdd", "final_norm": True}, r"OPTForCausalLM: has no final norm; set loss\.final_norm: false"),
    ],
)
def test_layers_that_have_no_logits(pair: Path, tmp_path: Path, loss: dict, words: str) -> None:
    models = narrow_opt(pair, tmp_path)
    config = load(write_config(pair, tmp_path / "run", loss=loss, mta=None, **models), RunConfig)
    with pytest.raises(UserError, match=words) as raised:
        check(config)
    assert "\n" not in str(raised.value)
    prepare_pair(load(write_config(pair, tmp_path / "run", **models), RunConfig))  # MTA does not go through the head


@pytest.mark.parametrize("final_norm", [False, True])
def test_layers_that_have(pair: Path, tmp_path: Path, final_norm: bool) -> None:
    loss = {"method": "fdd", "final_norm": final_norm}
    prepared = prepare_pair(load(write_config(pair, tmp_path, loss=loss), RunConfig))
    assert prepared.method.key_layers == {4: 2, 6: 3}


def test_rollouts_need_prompts(pair: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text(
        (pair / "train.jsonl").read_text(encoding="utf-8") + json.dumps({"id": "bare", "text": "Only text."}) + "\n"
    )
    changes = {"data__train": [str(text)], "mta": None}
    check(load(write_config(pair, tmp_path, **changes), RunConfig))
    with pytest.raises(UserError, match="record bare: has no prompt, and the student is to answer it in rollouts"):
        check(load(write_config(pair, tmp_path, loss={"method": "gkd"}, **changes), RunConfig))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_sequences_beyond_a_models_last_position(pair: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(pair / name, tmp_path / name))
    values = json.loads((folder / "config.json").read_text())
    models = {name: {"path": str(folder)}}
    for positions in (95, 96):
        (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": positions}))
        config = load(write_config(pair, tmp_path / "run", **models), RunConfig)
        if positions == 96:
            prepare_pair(config)
            continue
        with pytest.raises(UserError, match=rf"^data\.max_length: 96 tokens, but the {name} has 95 positions"):
            prepare_pair(config)


@pytest.fixture(scope="module")
def words_only(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A span store of the training records alone, by another parser than the bundled one."""
    store = tmp_path_factory.mktemp("words") / "spans"
    parse(ParseConfig(inputs=(str(pair / "train.jsonl"),), output=store, parser="none", workers=1))
    return str(store)


def test_validation_records_need_no_spans(pair: Path, tmp_path: Path, words_only: str, capsys) -> None:
    check(load(write_config(pair, tmp_path, data__spans=words_only), RunConfig))
    assert "validation data" in (out := capsys.readouterr().out) and "validation spans" not in out


GKD = {"method": "gkd"}
ANEW = {"method": "distillm2", "regenerate": "both"}


@pytest.mark.parametrize("loss", [GKD, ANEW])
@pytest.mark.parametrize(
    ("section", "ours"),
    [
        (None, "no section parse, so the bundled one"),
        ({}, r"no parse\.parser, so the bundled one"),
        ({"parser": "fp32:"}, r"parse\.parser: fp32:"),
    ],
)
def test_what_models_write_is_parsed_as_the_records_were(
    pair: Path, tmp_path: Path, words_only: str, loss: dict, section: dict | None, ours: str
) -> None:
    given = {} if section is None else {"parse": {"inputs": ["x.jsonl"], "output": "elsewhere"} | section}
    config = load(write_config(pair, tmp_path, loss=loss, data__spans=words_only, **given), RunConfig)
    with pytest.raises(UserError, match=rf"spans: parsed by 'none', another parser than the config's \({ours}\)"):
        check(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": GKD, "parse": {"inputs": ["x.jsonl"], "output": "elsewhere", "parser": "none"}},
        {"loss": GKD | {"rollouts": {"parser_workers": 0}}},
        {"loss": {"method": "kd"}},
        {"loss": GKD, "mta": None},
    ],
    ids=["the same", "unparsed", "nothing written", "without MTA"],
)
def test_other_parsers_that_are_no_mistake(pair: Path, tmp_path: Path, words_only: str, changes: dict) -> None:
    check(load(write_config(pair, tmp_path, data__spans=words_only, **changes), RunConfig))


def test_a_parser_that_is_not_there_is_told_before_any_text_is_written(pair: Path, tmp_path: Path) -> None:
    section = {"inputs": ["x.jsonl"], "output": "elsewhere", "parser": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match="nowhere"):
        check(load(write_config(pair, tmp_path, loss=ANEW, data__spans=None, parse=section), RunConfig))


@pytest.fixture
def own_code(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Both models with code of their own, which may run."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    for name in ("teacher", "student"):
        with_own_code(Path(shutil.copytree(pair / name, tmp_path / name)))
    return {name: {"path": str(tmp_path / name), "trust_remote_code": True} for name in ("teacher", "student")}


@pytest.mark.parametrize("changes", [{}, {"student": {"lora": {"r": 2}}}, {"loss": {"method": "fdd"}}])
def test_models_with_code_of_their_own(
    pair: Path, tmp_path: Path, own_code: dict[str, dict], changes: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    student = own_code["student"] | changes.get("student", {})
    values = {"teacher": own_code["teacher"]} | changes | {"student": student}
    check(load(write_config(pair, tmp_path / "run", **values), RunConfig))
    assert "own, 3 layers" in capsys.readouterr().out


@pytest.mark.parametrize("source", [{}, {"path": None, "teacher_layers": 3}, {"lora": {"r": 2}}])
def test_plans_for_models_with_code_of_their_own(
    pair: Path, tmp_path: Path, own_code: dict[str, dict], source: dict
) -> None:
    values = own_code | {"student": own_code["student"] | source}
    work = workload(load(write_config(pair, tmp_path / "run", **values), RunConfig))
    assert work.student.num_layers == (2 if "teacher_layers" in source else 3)
    assert work.teacher is not None and work.teacher.num_layers == 6


def test_code_that_may_not_run(pair: Path, tmp_path: Path, own_code: dict[str, dict]) -> None:
    student = own_code["student"] | {"trust_remote_code": False}
    with pytest.raises(UserError, match=r"student: the model brings code of its own; .* trust_remote_code: true"):
        check(load(write_config(pair, tmp_path / "run", teacher=own_code["teacher"], student=student), RunConfig))
