"""Two samples compared measure by measure: how far a labelled set and a pile lie apart.

The contract:
- Enters: one row of measures an image, of either set. Leaves: the median of each measure in either
  set, and the difference of the means in deviations.
- No label is read. Empty sets cannot be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError

_LEAST_DEVIATION = 1e-6


@dataclass(frozen=True)
class MeasureShift:
    """One measure in two sets.

    measure : its name. labelled, pile : the medians. shift : the labelled mean less the pile's, in
        pooled standard deviations (Cohen's d).
    """

    measure: str
    labelled: float
    pile: float
    shift: float


def compare_samples(
    measures: Sequence[str], labelled: np.ndarray, pile: np.ndarray
) -> tuple[MeasureShift, ...]:
    """The shift of each measure between two sets.

    Source: Cohen, *Statistical power analysis for the behavioral sciences*, 1988: .2 is a small
    difference of means in pooled deviations, .5 a medium one, .8 a large one.

    Parameters
    ----------
    measures : the names of the columns.
    labelled : (l, f) float, l >= 1
    pile : (p, f) float, p >= 1

    Raises
    ------
    DataError
        An empty set, or columns that do not fit the names.
    """
    sides = [np.asarray(side, np.float64) for side in (labelled, pile)]
    for name, side in zip(("labelled", "pile"), sides, strict=True):
        if side.ndim != 2 or side.shape[1] != len(measures) or not len(side):
            raise DataError(
                f"{name}: (rows, {len(measures)}) measures of one row or more expected, "
                f"got {side.shape}"
            )
    one, other = sides
    pooled = np.sqrt((one.var(0) + other.var(0)) / 2)
    shift = (one.mean(0) - other.mean(0)) / np.maximum(pooled, _LEAST_DEVIATION)
    rows = zip(measures, np.median(one, 0), np.median(other, 0), shift, strict=True)
    return tuple(MeasureShift(name, float(a), float(b), float(d)) for name, a, b, d in rows)
