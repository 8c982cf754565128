"""The student's MLPs over a few tokens at a time, for long inputs: their wide inner states never exist for all tokens.

An MLP treats each token by itself, so chunks give the same outputs; the weights' gradients are the same sums in another
order. Chunks are recomputed in backward, else autograd would keep every inner state after all. As in DeepSpeed's ALST
(arXiv 2506.13996), whose tiles need its own engine's sequence groups; these do not.
"""

from __future__ import annotations

from collections.abc import Callable

import deepspeed
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mta_ds.errors import UserError
from mta_ds.models.body import decoder_layers


def chunk_mlps(model: PreTrainedModel, num_tokens: int) -> None:
    """Let every decoder layer's MLP run over ``num_tokens`` tokens at a time, in place; before the engine is made.

    Raises:
        UserError: the layers have no plain MLP: none at all (OPT), or a mixture of experts, which looks at all tokens.
    """
    mlps = [getattr(layer, "mlp", None) for layer in decoder_layers(model)]
    for mlp in mlps:
        if not isinstance(mlp, nn.Module) or hasattr(mlp, "experts"):
            raise UserError(
                f"student.mlp_chunk: the layers of {type(model).__name__} have no plain module 'mlp'; leave it out"
            )
        mlp.forward = _chunked(mlp.forward, num_tokens)
    # Ranks have different numbers of chunks: under ZeRO-3 an MLP must be gathered once, not its matrices chunk by chunk
    deepspeed.utils.set_z3_leaf_modules(model, list({type(mlp) for mlp in mlps}))


def _chunked(forward: Callable[[Tensor], Tensor], num_tokens: int) -> Callable[[Tensor], Tensor]:
    """``forward`` of [..., d] in chunks."""

    def run(hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, -2)
        if len(tokens) <= num_tokens:
            return forward(hidden)
        if not torch.is_grad_enabled():
            return torch.cat([forward(chunk) for chunk in torch.split(tokens, num_tokens)]).view_as(hidden)
        chunks = [checkpoint(forward, chunk, use_reentrant=False) for chunk in torch.split(tokens, num_tokens)]
        return torch.cat(chunks).view_as(hidden)

    return run
