"""Detection and alignment on real photos: faces found, landmarks, embeddings, speed.

`python -m tests.benchmarks.bench_detection [--every 3]`, with the data root in CDP_DATA_ROOT:
`photos/people/<person>/<photo>.jpg`, the ready crops `lfw112/<person>/<photo>.jpg` of the same
photos, and `onnx/edgeface_xs.onnx`. Photos are reduced, their faces are found there, and the sharp
photo is aligned on these landmarks.
"""

from __future__ import annotations

import argparse
import os
import time
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from cdp.embedding import OnnxEmbedder
from cdp.images.align import align_face
from cdp.images.decode import decode_image
from cdp.images.detection import DetectionSettings, Detector

SHARES = (1.0, 0.5, 0.3, 0.2, 0.15)
SIDES = (150, 300, 640, 1280, 2560)


def main() -> None:
    """Print one table of reduced photos and one of speed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every n-th photo")
    options = parser.parse_args()
    root = Path(os.environ["CDP_DATA_ROOT"])
    paths = sorted((root / "photos/people").glob("*/*.jpg"))[:: options.every]
    photos = [decode_image(path.read_bytes()) for path in paths]
    ready = [decode_image((root / "lfw112" / p.parent.name / p.name).read_bytes()) for p in paths]
    embedder = OnnxEmbedder((root / "onnx/edgeface_xs.onnx").read_bytes())
    wanted = embedder.embed(np.stack(ready))[0]
    people = np.array([path.parent.name for path in paths])
    rows = np.arange(len(paths))
    print(f"{len(paths)} photos; ready crops: accuracy {verify(wanted, people, rows):.3f}")
    print("size   min_face_px  found  landmarks off  cosine  least  accuracy  ms")
    sharp = None
    for share in SHARES:
        for least_px in (10, 7) if share < 0.5 else (10, 20, 40) if share == 1 else (10,):
            landmarks, ms = find(photos, share, least_px)
            found = np.array([row for row in rows if landmarks[row] is not None])
            if sharp is None:
                sharp = landmarks
            crops = np.stack([align_face(photos[row], landmarks[row]) for row in found])
            vectors = embedder.embed(crops)[0]
            cosine = (vectors * wanted[found]).sum(1)
            both = [row for row in found if sharp[row] is not None]
            off = np.mean([np.abs(landmarks[r] - sharp[r]).mean() for r in both])
            print(
                f"{share:4.0%}  {least_px:11}  {len(found):5}  {off:10.2f} px  {cosine.mean():.4f}"
                f"  {cosine.min():.3f}  {verify(vectors, people, found):8.3f}  {ms:.1f}",
                flush=True,
            )
    time_sizes(photos[:12])


def find(
    photos: list[np.ndarray], share: float, least_px: float
) -> tuple[list[np.ndarray | None], float]:
    """Landmarks of the most central face, in pixels of the whole photo, and ms of CPU a photo."""
    detector = Detector(DetectionSettings(min_face_px=least_px))
    landmarks: list[np.ndarray | None] = []
    spent = 0.0
    for photo in photos:
        small = photo
        if share != 1:
            small = cv2.resize(photo, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        started = time.process_time()
        faces = detector.detect(small)
        spent += time.process_time() - started
        if not len(faces):
            landmarks.append(None)
            continue
        centre = (faces.box[:, :2] + faces.box[:, 2:]) / 2
        away = np.linalg.norm(centre - np.array(small.shape[1::-1]) / 2, axis=1)
        ratio = np.array(small.shape[1::-1]) / photo.shape[1::-1]
        best = faces.landmarks[int(np.argmax(faces.side_px - 2 * away))]
        landmarks.append((best + 0.5) / ratio - 0.5)
    return landmarks, 1000 * spent / len(photos)


def verify(vectors: np.ndarray, people: np.ndarray, rows: np.ndarray) -> float:
    """Accuracy at the best threshold over all genuine pairs and as many impostor pairs."""
    at = {row: place for place, row in enumerate(rows)}
    same = [
        (at[a], at[b])
        for person in np.unique(people[rows])
        for a, b in combinations(rows[people[rows] == person], 2)
    ]
    rng = np.random.default_rng(0)
    other = rng.integers(0, len(rows), (4 * len(same), 2))
    other = other[people[rows][other[:, 0]] != people[rows][other[:, 1]]][: len(same)]
    genuine, impostor = (
        np.einsum("pd,pd->p", vectors[pairs[:, 0]], vectors[pairs[:, 1]])
        for pairs in (np.array(same), other)
    )
    cuts = np.sort(np.concatenate([genuine, impostor]))
    accepted = 1 - np.searchsorted(np.sort(genuine), cuts) / len(genuine)
    refused = np.searchsorted(np.sort(impostor), cuts) / len(impostor)
    return float((accepted + refused).max() / 2)


def time_sizes(photos: list[np.ndarray]) -> None:
    """Photos a second of one core by the side of the photo, all enlarged to have a large face."""
    detector = Detector()
    for side in SIDES:
        started = time.process_time()
        for photo in photos:
            detector.detect(cv2.resize(photo, (side, side), interpolation=cv2.INTER_CUBIC))
        spent = time.process_time() - started
        print(f"{side} px: {len(photos) / spent:.1f} photos a second of one core")


if __name__ == "__main__":
    main()
