"""AdaFace head (Kim et al. 2022, eq. 13-16): a margin that follows image quality.

The contract:
- The quality of an image is its embedding's norm, standardised by running moments of the norm.
  A good image gets a margin on the angle below zero and one on the cosine above: hard good samples
  count more. A poor image gets the reverse: hopeless ones count less.
- The moments move in `train` mode alone. Ours: the first batch sets them (the authors start at 20
  and 100 and need thousands of steps to forget it).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdp.models.heads.head import CosineHead, bound_angle


class AdaFaceHead(CosineHead):
    """The own logit is `scale * (cos(theta - m q) - (m + m q))`, q the quality in [-1, 1].

    margin : float
        m: radians in the angle and units of the cosine outside it, as in the paper.
    concentration : float
        h: share of the norm's standard deviations that q covers before it is cut off.
    momentum : float
        Share of the new batch in the running moments.
    """

    norm_mean: Tensor
    norm_std: Tensor
    moments_known: Tensor

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        scale: float | None = None,
        margin: float = 0.4,
        concentration: float = 0.333,
        momentum: float = 0.01,
    ) -> None:
        super().__init__(embedding_dim, identity_count, scale=scale)
        self.margin = margin
        self.concentration = concentration
        self.momentum = momentum
        self.register_buffer("norm_mean", torch.tensor(20.0))
        self.register_buffer("norm_std", torch.tensor(100.0))
        self.register_buffer("moments_known", torch.tensor(0.0))

    def penalise(self, target: Tensor, norm: Tensor) -> Tensor:
        norm = norm.clamp(0.001, 100)
        if self.training and len(norm) > 1:
            self._observe(norm)
        quality = (norm - self.norm_mean) / (self.norm_std + 1e-3) * self.concentration
        quality = quality.clamp(-1, 1)
        margin = self.margin_share * self.margin
        angle_rad = (bound_angle(target) - margin * quality).clamp(1e-3, math.pi - 1e-3)
        return torch.cos(angle_rad) - (margin + margin * quality)

    @torch.no_grad()
    def _observe(self, norm: Tensor) -> None:
        share = 1 - self.moments_known * (1 - self.momentum)
        self.norm_mean.lerp_(norm.mean().to(self.norm_mean), share)
        self.norm_std.lerp_(norm.std().to(self.norm_std), share)
        self.moments_known.fill_(1.0)
