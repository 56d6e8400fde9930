"""Blends of two faces into one: further images for distillation.

The contract:
- Faces aligned to the same template go in, one face of the same frame comes out: one laid over the
  other (a morph), or a part of each on either side of a soft seam. Each of the two may be mirrored
  first, and the blend stretched a little.
- A blend is a face: it can be blended again.
- A blend is a function of its two faces and its seed; the batch plays no part.
- A blend has no identity and no label. It is used with a teacher's vector of it.
"""

from __future__ import annotations

import cv2
import numpy as np

from cdp.errors import DataError

_STRETCHED_SHARE = 0.5
"""Share of the blends that are stretched: to a teacher, other proportions are another identity."""
_SEAM_SHARE = 0.5
"""Share of the blends that are joined along a seam; the others are morphs."""
_LEVEL_SHARE = 0.8
"""Share of the seams that lie about level; the others have any direction."""


def blend_faces(first: np.ndarray, second: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Blend faces, pair by pair.

    Parameters
    ----------
    first, second : (n, s, s, 3) uint8, RGB
    seeds : (n,) int64, 0 or above

    Returns
    -------
    blends : (n, s, s, 3) uint8
        A morph takes 0.3 to 0.7 of the first. A level seam lies from 0.12 of the side above the
        middle to 0.22 below it, between the eyes and the mouth of the standard template, any other
        within 0.1 of the middle. A stretched blend is up to 7 % wider or narrower, and higher or
        lower, about the middle.

    Raises
    ------
    DataError
        Arrays that do not match.

    Notes
    -----
    Ours, after mixup (Zhang et al. 2018) and Beyer et al. 2022, whose teacher embeds the mixed
    image itself. The embedding of a morph is not the mean of the two embeddings: on LFW their
    cosine is .59.
    """
    if first.shape != second.shape or len(seeds) != len(first) or first.dtype != np.uint8:
        raise DataError(
            f"two arrays of faces (n, s, s, 3) uint8 and n seeds expected, got {first.shape} "
            f"{first.dtype}, {second.shape} and {len(seeds)}"
        )
    blends = np.empty_like(first)
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(int(seed))
        one, other = (
            faces[row, :, ::-1] if rng.random() < 0.5 else faces[row] for faces in (first, second)
        )
        share = _draw_share(rng, first.shape[1])
        mixed = share * one + (1 - share) * other
        if rng.random() < _STRETCHED_SHARE:
            mixed = _stretch(mixed, rng)
        blends[row] = np.rint(mixed)
    return blends


def _draw_share(rng: np.random.Generator, side: int) -> np.ndarray:
    """The weight of the first face at each pixel; (s, s, 1) or (1, 1, 1) float32 in [0, 1]."""
    if rng.random() >= _SEAM_SHARE:
        return np.full((1, 1, 1), rng.uniform(0.3, 0.7), np.float32)
    if rng.random() < _LEVEL_SHARE:
        angle, place = rng.normal(0, 0.5), rng.uniform(-0.12, 0.22)
    else:
        angle, place = rng.uniform(0, np.pi), rng.uniform(-0.1, 0.1)
    along = (np.arange(side, dtype=np.float32) + 0.5) / side - 0.5
    across = along[:, None] * np.float32(np.cos(angle)) + along * np.float32(np.sin(angle))
    share: np.ndarray = 1 / (1 + np.exp((across - np.float32(place)) / rng.uniform(0.02, 0.08)))
    return share[:, :, None].astype(np.float32)


def _stretch(face: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Wider or narrower, higher or lower, slightly askew; (s, s, 3) float32."""
    (wide, high), askew = rng.uniform(0.93, 1.07, 2), rng.normal(0, 0.02)
    middle = (len(face) - 1) / 2
    frame = np.array(
        [
            [wide, askew, middle * (1 - wide - askew)],
            [0, high, middle * (1 - high)],
        ]
    )
    stretched: np.ndarray = cv2.warpAffine(
        face, frame, face.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return stretched
