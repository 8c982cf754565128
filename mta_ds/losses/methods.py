"""Every base method by its name: the config section ``loss``, and the method that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag

from mta_ds.losses.distillm import DistiLLMConfig, make_distillm
from mta_ds.losses.distillm2 import DistiLLM2Config, make_distillm2
from mta_ds.losses.fdd import FDDConfig, make_fdd
from mta_ds.losses.gkd import GKDConfig, make_gkd
from mta_ds.losses.method import KDConfig, Method, make_kd

METHODS = ("kd", "distillm", "distillm2", "fdd", "gkd")


def _method_of(value: Any) -> Any:
    """The method that a section names; distillation on the data set where it names none."""
    return value.get("method", "kd") if isinstance(value, dict) else getattr(value, "method", None)


LossConfig = Annotated[
    Annotated[KDConfig, Tag("kd")]
    | Annotated[DistiLLMConfig, Tag("distillm")]
    | Annotated[DistiLLM2Config, Tag("distillm2")]
    | Annotated[FDDConfig, Tag("fdd")]
    | Annotated[GKDConfig, Tag("gkd")],
    Discriminator(
        _method_of,
        custom_error_type="unknown_method",
        custom_error_message=f"method is none of {', '.join(METHODS)}",
    ),
]


def make_method(
    config: KDConfig | DistiLLMConfig | DistiLLM2Config | FDDConfig | GKDConfig,
    vocab_size: int | None = None,
    key_layers: Mapping[int, int] | None = None,
    top_layers: tuple[int, int] = (0, 0),
    beside_mta: bool = False,
) -> Method:
    """The method of a config.

    Args:
        vocab_size: ids that mean something; heads are cut to it.
        key_layers: teacher layer -> student layer, lowest first, for a method that compares layers.
        top_layers: the student's last and the teacher's.
        beside_mta: whether MTA runs as well.
    """
    match config:
        case DistiLLMConfig():
            return make_distillm(config, vocab_size)
        case DistiLLM2Config():
            return make_distillm2(config, vocab_size)
        case FDDConfig():
            return make_fdd(config, vocab_size, key_layers or {}, top_layers, beside_mta)
        case GKDConfig():
            return make_gkd(config, vocab_size)
        case KDConfig():
            return make_kd(config, vocab_size)
