"""Densely connected backbone for small faces.

The contract: see `backbone.py`. Source: Huang et al. 2017 (DenseNet): each layer sees all before
it, in pre-activation order; the mean ending is theirs too. Ours: no bottlenecks, few layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.backbone import Backbone, MeanEnding, conv_unit, map_shape, scale_channels


class DenseLayer(nn.Module):
    """Normalise, activate, convolve to `growth` channels; the input is kept beside them."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, growth, 3, padding=1, bias=False),
        )

    def forward(self, feature_map: Tensor) -> Tensor:
        return torch.cat([feature_map, self.new(feature_map)], dim=1)


class DenseBackbone(Backbone):
    """Three dense blocks at a half, a quarter and an eighth of the input's side."""

    def __init__(self, input_px: int, embedding_dim: int, width: float) -> None:
        super().__init__()
        channels = scale_channels(24, width)
        layers: list[nn.Module] = [conv_unit(3, channels, stride=2)]
        for position, (growth, depth) in enumerate([(16, 3), (24, 4), (32, 3)]):
            if position:
                halved = scale_channels(channels / 2, 1.0)
                layers += [
                    nn.BatchNorm2d(channels),
                    nn.ReLU(inplace=True),
                    nn.Conv2d(channels, halved, 1, bias=False),
                    nn.AvgPool2d(2, ceil_mode=True),
                ]
                channels = halved
            for _ in range(depth):
                layers.append(DenseLayer(channels, scale_channels(growth, width)))
                channels += scale_channels(growth, width)
        self.trunk = nn.Sequential(*layers)
        self.ending = MeanEnding(map_shape(self.trunk, input_px)[0], embedding_dim)
