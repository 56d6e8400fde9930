"""Five facial landmarks to an upright face in the standard place.

The contract:
- The template is ArcFace's (Deng et al. 2019), the one that all embedders here expect.
- The transform is a similarity (rotation, one scale, translation): faces are never sheared or
  mirrored.
"""

from __future__ import annotations

import cv2
import numpy as np

from cdp.errors import DataError

TEMPLATE_112 = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
"""(5, 2) float64, pixels (x, y) of a 112 px face: left eye, right eye, nose, mouth corners, as seen
in the image. Source: the alignment of ArcFace / SphereFace."""


def estimate_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares similarity transform between point sets.

    Parameters
    ----------
    source, target : (m, 2) float, m >= 2
        Matching points, (x, y).

    Returns
    -------
    transform : (2, 3) float64
        `target ~ transform[:, :2] @ source + transform[:, 2]`; determinant above 0.

    Raises
    ------
    DataError
        The source points coincide, or a coordinate is not finite.

    Notes
    -----
    Source: Umeyama, "Least-squares estimation of transformation parameters between two point
    patterns", PAMI 1991, eq. 40-43.
    """
    source = np.asarray(source, dtype=np.float64)
    target = np.asarray(target, dtype=np.float64)
    if not (np.isfinite(source).all() and np.isfinite(target).all()):
        raise DataError("landmarks must be finite; got NaN or infinity")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    spread = source - source_mean
    variance = float((spread**2).sum() / len(source))
    if variance < 1e-12:
        raise DataError("landmarks coincide: no face can be aligned on them")
    covariance = (target - target_mean).T @ spread / len(source)
    left, singular, right = np.linalg.svd(covariance)
    sign = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    rotation = left @ np.diag(sign) @ right
    scale = float((singular * sign).sum() / variance)
    translation = target_mean - scale * rotation @ source_mean
    return np.hstack([scale * rotation, translation[:, None]])


def align_face(image: np.ndarray, landmarks: np.ndarray, size_px: int = 112) -> np.ndarray:
    """Cut a face out, upright and in the template's place.

    Parameters
    ----------
    image : (h, w, 3) uint8
    landmarks : (5, 2) float
        Pixels (x, y) in `image`, pixel centres at whole numbers, in the order of `TEMPLATE_112`.
    size_px : int
        Side of the result, in pixels.

    Returns
    -------
    face : (size_px, size_px, 3) uint8
        Black where the image ends. A large face is averaged, not sampled, on its way down.

    Raises
    ------
    DataError
        Landmarks of another shape, not finite, or coinciding.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise DataError(f"five landmarks (5, 2) expected, got an array of {points.shape}")
    target = (TEMPLATE_112 + 0.5) * (size_px / 112) - 0.5
    transform = estimate_similarity(points, target)
    scale = float(np.sqrt(np.linalg.det(transform[:, :2])))
    if scale < 0.5:
        height, width = image.shape[:2]
        reduced = (max(1, round(width * scale)), max(1, round(height * scale)))
        ratio = np.array([reduced[0] / width, reduced[1] / height])
        image = cv2.resize(image, reduced, interpolation=cv2.INTER_AREA)
        transform = estimate_similarity((points + 0.5) * ratio - 0.5, target)
    return np.asarray(cv2.warpAffine(image, transform, (size_px, size_px), flags=cv2.INTER_LINEAR))
