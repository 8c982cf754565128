"""Shapes from configs alone: parameters as in real models, a layer's bytes as autograd really keeps them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from tuning_cases import model_config, preset

from mta_ds.errors import UserError
from mta_ds.models.initialise import cut_config
from mta_ds.tuning.outline import outline
from mta_ds.tuning.shapes import model_shape, workload

SMALL = {
    "llama": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 2},
    "qwen2": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2},
    "opt": {"hidden_size": 24, "ffn_dim": 40, "num_attention_heads": 2, "word_embed_proj_dim": 24, "dropout": 0.0},
}


def small(kind: str, **changes: object):
    layers = {} if kind == "gpt2" else {"num_hidden_layers": 3}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    return AutoConfig.for_model(kind, vocab_size=64, **(SMALL[kind] | layers | drop | changes))


def really_saved(config, dtype: torch.dtype, num_layers: int, length: int) -> int:
    """Bytes that autograd keeps in a real model's forward, parameters apart."""
    model = AutoModelForCausalLM.from_config(cut_config(config, range(num_layers)), dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids, mask = torch.zeros(1, length, dtype=torch.int64), torch.ones(1, length, dtype=torch.int64)
        mask[0, -1] = int(config.model_type != "llama")  # beside padding, shared key heads are repeated
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_a_real_model(kind: str, tied: bool) -> None:
    config = small(kind, tie_word_embeddings=tied)
    real = AutoModelForCausalLM.from_config(config)
    shape = model_shape(config, torch.float32, 16)
    assert shape.parameters == sum(p.numel() for p in real.parameters())
    assert sorted(shape.sizes) == sorted(p.numel() for p in real.parameters())
    assert shape.head == real.get_output_embeddings().weight.numel()
    assert shape.layer_parameters * 3 <= shape.parameters


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_layers_saved_bytes_are_autograds_own(kind: str) -> None:
    config, length = small(kind), 24
    one, two = (really_saved(config, torch.float32, layers, length) for layers in (1, 2))
    measured = outline(config, torch.float32, length)
    assert measured.saved * length == pytest.approx(two - one, rel=0.05)
    assert measured.saved_outside * length == pytest.approx(one - (two - one), rel=0.25, abs=2000)


def test_working_bytes_hold_a_layers_widest_moment() -> None:
    config, length = small("llama", intermediate_size=400), 16
    measured = outline(config, torch.float32, length)
    # the input, the normed input, gate, its activation and up, or their product: three or four of 400
    assert 3 * 4 * 400 < measured.working < 5 * 4 * 400


def test_attention_that_is_not_fused_keeps_its_scores() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("gemma2", vocab_size=64, num_hidden_layers=3, head_dim=12, **sizes)
    short, long = (outline(config, torch.float32, length) for length in (16, 64))
    # a token's bytes grow with the sequence by at least two matrices of two heads, scores and their softmax; what a
    # sequence has once is shared by more tokens
    assert long.saved - short.saved >= 0.9 * 2 * 2 * (64 - 16) * 4


def test_of_a_mixture_one_token_meets_few_experts() -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", vocab_size=64, num_hidden_layers=2, num_local_experts=8, **sizes)
    shape = model_shape(config, torch.bfloat16, 16)  # torch sizes grouped products of this dtype alone
    experts = 8 * 3 * 24 * 40
    assert shape.active == 2 * (shape.layer_parameters - experts + experts * 2 / 8)


def test_keys_and_values_of_a_token() -> None:
    assert 2 * model_shape(model_config("8b"), torch.bfloat16, 64).cache_width == 131_072


def test_published_sizes() -> None:
    sizes = {name: model_shape(model_config(name), torch.bfloat16, 64).parameters for name in ("gpt2", "gpt2-xl", "1b")}
    assert sizes == {"gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "1b": 1_235_814_400}


def test_a_run_from_two_configs(tmp_path) -> None:
    work = workload(preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2"))
    assert work.projections == 3 * 768 * 1600
    assert work.trained == 124_439_808 + work.projections
    assert [layer.teacher for layer in work.key_layers] == [16, 24, 32]
    assert work.trajectory == (4, 6, 8)
    assert work.head_passes == 6  # the final state, FDD's first layer, and two beside the ones before
    assert (work.sequence_length, work.batch_per_rank, work.element_bytes) == (256, 16, 2)
    assert work.teacher is not None and work.teacher.num_layers == 48


def test_a_teacher_without_logits_is_cut(tmp_path) -> None:
    config = preset(
        *(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2"), "loss={method: kd, divergence: sft}", "data.validation=[]"
    )
    work = workload(config)
    assert work.teacher is not None and work.teacher.num_layers == 32
    assert not work.teacher_head


def test_a_cut_student_needs_no_folder_of_its_own(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2", "student={teacher_layers: 4}")
    assert workload(config).student.num_layers == 12


def test_adapters_alone_are_trained(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2", "student.lora={r: 8, targets: [c_attn]}")
    assert workload(config).trained == 12 * 8 * (768 + 3 * 768) + 3 * 768 * 1600


def test_a_missing_model_is_one_line(tmp_path) -> None:
    config = preset(tmp_path, "gpt2-fdd-mta", "gpt2-xl", "gpt2", "teacher.path=./nowhere")
    with pytest.raises(UserError, match=r"teacher\.path: \./nowhere: no such model folder"):
        workload(config)
