"""Backbone with parallel branches of several receptive fields, for small faces.

The contract: see `backbone.py`. Source: Szegedy et al. 2015/2016 (Inception, the 5x5 branch as two
3x3). Ours: the channel counts, and a mean and a maximum pooling branch in the reductions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.backbone import Backbone, MeanEnding, conv_unit, map_shape, scale_channels


class InceptionBlock(nn.Module):
    """1x1, 3x3, twice 3x3, and pooling with 1x1, side by side.

    Branch widths are a quarter of `outputs` each.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        part = outputs // 4
        squeezed = max(8, part)
        self.branches = nn.ModuleList(
            [
                conv_unit(inputs, part, 1),
                nn.Sequential(conv_unit(inputs, squeezed, 1), conv_unit(squeezed, part)),
                nn.Sequential(
                    conv_unit(inputs, squeezed, 1),
                    conv_unit(squeezed, squeezed),
                    conv_unit(squeezed, outputs - 3 * part),
                ),
                nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), conv_unit(inputs, part, 1)),
            ]
        )

    def forward(self, feature_map: Tensor) -> Tensor:
        return torch.cat([branch(feature_map) for branch in self.branches], dim=1)


class ReductionBlock(nn.Module):
    """Halve the side: a strided 3x3 convolution beside a maximum pooling."""

    def __init__(self, inputs: int, added: int) -> None:
        super().__init__()
        self.convolved = conv_unit(inputs, added, 3, stride=2)
        self.pooled = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, feature_map: Tensor) -> Tensor:
        return torch.cat([self.convolved(feature_map), self.pooled(feature_map)], dim=1)


class InceptionBackbone(Backbone):
    """One block each at half, a quarter and an eighth of the input's side."""

    def __init__(self, input_px: int, embedding_dim: int, width: float) -> None:
        super().__init__()
        stem, half, quarter, eighth = [scale_channels(c, width) for c in (32, 64, 128, 192)]
        self.trunk = nn.Sequential(
            conv_unit(3, stem, stride=2),
            InceptionBlock(stem, half),
            ReductionBlock(half, quarter - half),
            InceptionBlock(quarter, quarter),
            ReductionBlock(quarter, eighth - quarter),
            InceptionBlock(eighth, eighth),
        )
        self.ending = MeanEnding(map_shape(self.trunk, input_px)[0], embedding_dim)
