"""Rows of ready features: which image each is, and whom it shows.

The contract:
- `list.txt` names the rows of every model's file, and `meta.txt` their people. Without `list.txt`
  the tables in `features/` do: the rows of a split are all names that they have, in the order of
  their first appearance, and a column or array `identity` (`label`, `person`, ...) has the people.
- Without `list.txt` a file that does not name its rows is refused: their order would be a guess.
- Lists and names are read once in a process as long as the files stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from cdp.errors import DataError
from pipelines.data.feature_tables import PEOPLE, SUFFIXES, clean_name, list_named
from pipelines.data.fields import DESCRIBED, read_field
from pipelines.data.text_files import read_text

LARGEST_LIST = 256 << 20
"""Most bytes of a list of names."""
Locate = Callable[[str], Path]
Stamped = tuple[tuple[Path, int, int], ...]


def read_lines(path: Path) -> list[str]:
    """The lines of a list; only a newline ends a line, no other separator of Unicode."""
    try:
        if not path.is_file():
            raise DataError(f"cannot read {path}: no such file. It lists one image name a row")
        size = path.stat().st_size
        if size > LARGEST_LIST:
            raise DataError(f"cannot read {path}: too large: {size} bytes, at most {LARGEST_LIST}")
        lines = read_text(path).split("\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. It lists one image name a row") from error
    return lines if lines[-1] else lines[:-1]


def list_rows(locate: Locate, folder: str, *, people: bool) -> list[tuple[str, str | None]]:
    """(name, person) of each row of one split.

    folder : that of the split, below the data root.
    people : the split must name its people where no `list.txt` says which rows there are.
    """
    meta = locate(f"{folder}/meta.txt")
    persons = read_lines(meta) if meta.is_file() else None
    if not locate(f"{folder}/list.txt").is_file():
        if persons is not None:
            raise DataError(
                f"{meta} names one person a row, and beside it is no list.txt that says which "
                "image each row is. Add it, or name images and people in the table of vectors "
                "(columns `path` and `identity`)"
            )
        return _require_people(locate, folder, _find_named(locate, folder), people=people)
    names = read_names(locate, folder)
    if persons is None:
        return [(name, None) for name in names]
    if len(persons) != len(names):
        raise DataError(
            f"{meta} has {len(persons)} rows, list.txt has {len(names)}; expected one identity a "
            "row"
        )
    named = [(name, read_field(person)) for name, person in zip(names, persons, strict=True)]
    blank = [row for row, (_, person) in enumerate(named) if person is None]
    if people and blank:
        raise DataError(
            f"{meta}, row {blank[0] + 1}: the identity of {names[blank[0]]!r} expected, got "
            f"{persons[blank[0]]!r}; {len(blank):,} of {len(named):,} rows have none "
            f"({DESCRIBED}). Name the person, or take the image out of list, meta and features"
        )
    return named


def read_names(locate: Locate, folder: str) -> Sequence[str]:
    """The name of each row of one split."""
    listed = locate(f"{folder}/list.txt")
    if listed.is_file():
        return read_lines(listed)
    return [name for name, _ in _find_named(locate, folder)]


def count_rows(locate: Locate, folder: str) -> int:
    """The number of rows of one split."""
    listed = locate(f"{folder}/list.txt")
    if not listed.is_file():
        return len(_find_named(locate, folder))
    return _count_lines(*_stamp([listed])[0])


def require_order(locate: Locate, folder: str, path: Path) -> None:
    """Refuse a file of vectors of which neither `list.txt` nor the file itself names the rows."""
    if locate(f"{folder}/list.txt").is_file():
        return
    if path.suffix not in SUFFIXES or _read_named(*_stamp([path])[0]) is None:
        raise DataError(
            f"{path} does not name its rows, and there is no {folder}/list.txt with one image name "
            "a row. Write that list, or a table with a column `path`"
        )


def _require_people(
    locate: Locate, folder: str, named: Sequence[tuple[str, str | None]], *, people: bool
) -> list[tuple[str, str | None]]:
    nobody = [name for name, person in named if person is None]
    if people and nobody:
        if len(nobody) < len(named):
            advice = (
                f"; {len(nobody):,} of {len(named):,} rows have none ({DESCRIBED}). Name these "
                "people, or take the rows out of the tables of vectors"
            )
        else:
            known = ", ".join(PEOPLE)
            advice = (
                ", as no image has. Add a column `identity` to the table of vectors, or list.txt "
                f"and meta.txt (columns of people are called {known}; {DESCRIBED} names nobody)"
            )
        raise DataError(
            f"the labelled images of {locate(folder)} need a person each, and {nobody[0]!r} has "
            f"none{advice}"
        )
    return list(named)


def _find_named(locate: Locate, folder: str) -> tuple[tuple[str, str | None], ...]:
    """The rows of a split as its tables name them."""
    place = locate(f"{folder}/features")
    found = sorted(os.listdir(place)) if place.is_dir() else []
    tables = [locate(f"{folder}/features/{name}") for name in found if name.endswith(SUFFIXES)]
    named = _merge_named(_stamp(tables))
    if named is None:
        raise DataError(
            f"cannot read {locate(folder) / 'list.txt'}: no such file. It lists one image name a "
            "row; without it a Parquet or .npz file below features/ must name its rows in a column "
            "`path`"
        )
    return named


def _stamp(paths: Sequence[Path]) -> Stamped:
    """Each path with its time of change and size, by which what was read of it is kept."""
    try:
        return tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in paths)
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error


@lru_cache(maxsize=16)
def _count_lines(path: Path, mtime_ns: int, size: int) -> int:
    return len(read_lines(path))


@lru_cache(maxsize=16)
def _read_named(path: Path, mtime_ns: int, size: int) -> list[tuple[str, str | None]] | None:
    return list_named(path)


@lru_cache(maxsize=4)
def _merge_named(tables: Stamped) -> tuple[tuple[str, str | None], ...] | None:
    """The names of all tables, each once, with the person that some table says; None without any.

    DataError where two tables name two people for one image.
    """
    found = [(path, named) for path, *rest in tables
             if (named := _read_named(path, *rest)) is not None]  # fmt: skip
    if not found:
        return None
    spelling: dict[str, str] = {}
    person_of: dict[str, str | None] = {}
    for path, named in found:
        for name, person in named:
            key = clean_name(name)
            spelling.setdefault(key, name)
            known = person_of.setdefault(key, person)
            if known is None:
                person_of[key] = person
            elif person not in (None, known):
                raise DataError(
                    f"{path}: {name!r} shows {person!r}, and {known!r} by another table beside it. "
                    "Correct one of them"
                )
    return tuple((spelling[key], person) for key, person in person_of.items())
