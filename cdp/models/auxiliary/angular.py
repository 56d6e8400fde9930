"""Angular loss (Wang et al. 2017): a bound on the angle at the far corner of a triplet."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary


class AngularLoss(Auxiliary):
    """Over all triplets of a batch, as pytorch-metric-learning computes it, on unit vectors.

    bound_rad : float
        alpha: largest angle at the negative, in radians (the library takes degrees). A batch in
        which no identity has two images has no triplet and costs nothing.
    """

    def __init__(
        self, embedding_dim: int, identity_count: int, *, bound_rad: float = math.pi / 4
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if not 0 < bound_rad < math.pi / 2:
            raise ConfigError(f"bound_rad between 0 and pi/2 (radians) expected, got {bound_rad}")
        from pytorch_metric_learning import losses  # no other loss needs it

        self.formula = losses.AngularLoss(alpha=math.degrees(bound_rad))

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        # The library brings anchors and positives to unit length, but not the negatives.
        total: Tensor = self.formula(functional.normalize(embedding, dim=1), label)
        return total.expand(len(embedding))
