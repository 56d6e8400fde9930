"""The parts of all backbones: the base class, the convolution unit and the three endings.

The contract:
- A backbone maps (b, 3, input_px, input_px) float32 in [-1, 1], RGB, to (b, embedding_dim) float,
  *raw*: its direction is the identity, its norm follows image quality (AdaFace, section 3.2).
- The last layer is a batch normalisation without scale or shift, so that an average embedding has
  a norm near sqrt(embedding_dim) in every family and the heads can count on it.
- `spec` holds all it takes to build the same backbone again.
- No dropout and no other randomness: two forward passes in `eval` mode are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BackboneSpec:
    """The recipe of a backbone: family name, side of its input, length of its output, width."""

    name: str
    input_px: int
    embedding_dim: int
    width: float


class Backbone(nn.Module):
    """Base of all families: `trunk` makes a feature map, `ending` an embedding.

    A family fills in `trunk` and `ending`; `build_backbone` fills in `spec`.
    """

    spec: BackboneSpec
    trunk: nn.Module
    ending: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) float in [-1, 1] to (b, d) raw embeddings."""
        embedding: Tensor = self.ending(self.trunk(images))
        return embedding


def scale_channels(channels: float, width: float) -> int:
    """Channels times width, to the nearest multiple of 8 (fast kernels want it), at least 8."""
    return max(8, round(channels * width / 8) * 8)


def conv_unit(
    inputs: int,
    outputs: int,
    kernel: int = 3,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution, batch normalisation and, by default, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    if activation:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def map_shape(trunk: nn.Module, input_px: int) -> tuple[int, int]:
    """Channels and side of the trunk's feature map for an input of `input_px`."""
    was_training = trunk.training
    trunk.eval()
    with torch.no_grad():
        feature_map = trunk(torch.zeros(1, 3, input_px, input_px))
    trunk.train(was_training)
    return int(feature_map.shape[1]), int(feature_map.shape[2])


class FlatEnding(nn.Sequential):
    """Every cell of the map, through one linear layer (ArcFace's option E, without dropout)."""

    def __init__(self, channels: int, side: int, embedding_dim: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels * side * side, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )


class MeanEnding(nn.Sequential):
    """The mean over the map, through one linear layer."""

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )


class DepthwiseEnding(nn.Sequential):
    """A learned weight a cell and channel (MobileFaceNet's global depthwise convolution)."""

    def __init__(self, channels: int, side: int, embedding_dim: int) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, side, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.Flatten(),
            nn.Linear(channels, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim, affine=False),
        )
