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
from typing import Any

import numpy as np
from sklearn.utils import check_array

from cdp.errors import DataError
from cdp.mediator.training_set import DegradedCopies, take_rows
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
    elif len(views) and all(not callable(view) and np.ndim(view) == 1 for view in views):
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


def _read_array(view: Any, name: str) -> np.ndarray:
    """One view as an array of floats, not copied where it is one; its values are checked later."""
    if hasattr(view, "detach"):  # a tensor, maybe on a GPU or with gradients
        view = view.detach().cpu().numpy()
    try:
        array: np.ndarray = check_array(
            view, dtype=(np.float64, np.float32, np.float16), ensure_all_finite=False
        )
    except ValueError as error:
        raise DataError(f"{name} must be an (n, d) array or a list of such: {error}") from error
    return array


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
    """The identities in sorted order, and that of each row as (count,) int64."""
    ids = np.asarray(labelled_ids)
    kinds = {type(each) for each in ids.ravel()} if ids.dtype.kind == "O" else set()
    if ids.shape != (count,) or ids.dtype.kind not in "iuUTO" or not kinds <= {str}:
        raise DataError(
            f"labelled_ids must be {count} integers or {count} strings, one a labelled row, got "
            f"shape {ids.shape} of {ids.dtype}"
        )
    names, number = np.unique(ids, return_inverse=True)
    return names, number.astype(np.int64)


def keep_rows(view: View, rows: np.ndarray) -> View:
    """`take_rows`, when the view is loaded if it is given as a function."""
    return partial(take_rows, view, rows) if callable(view) else take_rows(view, rows)
