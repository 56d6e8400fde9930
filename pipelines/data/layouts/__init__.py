"""Layouts in which sets of faces are handed around, one file each.

- `listed.py`: a list of paths and people beside a folder (`list: labels.csv`)
- `flat.py`: the person in the name of the file (`pattern: "{person}_{number}"`)
- `tracks.py`: cut faces of videos, a folder or a part of the name a track
- `records.py`: RecordIO, `.rec` with or without `.idx`
- `shards.py`: `.tar` shards
- `video.py`: `.mp4`, `.mkv` and other videos, a frame an image

The contract:
- A layout gives entries; the bytes of an image inside an archive are read in place, nothing is
  unpacked. Its path is that of the archive, a slash, and its name inside.
- An archive is a module with `SUFFIXES`, `list_members(path)` and `read_member(path, name)`: a new
  one is one file here and one line in `ARCHIVES`.
- What cannot be read is an entry with a fault; nothing else of the archive is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cdp.errors import DataError
from pipelines.data.folders import join_path
from pipelines.data.layouts import records, shards, video
from pipelines.data.layouts.member import Member


class Archive(Protocol):
    """What a module of an archive offers."""

    SUFFIXES: tuple[str, ...]

    def list_members(self, path: Path) -> Iterator[Member]:
        """Every image of the archive, in its order."""
        ...

    def read_member(self, path: Path, name: str) -> bytes:
        """The bytes of one image; DataError when it cannot be read."""
        ...


ARCHIVES: dict[str, Archive] = {
    suffix: module for module in (records, shards, video) for suffix in module.SUFFIXES
}
"""Suffix -> the module that reads such files."""
UNREAD = {
    ".zip",
    ".gz",
    ".tgz",
    ".bz2",
    ".xz",
    ".7z",
    ".rar",
    ".lmdb",
    ".h5",
    ".hdf5",
    ".mat",
    ".mdb",
}
"""Archives that people have and that are not read in place."""
_INSIDE = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, ARCHIVES))}))/(.+)", re.DOTALL | re.IGNORECASE
)


@dataclass(frozen=True)
class Place:
    """An image inside an archive: the archive's path below the data root, and the name in it."""

    archive: str
    name: str


def find_place(path: str, locate: Callable[[str], Path]) -> Place | None:
    """Where an image lies whose path leads into an archive; None for a file of its own."""
    match = _INSIDE.fullmatch(path)
    if match is None or not locate(match[1]).is_file():
        return None
    return Place(match[1], match[2])


def read_place(place: Place, locate: Callable[[str], Path]) -> bytes:
    """The bytes of an image inside an archive."""
    path = locate(place.archive)
    return ARCHIVES[path.suffix.lower()].read_member(path, place.name)


def list_archive(archive: str, path: Path) -> list[Member]:
    """The images of one archive; DataError where it cannot be read at all."""
    try:
        return list(ARCHIVES[path.suffix.lower()].list_members(path))
    except OSError as error:
        raise DataError(f"cannot read {archive!r}: {error.strerror}") from error


def find_archives(root: str, place: Path) -> list[str]:
    """The archives at a place: the file itself, or those directly in the folder.

    DataError for a file of another kind; it says what to do with it.
    """
    if place.is_dir():
        found = [each.name for each in place.iterdir() if each.suffix.lower() in ARCHIVES]
        return [join_path(root, name) for name in sorted(found)]
    suffix = place.suffix.lower()
    if suffix in ARCHIVES:
        return [root]
    known = ", ".join(ARCHIVES)
    unpack = "Unpack it into a folder" if suffix in UNREAD else "Name a folder"
    raise DataError(
        f"{root!r} is a file of the kind {suffix or 'without suffix'}; a folder, or a file of the "
        f"kind {known} expected. {unpack} below the data root, and name that as root"
    )
