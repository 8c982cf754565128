"""Where whole models go, planned for GPUs that are not here; and that what is spread acts as one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.utils import compute_module_sizes
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.loading import load_pretrained, model_outline
from mta_ds.models.placement import _one_device_outside, load_whole, place

PLENTY = 10**9


@pytest.fixture(autouse=True)
def gpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate leaves out of a plan what the machine does not have."""
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda free: free)


def outline(**options: object) -> PreTrainedModel:
    return model_outline(configuration(**options), dtype=torch.float32)


def configuration(**options: object) -> AutoConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 6}
    return AutoConfig.for_model("llama", **sizes | {"vocab_size": 100} | options)


def weight_bytes(model: PreTrainedModel, device_map: dict, where: object) -> int:
    """Of the parameters that the map sends somewhere, by the longest name that fits."""
    owners = {
        name: max((key for key in device_map if name == key or name.startswith(f"{key}.") or not key), key=len)
        for name, _ in model.named_parameters()
    }
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if device_map[owners[n]] == where)


def test_one_gpu_while_it_has_the_room() -> None:
    model = outline()
    size = compute_module_sizes(model)[""]
    assert place(model, {0: int(size / 0.79), 1: PLENTY, "cpu": PLENTY}) == {"": 0}
    assert place(model, {0: int(size / 0.81), 1: PLENTY, "cpu": PLENTY}) != {"": 0}
    assert place(model, {2: int(size / 0.79), "cpu": 0}) == {"": 2}


@pytest.mark.parametrize("tied", [False, True])
def test_over_gpus_then_memory_the_head_first(tied: bool) -> None:
    model = outline(tie_word_embeddings=tied)
    size = compute_module_sizes(model)[""]
    half = int(0.7 * size / 0.8)  # accelerate keeps room for one more layer on the first
    two = place(model, {0: half, 1: half, "cpu": PLENTY})
    assert set(two.values()) == {0, 1} and two["lm_head"] == 0
    assert all(weight_bytes(model, two, gpu) <= 0.8 * half for gpu in (0, 1))
    one = place(model, {0: half, "cpu": PLENTY})
    assert set(one.values()) == {0, "cpu"} and one["lm_head"] == one["model.embed_tokens"] == 0
    assert weight_bytes(model, one, 0) + weight_bytes(model, one, "cpu") == sum(
        p.numel() * p.element_size() for p in model.parameters()
    )


def test_what_fits_nowhere_is_one_line() -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM: 0\.0 GB of weights do not fit .* on cpu") as raised:
        place(outline(), {0: 10_000, "cpu": 10_000})
    assert "\n" not in str(raised.value)


def test_rounded_weights_need_less_and_stay_on_gpus() -> None:
    model = outline(vocab_size=10)
    size = compute_module_sizes(model)[""]
    assert place(model, {0: int(size / 2), "cpu": 0}, "8bit") == {"": 0}
    assert place(model, {0: int(size / 4), "cpu": 0}, "4bit") == {"": 0}
    with pytest.raises(UserError, match="do not fit"):
        place(model, {0: int(size / 8), "cpu": PLENTY}, "8bit")


def test_a_cpu_has_the_whole_model(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(configuration()).save_pretrained(tmp_path)
    model = load_whole(tmp_path, "float32", device=torch.device("cpu"))
    assert not model.training and not hasattr(model, "hf_device_map")
    ids = torch.arange(7)[None]
    assert torch.equal(model(ids).logits, load_pretrained(tmp_path, "float32")(ids).logits)


def test_a_spread_model_acts_as_one(tmp_path: Path) -> None:
    """Spread between memory and disk, which have accelerate's hooks as GPUs have them."""
    AutoModelForCausalLM.from_config(configuration(tie_word_embeddings=False)).save_pretrained(tmp_path)
    plain = load_pretrained(tmp_path, "float32")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=parts, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    spread = _one_device_outside(model.eval())
    ids = torch.arange(7)[None]
    final = spread.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
    expected = plain.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(final, expected)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(spread.generate(ids, **settings), plain.generate(ids, **settings))
