"""How long a model's sequences may be.

GPT-2 and OPT look every position up in a table and fail behind its end; rotary models compute theirs, and state in the
config how far they were trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from mta_ds.errors import UserError


def num_positions(config: PretrainedConfig) -> int | None:
    """The positions that a model's config states; None for a model without a limit (ALiBi, recurrent layers)."""
    stated: int | None = getattr(config, "max_position_embeddings", None)
    return stated


def positions_in_table(model: PreTrainedModel) -> int | None:
    """The positions behind which a model fails; None for one that computes its positions."""
    is_rotary = any("RotaryEmbedding" in type(module).__name__ for module in model.modules())
    return None if is_rotary else num_positions(model.config)


def check_positions(config: PretrainedConfig, name: object, lengths: Mapping[str, int]) -> None:
    """Insist that a model has a position for every token.

    Args:
        name: what the message calls the model.
        lengths: tokens of the longest sequence, by the configuration key that says so.

    Raises:
        UserError: a sequence may be longer.
    """
    limit = num_positions(config)
    key = max(lengths, key=lengths.__getitem__)
    if limit is not None and lengths[key] > limit:
        raise UserError(
            f"{key}: {lengths[key]} tokens, but {name} has {limit} positions (max_position_embeddings of its "
            f"config.json); give at most {limit}"
        )
