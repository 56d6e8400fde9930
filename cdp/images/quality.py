"""Quality of a face: its size, sharpness, pose and score, and one number made of them.

The contract:
- Every measure is of one face alone. Pose is in degrees and rough: five points show it to about ten
  degrees.
- The quality lies in [0, 1]: 1 is a sharp, frontal, sure face of 112 px or more.
- Crops that came aligned are rated by size and sharpness, and by pose and score where landmarks are
  found in them.
"""

from __future__ import annotations

import cv2
import numpy as np

from cdp.errors import DataError
from cdp.images.align import TEMPLATE_112, estimate_similarity
from cdp.images.decode import fit_square

NOSE_DEPTH = 0.5
"""How far the tip of the nose is before the plane of the eyes, in distances between the eyes."""
NOSE_HEIGHT = 0.495
"""Height of the nose between eyes (0) and mouth (1) in the template."""
FULL_PX, FULL_SHARPNESS = 112, 100.0
"""Size and sharpness from which on a face is as good as can be."""
SIDE_PX = 112
"""Side at which sharpness is compared."""


def measure_sharpness(faces: np.ndarray) -> np.ndarray:
    """Variance of the Laplacian of each face.

    Source: Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy", ICPR 2000.

    Parameters
    ----------
    faces : (n, s, s, 3) uint8, RGB
        Of one side: the measure depends on it.

    Returns
    -------
    sharpness : (n,) float32
        0 for a blank face; below 30 a blurred one, above 100 a sharp one, at 112 px.
    """
    sharpness = np.empty(len(faces), np.float32)
    for row, face in enumerate(faces):
        grey = cv2.cvtColor(np.ascontiguousarray(face), cv2.COLOR_RGB2GRAY)
        sharpness[row] = cv2.Laplacian(grey, cv2.CV_32F).var()
    return sharpness


def estimate_pose(landmarks: np.ndarray) -> np.ndarray:
    """Yaw, pitch and roll from five landmarks.

    Parameters
    ----------
    landmarks : (n, 5, 2) float
        (x, y) in the order of `TEMPLATE_112`.

    Returns
    -------
    pose_deg : (n, 3) float32
        Yaw (positive: the nose points to the right of the image), pitch (positive: up), roll
        (positive: turned clockwise), in degrees; the template has 0, 0, 0.

    Notes
    -----
    Source: ours. The nose is taken to be `NOSE_DEPTH` before the plane of eyes and mouth, so its
    way along that plane is depth times the tangent of the angle.
    """
    points = np.asarray(landmarks, np.float64).reshape(-1, 5, 2)
    eyes, mouth = points[:, :2].mean(1), points[:, 3:].mean(1)
    along = (points[:, 1] - points[:, 0]) + (points[:, 4] - points[:, 3])
    length = np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-9)
    right = along / length
    down = np.stack([-right[:, 1], right[:, 0]], 1)
    distance = np.maximum(((points[:, 1] - points[:, 0]) * right).sum(1), 1e-9)
    height = ((mouth - eyes) * down).sum(1)
    nose = points[:, 2] - eyes
    axis = (mouth - eyes) / np.where(np.abs(height) < 1e-9, 1, height)[:, None]
    aside = ((nose - axis * (nose * down).sum(1)[:, None]) * right).sum(1)
    above = NOSE_HEIGHT * height - (nose * down).sum(1)
    size = np.maximum(np.maximum(distance, np.abs(height) * 0.8), 1e-9)
    yaw, pitch = (np.arctan2(way, NOSE_DEPTH * size) for way in (aside, above))
    roll = np.arctan2(right[:, 1], right[:, 0])
    return np.degrees(np.stack([yaw, pitch, roll], 1)).astype(np.float32)


def measure_misfit(landmarks: np.ndarray) -> np.ndarray:
    """How far landmarks are from the template after the best similarity.

    Parameters
    ----------
    landmarks : (n, 5, 2) float

    Returns
    -------
    misfit_px : (n,) float32
        Root mean square distance in pixels of a 112 px face: 2 to 5 for most, above 9 for profiles
        and for what is no face.
    """
    misfit = np.empty(len(landmarks), np.float32)
    for row, points in enumerate(np.asarray(landmarks, np.float64)):
        transform = estimate_similarity(points, TEMPLATE_112)
        away = points @ transform[:, :2].T + transform[:, 2] - TEMPLATE_112
        misfit[row] = np.sqrt((away**2).sum(1).mean())
    return misfit


def rate_quality(
    side_px: np.ndarray, sharpness: np.ndarray, pose_deg: np.ndarray, score: np.ndarray
) -> np.ndarray:
    """One quality of each face.

    Parameters
    ----------
    side_px : (n,) float
        Side of the aligned square in the photo.
    sharpness : (n,) float
        As `measure_sharpness` gives it at 112 px.
    pose_deg : (n, 3) float
        As `estimate_pose` gives it; roll does not count, since alignment undoes it.
    score : (n,) float
        Of the detector, in [0, 1].

    Returns
    -------
    quality : (n,) float32, in [0, 1]
        The score times three factors: the square roots of size and sharpness as shares of
        `FULL_PX` and `FULL_SHARPNESS`, at most 1, and the cosine of the angle away from the camera.
    """
    size = np.sqrt(np.clip(np.asarray(side_px) / FULL_PX, 0, 1))
    sharp = np.sqrt(np.clip(np.asarray(sharpness) / FULL_SHARPNESS, 0, 1))
    yaw, pitch = np.radians(pose_deg[:, 0]), np.radians(pose_deg[:, 1])
    frontal = np.clip(np.cos(yaw) * np.cos(pitch), 0, 1)
    return np.asarray(score * size * sharp * frontal, np.float32)


def rate_crops(crops: np.ndarray) -> np.ndarray:
    """Quality of aligned crops by size and sharpness, pose and score left aside.

    Parameters
    ----------
    crops : (n, s, s, 3) uint8, RGB
        As they came: a crop that was enlarged before counts as large, and as blurred.

    Returns
    -------
    quality : (n,) float32, in [0, 1]

    Raises
    ------
    DataError
        Another shape or type.
    """
    if crops.ndim != 4 or crops.shape[3] != 3 or crops.dtype != np.uint8:
        raise DataError(f"crops (n, s, s, 3) uint8 expected, got {crops.shape} {crops.dtype}")
    count, side = crops.shape[:2]
    standard = np.empty((count, SIDE_PX, SIDE_PX, 3), np.uint8)
    for row, crop in enumerate(crops):
        standard[row] = fit_square(crop, SIDE_PX)
    return rate_quality(
        np.full(count, side), measure_sharpness(standard), np.zeros((count, 3)), np.ones(count)
    )
