"""Lists of images, in the forms people have them: CSV, TSV, JSON lines, Parquet and `.lst`.

The contract:
- A list is read into rows of text by the names below, whatever its columns are called; a list
  without a header is path, identity.
- UTF-8 with or without a byte order mark, any line ends, quoted fields; blank lines are left out.
- At most `MOST_BYTES` and `MOST_ROWS`; a row with too few fields is a DataError with its number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import DataError

MOST_BYTES = 1 << 30
MOST_ROWS = 20_000_000
SUFFIXES = {".csv", ".tsv", ".txt", ".lst", ".jsonl", ".ndjson", ".parquet"}
NAMES = {
    "path": ("path", "file_name", "filename", "file", "filepath", "image", "image_path", "img"),
    "identity": ("identity", "label", "person", "person_id", "subject", "class", "id", "name"),
    "split": ("split", "set", "subset"),
}
"""Field -> the names its column may have, in order of preference; case does not matter."""
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


def read_list(path: Path) -> list[Listed]:
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
            rows: Iterable[Mapping[str, Any]] = _iterate_parquet(path)
        else:
            text = path.read_text(encoding="utf-8-sig")
            rows = _iterate_json(text) if suffix in (".jsonl", ".ndjson") else _iterate_text(text)
        return _collect(rows, path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. It lists one image a row") from error


def _collect(rows: Iterable[Mapping[str, Any]], path: Path) -> list[Listed]:
    listed = []
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if number > MOST_ROWS:
                raise DataError(f"at most {MOST_ROWS} rows expected")
            listed.append(_read_row(row))
    except DataError as error:
        raise DataError(f"{path}, row {number or 1}: {error}") from error
    except Exception as error:  # a broken file can make a parser raise anything
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path}, after row {number}: {reason}") from error
    return listed


def _read_row(row: Mapping[str, Any]) -> Listed:
    known = {str(name).strip().lower(): value for name, value in row.items()}
    found = {
        field: next((known[name] for name in names if known.get(name) is not None), None)
        for field, names in NAMES.items()
    }
    path = "" if found["path"] is None else str(found["path"])
    if not path.strip():
        raise DataError(f"a path expected, columns are {', '.join(map(repr, row))}")
    identity, split = (
        None if found[field] is None else str(found[field]).strip() or None
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


def _iterate_json(text: str) -> Iterator[Mapping[str, Any]]:
    for line in text.split("\n"):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"an object a line expected, got {line[:60]!r}")
            yield row


def _iterate_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet as pq

    try:
        reader = pq.ParquetFile(path)
        if reader.metadata.num_rows > MOST_ROWS:
            raise DataError(f"{path}: at most {MOST_ROWS} rows expected")
        known = {*BOX, *POINTS, "landmarks", *(n for names in NAMES.values() for n in names)}
        columns = [name for name in reader.schema_arrow.names if name.lower() in known]
        for batch in reader.iter_batches(batch_size=10_000, columns=columns):
            yield from batch.to_pylist()
    except DataError:
        raise
    except Exception as error:  # on a broken file the reader may raise any exception
        raise DataError(f"no Parquet table: {str(error).splitlines()[0][:120]}") from error


def _iterate_text(text: str) -> Iterator[Mapping[str, Any]]:
    """CSV, TSV, semicolons and `.lst`, with a header or without."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max("\t;,", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = (row for row in reader if any(field.strip() for field in row))
    head = next(rows, [])
    names = [field.strip().lower() for field in head]
    if set(names) & {*NAMES["path"]}:
        for row in rows:
            if len(row) < len(head):
                raise DataError(f"{len(head)} fields expected, got {len(row)}: {row}")
            yield dict(zip(names, row, strict=False))
        return
    for row in [head, *rows] if head else []:
        yield _name_fields(row)


def _name_fields(row: list[str]) -> Mapping[str, Any]:
    """The fields of a row without header: path[, identity[, split]], or a `.lst`'s.

    im2rec: number, label, path. InsightFace: aligned (0 or 1), path, label[, box[, landmarks]].
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
        return {"path": row[-1], "identity": _drop_point(row[1])}
    return dict(zip(("path", "identity", "split"), row, strict=False))


def _drop_point(label: str) -> str:
    """im2rec writes whole numbers as 7.000000."""
    whole = _is_number(label) and float(label).is_integer()
    return str(int(float(label))) if whole else label


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
