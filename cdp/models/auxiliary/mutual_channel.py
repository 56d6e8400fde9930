"""Mutual-channel loss (Chang et al. 2020): channels of a class agree on it and differ in place.

Source: section 3 and the authors' code. Ours: a 1x1 convolution makes the classes' channels, since
a small network's map has fewer channels than there are classes; the mask is drawn an image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.images.degradation import draw_uniform
from cdp.models.auxiliary.auxiliary import MapLoss, Seen

MOST_CLASSES = 20_000
_STREAM = 4


class MutualChannelLoss(MapLoss):
    """discriminality x cross-entropy over pooled channels + diversity x (1 - mean spread).

    channels : int
        xi: channels a class, 2 or more.
    discriminality, diversity : float
        Factors of the two terms (1.5 and 20 in the authors' code, trained from scratch, beside a
        cross-entropy of weight 1).
    kept : float
        Share of a class's channels that the discriminality term sees, drawn for each image; at
        least one.
    """

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        map_channels: int,
        map_side: int,
        *,
        channels: float = 2,
        discriminality: float = 1.5,
        diversity: float = 20.0,
        kept: float = 0.6,
    ) -> None:
        super().__init__(embedding_dim, identity_count, map_channels, map_side)
        if identity_count > MOST_CLASSES:
            raise ConfigError(
                f"mutual_channel computes a map of every class: at most {MOST_CLASSES} classes "
                f"expected, got {identity_count}"
            )
        if channels < 2 or channels > map_side**2 or not 0 < kept <= 1:
            raise ConfigError(
                f"2 to {map_side**2} channels (the map's cells) and kept in 0..1 expected, got "
                f"{channels} and {kept}"
            )
        self.channels = int(channels)
        self.kept = max(1, round(kept * self.channels))
        self.discriminality, self.diversity = discriminality, diversity
        self.convolution = nn.Conv2d(map_channels, self.channels * identity_count, 1, bias=False)

    def judge(self, seen: Seen) -> Tensor:
        grouped = self.convolution(seen.require_map()).flatten(2)
        grouped = grouped.unflatten(1, (self.identity_count, self.channels))
        logits = pool_channels(grouped, self._draw_mask(seen.require_seeds()))
        loss = functional.cross_entropy(logits, seen.label, reduction="none")
        spread = measure_spread(grouped).mean(1) / self.channels
        return self.discriminality * loss + self.diversity * (1 - spread)

    def _draw_mask(self, seeds: Tensor) -> Tensor:
        """(b, channels) bool, `kept` of them True."""
        order = draw_uniform(seeds, self.channels, stream=_STREAM).argsort(1)
        return order.argsort(1) < self.kept


def pool_channels(grouped: Tensor, mask: Tensor) -> Tensor:
    """Maximum over a class's kept channels, mean over the cells: (b, c, xi, cells) to (b, c)."""
    seen = grouped.masked_fill(~mask[:, None, :, None], -torch.inf)
    return seen.amax(2).mean(2)


def measure_spread(grouped: Tensor) -> Tensor:
    """Sum over the cells of the largest of a class's softmaxed channels, in 1..xi: to (b, c)."""
    return grouped.softmax(3).amax(2).sum(2)
