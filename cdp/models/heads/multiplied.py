"""The base class of the heads that multiply the angle to the own class by a whole number.

The contract:
- The multiplied angle and the weights are those of pytorch-metric-learning; ours is the loss a
  sample, and the annealing.
- The own logit is `(floor cos + psi) / (floor + 1)` of the plain and the multiplied cosine: the
  annealing of SphereFace's authors (Liu et al. 2017), who let lambda fall from 1000 to a floor of
  5. The multiplied angle alone does not train: m = 4 asks for an angle no beginner has.
- `margin_share` raises the multiplied part from 0 to what the floor leaves it.
"""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
from pytorch_metric_learning.losses import LargeMarginSoftmaxLoss
from torch import Tensor, nn

from cdp.errors import ConfigError
from cdp.models.heads.head import Head, HeadOutput, judge_logits


class MultipliedAngleHead(Head):
    """Base: the own logit is `psi(theta)`, the cosine of m theta made to fall over all of 0..pi.

    margin : int
        m, the factor of the angle; no unit.
    floor : float
        Lowest lambda, 0 or above; 0 ends with the multiplied angle alone.
    """

    library: ClassVar[type[LargeMarginSoftmaxLoss]]

    def __init__(
        self, embedding_dim: int, identity_count: int, *, margin: int = 4, floor: float = 5.0
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if margin != int(margin) or not 1 <= margin <= 8:
            raise ConfigError(f"a factor of the angle is a whole number in 1..8, got {margin}")
        if not floor >= 0:
            raise ConfigError(f"a floor of 0 or above expected, got {floor}")
        self.floor = floor
        with warnings.catch_warnings():
            # The library hands numpy a tensor in a way that numpy means to give up.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.formula = self.library(identity_count, embedding_dim, margin=int(margin))
        nn.init.normal_(self.formula.W, std=embedding_dim**-0.5)

    def score(self, embedding: Tensor, label: Tensor, masked: Tensor | None = None) -> HeadOutput:
        formula = self.formula
        formula.cast_types(embedding.dtype, embedding.device)
        cosine = formula.get_cosine(embedding)
        own = cosine.gather(1, label[:, None]).squeeze(1)
        harder = formula.modify_cosine_of_target_classes(own.clamp(-1 + 1e-6, 1 - 1e-6))
        annealed = torch.lerp(own, harder, self.margin_share / (1 + self.floor))
        with_margin = cosine.scatter(1, label[:, None], annealed[:, None])
        loss = judge_logits(formula.scale_logits(with_margin, embedding), label, masked)
        return HeadOutput(loss, formula.scale_logits(cosine, embedding))
