"""What is found wrong with two models, or with records for them, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import write_config
from transformers import AutoConfig

from mta_ds.config import load
from mta_ds.engine import RunConfig, check
from mta_ds.engine.pair import prepare_pair
from mta_ds.errors import UserError
from mta_ds.models import load_tokenizer


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


def with_own_code(folder: Path) -> None:
    """Make a Llama folder one whose classes come with it."""
    (folder / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def own_code(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """Both models with code of their own, which may run."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
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


def test_code_that_may_not_run(pair: Path, tmp_path: Path, own_code: dict[str, dict]) -> None:
    student = own_code["student"] | {"trust_remote_code": False}
    with pytest.raises(UserError, match=r"student: the model brings code of its own; .* trust_remote_code: true"):
        check(load(write_config(pair, tmp_path / "run", teacher=own_code["teacher"], student=student), RunConfig))
