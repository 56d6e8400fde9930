"""Features of a pair among its neighbouring pairs, for the second stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from cdp.arrays.cosine import make_unit
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import count_threads
from cdp.errors import DataError
from cdp.mediator.ensemble import Mediator
from cdp.types import PairTable

View = np.ndarray | Callable[[], np.ndarray]
FRIENDS = 5
"""An image is averaged with at most so many others: the surest ones."""
_EVIDENCE_LIMIT = 12.0
_BLOCK = 1 << 16
_PART = 16 * _BLOCK
PAIR_FEATURES = (
    "log_odds",
    "log_odds_below_weaker_best",
    "log_odds_below_stronger_best",
    "agreement_high",
    "agreement_low",
    "agreement_both",
    "friends_evidence_low",
    "friends_evidence_high",
    "best_path",
)


def name_neighbourhood(view_count: int) -> list[str]:
    """The columns of `describe_neighbourhood`, in order.

    For a pair (a, b) of probability p and log-odds z, and the images c that are candidates of both:
    z; z minus the weaker and the stronger of the best log-odds that a and b have with anybody;
    the share of the probability a (b) gives to the shared candidates that b (a) gives too (higher
    and lower of the two, and over their union); the mean log-odds between a and b's friends, and
    between b and a's (lower, higher); the strongest two-step path a - c - b (its weaker step).
    Then for each view the cosine between a and b, each averaged with its surest friends.
    """
    return [*PAIR_FEATURES, *(f"expanded_affinity_{view}" for view in range(view_count))]


def describe_neighbourhood(
    views: Sequence[View],
    pairs: PairTable,
    probability: np.ndarray,
    count: int,
    *,
    threads: int | None = None,
) -> np.ndarray:
    """Describe each pair by the other pairs around it.

    Parameters
    ----------
    views : one (count, d_v) array a model, or a function that loads it.
    pairs : the candidate pairs, all of them: they are each other's surroundings.
    probability : (m,) float in [0, 1].
    count : number of rows.
    threads : at most so many; None: all cores. Never changes the result.

    Returns
    -------
    (m, 9 + views) float32, columns as in `name_neighbourhood`.

    Raises
    ------
    DataError
        Lengths that differ, a probability outside [0, 1], or a bad vector.
    """
    value = check_probability(pairs, probability)
    around = Neighbourhood(views, pairs, value, count, count_threads(threads))
    out = np.empty((len(pairs), len(PAIR_FEATURES) + len(views)), np.float32)
    around.describe(slice(0, len(pairs)), out)
    return out


def check_probability(pairs: PairTable, probability: np.ndarray) -> np.ndarray:
    value = np.asarray(probability, np.float64)
    if value.shape != (len(pairs),):
        raise DataError(f"expected one probability a pair, got {len(pairs)} pairs, {value.shape}")
    if len(value) and not (value.min() >= 0 and value.max() <= 1):
        raise DataError(
            f"probabilities must lie in [0, 1], got [{value.min()}, {value.max()}] (NaN counts as "
            "outside)"
        )
    return value


class Neighbourhood:
    """What is known around each pair, for describing any part of the pairs.

    The cosines between averaged images are measured for all pairs at once, a view at a time; the
    rest is read off the neighbour lists block by block.
    """

    def __init__(
        self,
        views: Sequence[View],
        pairs: PairTable,
        value: np.ndarray,
        count: int,
        workers: int,
    ) -> None:
        self.pairs, self.value, self.workers = pairs, value, workers
        clipped = np.clip(value, 1e-6, 1 - 1e-6)
        odds = np.log(clipped) - np.log1p(-clipped)
        self.evidence = np.clip(odds, -_EVIDENCE_LIMIT, _EVIDENCE_LIMIT)
        self.best = np.full(count, -_EVIDENCE_LIMIT)
        np.maximum.at(self.best, pairs.source, self.evidence)
        np.maximum.at(self.best, pairs.target, self.evidence)
        integer = np.int32 if max(2 * len(pairs), count) < 2**31 else np.int64
        self.other, self.edge = (np.empty(2 * len(pairs), integer) for _ in range(2))
        self.start = _list_neighbours(pairs.source, pairs.target, count, self.other, self.edge)
        friend, weight = _choose_friends(self.start, self.other, self.edge, value, count)
        self.affinity = allocate((len(views), len(pairs)))
        for at, view in enumerate(views):
            unit, _ = make_unit(view() if callable(view) else view)
            if len(unit) != count:
                raise DataError(f"view {at} has {len(unit)} rows, expected {count}")
            expanded = np.empty_like(unit)
            _expand(unit, friend, weight, expanded)
            column = self.affinity[at]

            def measure(
                rows: slice, expanded: np.ndarray = expanded, column: np.ndarray = column
            ) -> None:
                _multiply(expanded, pairs.source[rows], pairs.target[rows], column[rows])

            self._share(measure, slice(0, len(pairs)))

    def describe(self, part: slice, out: np.ndarray) -> None:
        """Fill `out`, (rows of the part, columns) float32."""
        source, target = self.pairs.source, self.pairs.target

        def work(rows: slice) -> None:
            place = slice(rows.start - part.start, rows.stop - part.start)
            _describe(
                source[rows],
                target[rows],
                self.evidence[rows],
                self.start,
                self.other,
                self.edge,
                self.value,
                self.evidence,
                self.best,
                out[place],
            )
            out[place, len(PAIR_FEATURES) :] = self.affinity[:, rows].T

        self._share(work, part)

    def describe_parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All pairs, part by part; the next part is written over the last."""
        count = len(self.pairs)
        block = np.empty((min(_PART, count), len(PAIR_FEATURES) + len(self.affinity)), np.float32)
        for low in range(0, count, _PART):
            part = slice(low, min(low + _PART, count))
            described = block[: part.stop - part.start]
            self.describe(part, described)
            yield part, described

    def score(self, mediator: Mediator) -> np.ndarray:
        """What the mediator says of all pairs, (m,) float32."""
        score = np.empty(len(self.pairs), np.float32)
        for part, described in self.describe_parts():
            score[part] = mediator.score(described, threads=self.workers)
        return score

    def _share(self, work: Callable[[slice], None], part: slice) -> None:
        starts = range(part.start, part.stop, _BLOCK)
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(work, [slice(at, min(at + _BLOCK, part.stop)) for at in starts]))


@njit(cache=True, nogil=True)
def _list_neighbours(source, target, count, other, edge):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Candidates of each row in ascending order, and the pair each comes from; where they start."""
    start = np.zeros(count + 1, np.int64)
    for e in range(len(source)):
        start[source[e] + 1] += 1
        start[target[e] + 1] += 1
    start = np.cumsum(start)
    free = start[:-1].copy()
    # pairs are sorted by source, so the smaller candidates of a row come in order, then the larger
    for e in range(len(source)):
        row = target[e]
        other[free[row]], edge[free[row]] = source[e], e
        free[row] += 1
    for e in range(len(source)):
        row = source[e]
        other[free[row]], edge[free[row]] = target[e], e
        free[row] += 1
    return start


@njit(cache=True, nogil=True)
def _describe(  # type: ignore[no-untyped-def]  # pragma: no cover
    source, target, own, start, other, edge, value, evidence, best, out
):
    for e in range(len(source)):
        a, b, z = source[e], target[e], own[e]
        i, j = start[a], start[b]
        agreed = given_a = given_b = friends_a = friends_b = 0.0
        path = -15.0
        while i < start[a + 1] and j < start[b + 1]:
            if other[i] < other[j]:
                i += 1
            elif other[i] > other[j]:
                j += 1
            else:
                x, y = edge[i], edge[j]
                agreed += value[x] * value[y]
                given_a += value[x]
                given_b += value[y]
                friends_a += value[y] * evidence[x]
                friends_b += value[x] * evidence[y]
                path = max(path, min(evidence[x], evidence[y]))
                i += 1
                j += 1
        to_a, to_b = friends_a / (given_b + 0.5), friends_b / (given_a + 0.5)
        out[e, 0] = z
        out[e, 1] = z - min(best[a], best[b])
        out[e, 2] = z - max(best[a], best[b])
        out[e, 3] = agreed / (min(given_a, given_b) + 0.5)
        out[e, 4] = agreed / (max(given_a, given_b) + 0.5)
        out[e, 5] = agreed / (given_a + given_b - agreed + 0.5)
        out[e, 6] = min(to_a, to_b)
        out[e, 7] = max(to_a, to_b)
        out[e, 8] = path


@njit(cache=True, nogil=True)
def _choose_friends(start, other, edge, value, count):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The surest candidates of each row (ties: the smaller row), weighted by probability."""
    friend = np.full((count, FRIENDS), -1, np.int64)
    weight = np.zeros((count, FRIENDS), np.float32)
    for row in range(count):
        for i in range(start[row], start[row + 1]):
            sure = np.float32(value[edge[i]])
            place = FRIENDS - 1
            if sure <= weight[row, place]:
                continue
            while place > 0 and sure > weight[row, place - 1]:
                weight[row, place] = weight[row, place - 1]
                friend[row, place] = friend[row, place - 1]
                place -= 1
            weight[row, place] = sure
            friend[row, place] = other[i]
    return friend, weight


@njit(cache=True, nogil=True)
def _expand(unit, friend, weight, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for row in range(len(unit)):
        out[row] = unit[row]
        for f in range(friend.shape[1]):
            if friend[row, f] >= 0:
                for axis in range(unit.shape[1]):
                    out[row, axis] += weight[row, f] * unit[friend[row, f], axis]
        norm = 0.0
        for axis in range(unit.shape[1]):
            norm += np.float64(out[row, axis]) ** 2
        if norm > 0:
            scale = np.float32(1 / np.sqrt(norm))
            for axis in range(unit.shape[1]):
                out[row, axis] *= scale


@njit(cache=True, nogil=True)
def _multiply(unit, source, target, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for e in range(len(source)):
        total = np.float64(0)
        for axis in range(unit.shape[1]):
            total += unit[source[e], axis] * unit[target[e], axis]
        out[e] = total
