"""The parts of all backbones: the base class, the convolution unit and the three endings.

The contract:
- A backbone maps (b, 3, input_px, input_px) float32 in [-1, 1], RGB, to (b, embedding_dim) float,
  *raw*: its direction is the identity, its norm follows image quality (AdaFace, section 3.2).
- The last layer is a batch normalisation without scale or shift, so that an average embedding has
  a norm near sqrt(embedding_dim) in every family and the heads can count on it.
- `extract` gives what the losses of a training look at besides: maps, and a neck's parts.
- `spec` holds all it takes to build the same backbone again.
- No dropout and no other randomness: two forward passes in `eval` mode are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class BackboneSpec:
    """The recipe of a backbone: family, side of its input, length of its output, width, neck.

    network : the layers of a ready network, see `cdp.models.pretrained`; None for the families.
    """

    name: str
    input_px: int
    embedding_dim: int
    width: float
    neck: str = "own"
    network: Mapping[str, Any] | None = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        """The recipe in JSON values, as `build_backbone` takes them."""
        described = {each.name: getattr(self, each.name) for each in fields(self)}
        if self.network is None:
            del described["network"]
        return described


class Features(NamedTuple):
    """What a backbone makes of b images; what was not asked for is None.

    embedding : (b, d) float, raw
    map : (b, c, h, w) float or None, the trunk's last map
    early_map : (b, c, h, w) float or None, the last map that is larger than that
    parts : (b, k, d) float or None, a neck's parts
    part_weight : (b, k) float or None, the weight of each part
    gate : (b,) float or None, the gate of the neck `balanced`
    """

    embedding: Tensor
    map: Tensor | None = None
    early_map: Tensor | None = None
    parts: Tensor | None = None
    part_weight: Tensor | None = None
    gate: Tensor | None = None


class MapShape(NamedTuple):
    """Channels and side of a feature map."""

    channels: int
    side: int


class Neck(nn.Module):
    """Base of what stands between the trunk's map and the embedding in place of a family's ending.

    Its last layer is a batch normalisation without scale or shift.
    """

    reads_early = False
    """Whether it looks at the early map too."""

    def look(self, feature_map: Tensor, early_map: Tensor | None, seeds: Tensor | None) -> Features:
        """The embedding and what a loss may want to see.

        seeds : (b,) int64 or None
            One an image: the source of all random numbers of a training step; None draws nothing.
        """
        raise NotImplementedError


class Backbone(nn.Module):
    """Base of all families: `trunk` makes a feature map, `ending` an embedding.

    A family fills in `trunk` and `ending`; `build_backbone` fills in the rest, and puts a neck in
    the place of the ending where the spec names one.
    """

    spec: BackboneSpec
    trunk: nn.Module
    ending: nn.Module
    map_shape: MapShape
    early_shape: MapShape
    """Of the early map: twice the side, or that of the map where the trunk has no larger one."""
    tap: int = 0
    """The trunk's layers before the early map; 0 where it has none."""

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, s, s) float in [-1, 1] to (b, d) raw embeddings."""
        return self.extract(images).embedding

    def extract(
        self, images: Tensor, seeds: Tensor | None = None, *, early: bool = False
    ) -> Features:
        """Embeddings with the maps and parts that they were made of.

        seeds : (b,) int64 or None
            Given in a training step, for a neck that drops parts of the map.
        early : bool
            Keep the early map too.
        """
        neck = self.ending if isinstance(self.ending, Neck) else None
        feature_map, early_map = self._run_trunk(images, early or bool(neck and neck.reads_early))
        if neck is not None:
            return neck.look(feature_map, early_map, seeds)
        return Features(self.ending(feature_map), feature_map, early_map)

    def _run_trunk(self, images: Tensor, early: bool) -> tuple[Tensor, Tensor | None]:
        if not early:
            return self.trunk(images), None
        if not self.tap:
            feature_map = self.trunk(images)
            return feature_map, feature_map
        assert isinstance(self.trunk, nn.Sequential)
        early_map = self.trunk[: self.tap](images)
        return self.trunk[self.tap :](early_map), early_map

    def measure_maps(self) -> None:
        """Fill in the shapes of the maps and the place of the early one."""
        shapes = map_shapes(self.trunk, self.spec.input_px)
        self.map_shape = self.early_shape = shapes[-1]
        for length in range(len(shapes) - 1, 0, -1):
            shape = shapes[length - 1]
            if shape.side > self.map_shape.side:
                self.tap, self.early_shape = length, shape
                return


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


class _KeepShapes(TorchFunctionMode):
    """Leaves out steps that change no shape: batch normalisation and sums of maps.

    Without memory (device "meta") they would import torch's compiler, seconds in each process.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.batch_norm:
            return args[0]
        if func in (Tensor.add, Tensor.__add__) and args[0].shape == args[1].shape:
            return args[0]
        return func(*args, **(kwargs or {}))


def map_shapes(trunk: nn.Module, input_px: int) -> list[MapShape]:
    """The map's shape after each layer of the trunk, for an input of `input_px`."""
    was_training = trunk.training
    trunk.eval()
    shapes = []
    with torch.no_grad(), _KeepShapes():
        feature_map = torch.zeros(1, 3, input_px, input_px)
        for layer in trunk if isinstance(trunk, nn.Sequential) else [trunk]:
            feature_map = layer(feature_map)
            shapes.append(MapShape(int(feature_map.shape[1]), int(feature_map.shape[2])))
    trunk.train(was_training)
    return shapes


def map_shape(trunk: nn.Module, input_px: int) -> MapShape:
    """Channels and side of the trunk's feature map for an input of `input_px`."""
    return map_shapes(trunk, input_px)[-1]


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
