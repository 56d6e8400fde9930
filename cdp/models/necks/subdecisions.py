"""Consistent sub-decisions (Zhao et al. 2022): three views of one map, weighed by a concept branch.

Source: the network's form (dropout blocks, concept branch, weighted sum) is the paper's, as far as
its abstract and summaries say. Ours: the dropout share, its masks from the images' seeds, and the
normalisation after the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.images.degradation import draw_uniform
from cdp.models.backbone import Features, MapShape, Neck

PARTS = 3
DROPOUT = 0.3
_STREAM = 3


class SubdecisionNeck(Neck):
    """Embedding = BN(sum of w_i e_i), e_i = linear_i(dropout_i(map)), w = softmax(MLP(mean map)).

    `parts` are the e_i, `part_weight` the w_i. Nothing is dropped in `eval` mode.
    """

    def __init__(self, map_shape: MapShape, early_shape: MapShape, embedding_dim: int) -> None:
        super().__init__()
        channels, side = map_shape
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.ModuleList(
            nn.Linear(channels * side * side, embedding_dim, bias=False) for _ in range(PARTS)
        )
        squeezed = max(8, channels // 4)
        self.concept = nn.Sequential(
            nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, PARTS)
        )
        self.final = nn.BatchNorm1d(embedding_dim, affine=False)

    def look(self, feature_map: Tensor, early_map: Tensor | None, seeds: Tensor | None) -> Features:
        weight = torch.softmax(self.concept(feature_map.mean((2, 3))).float(), dim=1)
        flat = self.norm(feature_map).flatten(1)
        views = [flat] * PARTS
        if self.training and seeds is not None:
            draw = draw_uniform(seeds, PARTS * flat.shape[1], stream=_STREAM)
            kept = (draw >= DROPOUT).unflatten(1, (PARTS, -1)).to(flat.dtype) / (1 - DROPOUT)
            views = [flat * kept[:, number] for number in range(PARTS)]
        parts = torch.stack(
            [block(view) for block, view in zip(self.blocks, views, strict=True)], dim=1
        )
        embedding = self.final((weight[:, :, None] * parts).sum(1))
        return Features(embedding, feature_map, early_map, parts, weight)
