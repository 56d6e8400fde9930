"""Ready features: tables of vectors, one a model and split, and the checks before they are used.

The contract:
- A `.bin` file has no header. Its dimension comes from the manifest's `dims` or from a `dims.txt`
  (`<model> <dimension>` a row) in the split's folder or the one above, and with it the type:
  float32, float16 or float64 by the size. Without a dimension the type is float32. Numbers that
  make no sense as such, such as those of the other byte order, are an error. Parquet and `.npz`
  files are read as other tools write them (`pipelines.data.feature_tables`).
- A vector that is zero or not finite makes its image unusable, in all views alike. Where more than
  `MOST_BAD` of a view are so, the file is wrong, and that is an error.
- One model has one dimension in all splits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cdp.errors import DataError
from pipelines.data.feature_tables import LONGEST_VECTOR, read_table

MOST_BAD = 0.2
"""Share of the rows of a view that may be zero or not finite."""
SAMPLE_ROWS = 256
SPREAD = 2.0**13
"""A number further than this factor from the median of its file counts as odd."""
MOST_ODD = 0.03
BLOCK_ROWS = 1 << 16
TYPES = {2: np.float16, 4: np.float32, 8: np.float64}


def read_dims(paths: Iterable[Path]) -> dict[str, int]:
    """The dimensions in the first of these files that exists; empty without any."""
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. `<model> <dimension>` a row") from error
    dims = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if len(words) == 2 and words[1].isdecimal() and 1 <= int(words[1]) <= LONGEST_VECTOR:
            dims[words[0]] = int(words[1])
        elif words:
            raise DataError(
                f"{path}, line {number}: `<model> <dimension>` expected, got {line[:60]!r}"
            )
    return dims


SUFFIXES = (".bin", ".npy", ".npz", ".parquet")


def open_features(
    path: Path, count: int, dimension: int | None, read_names: Callable[[], Sequence[str]]
) -> np.ndarray:
    """The vectors of one file: (count, d) floats, mapped if possible.

    count : rows of list.txt. dimension : of the vectors, where it is known.
    read_names : the rows of list.txt, for files that name their vectors.
    """
    if path.suffix == ".bin":
        vectors = _map_raw(path, count, dimension)
    elif path.suffix == ".npy":
        vectors = _map_array(path)
    else:
        vectors = read_table(path, read_names())
    if not isinstance(vectors, np.ndarray) or (
        vectors.ndim != 2 or len(vectors) != count or vectors.dtype.kind != "f"
    ):
        found = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "others"
        raise DataError(
            f"{path} holds {found}, expected floats ({count}, d) for the {count} rows of list.txt"
        )
    if not 1 <= vectors.shape[1] <= LONGEST_VECTOR:
        raise DataError(
            f"{path}: vectors of 1 to {LONGEST_VECTOR} numbers expected, found {vectors.shape[1]}"
        )
    if dimension is not None and vectors.shape[1] != dimension:
        raise DataError(
            f"{path} holds vectors of {vectors.shape[1]} numbers; the manifest or dims.txt says "
            f"{dimension}"
        )
    return vectors


def _map_array(path: Path) -> np.ndarray:
    try:
        vectors: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # on a broken header the reader may raise any exception
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(f"{path} is not a .npy array of numbers: {reason}") from error
    if isinstance(vectors, np.ndarray) and not vectors.dtype.isnative:
        return vectors.astype(vectors.dtype.newbyteorder("="))
    return vectors


def _map_raw(path: Path, count: int, dimension: int | None) -> np.ndarray:
    size = path.stat().st_size
    if not count:
        raise DataError(f"{path} has {size} bytes, and list.txt names no image")
    if dimension is not None:
        width, rest = divmod(size, count * dimension)
        if rest or width not in TYPES:
            raise DataError(
                f"{path} has {size} bytes, which is not 2, 4 or 8 bytes a number for the {count} "
                f"rows of list.txt and the {dimension} numbers a row of the manifest or dims.txt"
            )
        return _map_as(path, np.dtype(TYPES[width]), count, size)
    wide, rest = divmod(size, 4 * count)
    if rest or not wide:
        raise DataError(
            f"{path} has {size} bytes, which is no whole number of float32 "
            f"vectors for the {count} rows of list.txt"
        )
    return _map_as(path, np.dtype(np.float32), count, size)


def _map_as(path: Path, kind: np.dtype, count: int, size: int) -> np.ndarray:
    vectors = np.memmap(path, kind, "r", shape=(count, size // (kind.itemsize * count)))
    if not _look_plausible(vectors):
        raise DataError(_describe_type(path, kind, count, size))
    return vectors


def _describe_type(path: Path, kind: np.dtype, count: int, size: int) -> str:
    """The message for numbers that are of another type: what they may be, and how to say so."""
    read = f"{path}: read as {kind.name}, its numbers spread over many orders of magnitude"
    for other in (*(np.dtype(TYPES[width]) for width in (4, 8, 2)), kind.newbyteorder()):
        wide, rest = divmod(size, other.itemsize * count)
        if other == kind or rest or not wide:
            continue
        found = np.memmap(path, other, "r", shape=(count, wide))
        finite = np.isfinite(found[:SAMPLE_ROWS]).all(axis=1)
        if finite.mean() < 1 - MOST_BAD or not _look_plausible(found):
            continue
        if not other.isnative:
            return (
                f"{read}; they look like {kind.name} of the other byte order. Write it as "
                "vectors.astype('<f4').tofile(...), or as a .npy file, which names its byte order"
            )
        return (
            f"{read}; they look like {other.name}, {wide} a row. Say so: "
            f"`dims: {{{path.stem}: {wide}}}` in the manifest or a row `{path.stem} {wide}` in "
            "dims.txt; or write it as float32"
        )
    return (
        f"{read}, which no embedding does. Write row-major float32 without a header, or a .npy file"
    )


def _look_plausible(vectors: np.ndarray) -> bool:
    """Whether a sample of rows looks like embeddings: numbers of a like magnitude.

    A float read in another width has the exponents of other bits: half of its numbers or more
    lie many powers of two away from the rest.
    """
    rows = np.unique(np.linspace(0, len(vectors) - 1, SAMPLE_ROWS).astype(np.int64))
    with np.errstate(all="ignore"):
        sample = np.abs(np.asarray(vectors[rows], np.float64))
        if not sample[:, ::2].any() and sample[:, 1::2].any():
            return False  # halves of float64 whose last bits are zeros
        value = sample[np.isfinite(sample).all(axis=1)]
        value = value[value != 0]
        if not len(value):
            return True  # rows of zeros and of NaN are bad rows, not another type
        middle = np.median(value)
        odd = (value > middle * SPREAD) | (value < middle / SPREAD)
    return bool(odd.mean() <= MOST_ODD and 1e-8 < middle < 1e8)


def find_bad_rows(views: Mapping[str, np.ndarray]) -> dict[int, str]:
    """Row -> reason, for the rows that are zero or not finite in some view.

    Raises
    ------
    DataError
        More than `MOST_BAD` of a view's rows are so.
    """
    bad: dict[int, str] = {}
    for name, vectors in views.items():
        found: dict[int, str] = {}
        for start in range(0, len(vectors), BLOCK_ROWS):
            block = np.asarray(vectors[start : start + BLOCK_ROWS], np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                square = np.einsum("nd,nd->n", block, block, dtype=np.float64)
            for row in np.flatnonzero(~np.isfinite(square) | (square == 0)).tolist():
                found[start + row] = _describe_bad(block[row])
        if len(found) > MOST_BAD * len(vectors):
            row, what = next(iter(found.items()))
            raise DataError(
                f"view {name}: {len(found)} of {len(vectors)} vectors cannot be used; the first, "
                f"row {row + 1} of list.txt, {what}. Make the file again"
            )
        for row, what in found.items():
            bad.setdefault(row, f"its vector in view {name} {what}")
    return bad


def _describe_bad(vector: np.ndarray) -> str:
    if np.isnan(vector).all():
        return "is missing, or all NaN"
    return "holds NaN or infinity" if vector.any() else "is all zeros"


def check_dimensions(dims: Iterable[tuple[str, str, int]]) -> None:
    """Refuse a model whose dimension differs between splits; rows of (split, model, dimension)."""
    first: dict[str, tuple[str, int]] = {}
    for split, model, dimension in dims:
        other, known = first.setdefault(model, (split, dimension))
        if known != dimension:
            raise DataError(
                f"view {model}: {known} numbers a vector in the {other} split, {dimension} in the "
                f"{split} one. Both must come from one model; check the files, or name their "
                "dimension (`dims` in the manifest)"
            )
