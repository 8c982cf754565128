"""Every base method by its name: the config section ``loss``, and the method that it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import Discriminator, Tag

from mta_ds.losses.distillm import DistiLLMConfig
from mta_ds.losses.distillm2 import DistiLLM2Config
from mta_ds.losses.fdd import FDDConfig
from mta_ds.losses.gkd import GKDConfig
from mta_ds.losses.method import KDConfig, Method, MethodConfig, Setting

_Choice = (
    Annotated[KDConfig, Tag("kd")]
    | Annotated[DistiLLMConfig, Tag("distillm")]
    | Annotated[DistiLLM2Config, Tag("distillm2")]
    | Annotated[FDDConfig, Tag("fdd")]
    | Annotated[GKDConfig, Tag("gkd")]
)
METHODS: tuple[str, ...] = tuple(choice.__metadata__[0].tag for choice in get_args(_Choice))


def _method_of(value: Any) -> Any:
    """The method that a section names; distillation on the data set where it names none."""
    return value.get("method", "kd") if isinstance(value, dict) else getattr(value, "method", None)


LossConfig = Annotated[
    _Choice,
    Discriminator(
        _method_of,
        custom_error_type="unknown_method",
        custom_error_message=f"method is none of {', '.join(METHODS)}",
    ),
]


def make_method(
    config: MethodConfig,
    vocab_size: int | None = None,
    key_layers: Mapping[int, int] | None = None,
    top_layers: tuple[int, int] = (0, 0),
    beside_mta: bool = False,
) -> Method:
    """The method of a config, in a run as :class:`Setting` describes it."""
    return config.make(Setting(vocab_size, key_layers or {}, top_layers, beside_mta))
