"""Lists of images, in the forms people have them: CSV, TSV, JSON lines, Parquet and `.lst`.

The contract:
- A list is read into rows of text by the names below, whatever its columns are called; a list
  without a header is path, identity. One column is the identity of all rows.
- Fields lie between commas, semicolons, tabs or `|`. UTF-8 with or without a byte order mark, or
  UTF-16 with one; any line ends, quoted fields; blank lines are left out.
- What names nobody is as in `pipelines.data.fields`.
- At most `MOST_BYTES` and `MOST_ROWS`; a row with too few fields is a DataError with its number.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import DataError
from pipelines.data.fields import read_field
from pipelines.data.text_files import read_text

MOST_BYTES = 1 << 30
MOST_ROWS = 20_000_000
SUFFIXES = {".csv", ".tsv", ".txt", ".lst", ".jsonl", ".ndjson", ".parquet"}
NAMES = {
    "path": ("path", "file_name", "filename", "file", "filepath", "image", "image_path", "img"),
    "identity": (
        "identity", "label", "person", "person_id", "subject", "class", "name", "person_name",
        "full_name", "subject_id", "id",
    ),
    "split": ("split", "set", "subset"),
}  # fmt: skip
"""Field -> the names its column may have, in order of preference; case does not matter.

`id` may number the rows: it is an identity only where no other column is.
"""
SEPARATORS = "\t;,|"
BOX = ("left", "top", "right", "bottom")
POINTS = tuple(f"{axis}{point}" for point in range(1, 6) for axis in "xy")
"""Columns of landmarks: x1, y1 ... x5, y5; or one column `landmarks` of ten numbers."""


@dataclass(frozen=True)
class Listed:
    """One row of a list.

    box : left, top, right, bottom in pixels, or None.
    landmarks : (5, 2) float64 pixels, or None.
    """

    path: str
    identity: str | None = None
    split: str | None = None
    box: tuple[float, ...] | None = None
    landmarks: np.ndarray | None = None


@dataclass(frozen=True)
class ImageList:
    """A whole list.

    column : the column of identities, in lower case; empty without one, or without a header.
    others : further columns that may be meant as identities.
    """

    rows: list[Listed]
    column: str = ""
    others: tuple[str, ...] = ()


Rows = Iterator[Mapping[str, Any]]
Form = tuple[list[str] | None, Rows]
"""The names of the columns, None without a header, and the rows."""


def read_list(path: Path) -> list[Listed]:
    """The rows of a list; parameters and errors as for `read_image_list`."""
    return read_image_list(path).rows


def read_image_list(path: Path) -> ImageList:
    """Read a list; the kind follows from the suffix of its name.

    Raises
    ------
    DataError
        No such file, another kind, too large, or a row that cannot be read; the message names it.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{path}: a list expected, one of {', '.join(sorted(SUFFIXES))}; got {path.name!r}"
        )
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"{path}: a list of at most {MOST_BYTES} bytes expected, has {size}")
        if suffix == ".parquet":
            return _collect(lambda: _open_parquet(path), path)
        text = read_text(path)
        read = _open_json if suffix in (".jsonl", ".ndjson") else _open_text
        return _collect(lambda: read(text), path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. It lists one image a row") from error


def _collect(read: Callable[[], Form], path: Path) -> ImageList:
    listed = []
    number = 0
    try:
        columns, rows = read()
        chosen = _choose_columns([*NAMES] if columns is None else columns)
        for number, row in enumerate(rows, 1):
            if number > MOST_ROWS:
                raise DataError(f"at most {MOST_ROWS} rows expected")
            listed.append(_read_row(row, chosen))
    except DataError as error:
        raise DataError(f"{path}, row {number or 1}: {error}") from error
    except Exception as error:  # a broken file can make a parser raise anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path}, after row {number}: {reason}") from error
    first, *others = ("",) if columns is None else (*chosen["identity"], "")
    return ImageList(listed, first, tuple(filter(None, others)))


def _choose_columns(columns: Iterable[str]) -> dict[str, list[str]]:
    """The columns of each field, the preferred one first."""
    known = {name.strip().lower() for name in columns}
    chosen = {field: [name for name in names if name in known] for field, names in NAMES.items()}
    chosen["identity"] = [name for name in chosen["identity"] if name != "id"] or chosen["identity"]
    return chosen


def _read_row(row: Mapping[str, Any], chosen: Mapping[str, Sequence[str]]) -> Listed:
    """One row; `chosen` as from `_choose_columns`. Rows of JSON lines may differ in their keys."""
    known = {str(name).strip().lower(): value for name, value in row.items()}
    paths = (known.get(name) for name in chosen["path"])
    path = next((str(value) for value in paths if value is not None and value == value), "")
    if not path.strip():
        raise DataError(f"a path expected, columns are {', '.join(map(repr, row))}")
    identity, split = (
        next((read_field(known[name]) for name in chosen[field] if name in known), None)
        for field in ("identity", "split")
    )
    return Listed(path.strip("\r\n"), identity, split, _read_box(known), _read_points(known))


def _read_box(row: Mapping[str, Any]) -> tuple[float, ...] | None:
    if any(row.get(name) in (None, "") for name in BOX):
        return None
    return tuple(_read_numbers([row[name] for name in BOX]))


def _read_points(row: Mapping[str, Any]) -> np.ndarray | None:
    values = row.get("landmarks")
    if isinstance(values, str):
        values = values.replace(",", " ").split()
    if values is None or len(values) == 0:
        if any(row.get(name) in (None, "") for name in POINTS):
            return None
        values = [row[name] for name in POINTS]
    numbers = _read_numbers(np.asarray(values, object).ravel())
    if len(numbers) != 10:
        raise DataError(f"ten numbers of landmarks expected (x1 y1 ... x5 y5), got {len(numbers)}")
    return np.array(numbers).reshape(5, 2)


def _read_numbers(values: Iterable[Any]) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise DataError(f"numbers expected: {error}") from error
    if not np.isfinite(numbers).all():
        raise DataError("finite numbers expected in a box or in landmarks")
    return numbers


# ----------------------------------------------------------------------------------------- forms


def _open_json(text: str) -> Form:
    lines = [line for line in text.split("\n") if line.strip()]
    names: dict[str, None] = {}
    for line in lines:
        with suppress(ValueError):  # named with its row when the rows are read
            row = json.loads(line)
            names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names), _iterate_json(lines)


def _iterate_json(lines: Iterable[str]) -> Rows:
    for line in lines:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise DataError(f"an object a line expected, got {line[:60]!r}")
        yield row


def _open_parquet(path: Path) -> Form:
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(path)
        if reader.metadata.num_rows > MOST_ROWS:
            raise DataError(f"{path}: at most {MOST_ROWS} rows expected")
        known = {*BOX, *POINTS, "landmarks", *(n for names in NAMES.values() for n in names)}
        columns = [name for name in reader.schema_arrow.names if name.lower() in known]
    except DataError:
        raise
    except Exception as error:  # on a broken file the reader may raise any exception
        raise _explain_parquet(error) from error
    return columns, _iterate_parquet(reader, columns)


def _iterate_parquet(reader: Any, columns: list[str]) -> Rows:
    try:
        for batch in reader.iter_batches(batch_size=10_000, columns=columns):
            yield from batch.to_pylist()
    except Exception as error:  # on a broken file the reader may raise any exception
        raise _explain_parquet(error) from error


def _explain_parquet(error: Exception) -> DataError:
    return DataError(f"no Parquet table: {str(error).splitlines()[0][:120]}")


def _open_text(text: str) -> Form:
    """CSV, TSV, semicolons, `|` and `.lst`, with a header or without."""
    first = next((line for line in text.split("\n") if line.strip()), "")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=_find_separator(first), strict=True
    )
    rows = (row for row in reader if any(field.strip() for field in row))
    head = next(rows, [])
    names = [field.strip().lower() for field in head]
    if set(names) & {*NAMES["path"]}:
        return names, _name_columns(names, rows)
    return None, map(_name_fields, [head, *rows] if head else [])


def _find_separator(head: str) -> str:
    """What separates the columns of a header, or the fields of a first row without one.

    A row without header is split at a `|` only where it has no other separator: a path may hold it.
    """
    for separator in SEPARATORS:
        if {name.strip(' "').lower() for name in head.split(separator)} & {*NAMES["path"]}:
            return separator
    bare = re.sub('"[^"]*"', "", head)
    common = max(SEPARATORS[:-1], key=bare.count)
    return common if common in bare else "|"


def _name_columns(names: list[str], rows: Iterable[list[str]]) -> Rows:
    for row in rows:
        if len(row) < len(names):
            raise DataError(f"{len(names)} fields expected, got {len(row)}: {row}")
        yield dict(zip(names, row, strict=False))


def _name_fields(row: list[str]) -> Mapping[str, Any]:
    """The fields of a row without header: path[, identity[, split]], or a `.lst`'s.

    im2rec: number, label (whole numbers as 7.000000), path. InsightFace: aligned (0 or 1), path,
    label[, box[, landmarks]].
    """
    row = [field.strip() if position else field for position, field in enumerate(row)]
    if len(row) >= 3 and _is_number(row[0]):
        if not _is_number(row[1]) and "." in row[1]:
            named: dict[str, Any] = {"path": row[1], "identity": row[2]}
            if len(row) >= 7:
                named |= dict(zip(BOX, row[3:7], strict=True))
            if len(row) >= 17:
                # InsightFace lists the five x before the five y.
                named["landmarks"] = [
                    row[7 + point + 5 * axis] for point in range(5) for axis in (0, 1)
                ]
            return named
        return {"path": row[-1], "identity": row[1]}
    return dict(zip(("path", "identity", "split"), row, strict=False))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
