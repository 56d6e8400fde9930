"""Center loss (Wen et al. 2016, eq. 2 to 4): close to the mean of one's own class."""

from __future__ import annotations

import torch
from torch import Tensor

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary


class CenterLoss(Auxiliary):
    """Half the squared distance to the own class's centre.

    rate : float
        alpha: how far a centre goes towards its images in a batch, 0..1. Centres start at 0, move
        after they have been used, in `train` mode alone, and are constants to the gradient.
    """

    center: Tensor

    def __init__(self, embedding_dim: int, identity_count: int, *, rate: float = 0.5) -> None:
        super().__init__(embedding_dim, identity_count)
        if not 0 <= rate <= 1:
            raise ConfigError(f"the centres' rate must lie in 0..1, got {rate}")
        self.rate = rate
        self.register_buffer("center", torch.zeros(identity_count, embedding_dim))

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        away = embedding - self.center[label]
        if self.training:
            self._follow(away.detach(), label)
        return 0.5 * away.square().sum(1)

    @torch.no_grad()
    def _follow(self, away: Tensor, label: Tensor) -> None:
        classes, place, size = torch.unique(label, return_inverse=True, return_counts=True)
        step = away.new_zeros(len(classes), away.shape[1]).index_add(0, place, away)
        step *= self.rate / (1 + size[:, None])
        self.center.index_add_(0, classes, step.to(self.center))
