"""Parquet tables: their schemas, columns of vectors, and views over one split or several.

The contract:
- A table is written atomically and in the schema its stage declares.
- A view is read in the order of `sample_id`.
- A Parquet file of unknown origin is checked against its expected size before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.arrays.scratch import allocate
from cdp.errors import DataError
from cdp.types import PairTable
from pipelines.files import open_atomically

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("labelled", "unlabelled")
"""The splits that are embedded and searched."""
JOINT = "joint"
"""The graph over labelled and unlabelled images together."""


def read_view(embeddings: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) sample ids and (n, d) vectors of one view over some splits, ascending by sample id."""
    ids = np.concatenate(
        [pq.read_table(path, columns=["sample_id"])["sample_id"].to_numpy() for path in embeddings]
    )
    vectors = [read_vectors(path, "embedding") for path in embeddings]
    if len(vectors) == 1:
        return ids, vectors[0]
    order = np.argsort(ids)
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids))
    joined = allocate((len(ids), vectors[0].shape[1]), vectors[0].dtype.type)
    row = 0
    for part in vectors:
        joined[place[row : row + len(part)]] = part
        row += len(part)
    return ids[order], joined


def describe_schema(schema: pa.Schema) -> dict[str, str]:
    """Column name -> name of its Arrow type, as it enters a fingerprint."""
    return {field.name: str(field.type) for field in schema}


def write_table(path: Path, columns: Mapping[str, Any] | pa.Table, schema: pa.Schema) -> None:
    """Write one Parquet file atomically, cast to `schema`."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns), schema=schema)
    if not table.schema.equals(schema):
        table = table.select(schema.names).cast(schema)
    with open_atomically(path) as draft:
        pq.write_table(table, draft, compression="zstd")


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """(n, d) array -> Arrow fixed-size list column of n rows, without copying."""
    values = np.ascontiguousarray(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def list_pairs(pairs: pd.DataFrame, sample_id: np.ndarray) -> PairTable:
    """The table `mediate/pairs` with ids as positions in the ascending `sample_id`.

    Runs of earlier versions have no column `listings`: their pairs all get the weight 1.
    """
    listings = pairs.get("listings")
    return PairTable(
        np.searchsorted(sample_id, pairs.source.to_numpy()),
        np.searchsorted(sample_id, pairs.target.to_numpy()),
        None if listings is None else listings.to_numpy(),
    )


def read_pairs(
    path: Path, sample_id: np.ndarray, columns: Sequence[str] = ("probability",)
) -> tuple[PairTable, dict[str, np.ndarray]]:
    """The table `mediate/pairs`, with ids as positions in the ascending `sample_id`, and columns.

    It is read in blocks; arrays that are large lie on disk (`cdp.arrays.scratch`).
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    readers = [pq.ParquetFile(file) for file in files]
    count = sum(reader.metadata.num_rows for reader in readers)
    schema = readers[0].schema_arrow
    found = {end: allocate((count,), np.int64) for end in ("source", "target")}
    for name in ("listings", *columns):
        found[name] = allocate((count,), schema.field(name).type.to_pandas_dtype())
    row = 0
    for reader in readers:
        for batch in reader.iter_batches(batch_size=1 << 18, columns=list(found)):
            part = slice(row, row + len(batch))
            for name, column in found.items():
                value = batch.column(name).to_numpy(zero_copy_only=False)
                if name in ("source", "target"):
                    value = np.searchsorted(sample_id, value)
                column[part] = value
            row += len(batch)
    pairs = PairTable(*(found.pop(name) for name in ("source", "target", "listings")))
    return pairs, found


def find_rows(labels: pd.DataFrame) -> np.ndarray | None:
    """The row that stands for each row of `propagate/labels`; None for runs of earlier versions."""
    if "representative" not in labels:
        return None
    return np.searchsorted(labels.sample_id.to_numpy(), labels.representative.to_numpy())


def read_vectors(path: Path, column: str) -> np.ndarray:
    """One fixed-size-list column of a Parquet table or directory -> (n, d) array.

    Row groups are copied one by one into the result, so the peak is the result, which lies on
    disk where it is large, plus one group.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    readers = [pq.ParquetFile(file) for file in files]
    count = sum(reader.metadata.num_rows for reader in readers)
    field = readers[0].schema_arrow.field(column).type
    result = allocate((count, field.list_size), field.value_type.to_pandas_dtype())
    row = 0
    for reader in readers:
        for batch in reader.iter_batches(columns=[column]):
            block = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            result[row : row + len(batch)] = block.reshape(len(batch), -1)
            row += len(batch)
    return result


def open_vectors(path: Path, column: str, count: int, longest: int) -> np.ndarray:
    """Vectors of a Parquet file from anywhere -> (n, d) array, or a DataError.

    The footer is checked before any row is read: it must declare one column of `count` fixed-size
    lists of at most `longest` floats. The rows must then match the footer; none may be null.
    """
    wanted = f"a column {column!r} of {count} fixed-size lists of 1 to {longest} floats"
    try:
        reader = pq.ParquetFile(path)
        schema, rows = reader.schema_arrow, reader.metadata.num_rows
        kind = schema.field(column).type if schema.get_field_index(column) >= 0 else None
        if kind is None or not pa.types.is_fixed_size_list(kind):
            raise DataError(f"{path}: {wanted} expected, found {describe_schema(schema)}")
        if (
            not pa.types.is_floating(kind.value_type)
            or not 1 <= kind.list_size <= longest
            or rows != count
        ):
            raise DataError(f"{path}: {wanted} expected, found {rows} of {kind}")
        result = np.empty((count, kind.list_size), kind.value_type.to_pandas_dtype())
        row = 0
        at_once = max(1, (1 << 22) // kind.list_size)
        for batch in reader.iter_batches(batch_size=at_once, columns=[column]):
            values = batch.column(0)
            if values.null_count or values.flatten().null_count or row + len(batch) > count:
                raise DataError(f"{path}: {wanted} expected, found nulls or more rows")
            block = values.flatten().to_numpy(zero_copy_only=False)
            result[row : row + len(batch)] = block.reshape(len(batch), -1)
            row += len(batch)
    except DataError:
        raise
    except Exception as error:  # on a broken file the reader may raise any exception
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise DataError(f"{path}: {wanted} expected; it cannot be read: {reason}") from error
    if row != count:
        raise DataError(f"{path}: {wanted} expected, found {row}")
    return result


def types_agree(declared: str, found: str) -> bool:
    """Whether a column's type is the declared one; a declared length of 0 means any length."""
    found = found.replace("<element: ", "<item: ")  # Parquet's name of it, where files are united
    return found == declared or (declared.endswith("[0]") and found.startswith(declared[:-3]))
