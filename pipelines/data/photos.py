"""Photos to aligned faces: detect, choose, cut out and rate the faces of a block of photos.

The contract:
- Each photo gives rows of `FACES`, one a face, or one reason why it has no usable face. A photo
  that cannot be read costs nothing but its own row.
- A face is *chosen* when its score reaches `min_score` and the settings want it; only chosen faces
  have a crop. Of a photo whose identity is known one face at most is chosen.
- Landmarks that the user gives are used instead of detecting.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from cdp.errors import DataError
from pipelines.config import Positive, Settings
from pipelines.data.lists import Listed, read_list

FACES = pa.schema(
    [
        ("path", pa.string()),
        ("photo", pa.string()),
        ("face", pa.int32()),
        ("left", pa.float32()),
        ("top", pa.float32()),
        ("right", pa.float32()),
        ("bottom", pa.float32()),
        ("score", pa.float32()),
        ("landmarks", pa.list_(pa.float32(), 10)),
        ("angle", pa.int32()),
        ("side_px", pa.float32()),
        ("sharpness", pa.float32()),
        ("yaw", pa.float32()),
        ("pitch", pa.float32()),
        ("roll", pa.float32()),
        ("misfit_px", pa.float32()),
        ("quality", pa.float32()),
        ("chosen", pa.bool_()),
        ("part", pa.int32()),
        ("row", pa.int32()),
        ("sha256", pa.string()),
    ]
)
"""One row a face: `path` names the face in all later tables, `row` is its place in the crops of
`part`, or -1."""
DOUBTFUL_SCORE = 0.7
"""Faces from this score on are listed, chosen or not."""
NEARLY_AS_LARGE = 0.75
"""Share of the largest face's side from which on the most central face is the main one: people who
stand beside are often as large, people in the background are not."""


class AlignSettings(Settings):
    """How photos become aligned faces; `{}` takes every default.

    faces : of each photo the "main" face (of those nearly as large as the largest the most central
        one), the "largest", the most "central" whatever its size, or "all"; a photo whose identity
        is known gives one face in any case, with "all" the main one.
    min_score : smallest score of a face that is used; less sure ones are only listed.
    min_face_px : smallest side of a face in the photo; 7 finds smaller faces and takes longer, 40
        is four times as fast.
    longest_px : photos are reduced to this longest side, or enlarged to it at most, while faces are
        looked for; crops are cut from the photo as it is.
    max_pixels : most pixels (width x height) a photo may have.
    turns : try photos turned by 90, 180 and 270 degrees where no face is sure upright.
    given : list of boxes or landmarks (CSV, Parquet, JSON lines) used instead of detecting,
        relative to the data root; photos it does not name are detected.
    restore : a restorer (`cdp export restorer`), relative to the data root, through which faces of
        fewer than 20 px are looked at; null enlarges them plainly, which is as good at 10 px.
    """

    faces: Literal["main", "largest", "central", "all"] = "main"
    min_score: float = Field(0.9, gt=0, lt=1)
    min_face_px: float = Field(10, ge=4)
    longest_px: Annotated[int, Field(ge=64, le=8192)] = 1280
    max_pixels: Annotated[int, Field(ge=1, le=100_000_000)] = 100_000_000
    turns: bool = True
    given: str | None = None
    restore: str | None = None


@dataclass(frozen=True)
class PhotoTask:
    """What a worker needs besides the photos.

    size_px : side of the crops. restorer : the file of `align.restore`.
    """

    align: AlignSettings
    size_px: Positive
    restorer: Path | None = None


@dataclass(frozen=True)
class FoundFaces:
    """The faces of a block of photos.

    rows : of the table `FACES`, as columns.
    crops : (n, s, s, 3) uint8, the chosen faces in the order of their rows.
    rejected : (photo, reason).
    """

    rows: dict[str, list[Any]]
    crops: np.ndarray
    rejected: list[tuple[str, str]]


@lru_cache(maxsize=2)
def _open_detector(align: str, restorer: Path | None) -> Any:
    from cdp.images.detection import DetectionSettings, Detector

    settings = AlignSettings.model_validate_json(align)
    return Detector(
        DetectionSettings(
            min_face_px=settings.min_face_px,
            min_score=min(DOUBTFUL_SCORE, settings.min_score),
            longest_px=settings.longest_px,
            turns=settings.turns,
        ),
        enlarge=None if restorer is None else _open_restorer(restorer),
    )


def _open_restorer(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from cdp.restoration import load_restorer, restore_faces

    return partial(restore_faces, load_restorer(path))


def find_faces(
    photos: Sequence[tuple[str, bool]],
    read_bytes: Callable[[str], bytes],
    task: PhotoTask,
    given: Mapping[str, Sequence[Listed]],
    part: int = 0,
) -> FoundFaces:
    """The faces of some photos.

    photos : (path, whether the photo shows one known person).
    given : path -> faces whose box or landmarks are known.
    part : number of this block, for the column `part`.
    """
    rows: dict[str, list[Any]] = {name: [] for name in FACES.names}
    crops: list[np.ndarray] = []
    rejected = []
    for path, one in photos:
        try:
            found = _find_in_photo(path, one, read_bytes(path), task, given.get(path, ()))
        except DataError as error:
            rejected.append((path, str(error)))
            continue
        first = len(crops)
        crops += found.pop("crops")
        found["part"] = [part] * len(found["path"])
        found["row"] = [first + row if row >= 0 else -1 for row in found["row"]]
        for name in rows:
            rows[name] += found[name]
        if not any(found["chosen"]):
            rejected.append((path, _explain_none(found["score"], task.align.min_score)))
    empty = np.empty((0, task.size_px, task.size_px, 3), np.uint8)
    return FoundFaces(rows, np.stack(crops) if crops else empty, rejected)


def _explain_none(score: list[float], least: float) -> str:
    if not score:
        return "no face found"
    return f"no face is sure: the best has the score {max(score):.2f}, at least {least:g} wanted"


def _find_in_photo(
    path: str, one: bool, data: bytes, task: PhotoTask, given: Sequence[Listed]
) -> dict[str, list[Any]]:
    import hashlib

    from cdp.images.align import align_face
    from cdp.images.decode import decode_image
    from cdp.images.quality import estimate_pose, measure_misfit, measure_sharpness, rate_quality

    image = decode_image(data, min_px=1, max_pixels=task.align.max_pixels)
    detector = _open_detector(task.align.model_dump_json(), task.restorer)
    faces = _place_given(detector, image, given) if given else detector.detect(image)
    chosen = choose_faces(faces, image.shape, task.align, one=one, given=bool(given))
    count = len(faces)
    aligned = [align_face(image, points, task.size_px) for points in faces.landmarks]
    standard = [face if task.size_px == 112 else align_face(image, points, 112)
                for face, points in zip(aligned, faces.landmarks, strict=True)]  # fmt: skip
    side_px = _measure_sides(faces.landmarks)
    sharpness, pose = measure_sharpness(np.array(standard)), estimate_pose(faces.landmarks)
    quality = rate_quality(side_px, sharpness, pose, faces.score)
    several = task.align.faces == "all" and not one
    names = [path if chosen[face] and not several else f"{path}#{face}" for face in range(count)]
    kept = np.flatnonzero(chosen).tolist()
    crop_row = {face: row for row, face in enumerate(kept)}
    return {
        "path": names,
        "photo": [path] * count,
        "face": list(range(count)),
        **{
            name: faces.box[:, i].tolist()
            for i, name in enumerate(("left", "top", "right", "bottom"))
        },
        "score": faces.score.tolist(),
        "landmarks": list(faces.landmarks.reshape(count, 10)),
        "angle": [faces.turn] * count,
        "side_px": side_px.tolist(),
        "sharpness": sharpness.tolist(),
        **{name: pose[:, i].tolist() for i, name in enumerate(("yaw", "pitch", "roll"))},
        "misfit_px": measure_misfit(faces.landmarks).tolist(),
        "quality": quality.tolist(),
        "chosen": chosen.tolist(),
        "row": [crop_row.get(face, -1) for face in range(count)],
        "sha256": [
            hashlib.sha256(aligned[face].tobytes()).hexdigest() if chosen[face] else ""
            for face in range(count)
        ],
        "crops": [aligned[face] for face in kept],
    }


def _place_given(detector: Any, image: np.ndarray, given: Sequence[Listed]) -> Any:
    """Faces at the places the user lists; landmarks that are not listed are found in the box."""
    from cdp.images.detection import Faces

    placed = []
    for listed in given:
        if listed.landmarks is not None:
            points = np.asarray(listed.landmarks, np.float32)[None]
            box = listed.box or (*points[0].min(0).tolist(), *points[0].max(0).tolist())
            one = Faces(np.array([box], np.float32), np.ones(1, np.float32), points)
        else:
            assert listed.box is not None
            if listed.box[2] - listed.box[0] < 1 or listed.box[3] - listed.box[1] < 1:
                raise DataError(f"a box of 1 px or more expected, the list gives {listed.box}")
            found = detector.locate_landmarks(image, np.array([listed.box]))
            one = Faces(found.box, np.ones(1, np.float32), found.landmarks)
        spread = one.landmarks[0].max(0) - one.landmarks[0].min(0)
        if spread.max() < 1:
            raise DataError("the landmarks given coincide: no face can be aligned on them")
        placed.append(one)
    return Faces(
        np.concatenate([one.box for one in placed]),
        np.concatenate([one.score for one in placed]),
        np.concatenate([one.landmarks for one in placed]),
    )


def choose_faces(
    faces: Any, shape: tuple[int, ...], align: AlignSettings, *, one: bool, given: bool = False
) -> np.ndarray:
    """(n,) bool: the faces of one photo that are used. Of equal ones the first, the surer one.

    shape : of the photo. one : at most one, since it shows one known person.
    given : the faces are the user's, and all sure.
    """
    sure = np.ones(len(faces), bool) if given else faces.score >= align.min_score
    if (align.faces == "all" and not one) or not sure.any():
        return np.asarray(sure)
    side = np.where(sure, faces.side_px.astype(np.float64), -np.inf)
    centre = (faces.box[:, :2] + faces.box[:, 2:]) / 2
    away = np.linalg.norm(centre - np.array(shape[1::-1]) / 2, axis=1)
    if align.faces == "largest":
        rank = side
    elif align.faces == "central":
        rank = side - 2 * away
    else:
        rank = np.where(side >= NEARLY_AS_LARGE * side.max(), -away, -np.inf)
    best = int(np.argmax(rank))
    return np.arange(len(faces)) == best


def _measure_sides(landmarks: np.ndarray) -> np.ndarray:
    """(n,) float32: the side, in the photo, of the square that an aligned crop shows."""
    from cdp.images.align import TEMPLATE_112, estimate_similarity

    sides = np.empty(len(landmarks), np.float32)
    for row, points in enumerate(landmarks):
        transform = estimate_similarity(points, TEMPLATE_112)
        sides[row] = 112 / np.sqrt(np.linalg.det(transform[:, :2]))
    return sides


def read_given(path: Path | None, folder: str = "") -> dict[str, list[Listed]]:
    """The faces a list gives, by the path of their photo.

    folder : put before the paths of the list.

    Raises
    ------
    DataError
        A row has no place of a face, or all places are shares of the photo instead of pixels.
    """
    given: dict[str, list[Listed]] = {}
    for listed in read_list(path) if path is not None else ():
        if listed.box is None and listed.landmarks is None:
            raise DataError(
                f"{path}: {listed.path!r} has neither a box (left, top, right, bottom) nor "
                "landmarks (x1, y1 ... x5, y5)"
            )
        name = posixpath.normpath(listed.path.strip().replace("\\", "/"))
        given.setdefault(f"{folder}/{name}" if folder else name, []).append(listed)
    faces = [listed for faces in given.values() for listed in faces]
    if faces and all(_lie_in_unit(listed) for listed in faces):
        raise DataError(
            f"{path}: places of faces in pixels expected; all numbers are between 0 and 1, shares "
            "of the photo. Multiply those of x by its width and those of y by its height"
        )
    return given


def _lie_in_unit(listed: Listed) -> bool:
    points = () if listed.landmarks is None else listed.landmarks.ravel()
    return all(0 <= number <= 1 for number in (*(listed.box or ()), *points))


def find_unknown(given: Collection[str], photos: Collection[str], path: Path) -> list[str]:
    """The photos of a list that are none of the data set's.

    path : of the list, for the message. DataError where it names none that there is.
    """
    unknown = [name for name in given if name not in photos]
    if given and len(unknown) == len(given):
        raise DataError(
            f"{path}: none of its {len(given)} paths is a photo of the data set; its first is "
            f"{unknown[0]!r}, the data set's {next(iter(photos), '')!r}. Write them as the data "
            "set does, from the data root on"
        )
    return unknown
