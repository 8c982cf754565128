"""Losses: ops become sums, normalisers and named metrics."""

from mta_ds.losses.divergences import LossConfig, describe, make_divergence
from mta_ds.losses.mta import (
    GlobalCounts,
    MTAConfig,
    MTALoss,
    Spans,
    count_sequences,
    dsa_scale,
    hid_scale,
    layer_weights,
    non_finite,
)
from mta_ds.ops import (
    Divergence,
    LayerGradients,
    LayerTerms,
    LinearDivergence,
    SpanLayout,
    align_layer,
    attach,
    linear_divergence,
    token_weights,
)

__all__ = [
    "Divergence",
    "GlobalCounts",
    "LayerGradients",
    "LayerTerms",
    "LinearDivergence",
    "LossConfig",
    "MTAConfig",
    "MTALoss",
    "SpanLayout",
    "Spans",
    "align_layer",
    "attach",
    "count_sequences",
    "describe",
    "dsa_scale",
    "hid_scale",
    "layer_weights",
    "linear_divergence",
    "make_divergence",
    "non_finite",
    "token_weights",
]
