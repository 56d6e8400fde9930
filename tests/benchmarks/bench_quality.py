"""What face quality is worth: as weights of the pictures of a set, and to choose a medoid.

`python -m tests.benchmarks.bench_quality [--people 100] [--seeds 3]`, with the data root in
CDP_DATA_ROOT: `lfw112/<person>/<image>.jpg` and `onnx/edgeface_xs.onnx`. Pictures of a person are
reduced to 8 to 48 px, each by chance; one sharp picture of each person is the gallery.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import cv2
import numpy as np

from cdp.aggregation import pool_vectors
from cdp.embedding import OnnxEmbedder
from cdp.images.decode import decode_image
from cdp.images.quality import rate_crops
from cdp.propagation.medoids import choose_medoids
from cdp.types import PairTable

SIZES_PX = (8, 10, 12, 16, 24, 32, 48)
PICTURES = 7
"""Of each person, the sharp one included."""


def main() -> None:
    """Print a line a seed, then the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--people", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    root = Path(os.environ["CDP_DATA_ROOT"])
    folders = [each for each in sorted((root / "lfw112").iterdir())
               if len(list(each.glob("*.jpg"))) >= PICTURES][: options.people]  # fmt: skip
    faces = np.stack([
        decode_image(path.read_bytes())
        for folder in folders for path in sorted(folder.glob("*.jpg"))[:PICTURES]
    ])  # fmt: skip
    embedder = OnnxEmbedder((root / "onnx/edgeface_xs.onnx").read_bytes())
    gallery = embedder.embed(faces[::PICTURES])[0]
    found = [measure(faces, gallery, embedder, seed) for seed in range(options.seeds)]
    for name in found[0]:
        values = np.array([each[name] for each in found])
        print(f"{name:42} {values.mean():.4f} +- {values.std(ddof=1):.4f}")


def measure(
    faces: np.ndarray, gallery: np.ndarray, embedder: OnnxEmbedder, seed: int
) -> dict[str, float]:
    """Rank-1 of sets by each weight, and the cosine of each medoid to the gallery."""
    rng = np.random.default_rng(seed)
    poor = np.delete(faces, np.s_[::PICTURES], axis=0)
    size = rng.choice(SIZES_PX, len(poor))
    small = np.stack([reduce(face, int(px)) for face, px in zip(poor, size, strict=True)])
    vectors, quality = embedder.embed(small)[0], rate_crops(small)
    person = np.repeat(np.arange(len(gallery)), PICTURES - 1)
    result = {}
    for count in (1, 2, 4, 6):
        rows = np.flatnonzero(np.arange(len(person)) % (PICTURES - 1) < count)
        for name, weight in (("mean", None), ("quality", quality[rows]),
                             ("quality squared", quality[rows] ** 2)):  # fmt: skip
            pooled = pool_vectors(vectors[rows], person[rows], weight)
            best = (pooled @ gallery.T).argmax(1)
            result[f"rank-1 of sets of {count}, {name}"] = float(
                (best == np.arange(len(best))).mean()
            )
    one, other = np.nonzero(np.triu(person[:, None] == person[None], 1))
    pairs = PairTable(one, other)
    likely = 1 / (1 + np.exp(-20 * ((vectors[one] * vectors[other]).sum(1) - 0.3)))
    for name, known in (("summed probability", None), ("and quality", quality)):
        medoid = choose_medoids(pairs, likely, person, known)
        result[f"cosine of medoids by {name}"] = float((vectors[medoid] * gallery).sum(1).mean())
        result[f"mean size of medoids by {name}"] = float(size[medoid].mean())
    return result


def reduce(face: np.ndarray, side_px: int) -> np.ndarray:
    """A face of 112 px with the detail of `side_px`."""
    small = cv2.resize(face, (side_px, side_px), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, face.shape[1::-1], interpolation=cv2.INTER_LINEAR))


if __name__ == "__main__":
    main()
