"""Losses: ops become sums, normalisers and named metrics."""

from mta_ds.losses.divergences import LossConfig, describe, make_divergence
from mta_ds.losses.mta import (
    GlobalCounts,
    LayerGradients,
    LayerTerms,
    MTAConfig,
    MTALoss,
    Spans,
    attach,
    count_sequences,
    dsa_scale,
    hid_scale,
    layer_gradients,
    layer_terms,
    layer_weights,
)
from mta_ds.ops import Divergence, LinearDivergence, linear_divergence

__all__ = [
    "Divergence",
    "GlobalCounts",
    "LayerGradients",
    "LayerTerms",
    "LinearDivergence",
    "LossConfig",
    "MTAConfig",
    "MTALoss",
    "Spans",
    "attach",
    "count_sequences",
    "describe",
    "dsa_scale",
    "hid_scale",
    "layer_gradients",
    "layer_terms",
    "layer_weights",
    "linear_divergence",
    "make_divergence",
]
