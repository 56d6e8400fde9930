"""Ready features as other tools write them: Parquet tables and `.npz` archives.

The contract:
- Parquet: one column of lists of floats, of fixed or any length, or one float column a dimension,
  numbered (`dim_0`, `dim_1`, ...). `.npz`: one array (n, d) of floats. float16, float32 and float64
  keep their type.
- With a column or array of names (`path`, `id`, ...) rows are found by them, in any order; without
  one they are in the order of list.txt.
- A column or array of people holds texts, integers, or floats that are whole numbers, as pandas
  writes integers beside a missing one; who is nobody is as in `pipelines.data.fields`.
- A row that is missing, null or of another length is a vector of NaN: that image alone is rejected.
- Rows are streamed: memory is that of the result. Nothing is unpickled, and nothing is allocated
  before the file's own header was checked.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import DataError
from pipelines.data.fields import read_field

LONGEST_VECTOR = 1 << 16
"""Most numbers of a ready feature vector."""
VECTORS = ("embedding", "embeddings", "feature", "features", "vector", "vectors")
NAMES = (
    "path", "file_name", "filename", "file", "filepath", "image", "image_path", "name", "names",
    "paths", "id", "ids", "image_id", "key",
)  # fmt: skip
"""What columns and arrays are called, in order of preference; case does not matter."""
INDEX = "__index_level_0__"
"""The column in which pandas keeps an index without a name."""
PEOPLE = (
    "identity", "identities", "person", "people", "person_id", "subject", "label", "labels",
    "class",
)  # fmt: skip
SUFFIXES = (".parquet", ".npz")
_NUMBERED = re.compile(r"(.*?)(\d+)")
_BLOCK_NUMBERS = 1 << 22
Columns = tuple[list[str] | None, Sequence[Any], str]
"""The names of the rows, their people, and the column or array of these; empty without one."""
Blocks = Iterator[tuple[int, np.ndarray]]
"""(number of the first row, vectors (n, width)) of one block after the other."""


@dataclass(frozen=True)
class _Table:
    """Vectors that can be streamed, and the names of the rows, if there are any."""

    rows: int
    width: int
    kind: np.dtype
    blocks: Callable[[], Blocks]
    names: Sequence[str] | None


def read_table(path: Path, names: Sequence[str]) -> np.ndarray:
    """The vectors of a Parquet or `.npz` file: (len(names), d) floats in the order of the list.

    Raises
    ------
    DataError
        The file cannot be read, has no vectors or several kinds of them, or fits no list of names.
    """
    with _name_faults(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return _gather(_open_npz(archive, path), path, names)
        return _gather(_open_parquet(pq.ParquetFile(path), path), path, names)


def list_named(path: Path) -> list[tuple[str, str | None]] | None:
    """(name, person) of each row of a Parquet or `.npz` file; None where it names no rows.

    The person is None where the file has no column of people or the field names nobody.
    """
    with _name_faults(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                columns = _read_npz_columns(archive, path)
        else:
            columns = _read_parquet_columns(pq.ParquetFile(path))
        names, people, column = columns
        if names is None:
            return None
        read = _read_people(people, column, path) if column else [None] * len(names)
        return list(zip(names, read, strict=True))


def _read_people(values: Sequence[Any], column: str, path: Path) -> list[str | None]:
    people = []
    for row, value in enumerate(values, 1):
        if isinstance(value, float) and not math.isnan(value) and not value.is_integer():
            raise DataError(
                f"{path}, row {row}: the column `{column}` of people has {value}; text or whole "
                "numbers expected. If it is no column of people, give it another name"
            )
        try:
            people.append(read_field(value))
        except DataError as error:
            raise DataError(f"{path}, row {row}, column `{column}`: {error}") from error
    return people


@contextmanager
def _name_faults(path: Path) -> Iterator[None]:
    """Any error of a reader as a DataError with the path."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # on a broken file a reader may raise any exception
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise DataError(
            f"{path}: a table of vectors expected; it cannot be read: {reason}"
        ) from error


# ------------------------------------------------------------------------------------------ rows


def _gather(table: _Table, path: Path, names: Sequence[str]) -> np.ndarray:
    if not 1 <= table.width <= LONGEST_VECTOR:
        raise DataError(
            f"{path}: vectors of 1 to {LONGEST_VECTOR} numbers expected, found {table.width}"
        )
    source = _find_rows(table, path, names)
    result = np.empty((len(names), table.width), table.kind)
    result[source < 0] = np.nan
    order = np.argsort(source, kind="stable")
    ranked = source[order]
    end = 0
    for first, block in table.blocks():
        end = first + len(block)
        low, high = np.searchsorted(ranked, [first, first + len(block)])
        chosen = order[low:high]
        result[chosen] = block[source[chosen] - first]
    if end != table.rows or (table.names is not None and len(table.names) != end):
        raise DataError(f"{path}: {table.rows} rows announced, {end} found")
    return result


def _find_rows(table: _Table, path: Path, names: Sequence[str]) -> np.ndarray:
    """The table's row of each name of the list; -1 where it has none."""
    if table.names is None:
        if table.rows != len(names):
            raise DataError(
                f"{path} holds {table.rows} vectors without names, expected one for each of the "
                f"{len(names)} rows of list.txt. Add a column `path`, or correct the list"
            )
        return np.arange(len(names))
    row_of: dict[str, int] = {}
    for row, name in enumerate(map(clean_name, table.names)):
        if row_of.setdefault(name, row) != row:
            raise DataError(f"{path}: {name!r} is named by rows {row_of[name] + 1} and {row + 1}")
    source = np.array([row_of.get(clean_name(name), -1) for name in names], np.int64)
    if len(names) and (source < 0).all():
        raise DataError(
            f"{path}: none of its names is in list.txt; its first is "
            f"{next(iter(row_of), '')!r}, the list's {names[0]!r}. Name the images as the list "
            "does, or leave the names out where the rows are in the order of the list"
        )
    return source


def clean_name(name: str) -> str:
    """A name by which rows of several tables are found, however their writers spelt its path."""
    return name.strip().replace("\\", "/").removeprefix("./")


def _pick_name(known: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first wanted name that is there, whatever its case."""
    found = {name.lower(): name for name in reversed(known)}
    return next((found[name] for name in wanted if name in found), None)


# --------------------------------------------------------------------------------------- Parquet


def _open_parquet(reader: pq.ParquetFile, path: Path) -> _Table:
    schema = reader.schema_arrow
    name = _pick_name_column(schema)
    names = None if name is None else _read_names(reader, name)
    rows = reader.metadata.num_rows
    lists = [field.name for field in schema if _is_vector(field.type)]
    if lists:
        column = lists[0] if len(lists) == 1 else _pick_name(lists, VECTORS)
        if column is None:
            raise DataError(
                f"{path}: several columns of vectors, {', '.join(lists)}; name one `embedding`"
            )
        kind = schema.field(column).type
        width = kind.list_size if pa.types.is_fixed_size_list(kind) else _measure(reader, column)
        number = np.dtype(kind.value_type.to_pandas_dtype())
        return _Table(
            rows, width, number, lambda: _read_lists(reader, column, width, number), names
        )
    columns = _find_dimensions(schema)
    if not columns:
        found = ", ".join(f"{field.name} {field.type}" for field in list(schema)[:8])
        raise DataError(
            f"{path}: a column `embedding` of lists of floats, or float columns numbered from 0, "
            f"expected; found {found}"
        )
    number = np.result_type(*(schema.field(each).type.to_pandas_dtype() for each in columns))
    return _Table(rows, len(columns), number, lambda: _read_columns(reader, columns, number), names)


def _read_parquet_columns(reader: pq.ParquetFile) -> Columns:
    schema = reader.schema_arrow
    name = _pick_name_column(schema)
    if name is None:
        return None, [], ""
    rest = [each for each in _list_naming(schema) if each != name]
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    person = _pick_name(rest, PEOPLE) or _pick_name(floats, PEOPLE)
    people = [] if person is None else _read_column(reader, person)
    return _read_names(reader, name), people, person or ""


def _pick_name_column(schema: pa.Schema) -> str | None:
    """The column that names the rows; a pandas index of texts where there is none other."""
    name = _pick_name(_list_naming(schema), NAMES)
    if name is None and INDEX in schema.names and _is_text(schema.field(INDEX).type):
        return INDEX
    return name


def _list_naming(schema: pa.Schema) -> list[str]:
    return [
        field.name for field in schema if pa.types.is_integer(field.type) or _is_text(field.type)
    ]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(pa.types, "is_string_view", lambda kind: False)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or is_view(kind))


def _is_vector(kind: pa.DataType) -> bool:
    is_list = (
        pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    )
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _read_names(reader: pq.ParquetFile, column: str) -> list[str]:
    names = ["" if name is None else str(name) for name in _read_column(reader, column)]
    if "" in names:
        raise DataError(f"the column {column} names no image in row {names.index('') + 1}")
    return names


def _read_column(reader: pq.ParquetFile, column: str) -> list[Any]:
    values: list[Any] = []
    for batch in reader.iter_batches(columns=[column]):
        values += batch.column(0).to_pylist()
    return values


def _find_dimensions(schema: pa.Schema) -> list[str]:
    """The longest series of float columns with one prefix and numbers without a gap."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    numbered = [(match[1], int(match[2]), match[0])
                for match in map(_NUMBERED.fullmatch, floats) if match]  # fmt: skip
    series = [list(group) for _, group in groupby(sorted(numbered), key=lambda each: each[0])]
    whole = [
        [name for *_, name in group]
        for group in series
        if len(group) > 1
        and [number - group[0][1] for _, number, _ in group] == [*range(len(group))]
    ]
    return max(whole, key=len, default=[])


def _measure(reader: pq.ParquetFile, column: str) -> int:
    """The commonest length of a list in the first rows that have one."""
    for batch in reader.iter_batches(batch_size=256, columns=[column]):
        length = batch.column(0).value_lengths().drop_null().to_pylist()
        if length:
            return int(Counter(length).most_common(1)[0][0])
    return 0


def _read_lists(reader: pq.ParquetFile, column: str, width: int, number: np.dtype) -> Blocks:
    first = 0
    for batch in reader.iter_batches(max(1, _BLOCK_NUMBERS // width), columns=[column]):
        values = batch.column(0)
        block = np.full((len(values), width), np.nan, number)
        if pa.types.is_fixed_size_list(values.type):
            right = values.is_valid().to_numpy(zero_copy_only=False)
        else:
            length = values.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
            right = length == width
        kept = values.filter(pa.array(right)).flatten()
        block[right] = _to_numbers(kept, number).reshape(-1, width)
        yield first, block
        first += len(values)


def _read_columns(reader: pq.ParquetFile, columns: list[str], number: np.dtype) -> Blocks:
    first = 0
    for batch in reader.iter_batches(max(1, _BLOCK_NUMBERS // len(columns)), columns=columns):
        yield first, np.stack([_to_numbers(batch.column(name), number) for name in columns], axis=1)
        first += len(batch)


def _to_numbers(values: pa.Array, number: np.dtype) -> np.ndarray:
    """Floats as an array; null is NaN."""
    plain = values.to_numpy(zero_copy_only=False)
    return np.asarray(plain, number)


# ------------------------------------------------------------------------------------------ .npz


@dataclass(frozen=True)
class _Member:
    """An array of an archive, by its header: shape, type, and whether columns come first."""

    file: str
    shape: tuple[int, ...]
    kind: np.dtype
    by_columns: bool


def _open_npz(archive: zipfile.ZipFile, path: Path) -> _Table:
    arrays, vectors = _list_arrays(archive)
    chosen = vectors[0] if len(vectors) == 1 else _pick_name(vectors, VECTORS)
    if chosen is None:
        found = ", ".join(f"{name} {each.kind} {each.shape}" for name, each in arrays.items())
        raise DataError(
            f"{path}: one array (n, d) of floats expected, or one of them called `embedding`; "
            f"found {found or 'no array'}"
        )
    array = arrays[chosen]
    if array.by_columns:
        raise DataError(f"{path}: {chosen} is stored by columns; save np.ascontiguousarray of it")
    rows, width = array.shape
    names = _read_npz_names(archive, path, arrays, rows)
    return _Table(rows, width, array.kind.newbyteorder("="),
                  lambda: _read_blocks(archive, array), names)  # fmt: skip


def _list_arrays(archive: zipfile.ZipFile) -> tuple[dict[str, _Member], list[str]]:
    """Every array of an archive, and the names of those that are vectors."""
    arrays = {
        info.filename.removesuffix(".npy"): _read_head(archive, info)
        for info in archive.infolist()
        if info.filename.endswith(".npy")
    }
    vectors = [
        name for name, array in arrays.items() if len(array.shape) == 2 and array.kind.kind == "f"
    ]
    return arrays, vectors


def _read_head(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    with archive.open(info) as stream:
        shape, by_columns, kind = _skip_head(stream)
        head = stream.tell()
    if (
        not kind.hasobject
        and info.file_size != head + int(np.prod(shape, dtype=object)) * kind.itemsize
    ):
        raise DataError(f"the array {info.filename} lies about its size")
    return _Member(info.filename, shape, kind, by_columns and len(shape) > 1)


def _skip_head(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    readers: Mapping[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise DataError(f"an array of version 1.0 or 2.0 expected, got {version}")
    found: tuple[tuple[int, ...], bool, np.dtype] = readers[version](stream)
    return found


def _read_npz_columns(archive: zipfile.ZipFile, path: Path) -> Columns:
    arrays, vectors = _list_arrays(archive)
    rows = {arrays[name].shape[0] for name in vectors}
    for count in rows:
        names = _read_npz_names(archive, path, arrays, count)
        if names is not None:
            person = _pick_name(_list_rows(arrays, count), PEOPLE)
            people = (
                [] if person is None else _read_npz_array(archive, path, arrays, person, "USiuf")
            )
            return names, people, person or ""
    return None, [], ""


def _read_npz_names(
    archive: zipfile.ZipFile, path: Path, arrays: Mapping[str, _Member], rows: int
) -> list[str] | None:
    """The first array of that many texts or whole numbers that is called as names are."""
    name = _pick_name(_list_rows(arrays, rows), NAMES)
    if name is None:
        return None
    return [str(value) for value in _read_npz_array(archive, path, arrays, name, "USiu")]


def _list_rows(arrays: Mapping[str, _Member], rows: int) -> list[str]:
    return [name for name, each in arrays.items() if each.shape == (rows,)]


def _read_npz_array(
    archive: zipfile.ZipFile, path: Path, arrays: Mapping[str, _Member], name: str, kinds: str
) -> list[Any]:
    """The values of an array of one of some kinds of type; bytes as text."""
    kind = arrays[name].kind
    if kind.kind not in kinds:
        what = "Python objects, which are not read" if kind.hasobject else f"of the type {kind}"
        raise DataError(
            f"{path}: the names `{name}` are {what}; save them as np.array(names, dtype=str)"
        )
    with archive.open(arrays[name].file) as stream:
        values = np.lib.format.read_array(stream, allow_pickle=False)
    return [value.decode("utf-8") if isinstance(value, bytes) else value
            for value in values.tolist()]  # fmt: skip


def _read_blocks(archive: zipfile.ZipFile, array: _Member) -> Blocks:
    rows, width = array.shape
    with archive.open(array.file) as stream:
        _skip_head(stream)
        at_once = max(1, _BLOCK_NUMBERS // width)
        for first in range(0, rows, at_once):
            count = min(at_once, rows - first)
            data = stream.read(count * width * array.kind.itemsize)
            yield first, np.frombuffer(data, array.kind).reshape(count, width)
