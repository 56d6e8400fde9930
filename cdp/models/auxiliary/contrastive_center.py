"""Contrastive-center loss (Qi and Su 2017): near one's own centre, far from the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.auxiliary.auxiliary import Auxiliary


class ContrastiveCenterLoss(Auxiliary):
    """Half the squared distance to the own centre over the sum of those to all the others.

    offset : float
        delta: added to the denominator, in squared embedding length. The centres are learned.
    """

    def __init__(self, embedding_dim: int, identity_count: int, *, offset: float = 1.0) -> None:
        super().__init__(embedding_dim, identity_count)
        self.offset = offset
        self.center = nn.Parameter(torch.empty(identity_count, embedding_dim))
        nn.init.normal_(self.center)

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        squared = (
            embedding.square().sum(1, keepdim=True)
            - 2 * embedding @ self.center.T
            + self.center.square().sum(1)
        )
        # By its definition, not by the expansion above: near 0 that has no digits left.
        own = (embedding - self.center[label]).square().sum(1)
        others = squared.sum(1) - squared.gather(1, label[:, None]).squeeze(1)
        return 0.5 * own / (others.clamp(min=0) + self.offset)
