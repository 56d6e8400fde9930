"""Destruction and construction learning (Chen et al. 2019): shuffled faces are classified too.

Source: section 3, with the locations of the cells by the permutation itself (the authors' code
guesses them by brightness) and as two coordinates. Ours: the shares (the authors' code weighs all
terms 1, the locations of cars and aircraft .01), and a grid of the map's side, 3 at 24 px, in place
of 7 cells a side at 448 px.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.models.auxiliary.auxiliary import MapLoss, Seen, TwinKind
from cdp.models.heads import score_quietly


class ConstructionLoss(MapLoss):
    """The head's loss of the shuffled image, a classifier of whole and shuffled, and locations.

    classes : float
        Factor on the head's loss of the shuffled image.
    adversary : float
        Factor on the cross-entropy of a classifier that separates shuffled from whole images. As in
        the authors' code its gradient is not reversed.
    alignment : float
        Factor on the distance (mean absolute) between each cell's predicted and true origin.
    """

    twin: ClassVar[TwinKind | None] = "shuffled"

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        map_channels: int,
        map_side: int,
        *,
        classes: float = 0.5,
        adversary: float = 0.1,
        alignment: float = 0.1,
    ) -> None:
        super().__init__(embedding_dim, identity_count, map_channels, map_side)
        self.classes, self.adversary, self.alignment = classes, adversary, alignment
        self.whole = nn.Linear(embedding_dim, 2)
        self.location = nn.Conv2d(map_channels, 2, 1)

    def judge(self, seen: Seen) -> Tensor:
        whole_map, twin = seen.require_map(), seen.require_twin()
        origin = twin.require_info()
        total = self.classes * score_quietly(seen.require_head(), twin.embedding, seen.label).loss
        for number, embedding in enumerate((seen.embedding, twin.embedding)):
            target = torch.full_like(seen.label, number)
            found = functional.cross_entropy(self.whole(embedding), target, reduction="none")
            total = total + self.adversary * found / 2
        side = whole_map.shape[-1]
        in_place = torch.arange(side * side, device=seen.label.device).expand_as(origin)
        away = measure_displacement(self._locate(whole_map), in_place, side)
        away = away + measure_displacement(self._locate(twin.require_map()), origin, side)
        return total + self.alignment * away / 2

    def _locate(self, feature_map: Tensor) -> Tensor:
        """Row and column of each cell's origin, (b, 2, cells), near 0..1."""
        located: Tensor = self.location(feature_map).flatten(2)
        return located


def measure_displacement(located: Tensor, origin: Tensor, side: int) -> Tensor:
    """Mean absolute distance to the true row and column in [0, 1]: (b, 2, cells), (b, cells)."""
    true = torch.stack([origin // side, origin % side], 1) / max(side - 1, 1)
    return (located - true).abs().mean((1, 2))
