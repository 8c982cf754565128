"""MLPs in chunks of tokens: outputs and gradients of the whole, and fewer inner states kept for backward."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mta_ds.errors import UserError
from mta_ds.models import chunk_mlps

SIZES = {
    "llama": {"hidden_size": 16, "intermediate_size": 88, "num_attention_heads": 2, "num_hidden_layers": 3},
    "gpt2": {"n_embd": 16, "n_inner": 88, "n_head": 2, "n_layer": 3, "n_positions": 64},
    "qwen2": {
        "hidden_size": 16,
        "intermediate_size": 88,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 3,
    },
}


def make_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=40, **SIZES[kind], **dropout))


def run(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Logits, gradients under a random upstream gradient, and the bytes that autograd keeps between the passes."""
    ids = torch.randint(0, 40, (3, 19), generator=torch.Generator().manual_seed(1))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)))
    return logits.detach(), {n: p.grad for n, p in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_tokens", [7, 57])
def test_chunks_give_the_whole(kind: str, checkpointed: bool, num_tokens: int) -> None:
    whole, chunked = make_model(kind).train(), make_model(kind).train()
    chunk_mlps(chunked, num_tokens)
    if checkpointed:
        chunked.gradient_checkpointing_enable({"use_reentrant": False})
    logits, gradients, kept = run(whole)
    ours, our_gradients, kept_by_us = run(chunked)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if num_tokens == 7 and not checkpointed:
        # two or more inner states of 88 a token in three layers, against the chunks' inputs
        assert kept - kept_by_us > 3 * 2 * 57 * 88 * 4 * 0.8
    with torch.no_grad():
        ids = torch.arange(30)[None]
        torch.testing.assert_close(chunked(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("opt", {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2, "num_hidden_layers": 2}),
        (
            "mixtral",
            {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
            | {"num_key_value_heads": 1, "num_local_experts": 2},
        ),
    ],
)
def test_layers_without_a_plain_mlp_are_refused(kind: str, options: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=40, **options))
    with pytest.raises(UserError, match=r"student\.mlp_chunk: the layers of \w+ForCausalLM have no plain module 'mlp'"):
        chunk_mlps(model, 8)
