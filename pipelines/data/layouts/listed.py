"""A list of paths and people beside a folder: CSV, TSV, JSON lines, Parquet or `.lst`.

The contract:
- A path of the list is looked for below the folder, below the data root, and beside the list.
- With a column `split` the rows of other splits are left out.
- A path listed twice for one person counts once; for two people it is a DataError.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from cdp.errors import DataError
from pipelines.data.folders import join_path
from pipelines.data.lists import Listed, read_list
from pipelines.data.manifest import Entry

SPLIT_NAMES = {
    "labelled": ("labelled", "labeled", "train", "training", "gallery"),
    "unlabelled": ("unlabelled", "unlabeled", "pile", "probe", "probes"),
    "evaluation": ("evaluation", "eval", "test", "testing", "val", "valid", "validation", "dev"),
}
"""Split -> what lists call it."""
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


def list_listed(
    split: str,
    root: str,
    name: str,
    locate: Callable[[str], Path],
    find_fault: Callable[[str], str],
    *,
    people: bool,
) -> list[Entry]:
    """The entries of one split.

    root : the folder. name : of the list, below the data root.
    people : the list must name a person in each row; else identities are optional.
    """
    folders = tuple(dict.fromkeys((root, "", posixpath.dirname(name))))
    person_of: dict[str, str | None] = {}
    entries = []
    for number, row in enumerate(_select(read_list(locate(name)), split, name), 1):
        if people and row.identity is None:
            raise DataError(f"{name}, row {number}: {row.path!r} has no identity")
        path = _find_path(row.path, folders, locate)
        if path in person_of:
            if person_of[path] != row.identity:
                raise DataError(
                    f"{name}: {row.path!r} is listed as {person_of[path]!r} and as "
                    f"{row.identity!r}; an image shows one person. Correct the list"
                )
            continue
        person_of[path] = row.identity
        fault = _find_way_out(path, locate) or find_fault(path)
        entries.append(Entry(path, split, row.identity, fault))
    if not entries:
        raise DataError(f"the list {name!r} names no image of the {split} split")
    return entries


def _select(rows: list[Listed], split: str, name: str) -> Iterator[Listed]:
    for number, row in enumerate(rows, 1):
        if row.split is None:
            yield row
            continue
        meant = SPLIT_OF.get(row.split.lower())
        if meant is None:
            raise DataError(
                f"{name}, row {number}: a split expected (one of {', '.join(SPLIT_OF)}), got "
                f"{row.split!r}"
            )
        if meant == split:
            yield row


def _find_way_out(path: str, locate: Callable[[str], Path]) -> str:
    """Why a path must not be opened that leads out of the data root, or an empty string."""
    try:
        locate(path)
    except (DataError, ValueError) as error:
        return str(error)
    return ""


def _find_path(path: str, folders: tuple[str, ...], locate: Callable[[str], Path]) -> str:
    """The path below the data root: the first place at which there is such a file."""
    spellings = dict.fromkeys((path, path.strip()))
    clean = [posixpath.normpath(spelling.replace("\\", "/")) for spelling in spellings]
    places = [join_path(folder, spelling) for spelling in clean for folder in folders]
    for place in places:
        try:
            if locate(place).is_file():
                return place
        except (DataError, OSError, ValueError):
            continue
    return places[0]
