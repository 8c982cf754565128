"""benepar's training loss, value and gradients the same, at a fraction of the work.

``SpanClassificationMarginLoss`` scores every cell of every chart in the graph and differentiates through the
decoder, although only the cells of two trees get a gradient: the gold tree's and the one that violates the margin
most. Here that tree is found without a graph; then those cells alone are scored again within it.
"""

from __future__ import annotations

from typing import Any

import torch
from benepar.parse_chart import ChartParser
from torch import Tensor
from torch.nn import functional

from mta_ds.spans.benepar_model import annotate, fencepost_features, label_scores
from mta_ds.spans.decode import most_likely_cells, span_fenceposts


def compute_loss(parser: ChartParser, batch: dict[str, Any]) -> Tensor:
    """What ``parser.compute_loss(batch)`` returns, up to rounding."""
    annotations = annotate(parser, batch)
    loss = _span_loss(parser, annotations, batch["span_labels"]) / batch["batch_size"]
    tag_scores = parser.f_tag(annotations).float()
    tag_loss = functional.cross_entropy(
        tag_scores.flatten(0, 1), batch["tag_labels"].flatten(), reduction="sum", ignore_index=-100
    )
    return loss + parser.tag_loss_scale * tag_loss / batch["batch_num_tokens"]


def _span_loss(parser: ChartParser, annotations: Tensor, gold_charts: Tensor) -> Tensor:
    """Sum over the batch of max(0, best margin-augmented score - score of the gold tree)."""
    lengths = (gold_charts[:, 0, :] != -100).sum(-1)
    features = fencepost_features(parser, annotations)
    left, right = map(torch.from_numpy, span_fenceposts(lengths.numpy(), features.shape[1]))
    features = features.flatten(0, 1)
    gold = _packed(gold_charts, lengths)
    cells, labels, sentences = _worst_tree(parser, features.detach(), left, right, gold, lengths)
    gold_cells = gold.nonzero().squeeze(1)
    of_sentence = torch.repeat_interleave(torch.arange(len(lengths)), lengths * (lengths + 1) // 2)
    both = torch.cat([cells, gold_cells])
    scores = label_scores(parser, features[left[both]], features[right[both]]).float()
    chosen = torch.cat([labels, gold[gold_cells]])
    values = functional.pad(scores, (1, 0)).gather(1, chosen[:, None]).squeeze(1)
    predicted = values[: len(cells)] + (labels != gold[cells])
    margins = torch.zeros(len(lengths)).index_add(0, sentences, predicted)
    margins = margins.index_add(0, of_sentence[gold_cells], -values[len(cells) :])
    return margins.relu().sum()


def _packed(charts: Tensor, lengths: Tensor) -> Tensor:
    """The upper triangles of padded charts [B, N, N], row by row, one sentence after the other."""
    inside = torch.arange(charts.shape[1])[None, :] < lengths[:, None]
    upper = torch.ones(charts.shape[1:], dtype=torch.bool).triu()
    return charts[inside[:, :, None] & inside[:, None, :] & upper]


@torch.no_grad()
def _worst_tree(
    parser: ChartParser, features: Tensor, left: Tensor, right: Tensor, gold: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells, labels and sentence numbers of the trees with the best scores, where each wrong label scores 1 more."""
    scores = functional.pad(label_scores(parser, features[left], features[right]).float(), (1, 0))
    scores += 1
    scores.scatter_add_(1, gold[:, None], -torch.ones(len(gold), 1))
    if parser.decoder.force_root_constituent:
        first_cells = (lengths * (lengths + 1) // 2).cumsum(0).roll(1)
        first_cells[0] = 0
        scores[first_cells + lengths - 1, 0] -= 1e9
    best, labels = scores.max(1)
    cells, sentences = most_likely_cells(best.numpy(), lengths.numpy())
    cells = torch.from_numpy(cells)
    return cells, labels[cells], torch.from_numpy(sentences)
