"""Patch-mixing backbone for small faces: no spatial convolution after the stem.

The contract: see `backbone.py`. Source: Tolstikhin et al. 2021 (MLP-Mixer). Ours: a
convolutional stem for the patches (Xiao et al. 2021, early convolutions) and ReLU. Its errors are
unlike those of the convolutional families, which helps a committee.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdp.models.backbone import Backbone, MeanEnding, conv_unit, scale_channels


class MixerBlock(nn.Module):
    """Mix over the places of one channel, then over the channels of one place; both residual."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.token_norm = nn.LayerNorm(channels)
        self.token_mix = nn.Sequential(
            nn.Linear(tokens, 2 * tokens), nn.ReLU(), nn.Linear(2 * tokens, tokens)
        )
        self.channel_norm = nn.LayerNorm(channels)
        self.channel_mix = nn.Sequential(
            nn.Linear(channels, 2 * channels), nn.ReLU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        mixed = self.token_mix(self.token_norm(tokens).transpose(1, 2)).transpose(1, 2)
        tokens = tokens + mixed
        out: Tensor = tokens + self.channel_mix(self.channel_norm(tokens))
        return out


class MixerTrunk(nn.Module):
    """A token for every 4x4 px, from two strided convolutions; three mixer blocks."""

    def __init__(self, input_px: int, channels: int) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            conv_unit(3, channels // 2, stride=2), conv_unit(channels // 2, channels, stride=2)
        )
        side = (input_px + 3) // 4
        self.place = nn.Parameter(torch.zeros(side * side, channels))
        self.blocks = nn.Sequential(*[MixerBlock(side * side, channels) for _ in range(3)])

    def forward(self, images: Tensor) -> Tensor:
        feature_map = self.patches(images)
        tokens = feature_map.flatten(2).transpose(1, 2) + self.place
        mixed = self.blocks(tokens).transpose(1, 2)
        out: Tensor = mixed.reshape(feature_map.shape)
        return out


class MixerBackbone(Backbone):
    """Two strided convolutions to tokens, three mixer blocks, the mean over the tokens."""

    def __init__(self, input_px: int, embedding_dim: int, width: float) -> None:
        super().__init__()
        channels = scale_channels(96, width)
        self.trunk = MixerTrunk(input_px, channels)
        self.ending = MeanEnding(channels, embedding_dim)
