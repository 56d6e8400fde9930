"""A list of paths and people beside a folder: CSV, TSV, JSON lines, Parquet or `.lst`.

The contract:
- A path of the list is looked for below the folder, below the data root, and beside the list.
- With a column `split` the rows of other splits are left out; `inspect_list` counts those that no
  split of the manifest takes.
- A path listed twice for one person counts once; for two people it is a DataError.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdp.errors import DataError
from pipelines.data.fields import DESCRIBED
from pipelines.data.folders import WAY_OUT, join_path
from pipelines.data.lists import ImageList, Listed, read_image_list
from pipelines.data.manifest import Entry

SPLIT_NAMES = {
    "labelled": ("labelled", "labeled", "train", "training", "gallery"),
    "unlabelled": ("unlabelled", "unlabeled", "pile", "probe", "probes"),
    "evaluation": ("evaluation", "eval", "test", "testing", "val", "valid", "validation", "dev"),
}
"""Split -> what lists call it."""
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}
ABSOLUTE = "an absolute path; write paths from the folder, the data root or the list's folder on"


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
    found = read_image_list(locate(name))
    chosen = [(number, row) for number, row in enumerate(found.rows, 1)
              if row.split is None or _find_split(row.split, name, number) == split]  # fmt: skip
    if people:
        _require_people(chosen, found, name)
    for _, row in chosen:
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


@dataclass(frozen=True)
class ListFacts:
    """What the entries of a list do not show.

    column, others : as of `ImageList`.
    alone : rows with an identity, where each has one of its own; else 0.
    left_out : what the list calls a split that takes none of its rows -> rows that are no image of
        the data set.
    """

    name: str
    column: str
    others: tuple[str, ...]
    alone: int
    left_out: Mapping[str, int]


def inspect_list(
    name: str, roots: Mapping[str, str], used: Collection[str], locate: Callable[[str], Path]
) -> ListFacts:
    """What is known of a list beside its entries.

    roots : split -> its folder, of the splits that take rows of the list. used : paths of all
        images of the data set.
    """
    found = read_image_list(locate(name))
    folders = tuple(dict.fromkeys((*roots.values(), "", posixpath.dirname(name))))
    named: list[str] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(found.rows, 1):
        if row.split is None or _find_split(row.split, name, number) in roots:
            named += [row.identity] if row.identity is not None else []
        elif _find_path(row.path, folders, locate) not in used:
            left_out[row.split] += 1
    alone = len(named) if len(named) > 1 and len(set(named)) == len(named) else 0
    return ListFacts(name, found.column, found.others, alone, left_out)


def _require_people(rows: Sequence[tuple[int, Listed]], found: ImageList, name: str) -> None:
    nobody = [(number, row) for number, row in rows if row.identity is None]
    if not nobody:
        return
    number, row = nobody[0]
    if found.column:
        reason = f"{DESCRIBED} in the column `{found.column}`"
    elif len(nobody) < len(rows):
        reason = DESCRIBED
    else:
        reason = (
            "no column of the list is one of people, such as `identity`; fields are separated by "
            "a comma, a semicolon, a tab or |"
        )
    raise DataError(
        f"{name}, row {number}: {row.path!r} has no identity; {len(nobody):,} of {len(rows):,} "
        f"rows have none ({reason}). Name the person, or take these rows out of the list"
    )


def _find_split(text: str, name: str, number: int) -> str:
    """The split that a list means by a word."""
    meant = SPLIT_OF.get(text.lower())
    if meant is None:
        raise DataError(
            f"{name}, row {number}: a split expected (one of {', '.join(SPLIT_OF)}), got {text!r}"
        )
    return meant


def _find_way_out(path: str, locate: Callable[[str], Path]) -> str:
    """Why a path must not be opened that leads out of the data root, or an empty string."""
    try:
        locate(path)
    except DataError:
        return ABSOLUTE if posixpath.isabs(path) else WAY_OUT
    except ValueError as error:
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
