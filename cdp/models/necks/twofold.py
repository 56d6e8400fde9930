"""Two halves (BBN, Zhou et al. 2020): one for the usual order of images, one for the reversed.

Source: two branches whose features are concatenated. Ours: they share the whole trunk, and each is
one linear layer. With `sampling: bilateral` the first half is trained on the usual order and the
second on rare classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.backbone import Features, MapShape, Neck


class TwofoldNeck(Neck):
    """Embedding = BN(linear_1(map), linear_2(map)), each half of its length."""

    def __init__(self, map_shape: MapShape, early_shape: MapShape, embedding_dim: int) -> None:
        super().__init__()
        channels, side = map_shape
        first = embedding_dim - embedding_dim // 2
        self.norm = nn.BatchNorm2d(channels)
        self.halves = nn.ModuleList(
            nn.Linear(channels * side * side, length, bias=False)
            for length in (first, embedding_dim - first)
        )
        self.final = nn.BatchNorm1d(embedding_dim, affine=False)

    def look(self, feature_map: Tensor, early_map: Tensor | None, seeds: Tensor | None) -> Features:
        flat = self.norm(feature_map).flatten(1)
        embedding = self.final(torch.cat([half(flat) for half in self.halves], 1))
        return Features(embedding, feature_map, early_map)
