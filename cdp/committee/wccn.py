"""Within-class covariance normalisation (WCCN) of the concatenated views.

The views of an image are joined into one vector and reduced to their principal axes. The
covariance within identities, estimated on the labelled rows, is noise: in small images blur, size
and pose dominate it. After whitening by it the cosine of two images separates identities better,
the more so the weaker the view (average precision of candidate pairs at 16 px, one weak network:
.28 before, .65 after). The cosine is one more feature of a pair (`wccn_cosine`, see
`cdp.committee.features`).

The contract:
- Enters: the views of labelled rows and their identities; unlabelled rows may join the estimate of
  the principal axes. Leaves: a `Wccn`, which maps rows of the same views to coordinates and pairs
  of rows to cosines.
- A covariance fitted on an identity makes its own pairs look more alike than those of a new
  identity. So identities are dealt into folds, and a labelled row is whitened by a covariance
  fitted without its fold.
- One view is held at a time; beside it stand `AXES` float32 a row. The same bits whatever the
  number of threads.

Source: within-class covariance normalisation (Hatch et al. 2006), shrunk towards a sphere, after
principal axes. Fitting it by folds for a pair feature is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cdp.arrays.cosine import make_unit, measure_pairs
from cdp.arrays.principal_axes import find_axes, sample_rows
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import BLOCK, count_threads, limit_blas, list_blocks
from cdp.errors import DataError
from cdp.types import PairTable, View, load_view

AXES = 128
"""Coordinates of a row; fewer where all views together have fewer dimensions."""
FOLDS = 5
_SHRINKAGE = 0.5
"""Weight of the sphere in the covariance within identities."""


@dataclass(frozen=True)
class Wccn:
    """A fitted normalisation: views to coordinates, coordinates to whitened rows and cosines.

    offset : (p,) float32. axes : one (d_v, p) float32 a view. A row's coordinates are the sum over
        the views of its unit vectors times the axes, less the offset.
    whitening : (folds + 1, p, p) float32; number f is fitted without the identities of fold f, the
        last on all.
    """

    offset: np.ndarray
    axes: tuple[np.ndarray, ...]
    whitening: np.ndarray

    def project(self, views: Sequence[View], *, threads: int | None = None) -> np.ndarray:
        """The coordinates of all rows.

        Parameters
        ----------
        views : one (n, d_v) array a model, or a function that loads it, as in the fit.
        threads : at most so many; None: all cores. Never changes the result.

        Returns
        -------
        (n, p) float32, mapped from a temporary file where it is large.

        Raises
        ------
        DataError
            Other views than those of the fit, or a bad vector.
        """
        if len(views) != len(self.axes):
            raise DataError(f"expected {len(self.axes)} views, got {len(views)}")
        out: np.ndarray | None = None
        for number, (view, axes) in enumerate(zip(views, self.axes, strict=True)):
            unit, _ = make_unit(load_view(view))
            if unit.shape[1] != len(axes) or (out is not None and len(unit) != len(out)):
                rows = len(unit) if out is None else len(out)
                raise DataError(
                    f"view {number} must have shape {(rows, len(axes))}, got {unit.shape}"
                )
            if out is None:
                out = allocate((len(unit), len(self.offset)))
                out[:] = -self.offset
            _add_product(unit, axes, out, count_threads(threads))
        assert out is not None
        return out

    def whiten(
        self, coordinates: np.ndarray, number: int = -1, *, threads: int | None = None
    ) -> np.ndarray:
        """Whiten rows: the covariance within identities becomes (nearly) a sphere.

        Parameters
        ----------
        coordinates : (n, p) float32, from `project`.
        number : the fold left out of the fit; -1: none.

        Returns
        -------
        (n, p) float32 of unit length, mapped where it is large; a row at the centre stays zero.
        """
        rows = allocate(coordinates.shape)
        rows[:] = 0
        _add_product(coordinates, self.whitening[number], rows, count_threads(threads))
        for part in list_blocks(0, len(rows), 4 * BLOCK):
            length = np.sqrt(np.einsum("ij,ij->i", rows[part], rows[part], dtype=np.float64))
            rows[part] /= np.maximum(length, 1e-12)[:, None].astype(np.float32)
        return rows

    def measure(
        self,
        coordinates: np.ndarray,
        pairs: PairTable,
        fold: np.ndarray,
        *,
        threads: int | None = None,
    ) -> np.ndarray:
        """The cosine of each labelled pair after whitening fitted without its identities.

        Parameters
        ----------
        coordinates : (n, p) float32, from `project`.
        pairs : of their rows.
        fold : (n,) int, the fold of each row's identity, -1 for a row outside the fit. A pair of
            two folds gets the mean of the cosines without either.

        Returns
        -------
        (m,) float32 in [-1, 1].
        """
        found = np.zeros(len(pairs), np.float32)
        one, other = fold[pairs.source], fold[pairs.target]
        left_out = np.stack([np.where(one < 0, other, one), np.where(other < 0, one, other)])
        left_out[left_out < 0] = len(self.whitening) - 1
        for number in range(len(self.whitening)):
            weight = (left_out == number).mean(0, dtype=np.float32)
            chosen = np.flatnonzero(weight)
            if len(chosen):
                rows = self.whiten(coordinates, number, threads=threads)
                few = pairs.take(chosen)
                found[chosen] += weight[chosen] * measure_cosines(rows, few, threads=threads)
        return found

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        axes = {f"axes_{number}": each for number, each in enumerate(self.axes)}
        return {**axes, "offset": self.offset, "whitening": self.whitening}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Wccn:
        """The inverse of `state`.

        Raises
        ------
        DataError
            Something is missing: the arrays are not those of a `Wccn`.
        """
        lacking = [name for name in ("axes_0", "offset", "whitening") if name not in state]
        if lacking:
            raise DataError(f"expected the state of a Wccn, but it lacks {', '.join(lacking)}")
        count = sum(name.startswith("axes_") for name in state)
        axes = tuple(state[f"axes_{number}"] for number in range(count))
        return cls(state["offset"], axes, state["whitening"])


def measure_cosines(rows: np.ndarray, pairs: PairTable, *, threads: int | None = 1) -> np.ndarray:
    """The cosine of each pair: (m,) float32 in [-1, 1]; `rows` (n, p) float32 of length 1 or 0."""
    found = np.empty(len(pairs), np.float32)
    return measure_pairs(rows, pairs.source, pairs.target, found, count_threads(threads))


def fit_wccn(
    views: Sequence[View],
    identity: np.ndarray,
    *,
    around: Sequence[View] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Wccn, np.ndarray]:
    """Estimate principal axes and the covariance within identities.

    Parameters
    ----------
    views : one (n, d_v) array a model over the labelled rows, or a function that loads it.
    identity : (n,) integers.
    around : the same models over labelled and unlabelled rows, for the principal axes; None: the
        labelled rows alone.
    seed : deals identities into folds.
    threads : at most so many; None: all cores. Never changes the result.

    Returns
    -------
    Wccn
    fold : (n,) int64, the fold of each row's identity, for `Wccn.measure`.

    Raises
    ------
    DataError
        A bad vector, or views of different lengths.
    """
    offset, axes = _find_axes(around or views)
    known, number = np.unique(identity, return_inverse=True)
    folds = min(FOLDS, max(len(known), 1))
    random = np.random.default_rng([seed, 0x64697363])
    fold = (random.permutation(len(known)) % folds)[number]
    blank = np.zeros((1, len(offset), len(offset)), np.float32)
    found = Wccn(offset, axes, blank)
    coordinates = np.asarray(found.project(views, threads=threads))
    with limit_blas():
        scatter = np.stack(
            [_scatter_within(coordinates[fold == each], number[fold == each])
             for each in range(folds)]
        )  # fmt: skip
        degrees = np.array(
            [(fold == each).sum() - len(np.unique(number[fold == each])) for each in range(folds)]
        )
        whitening = [
            _whiten(scatter.sum(0) - scatter[each], int(degrees.sum() - degrees[each]))
            for each in range(folds)
        ]
        whitening.append(_whiten(scatter.sum(0), int(degrees.sum())))
    return Wccn(offset, axes, np.stack(whitening)), fold


def _find_axes(views: Sequence[View]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The principal axes of the concatenated views, each view first reduced to its own axes."""
    means, bases, reduced = [], [], []
    for view in views:
        unit, _ = make_unit(sample_rows(load_view(view)))
        with limit_blas():
            mean = unit.mean(0, dtype=np.float64)
            centred = unit - mean.astype(np.float32)
            basis = _list_axes(centred)
            reduced.append(centred @ basis)
        means.append(mean)
        bases.append(basis)
    if len({len(each) for each in reduced}) > 1:
        raise DataError(f"all views must show the same rows, got {[len(each) for each in reduced]}")
    with limit_blas():
        joint = _list_axes(np.concatenate(reduced, axis=1))
        axes, row = [], 0
        for basis in bases:
            axes.append(np.ascontiguousarray(basis @ joint[row : row + basis.shape[1]]))
            row += basis.shape[1]
        offset = sum(mean @ each for mean, each in zip(means, axes, strict=True))
    return np.asarray(offset, np.float32), tuple(axes)


def _list_axes(centred: np.ndarray) -> np.ndarray:
    """(d, p) float32, the strongest axes first, each with its largest entry positive."""
    axes = find_axes(centred)[:, :AXES]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    return np.ascontiguousarray(axes * np.where(largest < 0, -1, 1), np.float32)


def _scatter_within(coordinates: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """(p, p) float64, the scatter matrix of the rows about the mean of their identity."""
    width = coordinates.shape[1]
    if not len(coordinates):
        return np.zeros((width, width))
    _, group = np.unique(identity, return_inverse=True)
    mean = np.zeros((int(group.max()) + 1, width))
    np.add.at(mean, group, coordinates)
    mean /= np.bincount(group)[:, None]
    rest = coordinates - mean[group]
    return rest.T @ rest


def _whiten(scatter: np.ndarray, degrees: int) -> np.ndarray:
    """(p, p) float32, a root of the inverse of the shrunk covariance within identities."""
    width = len(scatter)
    within = scatter / max(degrees, 1)
    spread = np.trace(within) / width
    if spread <= 0:  # no identity has two images, so there is no covariance to estimate
        return np.eye(width, dtype=np.float32)
    sphere = np.eye(width)
    within = (1 - _SHRINKAGE) * within / spread + _SHRINKAGE * sphere
    return np.linalg.cholesky(np.linalg.inv(within)).astype(np.float32)


def _add_product(left: np.ndarray, right: np.ndarray, out: np.ndarray, workers: int) -> None:
    """out += left @ right, block by block, so that threads do not change the bits."""

    def work(rows: slice) -> None:
        out[rows] += left[rows] @ right

    with limit_blas(), ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, list_blocks(0, len(left), 4 * BLOCK)))
