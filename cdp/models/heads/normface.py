"""NormFace head (Wang et al. 2017, eq. 6): softmax over scaled cosines, without a margin."""

from __future__ import annotations

from torch import Tensor

from cdp.models.heads.head import CosineHead


class NormFaceHead(CosineHead):
    """Cross-entropy over `scale * cos(theta)`."""

    def penalise(self, target: Tensor, norm: Tensor) -> Tensor:
        return target
