"""Quality of faces as a recognizer sees them: what to reject because it cannot be recognised.

The contract:
- Larger is better. A quality depends on its own image alone and needs neither label nor head.
- `norm` is there for every recognizer, `consistency` for the neck `subdecisions`, `confidence` for
  recognizers trained with the head `subspheres`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cdp.errors import ConfigError, DataError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import Backbone

QUALITIES = ("norm", "consistency", "confidence")


def measure_quality(
    backbone: Backbone,
    images: np.ndarray,
    kind: str = "norm",
    *,
    parts: int = 8,
    batch_size: int = 256,
) -> np.ndarray:
    """The quality of each face.

    Parameters
    ----------
    backbone : Backbone
        In `eval` mode, on any device.
    images : (n, s, s, 3) uint8, RGB
    kind : str
        "norm", the length of the embedding (Kim et al. 2022, AdaFace). "consistency", how alike the
        parts of the neck `subdecisions` are, in (0, 1]. "confidence", the least confident of the
        embedding's parts: the shortest one's length (Shi et al. 2020, URFace; the minimum is ours).
    parts : int
        Of "confidence": as the head's.
    batch_size : int

    Returns
    -------
    quality : (n,) float32

    Raises
    ------
    ConfigError
        Another kind, or a backbone without what it needs.
    DataError
        Images of another shape.
    """
    _check(backbone, images, kind, parts)
    device = next(backbone.parameters()).device
    found = np.empty(len(images), np.float32)
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        pixels = torch.from_numpy(np.array(images[rows])).to(device)
        seeds = torch.zeros(len(pixels), dtype=torch.int64, device=device)
        faces = degrade(pixels, seeds, DEGRADATIONS["none"], backbone.spec.input_px)
        with torch.inference_mode():
            features = backbone.extract(faces)
        if kind == "consistency":
            assert features.parts is not None
            value = compare_parts(features.parts)
        elif kind == "confidence":
            value = features.embedding.unflatten(1, (parts, -1)).norm(dim=2).amin(1)
        else:
            value = features.embedding.norm(dim=1)
        found[rows] = value.float().cpu().numpy()
    return found


def compare_parts(parts: Tensor) -> Tensor:
    """2 sigmoid(-mean distance between the parts' directions): (b, k, d) to (b,), 1 where equal.

    Source: SER-FIQ (Terhoerst et al. 2020), eq. 2, on the parts of one pass in place of passes with
    dropout.
    """
    unit = functional.normalize(parts, dim=2)
    first, second = torch.triu_indices(parts.shape[1], parts.shape[1], 1, device=parts.device)
    distance = (unit[:, first] - unit[:, second]).norm(dim=2)
    return 2 * torch.sigmoid(-distance.mean(1))


def _check(backbone: Backbone, images: np.ndarray, kind: str, parts: int) -> None:
    if kind not in QUALITIES:
        raise ConfigError(f"a quality of {', '.join(QUALITIES)} expected, got {kind!r}")
    if kind == "consistency" and backbone.spec.neck != "subdecisions":
        raise ConfigError(
            f"quality consistency needs the neck subdecisions, got {backbone.spec.neck!r}"
        )
    if kind == "confidence" and (parts < 1 or backbone.spec.embedding_dim % parts):
        raise ConfigError(f"parts that divide {backbone.spec.embedding_dim} expected, got {parts}")
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(f"images (n, s, s, 3) uint8 expected, got {images.shape} {images.dtype}")
