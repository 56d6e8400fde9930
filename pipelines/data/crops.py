"""Crops of the stage detect: aligned faces in `.npy` parts, found again by their path.

The contract:
- `crops/part-<number>.npy` holds (n, s, s, 3) uint8; the table `faces` says which row is whose.
- Parts are mapped, never loaded as a whole. A missing face is a DataError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cdp.errors import DataError
from pipelines.data.manifest import Entry
from pipelines.data.qualities import explain_poor
from pipelines.files import open_atomically

Found = tuple[int, int, str, str]
"""Width, height, SHA-256 and reason, as ingest finds them; the reason is empty for a good image."""


def write_crops(directory: Path, part: int, crops: np.ndarray) -> None:
    """Write the crops of one part below the working directory of the stage."""
    path = _locate_part(directory, part)
    with open_atomically(path) as draft, draft.open("wb") as stream:
        np.save(stream, crops)


def read_crops(directory: Path, paths: Sequence[str], size_px: int) -> np.ndarray:
    """The crops of some faces, by path: (n, s, s, 3) uint8."""
    place_of = _index_crops(directory)
    faces = np.empty((len(paths), size_px, size_px, 3), np.uint8)
    for face, path in zip(faces, paths, strict=True):
        place = place_of.get(path)
        if place is None:
            raise DataError(f"{path}: no face of it in {directory}. Run --stage detect again")
        face[:] = _open_part(_locate_part(directory, place[0]))[place[1]]
    return faces


def _locate_part(directory: Path, part: int) -> Path:
    return directory / "crops" / f"part-{part:05d}.npy"


@lru_cache(maxsize=64)
def _open_part(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Run --stage detect --force") from error


@lru_cache(maxsize=2)
def _index_crops(directory: Path) -> dict[str, tuple[int, int]]:
    table = pq.read_table(directory / "faces.parquet", columns=["path", "part", "row", "chosen"])
    table = table.filter(table["chosen"])
    columns = (table[name].to_pylist() for name in ("path", "part", "row"))
    return {path: (part, row) for path, part, row in zip(*columns, strict=True)}


def list_faces(
    entries: list[Entry], faces: Any, rejected: Any, min_px: int, min_quality: float = 0
) -> tuple[list[Entry], list[Found]]:
    """The entries of photos -> an entry a chosen face or rejected photo, and what is known of it.

    faces, rejected : the tables of the stage detect, as DataFrames.
    min_px : smallest side, in the photo, of the square that a crop shows.
    min_quality : smallest quality of a face.
    """
    chosen = faces[faces.chosen]
    by_photo = dict(iter(chosen.groupby("photo", sort=False)))
    reason_of = dict(zip(rejected.photo, rejected.reason, strict=True))
    pairs = [
        pair for entry in entries
        for pair in _list_photo(entry, by_photo.get(entry.path), reason_of, min_px, min_quality)
    ]  # fmt: skip
    twice = [name for name, count in Counter(e.path for e, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]!r} names a photo and a face of another; rename the photo")
    return [entry for entry, _ in pairs], [found for _, found in pairs]


def _list_photo(
    entry: Entry, rows: Any, reason_of: dict[str, str], min_px: int, min_quality: float
) -> Iterator[tuple[Entry, Found]]:
    if entry.fault or rows is None:
        reason = entry.fault or reason_of.get(entry.path, "no face found")
        yield entry, (0, 0, "", reason)
        return
    for row in rows.itertuples():
        side = max(1, round(row.side_px))
        reason = ""
        if side < min_px:
            reason = f"too small: a face of {side} px, at least {min_px} wanted"
        else:
            reason = explain_poor(row.quality, min_quality)
        yield replace(entry, path=row.path), (side, side, row.sha256, reason)
