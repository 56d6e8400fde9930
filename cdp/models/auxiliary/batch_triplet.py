"""Batch triplet loss (Trigueros et al. 2017): genuine and impostor scores narrow and apart.

Source: the triplet loss with the standard deviations of both kinds of scores added. Read: the
abstract (arXiv 1707.07923), which says so without a formula. Ours: scores are cosines over all
pairs of a batch, with a hinge on their means; the margin of .8 and the factor of 1. It needs two
images of an identity in a batch: `sampling: identity` with `images_per_identity` of 2 or more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cdp.models.auxiliary.auxiliary import Auxiliary


class BatchTripletLoss(Auxiliary):
    """max(0, margin + mean impostor - mean genuine cosine) + spread x (their standard deviations).

    margin : float
        In units of the cosine.
    spread : float
        Factor on the standard deviations. A batch without a pair of either kind costs nothing.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        margin: float = 0.8,
        spread: float = 1.0,
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        self.margin, self.spread = margin, spread

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        unit = functional.normalize(embedding, dim=1)
        rows, columns = torch.triu_indices(len(label), len(label), 1, device=label.device)
        cosine = (unit[rows] * unit[columns]).sum(1)
        same = (label[rows] == label[columns]).to(cosine.dtype)
        genuine, genuine_spread = _weigh(cosine, same)
        impostor, impostor_spread = _weigh(cosine, 1 - same)
        total = (self.margin + impostor - genuine).clamp(min=0)
        total = total + self.spread * (genuine_spread + impostor_spread)
        known = (same.sum() > 0) & (same.sum() < len(same))
        return (total * known).expand(len(embedding))


def _weigh(cosine: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the cosines with weight 1; the latter has a gradient at 0."""
    count = weight.sum().clamp(min=1)
    mean = (cosine * weight).sum() / count
    variance = ((cosine - mean).square() * weight).sum() / count
    return mean, (variance + 1e-8).sqrt() - 1e-4
