"""Feature activation diversity (Yin et al. 2019): a cover changes nothing beside itself.

Source: responses to what is not covered should stay as they are. Read: the abstract and the
project's page, which have no formula. Ours: the map is compared cell by cell, since here every
dimension of the embedding mixes all cells.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional

from cdp.models.auxiliary.auxiliary import MapLoss, Seen, TwinKind


class FeatureDiversityLoss(MapLoss):
    """Mean absolute difference of the map to that of the covered image, over uncovered cells."""

    reads: ClassVar[Literal["map", "early_map"] | None] = "early_map"
    twin: ClassVar[TwinKind | None] = "covered"

    def judge(self, seen: Seen) -> Tensor:
        twin = seen.require_twin()
        return compare_uncovered(seen.require_map(), twin.require_map(), twin.require_info())


def compare_uncovered(first: Tensor, second: Tensor, cover: Tensor) -> Tensor:
    """Mean absolute difference over cells without any covered pixel.

    first, second : (b, c, h, w) float
    cover : (b, s, s) bool

    Returns
    -------
    difference : (b,) float; 0 where every cell is covered
    """
    covered = functional.adaptive_max_pool2d(cover[:, None].to(first.dtype), first.shape[2:])
    open_cells = 1 - covered
    away = ((first - second).abs() * open_cells).sum((1, 2, 3))
    return away / (open_cells.sum((1, 2, 3)) * first.shape[1]).clamp(min=1)
