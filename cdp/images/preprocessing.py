"""What an ONNX face model is shown: range and order of its pixels, layout, side.

The contract:
- Faces enter as (n, s, s, 3) uint8 RGB. A model is shown `(pixel - mean) / scale` in its own order
  of colours, (n, 3, p, p) or (n, p, p, 3) float32.
- `PRESETS` are the conventions under which face models are handed around; docs/models.md names
  the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from cdp.errors import ConfigError

LARGEST_SHOWN = 1024
"""Larger numbers are no pixels of any convention: a scale was given upside down."""
Triple = float | tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """What a model is shown.

    mean, scale : a number, or one a channel in the model's order: shown is (pixel - mean) / scale.
    channels : order of the colours.
    layout : "nchw" is (n, 3, p, p), "nhwc" (n, p, p, 3); None follows the model's declared shape.
    output : name of the output that is the embedding; None is the only one of shape (n, d), d > 1.
    input_px : side of a model that leaves it free; None shows faces at the side they have.

    Raises
    ------
    ConfigError
        Scale not above 0, or numbers shown that are no pixels.
    """

    mean: Triple = 0.0
    scale: Triple = 1.0
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] | None = None
    output: str | None = None
    input_px: int | None = None

    def __post_init__(self) -> None:
        mean, scale = np.asarray(self.mean, np.float64), np.asarray(self.scale, np.float64)
        if not (scale > 0).all():
            raise ConfigError(f"scale: numbers above 0 expected, got {self.scale}")
        shown = np.abs(np.stack([(0 - mean) / scale, (255 - mean) / scale])).max()
        if shown > LARGEST_SHOWN:
            raise ConfigError(
                f"mean {self.mean} and scale {self.scale} show pixels up to {shown:.0f}; shown is "
                "(pixel - mean) / scale, so that mean 127.5 and scale 127.5 give -1..1"
            )

    def prepare(self, faces: np.ndarray) -> np.ndarray:
        """(n, 3, p, p) float32 RGB in 0..255 -> what the model is shown, in layout nchw."""
        if self.channels == "bgr":
            faces = faces[:, ::-1]
        mean, scale = self._spread()
        return np.ascontiguousarray((faces - mean) / scale, dtype=np.float32)

    def undo(self, shown: np.ndarray) -> np.ndarray:
        """What the model is shown, (n, 3, p, p) -> pixels (n, p, p, 3) uint8 RGB, to look at."""
        mean, scale = self._spread()
        pixels = np.clip(np.rint(shown * scale + mean), 0, 255).astype(np.uint8)
        if self.channels == "bgr":
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))

    def _spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and scale of each channel, (3, 1, 1) float32 each."""
        mean, scale = (
            np.broadcast_to(np.asarray(value, np.float32), 3)[:, None, None]
            for value in (self.mean, self.scale)
        )
        return mean, scale

    @property
    def keeps_range(self) -> bool:
        """Whether pixels are shown in 0..255, as they are."""
        return bool((np.asarray(self.mean) == 0).all() and (np.asarray(self.scale) == 1).all())

    def describe(self) -> str:
        """Order of colours and range of pixels in a few words: "BGR in -1..1"."""
        mean, scale = (
            np.broadcast_to(np.asarray(value, np.float64), 3) for value in (self.mean, self.scale)
        )
        low, high = (f"{((pixel - mean) / scale).mean():.3g}" for pixel in (0, 255))
        each = "" if np.ptp(mean) == np.ptp(scale) == 0 else " (a mean and scale a channel)"
        return f"{self.channels.upper()} in {low}..{high}{each}"


PRESETS: Mapping[str, Preprocessing] = MappingProxyType(
    {
        "plain": Preprocessing(),
        "insightface": Preprocessing(127.5, 127.5),
        "adaface": Preprocessing(127.5, 127.5, "bgr"),
        "edgeface": Preprocessing(127.5, 127.5),
        "facenet": Preprocessing(127.5, 128.0, input_px=160),
        "sface": Preprocessing(),
    }
)
"""Name of a family of models -> what they are shown."""

CANDIDATES = (
    Preprocessing(),
    Preprocessing(127.5, 127.5),
    Preprocessing(127.5, 127.5, "bgr"),
    Preprocessing(0.0, 255.0),
    Preprocessing(channels="bgr"),
    Preprocessing(0.0, 255.0, "bgr"),
    Preprocessing((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
)
"""The usual combinations of range and order, the most common first; the last is ImageNet's."""
