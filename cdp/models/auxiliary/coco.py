"""COCO loss (Liu et al. 2017, congenerous cosine): nearest to the own mean, by cosine."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.models.auxiliary.auxiliary import Auxiliary, mean_by_class
from cdp.models.heads import default_scale


class CocoLoss(Auxiliary):
    """Cross-entropy over `scale * cos(embedding, mean of each class in the batch)`.

    scale : float or None
        None chooses `default_scale(identity_count)`.
    """

    def __init__(
        self, embedding_dim: int, identity_count: int, *, scale: float | None = None
    ) -> None:
        super().__init__(embedding_dim, identity_count)
        if scale is not None and not scale > 0:
            raise ConfigError(f"the scale of COCO must be above 0, got {scale}")
        self.scale = float(scale) if scale is not None else default_scale(identity_count)

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        mean, place, _ = mean_by_class(embedding, label)
        cosine = functional.normalize(embedding, dim=1) @ functional.normalize(mean, dim=1).T
        return functional.cross_entropy(self.scale * cosine, place, reduction="none")
