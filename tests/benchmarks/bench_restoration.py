"""What a restorer in front gains: an embedder on tiny faces, and the detector on tiny photos.

    python -m tests.benchmarks.bench_restoration [--sets synthetic lfw photos] [--px 12,16]
        [--steps 300] [--people 100] [--embedder onnx/edgeface_xs.onnx]

With the data root in CDP_DATA_ROOT: `lfw112/<person>/<image>.jpg`, `photos/people/*/*.jpg` and the
embedder. One restorer is trained on sharp faces of a set, from the smallest side; other people's
faces are reduced, and the embedder sees them enlarged bilinearly, as it enlarges any face, and
restored. A line a size: PSNR beside the sharp face, mean cosine to its vector, accuracy at the best
threshold over all genuine and as many impostor pairs, TAR@FAR=1e-2 over all pairs, with the
interval of the difference over people drawn anew. *photos*: LFW's photos reduced until a face has
some 10 px, enlarged four times bilinearly, bicubically and by the restorer of LFW's faces, before
faces are looked for; beside the detector alone.
"""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from cdp.embedding import BackboneEmbedder, Embedder, OnnxEmbedder
from cdp.images.align import align_face
from cdp.images.decode import decode_image
from cdp.images.degradation import reduce_faces
from cdp.images.detection import DetectionSettings, Detector
from cdp.metrics.protocols import Resamples, score_all_pairs
from cdp.models import load_model
from cdp.restoration import RestorationPlan, Restorer, restore_faces, train_restorer
from cdp.restoration.network import ENLARGEMENT
from tests.benchmarks.bench_detection import measure_error, verify

IMAGES = 3
"""Of each person that is verified."""
TRAINED_FACES = 1500
SHARE, LEAST_PX = 0.15, 7
"""To which the photos are reduced, and the smallest face that is looked for then."""


def main() -> None:
    """Print the lines of each set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("synthetic", "lfw", "photos")
    parser.add_argument("--sets", nargs="+", choices=names, default=names)
    parser.add_argument("--px", default="12,16", help="sides of the small faces, between commas")
    parser.add_argument("--steps", type=int, default=300, help="of the restorer's training")
    parser.add_argument("--people", type=int, default=100, help="that are verified")
    parser.add_argument("--photos", type=int, default=165, help="that are looked at, 10 or more")
    parser.add_argument("--embedder", default="onnx/edgeface_xs.onnx", help="below the data root, "
                        "or the path of a network of ours (.safetensors)")  # fmt: skip
    options = parser.parse_args()
    root = Path(os.environ["CDP_DATA_ROOT"])
    embedder = open_model(root, options.embedder)
    sizes = sorted(int(px) for px in options.px.split(","))
    restorers: dict[str, Restorer] = {}
    for name in options.sets:
        source = "lfw" if name == "photos" else name
        trained, faces, person = DRAWN[source](root, options.people)
        if source not in restorers:
            restorers[source] = train(trained, sizes[0], options.steps)
        if name == "photos":
            compare_detection(root, embedder, restorers[source], options.photos)
            continue
        for px in sizes:
            compare_views(name, px, restorers[source], faces, person, embedder)


def open_model(root: Path, name: str) -> Embedder:
    """An embedder by its file."""
    if name.endswith(".safetensors"):
        return BackboneEmbedder(load_model(name)[0], device="cpu")
    return OnnxEmbedder((root / name).read_bytes())


def draw_synthetic(_: Path, people: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Faces to train on; held-out ones, and whom each shows."""
    from cdp.synthetic import SyntheticFaces

    data = SyntheticFaces()
    rng = np.random.default_rng(0)
    trained = rng.permutation(np.flatnonzero(data.split != "evaluation"))[:TRAINED_FACES]
    held_out = np.flatnonzero(data.split == "evaluation")
    rows = [held_out[data.identity[held_out] == name][:IMAGES]
            for name in np.unique(data.identity[held_out])[:people]]  # fmt: skip
    chosen = np.concatenate(rows)
    person = np.unique(data.identity[chosen], return_inverse=True)[1]
    return data.draw(np.sort(trained)), data.draw(chosen), person


def read_lfw(root: Path, people: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of LFW: people with one image are trained on, others verified."""
    folders = [sorted(each.glob("*.jpg")) for each in sorted((root / "lfw112").iterdir())]
    alone = [paths[0] for paths in folders if len(paths) == 1][:TRAINED_FACES]
    known = [paths[:IMAGES] for paths in folders if len(paths) >= IMAGES][:people]
    person = np.repeat(np.arange(len(known)), IMAGES)
    return read(alone), read([path for paths in known for path in paths]), person


def read(paths: list[Path]) -> np.ndarray:
    return np.stack([decode_image(path.read_bytes()) for path in paths])


DRAWN = {"synthetic": draw_synthetic, "lfw": read_lfw}


def train(faces: np.ndarray, small_px: int, steps: int) -> Restorer:
    """A restorer, and a line of what it cost."""
    started = time.process_time()
    plan = RestorationPlan(small_px=small_px, steps=steps)
    restorer, history = train_restorer(faces, plan, device="cpu", progress=False)
    print(f"restorer {small_px} px: {time.process_time() - started:.0f} s of CPU, pixels "
          f"{history[0]['pixels']:.4f} -> {history[-1]['pixels']:.4f}", flush=True)  # fmt: skip
    return restorer


def compare_views(
    name: str, px: int, restorer: Restorer, faces: np.ndarray, person: np.ndarray,
    embedder: Embedder,
) -> None:  # fmt: skip
    """Lines of one size: enlarged bilinearly, and restored."""
    small = reduce_faces(faces, px)
    side = min(ENLARGEMENT * px, faces.shape[1])
    goal = reduce_faces(faces, side)
    views = {"bilinear": enlarge(small, ENLARGEMENT, cv2.INTER_LINEAR),
             "restored": restore_faces(restorer, small)}  # fmt: skip
    sharp = embedder.embed(faces, flip=True)[0]
    resamples = Resamples(person, 200, 0)
    rows = np.arange(len(person))
    draws = {}
    for view, shown in views.items():
        vectors = embedder.embed(small if view == "bilinear" else shown, flip=True)[0]
        error = np.square(reduce_faces(shown, side).astype(np.float64) - goal).mean()
        (tar,) = [
            score for score in score_all_pairs(vectors, rows, resamples, (0.01,))
            if score.metric.startswith("tar@")
        ]  # fmt: skip
        draws[view] = np.append(tar.draws, tar.value)
        print(f"{name} {px} px {view}: PSNR {10 * np.log10(255**2 / error):.2f} dB, cosine "
              f"{(vectors * sharp).sum(1).mean():.4f}, pairs {verify(vectors, person, rows):.4f}, "
              f"TAR@FAR=1e-2 {tar.value:.4f}", flush=True)  # fmt: skip
    away = draws["restored"] - draws["bilinear"]
    low, high = np.quantile(away[:-1], [0.025, 0.975])
    print(f"{name} {px} px: TAR restored - bilinear {away[-1]:+.4f}, {low:+.4f} to {high:+.4f}",
          flush=True)  # fmt: skip


def enlarge(images: np.ndarray, factor: int, interpolation: int) -> np.ndarray:
    """(n, s, s, 3) uint8 to (n, factor s, factor s, 3) uint8."""
    side = factor * images.shape[1]
    return np.stack([cv2.resize(each, (side, side), interpolation=interpolation)
                     for each in images])  # fmt: skip


def compare_detection(root: Path, embedder: Embedder, restorer: Restorer, count: int) -> None:
    """A line a way to enlarge the photos before faces are looked for."""
    paths = sorted((root / "photos/people").glob("*/*.jpg"))[:count]
    photos = [decode_image(path.read_bytes()) for path in paths]
    people = np.array([path.parent.name for path in paths])
    ready = read([root / "lfw112" / path.parent.name / path.name for path in paths])
    wanted = embedder.embed(ready)[0]
    small = [cv2.resize(photo, None, fx=SHARE, fy=SHARE, interpolation=cv2.INTER_AREA)
             for photo in photos]  # fmt: skip
    four = ENLARGEMENT
    ways = {
        "the photo itself": (photos, 40),
        "detector alone": (small, LEAST_PX),
        "small candidates restored": (small, LEAST_PX),
        "bilinear": ([enlarge(each[None], four, cv2.INTER_LINEAR)[0] for each in small], 28),
        "bicubic": ([enlarge(each[None], four, cv2.INTER_CUBIC)[0] for each in small], 28),
        "restored": ([restore_faces(restorer, each[None])[0] for each in small], 28),
    }
    whole: list[np.ndarray | None] = []
    for way, (shown, least_px) in ways.items():
        restore = partial(restore_faces, restorer) if way == "small candidates restored" else None
        detector = Detector(DetectionSettings(min_face_px=least_px), enlarge=restore)
        landmarks = [locate(detector, each, photo)
                     for each, photo in zip(shown, photos, strict=True)]  # fmt: skip
        whole = whole or landmarks
        rows = np.array([row for row, each in enumerate(landmarks) if each is not None])
        vectors = embedder.embed(
            np.stack([align_face(photos[row], landmarks[row]) for row in rows])
        )[0]
        cosine = (vectors * wanted[rows]).sum(1)
        off = measure_error(landmarks, whole)
        print(f"photos at {SHARE:.0%}, {way}: {len(rows)} of {len(photos)} found, landmarks off "
              f"{off.mean():.1%}, {off.max():.1%} at most, cosine {cosine.mean():.4f}, least "
              f"{cosine.min():.3f}, pairs {verify(vectors, people, rows):.4f}",
              flush=True)  # fmt: skip


def locate(detector: Detector, shown: np.ndarray, photo: np.ndarray) -> np.ndarray | None:
    """Landmarks of the most central face, (5, 2) in pixels of the whole photo."""
    faces = detector.detect(shown)
    if not len(faces):
        return None
    centre = (faces.box[:, :2] + faces.box[:, 2:]) / 2
    away = np.linalg.norm(centre - np.array(shown.shape[1::-1]) / 2, axis=1)
    best = faces.landmarks[int(np.argmax(faces.side_px - 2 * away))]
    ratio = np.array(shown.shape[1::-1]) / photo.shape[1::-1]
    landmarks: np.ndarray = (best + 0.5) / ratio - 0.5
    return landmarks


if __name__ == "__main__":
    main()
