"""Are these aligned? How far the landmarks of faces are from where aligned faces have them.

The contract:
- Each image is judged alone, after the same centre crop and resizing that reads it as a face.
- An image counts as aligned when a face is found in it whose landmarks are near the template.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cdp.images.align import TEMPLATE_112
from cdp.images.decode import fit_square
from cdp.images.detection import DetectionSettings, Detector

NEAR_PX = 8.0
"""Mean distance of the landmarks from the template that an aligned face may have, at 112 px; of
aligned LFW 99 % have less than 6."""
SETTINGS = DetectionSettings(min_face_px=30, turns=False)


def measure_offsets(images: Iterable[np.ndarray]) -> np.ndarray:
    """How far the landmarks of each image are from the template.

    Parameters
    ----------
    images : iterable of (h, w, 3) uint8, RGB
        Any sizes.

    Returns
    -------
    offset_px : (n,) float32
        Mean distance over the five landmarks, in pixels of a 112 px face, of the face nearest to
        the template; NaN where no face is found.

    Raises
    ------
    BackendError
        The networks of the detector are not installed.
    """
    detector = Detector(SETTINGS)
    offsets = []
    for image in images:
        faces = detector.detect(fit_square(image, 112))
        away = np.linalg.norm(faces.landmarks - TEMPLATE_112, axis=2).mean(axis=1)
        offsets.append(away.min() if len(away) else np.nan)
    return np.array(offsets, np.float32)
