"""Strict loading, student initialisation and DeepSpeed configuration: real folders, damaged in every way we name."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.errors import UsageError, UserError
from mta_ds.models import (
    StudentConfig,
    cut_layers,
    load_pretrained,
    load_tokenizer,
    random_student,
    resolve_model,
    student_config,
)
from mta_ds.models.loading import _freed_memory_returned
from mta_ds.models.zero import teacher_config

CONFIGS = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_positions": 32},
    "qwen2": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def make_model(folder: Path, kind: str = "llama", num_layers: int = 4, **options) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=40, num_hidden_layers=num_layers, **CONFIGS[kind], **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_cut_model_has_the_teachers_layers(tmp_path: Path, kind: str, tied: bool) -> None:
    teacher_dir = make_model(tmp_path / "teacher", kind, tie_word_embeddings=tied)
    cut_dir = cut_layers(teacher_dir, (0, 3), tmp_path / "cut")
    teacher, cut = load_pretrained(teacher_dir, "float32"), load_pretrained(cut_dir, "float32")
    assert cut.config.num_hidden_layers == 2
    theirs = teacher.state_dict()
    for name, value in cut.state_dict().items():
        assert torch.equal(value, theirs[name.replace(".1.", ".3.")]), name


def test_cut_of_a_sharded_teacher(tmp_path: Path) -> None:
    teacher_dir = make_model(tmp_path / "teacher")
    whole = load_pretrained(teacher_dir, "float32")
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    cut = load_pretrained(cut_layers(tmp_path / "sharded", 2, tmp_path / "cut"), "float32")
    assert torch.equal(cut.model.layers[0].mlp.up_proj.weight, whole.model.layers[1].mlp.up_proj.weight)
    assert torch.equal(cut.model.layers[1].mlp.up_proj.weight, whole.model.layers[3].mlp.up_proj.weight)


@pytest.mark.parametrize("layers", [(0, 4), (2, 1), (), (-1,), (1, 1), 9])
def test_cut_of_layers_that_do_not_exist(tmp_path: Path, layers) -> None:
    with pytest.raises(UserError, match=r"student\.teacher_layers"):
        cut_layers(make_model(tmp_path / "teacher"), layers, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_random_student_depends_on_the_seed_alone(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    folders = [random_student(source / "config.json", s, source, tmp_path / str(i)) for i, s in enumerate((1, 1, 2))]
    a, b, c = (load_pretrained(folder, "float32").lm_head.weight for folder in folders)
    assert torch.equal(a, b) and not torch.equal(a, c)


def damage(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "1 missing .*layers.1.mlp.up_proj"),
        (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), "1 unexpected .*layers.9"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "cannot load the weights|mismatched"),
    ],
)
def test_weights_that_do_not_match_are_refused(tmp_path: Path, edit, message) -> None:
    folder = make_model(tmp_path / "model")
    damage(folder, edit)
    with pytest.raises(UserError, match=message):
        load_pretrained(folder, "float32")


def test_config_with_fewer_layers_than_the_weights(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="unexpected"):
        load_pretrained(folder, "float32")


def test_folder_without_weights_or_config(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load the weights"):
        load_pretrained(folder, "float32")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_pretrained(folder, "float32")


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer in the folder"):
        load_tokenizer(make_model(tmp_path / "model"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path / "model")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./missing", "missing"])
def test_missing_folder(path: str) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        resolve_model(path)


def test_logits_that_are_not_the_heads_product_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="final_logit_softcapping"):
        load_pretrained(tmp_path, "float32")


@pytest.mark.parametrize("sources", [{}, {"path": "a", "teacher_layers": 2}])
def test_student_has_exactly_one_source(sources) -> None:
    with pytest.raises(ValidationError, match="exactly one"):
        StudentConfig(**sources)


def test_deepspeed_json_may_not_say_what_the_yaml_says(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 4}')
    with pytest.raises(UsageError, match="gradient_accumulation_steps"):
        student_config(path, "float32", 1, 1, 1, 1.0)
    path.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}')
    made = student_config(path, "bfloat16", 3, 2, 4, 0.5)
    assert made["train_batch_size"] == 24 and made["bf16"]["enabled"] and made["gradient_clipping"] == 0.5
    alone = student_config(path, "bfloat16", 3, 2, 1, 0.5)
    assert [each["zero_optimization"].get("contiguous_gradients") for each in (made, alone)] == [None, False]
    with pytest.raises(UsageError, match="stage 3 only"):
        teacher_config(path, "float32", 1)
    path.write_text("{]")
    with pytest.raises(UsageError, match="not valid JSON"):
        teacher_config(path, "float32", 1)


@pytest.mark.parametrize(
    ("offload", "message"),
    [
        ({"device": "disk"}, r"offload_param\.device is 'disk'; choose cpu, nvme or none"),
        ({"device": "nvme"}, r"nvme_path: missing; name a folder"),
        ({"device": "nvme", "nvme_path": "/nowhere/at/all"}, r"nvme_path: /nowhere/at/all; name a folder"),
    ],
)
def test_offload_that_cannot_work_is_refused_before_loading(tmp_path: Path, offload: dict, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    with pytest.raises(UsageError, match=message):
        teacher_config(path, "float32", 1)


def test_nvme_offload_needs_async_io(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    path = tmp_path / "ds.json"
    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": offload}}))
    if AsyncIOBuilder().is_compatible(verbose=False):
        assert teacher_config(path, "float32", 1)["zero_optimization"]["offload_param"] == offload
        return
    with pytest.raises(UsageError, match="needs DeepSpeed's async_io, which cannot be built here"):
        teacher_config(path, "float32", 1)


@pytest.mark.parametrize(
    ("said", "while_loading", "afterwards"),
    [({}, 1 << 20, (1 << 25, 1 << 26)), ({"MMAP": 1 << 16, "TRIM": 1 << 17}, 1 << 16, (1 << 16, 1 << 17))],
)
def test_large_blocks_are_kept_after_loading_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, int], while_loading: int, afterwards: tuple[int, int]
) -> None:
    for name in ("MMAP", "TRIM"):
        monkeypatch.delenv(f"MALLOC_{name}_THRESHOLD_", raising=False)
    for name, size in said.items():
        monkeypatch.setenv(f"MALLOC_{name}_THRESHOLD_", str(size))
    asked: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *option: asked.append(option), malloc_trim=lambda _: None)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    with _freed_memory_returned():
        assert asked == [(-3, while_loading)]
    assert asked[1:] == [(-3, afterwards[0]), (-1, afterwards[1])]
