"""Rows times a matrix, with the same bits for a row wherever it stands among others.

The contract:
- Scores must not depend on how pairs are dealt to blocks and threads. BLAS rounds rows of one
  product in different ways on some processors (OpenBLAS without AVX-512: the first rows of a tile
  are not summed as its last ones), and alike on others.
- `rounds_alike` tries BLAS on products of the shape that is needed. Where it fails, `multiply_rows`
  is used: it sums the inputs of every row in their order, at about half the speed.

Source: ours.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba
import numpy as np

_TRIED = 8
"""Rows that BLAS is tried with."""


@numba.njit(nogil=True, cache=True, fastmath={"contract", "nsz"})
def multiply_rows(x: Any, weight: Any, out: Any) -> None:  # pragma: no cover
    """x (rows, width) times weight (width, columns) into out, all float32; an even number of rows.

    Two rows and four inputs at a time, so that what is loaded is used more than once.
    """
    width, columns = weight.shape
    whole = width - width % 4
    for m in range(0, len(x), 2):
        out[m : m + 2] = np.float32(0)
        for i in range(0, whole, 4):
            a_0, a_1, a_2, a_3 = x[m, i], x[m, i + 1], x[m, i + 2], x[m, i + 3]
            b_0, b_1, b_2, b_3 = x[m + 1, i], x[m + 1, i + 1], x[m + 1, i + 2], x[m + 1, i + 3]
            for j in range(columns):
                w_0, w_1 = weight[i, j], weight[i + 1, j]
                w_2, w_3 = weight[i + 2, j], weight[i + 3, j]
                one, other = out[m, j], out[m + 1, j]
                one += a_0 * w_0
                one += a_1 * w_1
                one += a_2 * w_2
                one += a_3 * w_3
                other += b_0 * w_0
                other += b_1 * w_1
                other += b_2 * w_2
                other += b_3 * w_3
                out[m, j], out[m + 1, j] = one, other
        for i in range(whole, width):
            for j in range(columns):
                out[m, j] += x[m, i] * weight[i, j]
                out[m + 1, j] += x[m + 1, i] * weight[i, j]


@numba.njit(nogil=True, cache=True)
def multiply(x: Any, weight: Any, by_blas: bool, out: Any) -> None:  # pragma: no cover
    """x times weight into out: by BLAS, or by `multiply_rows`."""
    if by_blas:
        np.dot(x, weight, out)
    else:
        multiply_rows(x, weight, out)


@cache
def rounds_alike(rows: int, width: int, columns: int) -> bool:
    """Whether BLAS gives a row the same bits at all places of a (rows, width) float32 matrix.

    columns : of the (width, columns) matrix that it is multiplied with. To be asked under the
    limit of threads that holds for the products.
    """
    random = np.random.default_rng(0)
    weight = random.normal(size=(width, columns)).astype(np.float32)
    out = np.empty((rows, columns), np.float32)
    for row in random.normal(size=(_TRIED, width)).astype(np.float32):
        multiply(np.tile(row, (rows, 1)), weight, True, out)
        if not (out == out[0]).all():
            return False
    return True
