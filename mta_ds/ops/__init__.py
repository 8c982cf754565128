"""Structural ops: one public function each, and :mod:`mta_ds.ops.reference` is the definition they are held to.

Ragged contract: a batch's valid tokens are concatenated, ``cu_seqlens`` [B + 1] bounds sequences and ``cu_spans``
[B + 1] each sequence's spans; these and the spans are host data, on the CPU. Ops return sums and normalisers,
accumulate in fp32 in an order that never changes, and wait for no GPU.
"""

from mta_ds.ops.divergence import Divergence, DivergenceName, divergence_values
from mta_ds.ops.dsa import dsa
from mta_ds.ops.head_gradient import HeadGradient
from mta_ds.ops.hid import hid
from mta_ds.ops.key_layer import LayerGradients, LayerTerms, align_layer, attach
from mta_ds.ops.layout import SpanLayout
from mta_ds.ops.linear_divergence import (
    IGNORED,
    LinearDivergence,
    label_log_probs,
    linear_divergence,
    token_entropy,
)
from mta_ds.ops.reference import covered_tokens
from mta_ds.ops.span_pool import normalise_within, span_pool, span_weights
from mta_ds.ops.token_weights import entropy_weights, token_weights
from mta_ds.ops.trajectory import TrajectoryGradients, align_trajectory, attach_trajectory

__all__ = [
    "IGNORED",
    "Divergence",
    "DivergenceName",
    "HeadGradient",
    "LayerGradients",
    "LayerTerms",
    "LinearDivergence",
    "SpanLayout",
    "TrajectoryGradients",
    "align_layer",
    "align_trajectory",
    "attach",
    "attach_trajectory",
    "covered_tokens",
    "divergence_values",
    "dsa",
    "entropy_weights",
    "hid",
    "label_log_probs",
    "linear_divergence",
    "normalise_within",
    "span_pool",
    "span_weights",
    "token_entropy",
    "token_weights",
]
