"""Quality of the images of a data set: measured on the crops, or as the stage detect rated them.

The contract:
- One row of `MEASURES` an image; NaN for what is not known, null in the table. An image that cannot
  be read has none.
- Size and sharpness are always known. Score and pose are those of the detector: of faces found in
  photos, or, on request, of the face in a crop that came aligned.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

MEASURES = ("side_px", "sharpness", "score", "yaw", "pitch", "roll", "quality")
QUALITIES = pa.schema([("sample_id", pa.int64()), *((name, pa.float32()) for name in MEASURES)])
UNKNOWN = (float("nan"),) * len(MEASURES)
LEAST_SCORE = 0.5
"""Of a face in a crop; below it the landmarks mean nothing and there is no pose."""
Measures = tuple[float, ...]


def measure_image(image: np.ndarray, *, pose: bool) -> Measures:
    """The measures of one image that is taken for an aligned face.

    image : (h, w, 3) uint8, RGB; its centred square is measured.
    pose : also find landmarks in it, which needs the detector.
    """
    from cdp.images.decode import fit_square
    from cdp.images.quality import SIDE_PX, measure_sharpness, rate_quality

    face = fit_square(image, SIDE_PX)
    side, sharpness = np.array([min(image.shape[:2])]), measure_sharpness(face[None])
    score, angles = _find_pose(face) if pose else (float("nan"), np.full(3, np.nan))
    quality = rate_quality(
        side, sharpness, np.nan_to_num(angles[None]), np.nan_to_num([score], nan=1.0)
    )
    known = (float(side[0]), float(sharpness[0]), score)
    return (*known, *(float(each) for each in angles), float(quality[0]))


def _find_pose(face: np.ndarray) -> tuple[float, np.ndarray]:
    """The detector's score of an aligned face, and yaw, pitch and roll; NaN where it is no face."""
    from cdp.images.quality import estimate_pose

    side = len(face)
    found = _open_detector().locate_landmarks(face, np.array([[0, 0, side, side]]))
    score = float(found.score[0])
    return score, estimate_pose(found.landmarks)[0] if score >= LEAST_SCORE else np.full(3, np.nan)


@lru_cache(maxsize=1)
def _open_detector() -> Any:
    from cdp.images.detection import Detector

    return Detector()


def read_measures(faces: Any) -> dict[str, Measures]:
    """The measures of chosen faces by path, from the table `detect/faces` as a DataFrame."""
    chosen = faces[faces.chosen]
    values = zip(*(chosen[name].tolist() for name in MEASURES), strict=True)
    return dict(zip(chosen.path, values, strict=True))


def explain_poor(quality: float, least: float) -> str:
    """Why a face of that quality is rejected, or an empty string."""
    if not quality < least:
        return ""
    return f"poor: a face of quality {quality:.2f}, at least {least:g} wanted"


def make_columns(measures: list[Measures]) -> dict[str, Any]:
    """The columns of `QUALITIES`, one row an image."""
    values = np.array(measures, np.float32).reshape(len(measures), len(MEASURES))
    columns: dict[str, Any] = {"sample_id": np.arange(len(values))}
    for place, name in enumerate(MEASURES):
        columns[name] = pa.array(values[:, place], mask=np.isnan(values[:, place]))
    return columns
