"""mta_ds: distil large language models with Multi-Granular Trajectory Alignment at DeepSpeed scale.

The stages are functions (:func:`parse`, :func:`check`, :func:`train`, :func:`write_responses`, :func:`evaluate`,
:func:`write_report`), each on its configuration; :class:`MTALoss` is the structural loss alone, for a training loop of
your own. Nothing heavy is imported before one of them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "parse": "mta_ds.spans.parse",
    "ParseConfig": "mta_ds.spans.parse",
    "SpanStore": "mta_ds.spans.store",
    "RunConfig": "mta_ds.engine",
    "check": "mta_ds.engine",
    "train": "mta_ds.engine",
    "evaluate": "mta_ds.evaluation",
    "write_responses": "mta_ds.evaluation",
    "write_report": "mta_ds.evaluation",
    "MTAConfig": "mta_ds.losses",
    "MTALoss": "mta_ds.losses",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mta_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
