"""ArcFace head (Deng et al. 2019, eq. 3): a margin on the angle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cdp.models.heads.head import CosineHead, bound_angle


class ArcFaceHead(CosineHead):
    """The own logit is `scale * cos(theta + margin_rad)`.

    margin_rad : float
        In radians. Where theta + margin exceeds pi, and the cosine would rise again, the logit
        goes on as `cos(theta) - margin sin(margin)` (the authors' code), which still falls.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        scale: float | None = None,
        margin_rad: float = 0.5,
    ) -> None:
        super().__init__(embedding_dim, identity_count, scale=scale)
        self.margin_rad = margin_rad

    def penalise(self, target: Tensor, norm: Tensor) -> Tensor:
        margin_rad = self.margin_share * self.margin_rad
        angle_rad = bound_angle(target)
        beyond = target - margin_rad * math.sin(margin_rad)
        return torch.where(
            angle_rad + margin_rad < math.pi, torch.cos(angle_rad + margin_rad), beyond
        )
