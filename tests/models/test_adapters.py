"""A teacher's adapter merged file by file, against peft's own merge; and every folder that must not be merged."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.errors import UserError
from mta_ds.models.adapters import merged_folder
from mta_ds.models.loading import load_pretrained

WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
KINDS = {
    "llama": WIDTHS | {"intermediate_size": 24, "num_key_value_heads": 1},
    "qwen2": WIDTHS | {"intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32},
    "opt": WIDTHS | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
}
TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "qwen2": ["q_proj", "up_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "opt": ["v_proj", "fc1"],
}


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **options: object) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=40, **KINDS[kind] | options)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size="9KB")
    return folder


def make_adapter(base: Path, folder: Path, **options: object) -> dict[str, torch.Tensor]:
    """Save a random adapter; returns what peft's own merge makes of it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kind = model.config.model_type
    values = {"r": 3, "lora_alpha": 7, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"} | options
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    merged = adapted.merge_and_unload()
    return {name: value.detach().clone() for name, value in merged.state_dict().items()}


def assert_merged(base: Path, adapter: Path, cache: Path, expected: dict[str, torch.Tensor]) -> Path:
    folder = merged_folder(base, adapter, cache)
    before, after = (load_pretrained(f, "float32").state_dict() for f in (base, folder))
    assert after.keys() == expected.keys()
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert any(not torch.allclose(value, before[name], atol=1e-3) for name, value in after.items())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_pefts(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    assert len(list(base.glob("*.safetensors"))) > 1
    expected = make_adapter(base, tmp_path / "adapter")
    folder = assert_merged(base, tmp_path / "adapter", tmp_path / "cache", expected)
    assert folder.parent == tmp_path / "cache" and folder.name.startswith("teacher-merged-")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 11}},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_plain_lora(tmp_path: Path, options: dict) -> None:
    base = make_base(tmp_path / "base")
    assert_merged(base, tmp_path / "adapter", tmp_path, make_adapter(base, tmp_path / "adapter", **options))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_replace_the_bases(tmp_path: Path, bias: str) -> None:
    base = make_base(tmp_path / "base", "opt")
    expected = make_adapter(base, tmp_path / "adapter", bias=bias)
    folder = assert_merged(base, tmp_path / "adapter", tmp_path, expected)
    name = "model.decoder.layers.1.self_attn.v_proj.bias"
    before, after = (load_pretrained(f, "float32").state_dict()[name] for f in (base, folder))
    assert not torch.allclose(before, after)


def test_checkpoint_of_the_base_model_without_its_prefix(tmp_path: Path) -> None:
    whole = make_base(tmp_path / "whole", "gpt2")
    load_pretrained(whole, "float32").transformer.save_pretrained(tmp_path / "base")
    assert "h.0.attn.c_attn.weight" in load_file(tmp_path / "base" / "model.safetensors")
    expected = make_adapter(whole, tmp_path / "adapter")
    assert_merged(tmp_path / "base", tmp_path / "adapter", tmp_path, expected)


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    expected = make_adapter(base, tmp_path / "adapter")
    merged = load_pretrained(merged_folder(base, tmp_path / "adapter", tmp_path), "bfloat16").state_dict()
    for name, value in merged.items():
        assert value.dtype == torch.bfloat16
        off = value != expected[name].to(torch.bfloat16)
        assert off.float().mean() < 0.01, name  # float32 sums of another order, at a tie


def test_merged_once_and_anew_when_an_input_changes(tmp_path: Path) -> None:
    base, adapter, cache = make_base(tmp_path / "base"), tmp_path / "adapter", tmp_path / "cache"
    make_adapter(base, adapter)
    first = merged_folder(base, adapter, cache)
    made = {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    assert merged_folder(base, adapter, cache) == first
    assert made == {file.name: file.stat().st_mtime_ns for file in first.iterdir()}
    expected = make_adapter(base, adapter, lora_alpha=3)
    second = assert_merged(base, adapter, cache, expected)
    assert second != first and sorted(path.name for path in cache.iterdir()) == sorted((first.name, second.name))
    assert merged_folder(base, None, cache) == base


def test_tokenizer_and_settings_come_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")
    (base / "generation_config.json").write_text('{"eos_token_id": 3}')
    make_adapter(base, tmp_path / "adapter")
    folder = merged_folder(base, tmp_path / "adapter", tmp_path)
    for name in ("tokenizer.json", "generation_config.json", "config.json", "model.safetensors.index.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()


def edit_config(**changes: object):
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change):
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"adapter: no LoRA adapter, it has no adapter_config\.json"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not an adapter's configuration"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"it has no adapter_model\.safetensors"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"), "damaged"),
        (pickled, r"adapter_model\.bin: a pickle can run code and is not loaded"),
        (edit_config(peft_type="IA3"), "the adapter is IA3; only LoRA"),
        (edit_config(use_dora=True), "use_dora is more than plain LoRA"),
        (edit_config(init_lora_weights="pissa"), "initialised by pissa change the base"),
        (edit_tensors(lambda t: t.pop(B)), "lacks lora_A or lora_B"),
        (edit_tensors(lambda t: t.clear()), "it has no lora_A and lora_B"),
        (
            edit_tensors(lambda t: t.update({A.replace("lora_A", "lora_magnitude_vector"): t[A].clone()})),
            "not one of plain",
        ),
        (
            edit_tensors(lambda t: t.update({A: torch.zeros(3, 20)})),
            r"another base: it changes a 16 × 20 matrix 'model\.layers\.1\.self_attn\.q_proj', which has 16 × 16",
        ),
        (
            edit_tensors(lambda t: t.update({k.replace("layers.1", "layers.9"): t[k].clone() for k in (A, B)})),
            r"another base: .*/base has no module 'model\.layers\.9\.self_attn\.q_proj'",
        ),
        (
            edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(44, 16)})),
            r"replaces 'lm_head\.weight' by \[44, 16\], .*/base has \[40, 16\]; a model with added tokens",
        ),
    ],
)
def test_what_is_no_adapter_of_this_base_is_refused(tmp_path: Path, edit, message: str) -> None:
    base, adapter = make_base(tmp_path / "base"), tmp_path / "adapter"
    make_adapter(base, adapter)
    edit(adapter)
    with pytest.raises(UserError, match=message) as refused:
        merged_folder(base, adapter, tmp_path / "cache")
    assert "\n" not in str(refused.value) and not (tmp_path / "cache").exists()


def test_tied_weights_cannot_change_in_one_place(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", tie_word_embeddings=True), tmp_path / "adapter"
    make_adapter(base, adapter)
    edit_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(40, 16)}))(adapter)
    with pytest.raises(UserError, match=r"'lm_head\.weight', which the base ties \(model\.embed_tokens\.weight = lm"):
        merged_folder(base, adapter, tmp_path / "cache")


def test_missing_folders_and_bases_that_cannot_be_merged(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), tmp_path / "adapter"
    with pytest.raises(UserError, match="no such adapter folder"):
        merged_folder(base, adapter, tmp_path)
    make_adapter(base, adapter)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="base: its weights are quantised"):
        merged_folder(base, adapter, tmp_path)
    (base / "config.json").write_text(json.dumps(config))
    for file in base.glob("model*.safetensors*"):
        file.unlink()
    with pytest.raises(UserError, match="needs weights in safetensors"):
        merged_folder(base, adapter, tmp_path)
