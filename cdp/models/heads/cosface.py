"""CosFace head (Wang et al. 2018, eq. 4; AM-softmax): a margin on the cosine."""

from __future__ import annotations

from torch import Tensor

from cdp.models.heads.head import CosineHead


class CosFaceHead(CosineHead):
    """The own logit is `scale * (cos(theta) - margin)`.

    margin : float
        In units of the cosine.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        *,
        scale: float | None = None,
        margin: float = 0.35,
    ) -> None:
        super().__init__(embedding_dim, identity_count, scale=scale)
        self.margin = margin

    def penalise(self, target: Tensor, norm: Tensor) -> Tensor:
        return target - self.margin_share * self.margin
