"""Plain stacked-convolution backbone for small faces.

The contract: see `backbone.py`. Source: Simonyan & Zisserman 2015 (VGG): 3x3 convolutions, max
pooling, no shortcut; batch normalisation after Ioffe & Szegedy 2015.
"""

from __future__ import annotations

from torch import nn

from cdp.models.backbone import Backbone, FlatEnding, conv_unit, map_shape, scale_channels


class PlainBackbone(Backbone):
    """One, two, two and one convolutions, a max pooling between the groups."""

    def __init__(self, input_px: int, embedding_dim: int, width: float) -> None:
        super().__init__()
        groups = [(16,), (32, 32), (64, 64), (128,)]
        layers: list[nn.Module] = []
        inputs = 3
        for position, group in enumerate(groups):
            for channels in group:
                outputs = scale_channels(channels, width)
                layers.append(conv_unit(inputs, outputs))
                inputs = outputs
            if position < len(groups) - 1:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.trunk = nn.Sequential(*layers)
        self.ending = FlatEnding(*map_shape(self.trunk, input_px), embedding_dim)
