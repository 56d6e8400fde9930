"""All views of an image as one vector, in directions that tell labelled people apart.

A network trained on large sharp faces spends much of its vector on what changes between two images
of a person seen from afar: blur, size, pose. Labelled people show these directions: what differs
within a person is noise. Divided by its spread, the cosine of two images says more, the more so the
weaker the view (average precision of candidate pairs at 16 px, on one poor network: .28 before, .65
after). The mediator gets this cosine as one more input.

The contract:
- Enters: the views of labelled rows and who they show; unlabelled rows beside them say where the
  whole set spreads. Leaves: a `Wccn`, which takes any rows of the same views to
  coordinates, and pairs of rows to cosines.
- Noise learnt from a person makes that person look more alike than strangers will. So people are
  dealt into folds, and a labelled row is compared by what the other folds taught.
- One view is looked at at a time; beside it stand `AXES` float32 a row. The same bits whatever the
  number of threads.

Source: within-class covariance normalisation (Hatch et al. 2006), shrunk towards a sphere, after
principal axes. Giving it to the mediator by folds is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import BLOCK, count_threads, limit_blas, list_blocks
from cdp.errors import DataError
from cdp.types import PairTable

View = np.ndarray | Callable[[], np.ndarray]

AXES = 128
"""Coordinates of a row; fewer where all views together have fewer dimensions."""
FOLDS = 5
_SHRINKAGE = 0.5
_SAMPLE = 16384


@dataclass(frozen=True)
class Wccn:
    """Views to coordinates, and coordinates to cosines.

    offset : (p,) float32. axes : one (d_v, p) float32 a view. A row's coordinates are the sum over
        the views of its unit vectors times the axes, less the offset.
    whitening : (folds + 1, p, p) float32; number f learnt nothing of the people of fold f, the last
        learnt of all.
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
            unit, _ = make_unit(view() if callable(view) else view)
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
        """Rows in which what differs within a person spreads alike in all directions.

        Parameters
        ----------
        coordinates : (n, p) float32, from `project`.
        number : the fold whose people have taught nothing; -1: all have.

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
        """The cosine of each pair of evened-out rows, by what other people than theirs taught.

        Parameters
        ----------
        coordinates : (n, p) float32, from `project`.
        pairs : of their rows.
        fold : (n,) int, the fold of each labelled row's person, -1 for a row nobody learnt from. A
            pair of two folds gets the mean of what either leaves.

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
                found[chosen] += weight[chosen] * measure_cosines(rows, few)
        return found

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        axes = {f"wccn_axes_{number}": each for number, each in enumerate(self.axes)}
        return {
            **axes,
            "wccn_offset": self.offset,
            "wccn_whitening": self.whitening,
        }

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Wccn | None:
        """The inverse of `state`; None where the state holds no wccn."""
        if "wccn_offset" not in state:
            return None
        count = sum(name.startswith("wccn_axes_") for name in state)
        axes = tuple(state[f"wccn_axes_{number}"] for number in range(count))
        return cls(state["wccn_offset"], axes, state["wccn_whitening"])


def measure_cosines(rows: np.ndarray, pairs: PairTable) -> np.ndarray:
    """The cosine of each pair: (m,) float32 in [-1, 1]; `rows` (n, p) float32 of length 1 or 0."""
    found = np.empty(len(pairs), np.float32)
    for part in list_blocks(0, len(pairs), 64 * BLOCK):
        found[part] = np.einsum("ij,ij->i", rows[pairs.source[part]], rows[pairs.target[part]])
    return np.clip(found, -1, 1)


def fit_wccn(
    views: Sequence[View],
    identity: np.ndarray,
    *,
    around: Sequence[View] | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Wccn, np.ndarray]:
    """Learn the directions from labelled people.

    Parameters
    ----------
    views : one (n, d_v) array a model over the labelled rows, or a function that loads it.
    identity : (n,) integers.
    around : the same models over more rows, the unlabelled among them, for where the set spreads;
        None: the labelled rows alone.
    seed : deals people into folds.
    threads : at most so many; None: all cores. Never changes the result.

    Returns
    -------
    Wccn
    fold : (n,) int64, the fold of each row's person, for `Wccn.measure`.

    Raises
    ------
    DataError
        A bad vector, or views of different lengths.
    """
    offset, axes = _find_axes(around or views)
    people, person = np.unique(identity, return_inverse=True)
    folds = min(FOLDS, max(len(people), 1))
    random = np.random.default_rng([seed, 0x64697363])
    fold = (random.permutation(len(people)) % folds)[person]
    blank = np.zeros((1, len(offset), len(offset)), np.float32)
    found = Wccn(offset, axes, blank)
    coordinates = np.asarray(found.project(views, threads=threads))
    with limit_blas():
        scatter = np.stack(
            [_scatter_within(coordinates[fold == each], person[fold == each])
             for each in range(folds)]
        )  # fmt: skip
        degrees = np.array(
            [(fold == each).sum() - len(np.unique(person[fold == each])) for each in range(folds)]
        )
        whitening = [
            _whiten(scatter.sum(0) - scatter[each], int(degrees.sum() - degrees[each]))
            for each in range(folds)
        ]
        whitening.append(_whiten(scatter.sum(0), int(degrees.sum())))
    return Wccn(offset, axes, np.stack(whitening)), fold


def _find_axes(views: Sequence[View]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The principal axes of all views side by side, each view first cut to its own."""
    means, bases, reduced = [], [], []
    for view in views:
        loaded = view() if callable(view) else view
        unit, _ = make_unit(loaded[:: max(len(loaded) // _SAMPLE, 1)])
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
    moment = centred.T.astype(np.float64) @ centred.astype(np.float64)
    axes = np.linalg.eigh(moment)[1][:, ::-1][:, :AXES]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0)
    return np.ascontiguousarray(axes * np.where(largest < 0, -1, 1), np.float32)


def _scatter_within(coordinates: np.ndarray, person: np.ndarray) -> np.ndarray:
    """(p, p) float64, the sum over the rows of what differs from their person's mean."""
    width = coordinates.shape[1]
    if not len(coordinates):
        return np.zeros((width, width))
    _, group = np.unique(person, return_inverse=True)
    mean = np.zeros((int(group.max()) + 1, width))
    np.add.at(mean, group, coordinates)
    mean /= np.bincount(group)[:, None]
    rest = coordinates - mean[group]
    return rest.T @ rest


def _whiten(scatter: np.ndarray, degrees: int) -> np.ndarray:
    """(p, p) float32 that takes what differs within a person to equal spread in all directions."""
    width = len(scatter)
    within = scatter / max(degrees, 1)
    spread = np.trace(within) / width
    if spread <= 0:  # nobody has two images: nothing is known, all directions count alike
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
