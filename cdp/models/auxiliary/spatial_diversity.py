"""Spatial activation diversity (Yin et al. 2019): different filters look at different places.

Source: the responses of filters should not overlap. Read: the abstract and the project's page,
which have no formula. Ours: the form, a mean cosine, and the random subset of channels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError
from cdp.images.degradation import draw_uniform
from cdp.models.auxiliary.auxiliary import MapLoss, Seen

_STREAM = 5


class SpatialDiversityLoss(MapLoss):
    """Mean over pairs of filters of the cosine of their absolute response maps.

    channels : int
        Filters that are compared in an image, drawn by its seed. Those without any response are
        left out.
    """

    reads: ClassVar[Literal["map", "early_map"] | None] = "early_map"

    def __init__(
        self,
        embedding_dim: int,
        identity_count: int,
        map_channels: int,
        map_side: int,
        *,
        channels: float = 32,
    ) -> None:
        super().__init__(embedding_dim, identity_count, map_channels, map_side)
        if channels < 2:
            raise ConfigError(f"2 channels or more expected, got {channels}")
        self.channels = min(int(channels), map_channels)

    def judge(self, seen: Seen) -> Tensor:
        flat = seen.require_map().flatten(2)
        drawn = draw_uniform(seen.require_seeds(), flat.shape[1], stream=_STREAM)
        chosen = drawn.argsort(1)[:, : self.channels]
        return measure_overlap(flat.gather(1, chosen[:, :, None].expand(-1, -1, flat.shape[2])))


def measure_overlap(response: Tensor) -> Tensor:
    """Mean cosine over the pairs of live filters: (b, k, cells) to (b,); 0 with fewer than two."""
    magnitude = response.abs()
    live = (magnitude.amax(2) > 0).to(response.dtype)
    unit = functional.normalize(magnitude, dim=2)
    total = torch.einsum("bkn,bln->b", unit, unit) - live.sum(1)
    pairs = live.sum(1) * (live.sum(1) - 1)
    return total / pairs.clamp(min=1)
