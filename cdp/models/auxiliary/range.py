"""Range loss (Zhang et al. 2017): narrow classes, the two nearest of them apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdp.models.auxiliary.auxiliary import Auxiliary, mean_by_class


class RangeLoss(Auxiliary):
    """Over a batch: the harmonic mean of each class's largest squared distances, and a hinge.

    ranges : int
        k: how many of the largest distances within a class count.
    margin : float or None
        Squared distance that the two nearest class means should keep; None is twice the
        embedding's length, what two unrelated raw embeddings have.
    between : float
        Weight of the hinge beside the ranges (beta / alpha of the paper). Ours: the ranges are the
        mean, not the sum, over classes with two images or more.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        ranges: int = 2,
        margin: float | None = None,
        between: float = 2.0,
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        self.ranges = int(ranges)
        self.margin = 2.0 * embedding_dim if margin is None else margin
        self.between = between

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        if embedding.dtype in (torch.float16, torch.bfloat16):
            embedding = embedding.float()
        total = (embedding * 0).sum()
        squared = _pairwise(embedding)
        pair = torch.triu(label[:, None] == label[None, :], diagonal=1)
        mean, place, size = mean_by_class(embedding, label)
        wide = torch.nonzero(size > 1).squeeze(1)
        for number in wide.tolist():
            rows = torch.nonzero(place == number).squeeze(1)
            within = squared[rows[:, None], rows][pair[rows[:, None], rows]]
            largest = within.topk(min(self.ranges, len(within))).values.clamp(1e-6, 1e37)
            # the logarithm of the harmonic mean: the inverse of a huge distance would be zero
            mean_range = math.log(len(largest)) - torch.logsumexp(-largest.log(), 0)
            total = total + mean_range.exp() / len(wide)
        if len(size) > 1:
            apart = _pairwise(mean)[torch.triu_indices(len(size), len(size), 1).unbind(0)]
            total = total + self.between * (self.margin - apart.min()).clamp(min=0)
        return total.expand(len(embedding))


def _pairwise(vectors: Tensor) -> Tensor:
    """Squared distances (n, n), by their definition, so that equal vectors are exactly 0 apart."""
    return (vectors[:, None] - vectors[None, :]).square().sum(2)
