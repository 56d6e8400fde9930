"""Distillation from the sharp twin: a degraded face follows the same face sharp.

Source: the map term is that of feature-similarity distillation for low-resolution faces (Shin et
al. 2022; in the authors' code it is taken at several layers and averaged). The relation term
follows relational distillation (Park et al. 2019), which compares distances, divided by their mean,
and angles by a Huber loss. Ours: it compares cosines by a squared difference; and the teacher is
the network itself on the sharp image, without a gradient, in place of one trained on sharp faces.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from cdp.models.auxiliary.auxiliary import Auxiliary, MapLoss, Seen, TwinKind


class MapDistillationLoss(MapLoss):
    """1 - cosine of an image's flattened map and its sharp twin's, which is held fixed."""

    twin: ClassVar[TwinKind | None] = "sharp"

    def judge(self, seen: Seen) -> Tensor:
        sharp = seen.require_twin().require_map().detach()
        return 1 - functional.cosine_similarity(
            seen.require_map().flatten(1), sharp.flatten(1), dim=1
        )


class RelationDistillationLoss(Auxiliary):
    """Mean squared difference of an image's cosines to the batch and those of its sharp twin."""

    twin: ClassVar[TwinKind | None] = "sharp"

    def judge(self, seen: Seen) -> Tensor:
        own = functional.normalize(seen.embedding, dim=1)
        sharp = functional.normalize(seen.require_twin().embedding.detach(), dim=1)
        return (own @ own.T - sharp @ sharp.T).square().mean(1)
