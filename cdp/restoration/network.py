"""Networks of the restoration: two generators, which enlarge and refine, and a discriminator.

The contract:
- Pictures are (b, 3, s, s) float in [-1, 1], RGB, on both sides; a restored side is four times as
  long, for any s.
- A file is safetensors with the network's sizes in its header; nothing is executed on load.
- Building is deterministic given `seed` and leaves torch's random state as it was.

Source: Bai et al. 2018 (Finding Tiny Faces with GAN): SRN enlarges, RN refines, and the
discriminator says of a picture both whether it is real and whether it is a face. Read: a
re-implementation (EthanGuan/Finding-Tiny-Faces-with-GAN) with 8 blocks of 64 channels in each
generator and a trained VGG19 in the discriminator. Ours: 4 blocks of 16 channels and a small
discriminator, no normalisation layers, and that each generator adds to what it is given, SRN to the
bilinear picture.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from cdp.errors import ConfigError, DataError

ENLARGEMENT = 4
_HEADER = "cdp.restorer"
_BROKEN = (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError)


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, value: Tensor) -> Tensor:
        out: Tensor = value + self.branch(value)
        return out


def _start(width: int, blocks: int) -> list[nn.Module]:
    return [nn.Conv2d(3, width, 3, padding=1), nn.ReLU(inplace=True),
            *(_Block(width) for _ in range(blocks))]  # fmt: skip


def _finish(width: int) -> nn.Conv2d:
    """The last convolution; it adds nothing before it is trained."""
    layer = nn.Conv2d(width, 3, 3, padding=1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Restorer(nn.Module):
    """SRN and RN: (b, 3, s, s) to (b, 3, 4s, 4s).

    width : int
        Channels.
    blocks : int
        Residual blocks of each generator.
    """

    def __init__(self, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.width, self.blocks = width, blocks
        enlarge: list[nn.Module] = []
        for _ in range(2):
            enlarge += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.ReLU(inplace=True)]
        self.enlarging = nn.Sequential(*_start(width, blocks), *enlarge, _finish(width))
        self.refining = nn.Sequential(*_start(width, blocks), _finish(width))

    def forward(self, small: Tensor) -> Tensor:
        return self.restore_twice(small)[1].clamp(-1, 1)

    def restore_twice(self, small: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures after SRN and after RN, as they are trained, not cut to [-1, 1]."""
        first = enlarge_plainly(small) + self.enlarging(small)
        return first, first + self.refining(first)


class Discriminator(nn.Module):
    """(b, 3, s, s) to the logits that a picture is real, and that it is a face: (b, 2)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            inputs = outputs
        self.layers = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 2)
        )

    def forward(self, pictures: Tensor) -> Tensor:
        logits: Tensor = self.layers(pictures)
        return logits


def enlarge_plainly(small: Tensor) -> Tensor:
    """The bilinear enlargement that a restorer starts from and must be better than."""
    return functional.interpolate(
        small, scale_factor=ENLARGEMENT, mode="bilinear", align_corners=False
    )


def build_restorer(width: int = 16, blocks: int = 4, *, seed: int = 0) -> Restorer:
    """A restorer with fresh weights, which enlarges bilinearly; `ConfigError` for sizes below 1."""
    if width < 1 or blocks < 1:
        raise ConfigError(f"a width and blocks of 1 or more expected, got {width} and {blocks}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Restorer(width, blocks)


def restore_faces(restorer: Restorer, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
    """Restore small faces: (n, s, s, 3) uint8 to (n, 4s, 4s, 3) uint8.

    Raises
    ------
    DataError
        Images of another shape or dtype.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(f"images (n, s, s, 3) uint8 expected, got {images.shape} {images.dtype}")
    device = next(restorer.parameters()).device
    side = ENLARGEMENT * images.shape[1]
    restored = np.empty((len(images), side, side, 3), np.uint8)
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        part = torch.from_numpy(np.array(images[rows])).to(device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            large = restorer(part.float() / 127.5 - 1)
        pixels = ((large + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        restored[rows] = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return restored


def save_restorer(path: str | Path, restorer: Restorer) -> None:
    """Write a safetensors file (not atomic: the caller's to do)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in restorer.state_dict().items()}
    header = json.dumps({"width": restorer.width, "blocks": restorer.blocks})
    save_file(tensors, str(path), metadata={_HEADER: header})


def load_restorer(path: str | Path) -> Restorer:
    """Read what `save_restorer` wrote, in `eval` mode; `DataError` when it is none."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            sizes = json.loads((file.metadata() or {})[_HEADER])
        tensors = load_file(str(path))
        if not 1 <= int(sizes["width"]) <= 1024 or not 1 <= int(sizes["blocks"]) <= 64:
            raise ValueError(f"a width of 1..1024 and 1..64 blocks, got {sizes}")
        restorer = build_restorer(int(sizes["width"]), int(sizes["blocks"]))
        restorer.load_state_dict(tensors)
    except _BROKEN as error:
        raise DataError(f"{path}: a restorer of ours expected: {error}") from error
    return restorer.eval()
