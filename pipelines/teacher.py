"""Vectors of every training image by one committee member, made once and kept.

The contract:
- A table lies beside the trained models under a key of all that determines it: the member's file,
  the images' content, the side they are seen at. Changing what the student does with it embeds
  nothing again.
- The teacher sees faces as they came unless told otherwise: it is there for what the student's
  small input does not show.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError
from pipelines.dataset import Dataset
from pipelines.models import LabelledSet, find_origin, open_embedder, reduce_to
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


def embed_set(work: Work, teacher: Teacher, each: LabelledSet) -> np.ndarray:
    """The teacher's vectors of a set, (n, d) float32 of unit length, mapped from their file."""
    key = digest_json(
        {"teacher": teacher.digest, "size_px": teacher.size_px, "images": list(each.sha256),
         "source_px": work.dataset.manifest.size_px}
    )  # fmt: skip
    path = work.runtime.store.model_directory(key) / "vectors.npy"
    with work.runtime.store.lock(f"model/{key[:20]}", wait=True):
        if not path.exists():
            parts = [
                (work.dataset, each.paths[row : row + PART_SIZE], teacher, work.runtime.device)
                for row in range(0, len(each.paths), PART_SIZE)
            ]
            found = list(
                work.engine.map(embed_part, parts, label=f"{work.stage.name} asks {teacher.name}")
            )
            draft = path.with_suffix(".draft")
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as stream:
                np.save(stream, np.concatenate(found))
            draft.rename(path)
    vectors: np.ndarray = np.load(path, mmap_mode="r")
    return vectors


def embed_part(dataset: Dataset, paths: tuple[str, ...], teacher: Teacher, device: str) -> Any:
    """Some images as the teacher sees them, (n, d) float32."""
    embedder = open_embedder(teacher.origin, teacher.origin.stat().st_mtime_ns, device)
    return embedder.embed(reduce_to(dataset.read_faces(paths), teacher.size_px))[0]
