"""Appearance of a face as a picture: detail by scale, noise, light, and where something covers it.

The contract:
- Every measure is of one face alone, of any side; faces are compared at `SIDE_PX`.
- No measure is meant to tell people apart: they say how a picture was taken.
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np

from cdp.errors import DataError

SIDE_PX = 112
"""Side to which faces are brought before they are measured."""
SCALES = (1.0, 2.0, 4.0, 8.0)
"""Standard deviations in pixels of the blurs between which detail is measured."""
APPEARANCE = (
    *("detail_1", "detail_2", "detail_4", "detail_8", "noise"),
    *("light", "contrast", "saturation"),
    *("light_top", "light_middle", "light_bottom"),
    *("detail_top", "detail_middle", "detail_bottom"),
)
"""The columns of `measure_appearance`."""
_NOISE = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float32)
_FLOOR = 0.05
"""Added to squared detail in grey levels, so that a blank face has a logarithm."""


def measure_appearance(faces: np.ndarray) -> np.ndarray:
    """How each face was taken, in `APPEARANCE`.

    Source: ours. Detail in octaves (differences of Gaussians) shows size and blur; the noise is
    that of Immerkaer, "Fast noise variance estimation", 1996.

    Parameters
    ----------
    faces : (n, s, s, 3) uint8, RGB
        Of any one side.

    Returns
    -------
    appearance : (n, 14) float32
        Logarithms of mean squared detail in four octaves and of the noise; mean and deviation of
        the light and mean saturation, in shares of full scale; the light of three bands (eyes,
        nose, mouth) less the mean, and the logarithm of their finest detail less that of the face:
        a cover leaves a band without detail.

    Raises
    ------
    DataError
        Faces of another shape or type.
    """
    faces = np.asarray(faces)
    if faces.ndim != 4 or faces.shape[3] != 3 or faces.dtype != np.uint8:
        raise DataError(f"faces (n, s, s, 3) uint8 expected, got {faces.shape} {faces.dtype}")
    measured = np.empty((len(faces), len(APPEARANCE)), np.float32)
    for row, face in enumerate(faces):
        measured[row] = _measure_face(np.ascontiguousarray(face))
    return measured


def _measure_face(face: np.ndarray) -> list[float]:
    if face.shape[0] != SIDE_PX:
        way = cv2.INTER_LINEAR if face.shape[0] < SIDE_PX else cv2.INTER_AREA
        face = cv2.resize(face, (SIDE_PX, SIDE_PX), interpolation=way)
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY).astype(np.float32)
    blurred = [grey, *(cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in SCALES)]
    squared = [(fine - rough) ** 2 for fine, rough in pairwise(blurred)]
    detail = [np.log(each.mean() + _FLOOR) for each in squared]
    noise = np.log(np.abs(cv2.filter2D(grey, cv2.CV_32F, _NOISE)).mean() + _FLOOR)
    high, low = face.max(2).astype(np.float32), face.min(2).astype(np.float32)
    light = grey.mean() / 255
    bands = [slice(18, 52), slice(52, 78), slice(78, 108)]
    band_light = [grey[band, 16:96].mean() / 255 - light for band in bands]
    fine = squared[1] + squared[2]
    whole = np.log(fine.mean() + _FLOOR)
    band_detail = [np.log(fine[band, 16:96].mean() + _FLOOR) - whole for band in bands]
    return [
        *detail,
        noise,
        light,
        grey.std() / 255,
        float(np.mean((high - low) / np.maximum(high, 1))),
        *band_light,
        *band_detail,
    ]
