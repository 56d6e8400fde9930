"""Residual balancing map (Cao et al. 2020, domain balancing): a gated change of the embedding.

Source: x + f(x) R(x), a soft gate f and a light residual R. Read: a summary of the paper (ntechlab,
2020); no code of the authors was found. Ours: the layers' sizes, a gate within 0..2, and the
normalisation after it. The loss `gate` brings the gate to the class's factor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.backbone import Features, MapShape, Neck


class BalancedNeck(Neck):
    """Embedding = BN(x + f(x) R(x)), x the flattened map through one linear layer."""

    def __init__(self, map_shape: MapShape, early_shape: MapShape, embedding_dim: int) -> None:
        super().__init__()
        channels, side = map_shape
        squeezed = max(8, embedding_dim // 4)
        self.flat = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * side * side, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        self.gate = nn.Sequential(
            nn.Linear(embedding_dim, squeezed), nn.ReLU(), nn.Linear(squeezed, 1)
        )
        self.change = nn.Sequential(
            nn.Linear(embedding_dim, squeezed), nn.ReLU(), nn.Linear(squeezed, embedding_dim)
        )
        self.final = nn.BatchNorm1d(embedding_dim, affine=False)

    def look(self, feature_map: Tensor, early_map: Tensor | None, seeds: Tensor | None) -> Features:
        plain = self.flat(feature_map)
        gate = 2 * torch.sigmoid(self.gate(plain))
        embedding = self.final(plain + gate * self.change(plain))
        return Features(embedding, feature_map, early_map, gate=gate[:, 0])
