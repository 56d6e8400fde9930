"""Features of a pair from the scores of neighbouring pairs, the input of the second stage.

The contract:
- Enters: the views, all candidate pairs and a probability a pair. Leaves: (m, 9 + views) float32,
  columns as in `name_neighbourhood`.
- A *candidate* of an image is an image it forms a pair with; a *shared candidate* of a pair is a
  candidate of both its images. The *expansion neighbours* of an image are its `EXPANSION`
  candidates of highest probability.
- No feature grows with the number of images of an identity, so a mediator trained on identities of
  five images serves for one of five hundred.
- One view is held at a time, and pairs are described in parts. The same bits whatever the number of
  threads.

Source: ours. Averaging with sure neighbours is query expansion (Chum et al. 2007).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from cdp.arrays.cosine import make_unit, measure_pairs
from cdp.arrays.log_odds import fill_log_odds
from cdp.arrays.scratch import allocate
from cdp.arrays.threads import count_threads, list_blocks
from cdp.errors import DataError
from cdp.mediator.ensemble import Mediator
from cdp.propagation.scored_pairs import check_probability
from cdp.types import PairTable, View, load_view

EXPANSION = 5
"""Number of expansion neighbours, the candidates that an image is averaged with."""
_LOG_ODDS_LIMIT = 12.0
_MARGIN = 1e-6
"""Probabilities are clipped to [_MARGIN, 1 - _MARGIN] before their log-odds."""
_NO_PATH = -15.0
"""`best_path` of a pair without a shared candidate: below every log-odds."""
_PRIOR_COUNT = 0.5
"""Added to the denominators, so that a pair with hardly any shared candidate scores near 0."""
_BLOCK = 1 << 16
_PART = 16 * _BLOCK
PAIR_FEATURES = (
    "log_odds",
    "log_odds_below_weaker_best",
    "log_odds_below_stronger_best",
    "agreement_high",
    "agreement_low",
    "agreement_both",
    "neighbour_log_odds_low",
    "neighbour_log_odds_high",
    "best_path",
)


def name_neighbourhood(view_count: int) -> list[str]:
    """The columns of `describe_neighbourhood`, in order.

    For a pair (a, b) with log-odds z and shared candidates c of probabilities p(a, c), p(b, c):

    - `log_odds`: z;
    - `log_odds_below_weaker_best`, `log_odds_below_stronger_best`: z minus the lower and the higher
      of the best log-odds of a and of b with any candidate;
    - `agreement_high`, `agreement_low`, `agreement_both`: the sum over c of p(a, c) p(b, c),
      divided by the lower and the higher of the two sums of p, and by their union;
    - `neighbour_log_odds_low`, `neighbour_log_odds_high`: the mean log-odds of a with b's
      candidates, weighted by p(b, c), and of b with a's;
    - `best_path`: the strongest path a - c - b, measured by the log-odds of its weaker step;
    - `expanded_affinity_<view>`: the cosine of a and b, both averaged with their expansion
      neighbours.
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
    """Compute the neighbourhood features of every pair.

    Parameters
    ----------
    views : one (count, d_v) array a model, or a function that loads it.
    pairs : all candidate pairs.
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
    value = check_probability(probability, len(pairs))
    around = Neighbourhood(views, pairs, value, count, count_threads(threads))
    out = np.empty((len(pairs), len(PAIR_FEATURES) + len(views)), np.float32)
    around.describe(slice(0, len(pairs)), out)
    return out


class Neighbourhood:
    """All candidate pairs, indexed by image, to describe any part of them.

    The cosines of averaged images are computed for all pairs at once, a view at a time; the other
    features block by block from the lists of candidates.
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
        self.log_odds = fill_log_odds(value, _LOG_ODDS_LIMIT, margin=_MARGIN)
        self.best = np.full(count, -_LOG_ODDS_LIMIT)
        np.maximum.at(self.best, pairs.source, self.log_odds)
        np.maximum.at(self.best, pairs.target, self.log_odds)
        integer = np.int32 if max(2 * len(pairs), count) < 2**31 else np.int64
        self.other, self.edge = (allocate((2 * len(pairs),), integer) for _ in range(2))
        self.start = _list_neighbours(pairs.source, pairs.target, count, self.other, self.edge)
        expansion, weight = _choose_expansion(self.start, self.other, self.edge, value, count)
        self.affinity = allocate((len(views), len(pairs)))
        for at, view in enumerate(views):
            unit, _ = make_unit(load_view(view))
            if len(unit) != count:
                raise DataError(f"view {at} has {len(unit)} rows, expected {count}")
            expanded = _expand_rows(unit, expansion, weight, workers)
            measure_pairs(expanded, pairs.source, pairs.target, self.affinity[at], workers)

    def describe(self, part: slice, out: np.ndarray) -> None:
        """Fill `out`, (rows of the part, columns) float32."""
        source, target = self.pairs.source, self.pairs.target

        def work(rows: slice) -> None:
            place = slice(rows.start - part.start, rows.stop - part.start)
            _describe(
                source[rows],
                target[rows],
                self.log_odds[rows],
                self.start,
                self.other,
                self.edge,
                self.value,
                self.log_odds,
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
        """The mediator's probability of every pair, (m,) float32."""
        score = allocate((len(self.pairs),))
        for part, described in self.describe_parts():
            score[part] = mediator.score(described, threads=self.workers)
        return score

    def _share(self, work: Callable[[slice], None], part: slice) -> None:
        starts = range(part.start, part.stop, _BLOCK)
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(work, [slice(at, min(at + _BLOCK, part.stop)) for at in starts]))


@njit(cache=True, nogil=True)
def _list_neighbours(source, target, count, other, edge):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Fill in each row's candidates, ascending, and their pairs; where each row's list starts."""
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
    source, target, own, start, other, edge, value, log_odds, best, out
):
    """Pairs of one source, which lie together, share the marks of its candidates."""
    owner = np.full(len(best), -1, np.int64)
    edge_of = np.empty(len(best), edge.dtype)
    for e in range(len(source)):
        a, b, z = source[e], target[e], own[e]
        if e == 0 or source[e - 1] != a:
            for i in range(start[a], start[a + 1]):
                owner[other[i]] = a
                edge_of[other[i]] = edge[i]
        agreed = sum_a = sum_b = cross_a = cross_b = 0.0
        path = _NO_PATH
        for j in range(start[b], start[b + 1]):
            if owner[other[j]] != a:
                continue
            x, y = edge_of[other[j]], edge[j]
            agreed += value[x] * value[y]
            sum_a += value[x]
            sum_b += value[y]
            cross_a += value[y] * log_odds[x]
            cross_b += value[x] * log_odds[y]
            path = max(path, min(log_odds[x], log_odds[y]))
        to_a, to_b = cross_a / (sum_b + _PRIOR_COUNT), cross_b / (sum_a + _PRIOR_COUNT)
        out[e, 0] = z
        out[e, 1] = z - min(best[a], best[b])
        out[e, 2] = z - max(best[a], best[b])
        out[e, 3] = agreed / (min(sum_a, sum_b) + _PRIOR_COUNT)
        out[e, 4] = agreed / (max(sum_a, sum_b) + _PRIOR_COUNT)
        out[e, 5] = agreed / (sum_a + sum_b - agreed + _PRIOR_COUNT)
        out[e, 6] = min(to_a, to_b)
        out[e, 7] = max(to_a, to_b)
        out[e, 8] = path


@njit(cache=True, nogil=True)
def _choose_expansion(start, other, edge, value, count):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The expansion neighbours of each row (ties: the smaller row), weighted by probability."""
    chosen = np.full((count, EXPANSION), -1, np.int64)
    weight = np.zeros((count, EXPANSION), np.float32)
    for row in range(count):
        for i in range(start[row], start[row + 1]):
            probability = np.float32(value[edge[i]])
            place = EXPANSION - 1
            if probability <= weight[row, place]:
                continue
            while place > 0 and probability > weight[row, place - 1]:
                weight[row, place] = weight[row, place - 1]
                chosen[row, place] = chosen[row, place - 1]
                place -= 1
            weight[row, place] = probability
            chosen[row, place] = other[i]
    return chosen, weight


def _expand_rows(
    unit: np.ndarray, expansion: np.ndarray, weight: np.ndarray, workers: int
) -> np.ndarray:
    """Each row averaged with its expansion neighbours, (n, d) float32 unit rows."""
    out = allocate(unit.shape)

    def work(part: slice) -> None:
        _expand(unit, part.start, expansion[part], weight[part], out[part])

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, list_blocks(0, len(unit))))
    return out


@njit(cache=True, nogil=True)
def _expand(unit, start, expansion, weight, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Write the averages of the rows from `start` on."""
    for row in range(len(out)):
        out[row] = unit[start + row]
        for f in range(expansion.shape[1]):
            if expansion[row, f] >= 0:
                for axis in range(unit.shape[1]):
                    out[row, axis] += weight[row, f] * unit[expansion[row, f], axis]
        norm = 0.0
        for axis in range(unit.shape[1]):
            norm += np.float64(out[row, axis]) ** 2
        if norm > 0:
            scale = np.float32(1 / np.sqrt(norm))
            for axis in range(unit.shape[1]):
                out[row, axis] *= scale
