"""Trunk-branch ensemble (Ding and Tao 2018): branches look at the parts of an aligned face.

Source: branches on patches around facial parts share the low layers with the trunk, and their
features are concatenated. Read: the abstract (arXiv 1607.05427). Ours: three windows of the
five-point template on the early map.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cdp.models.backbone import Features, MapShape, Neck, conv_unit

WINDOWS = {
    "eyes": ((0.3, 0.62), (0.15, 0.85)),
    "nose": ((0.45, 0.75), (0.3, 0.7)),
    "mouth": ((0.68, 1.0), (0.25, 0.75)),
}
"""Rows and columns of each part as shares of the side of an aligned face."""


def find_cells(side: int, share: tuple[float, float]) -> slice:
    """The cells of a map's side that a share of the face covers; at least one."""
    start = min(math.floor(share[0] * side), side - 1)
    return slice(start, max(start + 1, math.ceil(share[1] * side)))


class TrunkBranchNeck(Neck):
    """Embedding = BN(linear(map, mean of conv(eyes), mean of conv(nose), mean of conv(mouth)))."""

    reads_early = True

    def __init__(self, map_shape: MapShape, early_shape: MapShape, embedding_dim: int) -> None:
        super().__init__()
        channels, side = map_shape
        self.windows = [
            tuple(find_cells(early_shape.side, share) for share in window)
            for window in WINDOWS.values()
        ]
        early = early_shape.channels
        self.branches = nn.ModuleList(conv_unit(early, early) for _ in WINDOWS)
        self.norm = nn.BatchNorm2d(channels)
        joined = channels * side * side + len(WINDOWS) * early
        self.linear = nn.Linear(joined, embedding_dim, bias=False)
        self.final = nn.BatchNorm1d(embedding_dim, affine=False)

    def look(self, feature_map: Tensor, early_map: Tensor | None, seeds: Tensor | None) -> Features:
        assert early_map is not None
        seen = [self.norm(feature_map).flatten(1)]
        for branch, (rows, columns) in zip(self.branches, self.windows, strict=True):
            seen.append(branch(early_map[:, :, rows, columns]).mean((2, 3)))
        embedding = self.final(self.linear(torch.cat(seen, 1)))
        return Features(embedding, feature_map, early_map)
