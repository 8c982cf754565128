"""Adapters in real models of four architectures: what is trained, merged and saved, against peft's own ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.loading import model_outline
from mta_ds.models.lora import (
    LoraConfig,
    adapter_parameters,
    adapter_size,
    base_name,
    inject_adapters,
    plain_parameters,
    save_adapter,
)

WIDTHS = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
KINDS = {
    "llama": WIDTHS | {"intermediate_size": 24, "num_key_value_heads": 1},
    "qwen2": WIDTHS | {"intermediate_size": 24, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "tie_word_embeddings": True},
    "opt": WIDTHS | {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32},
}
IDS = torch.arange(11)[None]
LORA = LoraConfig(r=3, alpha=7)


def make_model(kind: str = "llama", **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=40, **KINDS[kind] | options)
    return AutoModelForCausalLM.from_config(config).eval()


def disturb(model: PreTrainedModel) -> None:
    """B is zero at first, and would hide every mistake."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_are_trained_and_the_start_is_the_base(kind: str) -> None:
    model = make_model(kind)
    before, parameters = model(IDS).logits, dict(model.named_parameters())
    inject_adapters(model, LORA, seed=0, base="")
    assert torch.equal(model(IDS).logits, before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(".lora_A." in name or ".lora_B." in name for name in trained)
    matrices = [n for n, p in parameters.items() if ".layers." in n or ".h." in n if p.ndim == 2]
    assert len(trained) == 2 * len(matrices)  # the default takes every matrix of the layers, Conv1D too
    model(IDS).logits.sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora_B." in n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_parameters_equal_pefts(kind: str, use_rslora: bool, tmp_path: Path) -> None:
    model, lora = make_model(kind), LoraConfig(r=3, alpha=7, use_rslora=use_rslora)
    names = set(model.state_dict())
    inject_adapters(model, lora, seed=0, base="")
    disturb(model)
    adapted = model(IDS).logits
    plain = {name: value() for aliases, value in plain_parameters(model) for name in aliases}
    assert set(plain) == names
    merged = make_model(kind)
    assert not torch.allclose(merged(IDS).logits, adapted, atol=1e-3)
    merged.load_state_dict(plain)
    torch.testing.assert_close(merged(IDS).logits, adapted, rtol=1e-5, atol=1e-5)
    save_adapter(model, {name: p.detach() for name, p in adapter_parameters(model).items()}, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(kind), tmp_path).merge_and_unload().state_dict()
    for name, value in plain.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def test_bf16_is_merged_in_float32_and_rounded_once() -> None:
    model = make_model().to(torch.bfloat16)
    base = model.model.layers[0].mlp.up_proj.weight.detach().double()
    inject_adapters(model, LORA, seed=0, base="")
    model.to(torch.bfloat16)
    disturb(model)
    name = "model.layers.0.mlp.up_proj.weight"
    merged = next(value() for aliases, value in plain_parameters(model) if name in aliases)
    layer = model.model.layers[0].mlp.up_proj
    a, b = (m["default"].weight.detach().double() for m in (layer.lora_A, layer.lora_B))
    exact = base + 7 / 3 * b @ a
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= exact.abs().max() * 2**-8
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.99


def test_adapters_depend_on_the_seed_alone() -> None:
    adapters = []
    for seed, other in ((1, 10), (1, 11), (2, 10)):
        model = make_model()
        torch.manual_seed(other)
        inject_adapters(model, LORA, seed, base="")
        adapters.append({name: p.detach().clone() for name, p in adapter_parameters(model).items()})
    first, same, differs = adapters
    assert all(torch.equal(value, same[name]) for name, value in first.items())
    assert all(torch.equal(value, differs[name]) == (".lora_B." in name) for name, value in first.items())


def test_the_projections_start_is_what_it_is_without_adapters() -> None:
    drawn = []
    for lora in (None, LORA):
        model = make_model()
        torch.manual_seed(3)
        if lora is not None:
            inject_adapters(model, lora, seed=3, base="")
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make_model(kind, **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0})
        inject_adapters(model, LORA, seed=0, base="")
        disturb(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(IDS).logits.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, value in gradients[0].items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, gradients[1][name], msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_own_loader_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path / "base")
    inject_adapters(model, LORA, seed=0, base=str(tmp_path / "base"))
    disturb(model)
    tensors = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    save_adapter(model, tensors, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["target_modules"] == sorted(config["target_modules"])
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_size_without_weights_is_that_of_the_model(kind: str) -> None:
    model = make_model(kind)
    total = sum(p.numel() for p in model.parameters())
    size = adapter_size(model_outline(model.config), LORA)
    inject_adapters(model, LORA, seed=0, base="")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    modules = sum(name.endswith(".lora_A.weight") for name in adapter_parameters(model))
    assert size == (modules, trainable, total)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "c_attn"), r"named 'c_attn'; choose from down_proj, gate_proj, k_proj, .*, or all-linear"),
        (("lm_head",), r"'lm_head' is lm_head, which cannot be adapted"),
        (("embed_tokens",), r"'embed_tokens' is model\.embed_tokens, which cannot"),
        (("self_attn",), r"'self_attn' is model\.layers\.0\.self_attn, which cannot"),
        ((), r"empty; choose from"),
    ],
)
def test_targets_that_match_nothing_name_some_that_exist(targets: tuple[str, ...], message: str) -> None:
    model = make_model()
    for call in (
        lambda: inject_adapters(model, LoraConfig(targets=targets), 0, ""),
        lambda: adapter_size(model_outline(model.config), LoraConfig(targets=targets)),
    ):
        with pytest.raises(UserError, match=rf"student\.lora\.targets: .*{message}"):
            call()
    assert all(p.requires_grad for p in model.parameters())


def test_named_targets_are_all_that_is_adapted() -> None:
    model = make_model("gpt2")
    inject_adapters(model, LoraConfig(targets=("mlp.c_proj", "c_attn")), 0, "")
    adapted = {name.split(".lora_")[0] for name in adapter_parameters(model)}
    layers = [f"base_model.model.transformer.h.{i}." for i in range(2)]
    assert adapted == {layer + name for layer in layers for name in ("mlp.c_proj", "attn.c_attn")}


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'mta-ds\[lora\]'"):
        inject_adapters(make_model(), LORA, 0, "")


def test_options_out_of_range_are_refused() -> None:
    for options in ({"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"targets": "q_proj"}, {"rank": 4}):
        with pytest.raises(ValidationError):
            LoraConfig(**options)


def test_base_is_named_so_that_it_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    assert base_name("model", Path("model")) == str(tmp_path / "model")
    assert base_name(None, Path("model")) == str(tmp_path / "model")
    assert base_name("facebook/opt-1.3b", Path("model")) == "facebook/opt-1.3b"
