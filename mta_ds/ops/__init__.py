"""Structural ops: one public function each; the backend behind it is chosen here, once.

Ragged contract: a batch's valid tokens are concatenated, ``cu_seqlens`` [B + 1] bounds sequences and ``cu_spans``
[B + 1] each sequence's spans; ops return sums and normalisers, and accumulate in fp32.
"""

from mta_ds.ops.divergence import Divergence, DivergenceName, divergence_values
from mta_ds.ops.linear_divergence import LinearDivergence, linear_divergence
from mta_ds.ops.reference import covered_tokens, dsa, hid, normalise_within, span_pool, span_weights, token_weights

__all__ = [
    "Divergence",
    "DivergenceName",
    "LinearDivergence",
    "covered_tokens",
    "divergence_values",
    "dsa",
    "hid",
    "linear_divergence",
    "normalise_within",
    "span_pool",
    "span_weights",
    "token_weights",
]
