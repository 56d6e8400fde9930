"""Vectors of every training image by one committee member, made once and kept.

The contract:
- A table lies beside the trained models under a key of all that determines it: the member's file,
  the images' content, the side they are seen at. It holds every training image, whatever its label:
  neither other pseudo-labels nor what the student does with it embed anything again.
- The teacher sees faces as they came unless told otherwise: it is there for what the student's
  small input does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError
from pipelines.dataset import Dataset
from pipelines.models import find_origin, open_embedder, reduce_to
from pipelines.stage import Work
from pipelines.store import digest_file, digest_json

PART_SIZE = 512


@dataclass(frozen=True)
class Teacher:
    """A committee member that shows the way.

    origin : the file it is read from.
    digest : of its bytes.
    size_px : side its faces are reduced to first; None shows them as they came.
    """

    name: str
    origin: Path
    digest: str
    size_px: int | None


def find_teacher(work: Work, name: str, size_px: int | None) -> Teacher:
    """A member of the committee by name; ConfigError when it is none, or has no model."""
    members = {member.name: member for member in work.config.committee.all}
    if name not in members:
        raise ConfigError(
            f"{name!r} is no member of the committee; choose one of: {', '.join(members)}"
        )
    origin = find_origin(work, members[name])
    if origin is None:
        raise ConfigError(f"member {name!r} is a table of features; it cannot look at images")
    return Teacher(name, origin, digest_file(origin), size_px)


@dataclass(frozen=True)
class Vectors:
    """What a teacher says of images.

    sha256 : (n,) str, ascending, of their content. rows : (n, d) float32 of unit length.
    """

    sha256: np.ndarray
    rows: np.ndarray

    def take(self, sha256: Sequence[str]) -> np.ndarray:
        """(m, d) float32, of images that are among them."""
        return self.rows[np.searchsorted(self.sha256, np.asarray(sha256))]


def embed_images(work: Work, teacher: Teacher, samples: Any) -> Vectors:
    """The teacher's vectors of a table of (path, sha256), mapped from their file."""
    paths, sha256 = _list_contents(samples)
    key = digest_json(
        {"teacher": teacher.digest, "size_px": teacher.size_px, "images": sha256.tolist(),
         "source_px": work.dataset.manifest.size_px}
    )  # fmt: skip
    path = work.runtime.store.model_directory(key) / "vectors.npy"
    with work.runtime.store.lock(f"model/{key[:20]}", wait=True):
        if not path.exists():
            parts = [
                (work.dataset, paths[row : row + PART_SIZE], teacher, work.runtime.device)
                for row in range(0, len(paths), PART_SIZE)
            ]
            found = list(
                work.engine.map(embed_part, parts, label=f"{work.stage.name} asks {teacher.name}")
            )
            draft = path.with_suffix(".draft")
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as stream:
                np.save(stream, np.concatenate(found))
            draft.rename(path)
    return Vectors(sha256, np.load(path, mmap_mode="r"))


def _list_contents(samples: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """Each content once, with one of its paths, ascending by content."""
    sha256, first = np.unique(samples.sha256.to_numpy(str), return_index=True)
    return tuple(samples.path.to_numpy()[first]), sha256


def embed_blends(
    work: Work, teacher: Teacher, samples: Any, count: int, side_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Blends of two images of a table, and the teacher's vectors of them; mapped from their files.

    side_px : side the blends are reduced to once the teacher has seen them.

    Returns (count, side_px, side_px, 3) uint8 and (count, d) float32 of unit length. They follow
    from the images and the run's seed.
    """
    paths, sha256 = _list_contents(samples)
    side_px = min(side_px, work.dataset.manifest.size_px)
    key = digest_json(
        {"blends": count, "seed": work.seed, "side_px": side_px, "teacher": teacher.digest,
         "size_px": teacher.size_px, "images": sha256.tolist(),
         "source_px": work.dataset.manifest.size_px}
    )  # fmt: skip
    place = work.runtime.store.model_directory(key)
    with work.runtime.store.lock(f"model/{key[:20]}", wait=True):
        if not (place / "vectors.npy").exists():
            rng = np.random.default_rng([work.seed, count])
            pair = rng.integers(0, len(paths), (count, 2))
            seeds = rng.integers(0, 2**63 - 1, count)
            parts = [
                (work.dataset,
                 [tuple(paths[row] for row in pair[first : first + PART_SIZE, end])
                  for end in (0, 1)],
                 seeds[first : first + PART_SIZE], teacher, side_px, work.runtime.device)
                for first in range(0, count, PART_SIZE)
            ]  # fmt: skip
            label = f"{work.stage.name} asks {teacher.name} about blends"
            found = list(work.engine.map(embed_blends_part, parts, label=label))
            place.mkdir(parents=True, exist_ok=True)
            for name, values in zip(("faces", "vectors"), zip(*found, strict=True), strict=True):
                draft = place / f"{name}.draft"
                with draft.open("wb") as stream:
                    np.save(stream, np.concatenate(values))
                draft.rename(place / f"{name}.npy")
    faces = np.load(place / "faces.npy", mmap_mode="r")
    return faces, np.load(place / "vectors.npy", mmap_mode="r")


def embed_blends_part(
    dataset: Dataset, paths: Any, seeds: np.ndarray, teacher: Teacher, side_px: int, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Some blends, reduced, and their vectors; paths : of the first and of the second faces."""
    from cdp.images.blending import blend_faces

    first, second = (dataset.read_faces(each) for each in paths)
    blends = blend_faces(first, second, seeds)
    embedder = open_embedder(teacher.origin, teacher.origin.stat().st_mtime_ns, device)
    return reduce_to(blends, side_px), embedder.embed(reduce_to(blends, teacher.size_px))[0]


def embed_part(dataset: Dataset, paths: tuple[str, ...], teacher: Teacher, device: str) -> Any:
    """Some images as the teacher sees them, (n, d) float32."""
    embedder = open_embedder(teacher.origin, teacher.origin.stat().st_mtime_ns, device)
    return embedder.embed(reduce_to(dataset.read_faces(paths), teacher.size_px))[0]
