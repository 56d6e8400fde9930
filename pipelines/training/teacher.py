"""A teacher's vectors of every training image, computed once and kept.

The contract:
- The teacher is a committee member. Its vectors lie beside the trained models under a key of all
  that determines them: the member's file, the images' content, the side they are reduced to. They
  cover every training image, whatever its label, so that other pseudo-labels or other settings of
  the student embed nothing again.
- By default the teacher embeds faces at full resolution: it adds what the student's small input
  lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdp.images.preprocessing import Preprocessing
from pipelines.data.dataset import Dataset
from pipelines.files import digest_file, digest_json, reserve_array
from pipelines.members import find_model, open_embedder, reduce_to
from pipelines.stage import Work

PART_SIZE = 512
AGAIN_SHARE = 0.3
"""Share of the blends that are blended once more, with a third face."""


@dataclass(frozen=True)
class Teacher:
    """A committee member whose vectors a student is trained to follow.

    origin : its file.
    digest : SHA-256 of its bytes.
    size_px : side the faces are reduced to first; None keeps them as they are.
    shown : range and order of the pixels of an ONNX model; None for others.
    """

    name: str
    origin: Path
    digest: str
    size_px: int | None
    shown: Preprocessing | None = None

    def describe(self) -> dict[str, Any]:
        """What determines its vectors, for a key."""
        seen = {} if self.shown is None else {"shown": asdict(self.shown)}
        return {"teacher": self.digest, "size_px": self.size_px, **seen}


def find_teacher(work: Work, name: str, size_px: int | None) -> Teacher:
    """A member of the committee by name; ConfigError when it is none, or has no model."""
    origin, shown = find_model(work, name)
    return Teacher(name, origin, digest_file(origin), size_px, shown)


@dataclass(frozen=True)
class Vectors:
    """A teacher's vectors of images, by content.

    sha256 : (n,) str, ascending, of the images' content. rows : (n, d) float32 of unit length.
    """

    sha256: np.ndarray
    rows: np.ndarray

    def take(self, sha256: Sequence[str]) -> np.ndarray:
        """(m, d) float32, the vectors of some of the images."""
        return self.rows[np.searchsorted(self.sha256, np.asarray(sha256))]


def embed_images(work: Work, teacher: Teacher, samples: Any) -> Vectors:
    """The teacher's vectors of a table of (path, sha256), mapped from their file."""
    paths, sha256 = _list_contents(samples)
    key = digest_json(
        {**teacher.describe(), "images": sha256.tolist(),
         "source_px": work.dataset.manifest.size_px}
    )  # fmt: skip
    path = work.runtime.store.model_directory(key) / "vectors.npy"
    with work.runtime.store.lock(f"model/{key[:20]}", wait=True):
        if not path.exists():
            parts = [
                (work.dataset, paths[row : row + PART_SIZE], teacher, work.runtime.device)
                for row in range(0, len(paths), PART_SIZE)
            ]
            label = f"{work.stage.name} embeds with {teacher.name}"
            found = ((rows,) for rows in work.engine.map(embed_part, parts, label=label))
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_rows((path,), len(paths), found)
    return Vectors(sha256, np.load(path, mmap_mode="r"))


def _list_contents(samples: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Each content once, with one of its paths, ascending by content."""
    sha256, first = np.unique(samples.sha256.to_numpy(str), return_index=True)
    return tuple(samples.path.to_numpy()[first]), sha256


def embed_blends(
    work: Work, teacher: Teacher, samples: Any, count: int, side_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blends of two images of a table, some of three, and the teacher's vectors of them, mapped.

    side_px : side the blends are reduced to after the teacher has embedded them.

    Returns (count, side_px, side_px, 3) uint8 and (count, d) float32 of unit length. They follow
    from the images and the run's seed.
    """
    paths, sha256 = _list_contents(samples)
    side_px = min(side_px, work.dataset.manifest.size_px)
    key = digest_json(
        {"blends": count, "version": 2, "seed": work.seed, "side_px": side_px,
         **teacher.describe(), "images": sha256.tolist(),
         "source_px": work.dataset.manifest.size_px}
    )  # fmt: skip
    place = work.runtime.store.model_directory(key)
    with work.runtime.store.lock(f"model/{key[:20]}", wait=True):
        if not (place / "vectors.npy").exists():
            rng = np.random.default_rng([work.seed, count])
            sources = rng.integers(0, len(paths), (count, 3))
            again = rng.random(count) < AGAIN_SHARE
            seeds = rng.integers(0, 2**63 - 1, (count, 2))
            parts = [
                (work.dataset, [[paths[row] for row in column] for column in sources[rows].T],
                 again[rows], seeds[rows], teacher, side_px, work.runtime.device)
                for rows in (slice(at, at + PART_SIZE) for at in range(0, count, PART_SIZE))
            ]  # fmt: skip
            label = f"{work.stage.name} embeds blends with {teacher.name}"
            place.mkdir(parents=True, exist_ok=True)
            found = work.engine.map(embed_blends_part, parts, label=label)
            _write_rows((place / "faces.npy", place / "vectors.npy"), count, found)
    faces = np.load(place / "faces.npy", mmap_mode="r")
    return faces, np.load(place / "vectors.npy", mmap_mode="r")


def _write_rows(files: Sequence[Path], count: int, parts: Iterator[tuple[np.ndarray, ...]]) -> None:
    """Write arrays of `count` rows as their parts arrive; a file gets its name when it is whole."""
    drafts = [file.with_suffix(".draft") for file in files]
    at = 0
    for part in parts:
        for draft, values in zip(drafts, part, strict=True):
            if at == 0:
                reserve_array(draft, values.dtype, (count, *values.shape[1:]))
            rows = np.load(draft, mmap_mode="r+")
            rows[at : at + len(values)] = values
            rows.flush()
        at += len(part[0])
    for draft, file in zip(drafts, files, strict=True):
        draft.rename(file)


def embed_blends_part(
    dataset: Dataset,
    paths: Sequence[Sequence[str]],
    again: np.ndarray,
    seeds: np.ndarray,
    teacher: Teacher,
    side_px: int,
    device: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Some blends, reduced, and their vectors.

    paths : of the first, the second and the third faces.
    again : (n,) bool, whether a blend is blended once more, with the third face.
    seeds : (n, 2) int64, of the first and the second blending.
    """
    from cdp.images.blending import blend_faces

    first, second = (dataset.read_faces(each) for each in paths[:2])
    blends = blend_faces(first, second, seeds[:, 0])
    if again.any():
        third = dataset.read_faces([paths[2][row] for row in np.flatnonzero(again).tolist()])
        blends[again] = blend_faces(blends[again], third, seeds[again, 1])
    embedder = open_embedder(teacher.origin, device, teacher.shown)
    return reduce_to(blends, side_px), embedder.embed(reduce_to(blends, teacher.size_px))[0]


def embed_part(dataset: Dataset, paths: tuple[str, ...], teacher: Teacher, device: str) -> Any:
    """The teacher's vectors of some images, (n, d) float32."""
    embedder = open_embedder(teacher.origin, device, teacher.shown)
    return embedder.embed(reduce_to(dataset.read_faces(paths), teacher.size_px))[0]
