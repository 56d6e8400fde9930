"""Residual backbone for small faces.

The contract: see `backbone.py`. Sources: He et al. 2016 (residual learning); Deng et al. 2019
(ArcFace) for the full-resolution stem and the flat ending. Ours: the stride sits in a
block's first convolution and there is one block a resolution, to train fast on a CPU.
"""

from __future__ import annotations

from torch import Tensor, nn

from cdp.models.backbone import Backbone, FlatEnding, conv_unit, map_shape, scale_channels


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            conv_unit(inputs, outputs, 3, stride),
            conv_unit(outputs, outputs, 3, activation=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_unit(inputs, outputs, 1, stride, activation=False)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, feature_map: Tensor) -> Tensor:
        out: Tensor = self.activation(self.branch(feature_map) + self.shortcut(feature_map))
        return out


class ResidualBackbone(Backbone):
    """Stem at full resolution, then three halvings with one residual block each."""

    def __init__(self, input_px: int, embedding_dim: int, width: float) -> None:
        super().__init__()
        stem, *stages = [scale_channels(c, width) for c in (16, 32, 64, 128)]
        blocks: list[nn.Module] = [conv_unit(3, stem)]
        inputs = stem
        for outputs in stages:
            blocks.append(ResidualBlock(inputs, outputs, stride=2))
            inputs = outputs
        self.trunk = nn.Sequential(*blocks)
        self.ending = FlatEnding(*map_shape(self.trunk, input_px), embedding_dim)
