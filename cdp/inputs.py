"""What is given to an estimator, checked: views, labels, degraded copies.

The contract:
- Enters: arrays, DataFrames or tensors of any width, float16/32/64 or integers, memory-mapped or
  not, or functions that load them. Leaves: a list of views, the base first; identities as numbers.
- Wrong shapes and counts raise a `DataError` that names the parameter; values are checked later,
  row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
from sklearn.utils import check_array

from cdp.errors import DataError
from cdp.mediator.training_set import DegradedCopies, take_rows
from cdp.parameters import is_number
from cdp.types import View, load_view

Views = Any
"""(n, d) array, DataFrame, tensor or Series of vectors; or a sequence or dict of such, or of
functions that load them."""


def read_views(views: Views, name: str) -> list[View]:
    """The views as a list, base first, checked as far as possible without loading any."""
    if len(getattr(views, "shape", ())) == 2:  # an array, a DataFrame, a tensor, a sparse matrix
        listed = [views]
    elif isinstance(views, Mapping):  # the views by the name of their model, base first
        listed = list(views.values())
    elif len(views) and all(not callable(view) and _count_axes(view) == 1 for view in views):
        listed = [list(views)]  # rows: a list or a Series of vectors
    else:
        listed = list(views)
    if not listed:
        raise DataError(f"{name} must hold at least one (n, d) array, got none")
    read = [view if callable(view) else _read_array(view, name) for view in listed]
    counts = [len(view) for view in read if not callable(view)]
    if len(set(counts)) > 1:
        raise DataError(f"all {name} must show the same rows, got {counts} rows")
    return read


def _count_axes(view: Any) -> int:
    try:
        return np.ndim(view)
    except ValueError:  # rows of several lengths
        return 2


def _read_array(view: Any, name: str) -> np.ndarray:
    """One view as an array of floats, not copied where it is one; its values are checked later."""
    if hasattr(view, "detach"):  # a tensor, maybe on a GPU or with gradients
        view = view.detach().cpu().numpy()
    try:
        array: np.ndarray = check_array(
            view, dtype=(np.float64, np.float32, np.float16), ensure_all_finite=False
        )
    except ValueError as error:
        lines = str(error).splitlines()  # all but the first and the advice may hold the array
        reason = ". ".join([lines[0].rstrip(":"), *(t for t in lines if t.startswith("Reshape"))])
        raise DataError(
            f"{name} must be an (n, d) array of real numbers or a list of such, got "
            f"{_describe_array(view)}: {reason}"
        ) from error
    return array


def _describe_array(view: Any) -> str:
    """The type and shape of what is no view."""
    try:
        array = np.asarray(view)
    except ValueError:  # rows of several lengths
        return f"a {type(view).__name__} of rows that differ in length"
    return f"{array.dtype} of shape {array.shape}"


def name_views(views: Sequence[Any]) -> list[str]:
    """What messages call the views, by their number."""
    return [f"view {number}" for number in range(len(views))]


def read_copies(views: Views | None, of: Any, labelled_ids: Any) -> DegradedCopies | None:
    """The degraded copies that are given, checked; None without."""
    if (views is None) != (of is None):
        raise DataError("degraded_views and degraded_of belong together: give both, or neither")
    if views is None:
        return None
    if labelled_ids is None:
        raise DataError("degraded_views are copies of labelled_views: give these too")
    copies, row = read_views(views, "degraded_views"), np.asarray(of)
    count = len(load_view(copies[0]))
    if row.shape != (count,) or row.dtype.kind not in "iu":
        raise DataError(
            f"degraded_of must be {count} integers, one a degraded row, got shape {row.shape} of "
            f"{row.dtype}"
        )
    if count and not 0 <= row.min() <= row.max() < len(labelled_ids):
        raise DataError(
            f"degraded_of names rows of labelled_views, 0 to {len(labelled_ids) - 1}, got "
            f"{row.min()} to {row.max()}"
        )
    return DegradedCopies(copies, row.astype(np.int64)) if count else None


def check_models(
    labelled: Sequence[View], views: Sequence[View], name: str = "labelled_views"
) -> None:
    """Raise a `DataError` where two sets of views cannot be of the same models."""
    if len(labelled) != len(views):
        raise DataError(
            f"{name} must come from the same models as views, got {len(labelled)} views "
            f"for {len(views)}"
        )
    for number, (one, other) in enumerate(zip(labelled, views, strict=True)):
        if not (callable(one) or callable(other)) and one.shape[1] != other.shape[1]:
            raise DataError(
                f"view {number} has {one.shape[1]} dimensions in {name} and {other.shape[1]} "
                "unlabelled: they are not of one model"
            )


def number_identities(labelled_ids: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The identities in sorted order, and that of each row as (count,) int64.

    Floats that are whole numbers are integers. A row without identity is a `DataError`.
    """
    # numpy makes the text "nan" of a NaN that lies in a list of strings.
    kind = object if isinstance(labelled_ids, list | tuple) else None
    ids = np.asarray(labelled_ids, kind)
    expected = f"labelled_ids must be {count} integers or {count} strings, one a labelled row"
    if ids.shape != (count,) or ids.dtype.kind not in "fiuUTO":
        raise DataError(f"{expected}, got shape {ids.shape} of {ids.dtype}")
    if ids.dtype.kind in "fO":
        missing = np.flatnonzero(pd.isna(ids))
        if len(missing):
            raise DataError(
                f"{expected}; row {missing[0]} is {ids[missing[0]]!r}, no identity ({len(missing)} "
                "such rows). Leave these rows out of labelled_views and labelled_ids; in views "
                "they are clustered"
            )
        ids = _read_objects(ids, expected)
    names, number = np.unique(ids, return_inverse=True)
    return names, number.astype(np.int64)


def _read_objects(ids: np.ndarray, expected: str) -> np.ndarray:
    """(n,) floats or objects, none missing, as strings or as integers."""
    given = ids.tolist()
    if not given or all(isinstance(each, str) for each in given):
        return ids
    for row, each in enumerate(given):
        if not (is_number(each) and each == each // 1 and abs(each) <= _find_largest(each)):
            mixed = ", and others are numbers" if isinstance(each, str) else ""
            raise DataError(f"{expected}; row {row} is {each!r}{mixed}")
    return np.array([int(each) for each in given], np.int64)


def _find_largest(number: Any) -> int:
    """The largest identity: beyond 2**53 a float does not hold every whole number."""
    return 2**63 - 1 if isinstance(number, Integral) else 2**53


def keep_rows(view: View, rows: np.ndarray) -> View:
    """`take_rows`, when the view is loaded if it is given as a function."""
    return partial(take_rows, view, rows) if callable(view) else take_rows(view, rows)
