"""Maps over their faces, as pictures: blue is cold, red is hot."""

from __future__ import annotations

import cv2
import numpy as np

from cdp.errors import DataError


def overlay_maps(images: np.ndarray, maps: np.ndarray, *, share: float = 0.5) -> np.ndarray:
    """Colour each face by its map.

    Parameters
    ----------
    images : (n, s, s, 3) uint8, RGB
    maps : (n, h, w) float, 0 or above
        Each is scaled so that its largest value is the hottest colour.
    share : float
        Of the colour, 0..1; the rest is the face in grey.

    Returns
    -------
    pictures : (n, s, s, 3) uint8, RGB
    """
    if maps.ndim != 3 or len(maps) != len(images):
        raise DataError(f"a map of each of {len(images)} faces expected, got {maps.shape}")
    side = images.shape[1]
    pictures = np.empty_like(images)
    for place, (face, heat) in enumerate(zip(images, maps, strict=True)):
        scaled = np.clip(heat / max(float(heat.max()), 1e-12), 0, 1).astype(np.float32)
        large = cv2.resize(scaled, (side, side), interpolation=cv2.INTER_LINEAR)
        colour = cv2.applyColorMap(np.round(255 * large).astype(np.uint8), cv2.COLORMAP_JET)
        grey = cv2.cvtColor(np.ascontiguousarray(face), cv2.COLOR_RGB2GRAY)[:, :, None]
        mixed = share * colour[:, :, ::-1].astype(np.float32) + (1 - share) * grey
        pictures[place] = np.round(mixed).astype(np.uint8)
    return pictures
