"""The hidden states that key layers hand out are transformers' own, for every architecture we name."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.models import CausalBody, decoder_layers, state_width, truncate

SMALL = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
ROPE = SMALL | {"intermediate_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 64}
ARCHITECTURES = {
    "gpt2": {"vocab_size": 97, "n_embd": 24, "n_layer": 4, "n_head": 2, "n_positions": 64},
    "llama": ROPE | {"tie_word_embeddings": True},
    "qwen2": ROPE,
    "qwen3": ROPE | {"head_dim": 12},
    "mistral": ROPE,
    "opt": SMALL | {"ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 24},
    "opt-projected": SMALL | {"ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 16},
    "gpt_neox": SMALL | {"intermediate_size": 40, "max_position_embeddings": 64},
    "gemma": ROPE | {"head_dim": 12},
}


def tiny(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition("-")[0], **ARCHITECTURES[name])
    return AutoModelForCausalLM.from_config(config).eval()


def padded_batch():
    ids = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    mask[2, 3:] = 0
    return ids, mask


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_key_layers_equal_output_hidden_states(name: str) -> None:
    model = tiny(name)
    ids, mask = padded_batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        body = CausalBody(model, [1, 2, 3, 4])
        body.register_taps()
        seen: dict[int, torch.Tensor] = {}
        final = body(ids, mask, on_layer=seen.__setitem__)
    assert list(seen) == [1, 2, 3, 4]
    for layer, hidden in seen.items():
        assert torch.equal(hidden, expected.hidden_states[layer]), f"{name} layer {layer}"
    logits = final @ body.head.T
    assert torch.allclose(logits[mask.bool()], expected.logits[mask.bool()], atol=1e-5)


def test_without_a_listener_nothing_is_handed_out() -> None:
    body = CausalBody(tiny("llama"), [2, 4])
    body.register_taps()
    seen: list[int] = []
    body(*padded_batch(), on_layer=lambda layer, _hidden: seen.append(layer))
    body(*padded_batch())
    assert seen == [2, 4]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_truncated_model_emits_bit_identical_states(name: str) -> None:
    ids, mask = padded_batch()
    states: list[dict[int, torch.Tensor]] = []
    for cut in (False, True):
        model = tiny(name)
        if cut:
            truncate(model, 3)
            assert len(decoder_layers(model)) == 3
        # layer 3 is the cut model's last, but still no final state: it must not have passed the final norm
        body = CausalBody(model, [2, 3], num_layers=4)
        body.register_taps()
        states.append({})
        with torch.no_grad():
            body(ids, mask, on_layer=states[-1].__setitem__)
    assert torch.equal(states[0][2], states[1][2]) and torch.equal(states[0][3], states[1][3])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_of_the_states(name: str) -> None:
    model = tiny(name)
    with torch.no_grad():
        ids, mask = padded_batch()
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [state_width(model.config, layer) for layer in range(1, 5)] == [h.shape[-1] for h in states[1:]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "qwen3"])
def test_gradient_checkpointing_hands_out_once_and_keeps_gradients(name: str) -> None:
    ids, mask = padded_batch()
    gradients = []
    for checkpointing in (False, True):
        model = tiny(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for attribute in ("dropout", "attention_dropout"):
                if isinstance(getattr(module, attribute, None), float):
                    setattr(module, attribute, 0.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        body = CausalBody(model, [1, 3])
        body.register_taps()
        seen: list[torch.Tensor] = []
        final = body(ids, mask, on_layer=lambda _layer, hidden, seen=seen: seen.append(hidden))
        assert len(seen) == 2
        (final.square().sum() + seen[0].square().sum() + seen[1].sum()).backward()
        assert len(seen) == 2
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for parameter, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][parameter], atol=1e-5), parameter
