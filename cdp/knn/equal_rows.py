"""Many images with one and the same vector: a picture without a face, or a failure of a model.

The contract:
- Enters: the views of a set. Leaves: a reason to look at the images, or "". Nothing is changed.
- Copies of a picture have equal vectors too. Which of both it is cannot be seen in vectors, so that
  no quality is stated where these images are many.

Source: ours. LFW, 49 of 1,189 rows with one vector: pairwise F .74, stated as .97 before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.arrays.threads import list_blocks
from cdp.types import View, load_view

EQUAL_ROWS = "nobody can judge the pairs of images that have one and the same vector"
"""Why no quality is stated where these images are many."""
LEAST_ROWS = 20
"""Fewer equal rows are not mentioned,"""
LEAST_SHARE = 0.01
"""nor a smaller share of the set."""


def find_equal_rows(view: View) -> np.ndarray:
    """The rows of the largest group of equal rows, ascending int64; empty if it is not large.

    view : (n, d) float, or a function that loads it.
    """
    rows = load_view(view)
    mark = np.random.default_rng(0).normal(size=rows.shape[1])
    total = np.empty(len(rows))
    for part in list_blocks(0, len(rows)):
        total[part] = np.einsum("ij,j->i", np.asarray(rows[part], np.float64), mark)
    number, size = np.unique(total, return_inverse=True, return_counts=True)[1:]
    if not len(size) or size.max() < max(LEAST_ROWS, LEAST_SHARE * len(rows)):
        return np.empty(0, np.int64)
    return np.flatnonzero(number == size.argmax())


def describe_equal_rows(
    views: Sequence[View], names: Sequence[str], kind: str, ids: np.ndarray | None = None
) -> str:
    """Which images have one and the same vector, and what that may mean; "" where few do.

    Parameters
    ----------
    views : one a model. names : of the models. kind : what a row is called, such as "images".
    ids : (n,) sample ids of the rows; None: a row is named by its number.
    """
    for name, view in zip(names, views, strict=True):
        equal = find_equal_rows(view)
        if len(equal):
            first = f"row {equal[0]}" if ids is None else f"sample_id {ids[equal[0]]}"
            return (
                f"{len(equal):,} {kind} have one and the same vector in {name} (the first is "
                f"{first}): they are copies of one picture, or the model was shown no face. "
                "Look at them, and leave them out unless they are copies"
            )
    return ""
