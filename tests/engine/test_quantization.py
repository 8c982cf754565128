"""A teacher in 8 or 4 bits: its states against the rounding written out here, a run with it, bad input."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support import CPU_TEST, assert_same_run, run_command, train, write_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mta_ds.config import load
from mta_ds.engine import RunConfig
from mta_ds.errors import UsageError, UserError
from mta_ds.models import TeacherConfig, copy_tokenizer, decoder_layers, load_pretrained, load_teacher, output_head
from mta_ds.tuning.shapes import workload

# arXiv 2305.14314, appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# bitsandbytes' matrices on a CPU have multiples of 32 rows and of 64 columns
SIZES = {
    "gpt2": {"vocab_size": 97, "n_embd": 64, "n_layer": 4, "n_head": 2, "n_positions": 64},
    "llama": {
        **{"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2},
        **{"intermediate_size": 128, "num_key_value_heads": 1, "max_position_embeddings": 64},
    },
}
TOLERANCE = 0.05  # in 8 bits activations are rounded as well; in 4, a CPU multiplies in bfloat16


class Padded:
    """Two sequences of 11 and 7 tokens."""

    def __init__(self) -> None:
        self.input_ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
        self.attention_mask = torch.ones_like(self.input_ids)
        self.attention_mask[1, 7:] = 0
        self.valid = self.attention_mask.flatten().nonzero().flatten()


def rounded(weight: torch.Tensor, bits: str) -> torch.Tensor:
    """A matrix [out, in] as it is after its rounding: NF4 by blocks of 64, LLM.int8 by rows."""
    if bits == "8bit":
        scale = weight.abs().amax(1, keepdim=True) / 127
        return (weight / scale).round() * scale
    levels = torch.tensor(NF4)
    blocks = [
        levels[(block[:, None] / block.abs().max() - levels).abs().argmin(1)] * block.abs().max()
        for block in weight.flatten().split(64)
    ]
    return torch.cat(blocks).reshape(weight.shape)


def round_layers(model: PreTrainedModel, bits: str) -> PreTrainedModel:
    """Every matrix of the decoder layers, rounded; GPT-2's are stored the other way round."""
    with torch.no_grad():
        for name, weight in decoder_layers(model).named_parameters():
            if weight.ndim == 2:
                stored_as = weight.T if ".c_" in name else weight
                stored_as.copy_(rounded(stored_as.contiguous(), bits))
    return model


def states(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """The key layers' states of a plain model, [n, d] each."""
    batch = Padded()
    with torch.no_grad():
        found = model.eval()(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states
    return {layer: found[layer].flatten(0, 1)[batch.valid] for layer in (1, 3, 4)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the second."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("name", SIZES)
def test_states_are_those_of_the_rounded_weights(name: str, bits: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, initializer_range=0.2, **SIZES[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = TeacherConfig(path=str(tmp_path), quantization=bits)
    teacher = load_teacher(tmp_path, options, "float32", 2, [1, 3, 4], needs_final=True)
    seen: dict[int, torch.Tensor] = {}
    final = teacher.run(Padded(), seen.__setitem__)

    model = load_pretrained(tmp_path, "float32")
    unrounded = states(model)
    expected = states(round_layers(model, bits))
    assert list(seen) == list(expected) and torch.equal(final, seen[4])
    for layer, state in seen.items():
        assert distance(state, expected[layer]) < TOLERANCE, layer
    if bits == "4bit":
        assert distance(seen[4], unrounded[4]) > 2 * TOLERANCE
    assert torch.equal(teacher.head(), output_head(model)) and teacher.norm() is not None
    matrices = [w for w in decoder_layers(teacher.model).parameters() if w.ndim == 2]
    assert {w.dtype for w in matrices} == {torch.int8 if bits == "8bit" else torch.uint8}
    whole = sum(w.nbytes for w in decoder_layers(model).parameters() if w.ndim == 2)
    assert sum(w.nbytes for w in matrices) == whole / (4 if bits == "8bit" else 8)


@pytest.fixture(scope="session")
def wide(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher for the pair's student whose matrices have enough rows."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(3)
    own = AutoConfig.from_pretrained(pair / "teacher")
    sizes = SIZES["llama"] | {"vocab_size": own.vocab_size, "max_position_embeddings": 128}
    config = AutoConfig.for_model("llama", initializer_range=0.2, eos_token_id=own.eos_token_id, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    copy_tokenizer(pair / "teacher", folder)
    return folder


def test_a_run_equals_one_with_the_rounded_teacher(pair: Path, wide: Path, tmp_path: Path) -> None:
    round_layers(load_pretrained(wide, "float32"), "4bit").save_pretrained(tmp_path / "rounded")
    copy_tokenizer(wide, tmp_path / "rounded")
    rounded, quantized = {"path": str(tmp_path / "rounded")}, {"path": str(wide), "quantization": "4bit"}
    expected = train(pair, tmp_path / "a", 1, teacher=rounded)
    two = train(pair, tmp_path / "b", 2, teacher=quantized, train__micro_batch_size=2)
    assert_same_run(two, expected, tolerance=TOLERANCE)
    assert "4bit" in run_command("check", tmp_path / "b" / "run.yaml").stdout


def test_bad_input(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = {"path": str(pair / "teacher"), "quantization": "4bit"}
    with pytest.raises(UsageError, match=r"teacher: .*remove it, or deepspeed"):
        load(write_config(pair, tmp_path, teacher=quantized | {"deepspeed": str(CPU_TEST)}), RunConfig)
    with pytest.raises(UsageError, match=r"train\.verify_weights: a quantised teacher"):
        load(write_config(pair, tmp_path, teacher=quantized, train__verify_weights=True), RunConfig)
    with pytest.raises(UsageError, match=r"teacher\.quantization: .*'8bit' or '4bit'"):
        load(write_config(pair, tmp_path, teacher=quantized | {"quantization": "2bit"}), RunConfig)
    config = load(write_config(pair, tmp_path, teacher=quantized), RunConfig)
    with pytest.raises(UserError, match=r"teacher\.quantization=null"):
        workload(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes: pip install"):
        load_pretrained(pair / "teacher", "float32", quantization="4bit")


def test_weights_that_are_quantised_already_are_refused(pair: Path, tmp_path: Path) -> None:
    load_pretrained(pair / "teacher", "float32", quantization="8bit").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: quantization_config: the weights in the files are quantised"):
        load_pretrained(tmp_path, "float32")
