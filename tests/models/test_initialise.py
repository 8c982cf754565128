"""Where a student starts: what a cut keeps of the teacher beside its layers, and models with code of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from own_code import keep_code_in, with_own_code
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.errors import UserError
from mta_ds.models import cut_layers, load_pretrained, random_student
from mta_ds.models.initialise import INDEX, cut_config

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def make_model(folder: Path, kind: str = "llama", **options: object) -> Path:
    torch.manual_seed(0)
    values = SIZES | {"vocab_size": 40, "num_hidden_layers": 4, "pad_token_id": 0, "eos_token_id": 0} | options
    config = AutoConfig.for_model(kind, bos_token_id=0, **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="9KB")
    return folder


def test_each_layer_keeps_its_own_kind(tmp_path: Path) -> None:
    """SmolLM3 has rotary positions in some layers and none in others."""
    kinds = {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1, 0]}
    teacher = make_model(tmp_path / "teacher", "smollm3", **kinds)
    cut = load_pretrained(cut_layers(teacher, (1, 2, 3), tmp_path / "cut"), "float32")
    assert cut.config.no_rope_layers == [0, 1, 0]
    assert cut.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.use_rope for layer in cut.model.layers] == [0, 1, 0]


def test_lists_that_are_not_of_the_layers_stay_as_they_are() -> None:
    config = AutoConfig.for_model("qwen2", num_hidden_layers=4)
    config.no_rope_layers = [1, 2]  # of another meaning, by its length
    assert cut_config(config, (0, 3)).no_rope_layers == [1, 2]


def test_weights_that_the_index_does_not_name_are_not_the_models(tmp_path: Path) -> None:
    """As in folders that hold the same weights twice, in the names of another library."""
    teacher = make_model(tmp_path / "teacher")
    shards = sorted(teacher.glob("model-*.safetensors"))
    assert len(shards) > 1
    shutil.copyfile(shards[0], teacher / "consolidated.safetensors")
    cut = cut_layers(teacher, (0, 3), tmp_path / "cut")
    assert not (cut / "consolidated.safetensors").exists()
    stored = [name for file in cut.glob("*.safetensors") for name in load_file(file)]
    assert len(stored) == len(set(stored))
    ours, theirs = (load_pretrained(folder, "float32") for folder in (cut, teacher))
    assert torch.equal(ours.model.layers[1].mlp.up_proj.weight, theirs.model.layers[3].mlp.up_proj.weight)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    teacher = make_model(tmp_path / "teacher")
    (first, *rest) = sorted(teacher.glob("model-*.safetensors"))
    first.unlink()
    with pytest.raises(UserError, match=rf"teacher: needs weights in safetensors, .*; no {first.name}$"):
        cut_layers(teacher, (0, 3), tmp_path / "cut")
    for file in (*rest, teacher / INDEX):
        file.unlink()
    with pytest.raises(UserError, match=r"teacher: needs weights in safetensors, .*; no model\.safetensors$"):
        cut_layers(teacher, (0, 3), tmp_path / "cut")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with code of its own."""
    keep_code_in(tmp_path / "modules", monkeypatch)
    with_own_code(folder := make_model(tmp_path / "own"))
    return folder


def test_a_cut_brings_the_teachers_code(own: Path, tmp_path: Path) -> None:
    cut = cut_layers(own, (0, 3), tmp_path / "cut", trust_remote_code=True)
    assert sorted(path.name for path in cut.glob("*.py")) == ["configuration_own.py", "modeling_own.py"]
    model = load_pretrained(cut, "float32", trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM" and model.config.num_hidden_layers == 2
    with pytest.raises(UserError, match="the model brings code of its own"):
        cut_layers(own, (0, 3), tmp_path / "untrusted")


def test_a_random_student_brings_its_code(own: Path, tmp_path: Path) -> None:
    source = own / "config.json"
    folder = random_student(source, 1, own, tmp_path / "random", trust_remote_code=True)
    assert sorted(path.name for path in folder.glob("*.py")) == ["configuration_own.py", "modeling_own.py"]
    assert type(load_pretrained(folder, "float32", trust_remote_code=True)).__name__ == "OwnForCausalLM"
    with pytest.raises(UserError, match="the model brings code of its own"):
        random_student(source, 1, own, tmp_path / "untrusted")


def test_other_code_is_another_student(own: Path, tmp_path: Path) -> None:
    cut_layers(own, (0, 3), tmp_path / "cut", trust_remote_code=True)
    with open(own / "modeling_own.py", "a") as file:
        file.write("\n# changed\n")
    cut = cut_layers(own, (0, 3), tmp_path / "cut", trust_remote_code=True)
    assert "# changed" in (cut / "modeling_own.py").read_text()
