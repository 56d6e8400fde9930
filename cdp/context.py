"""The second reading: what the pairs around a pair say about it.

The mediator reads each pair alone. Once every candidate pair has a probability, a pair can be read
again in its surroundings: do the two images agree about the images they both know, and do they look
alike once each is averaged with the images it surely shows the same person as? A second mediator
learns that from the labelled pairs, and it is what recovers the blurred images of a person: each
alone resembles nobody, all its friends resemble each other.

The contract:
- Enters: the views, the candidate pairs and their probabilities (labelled pairs: held-out ones,
  `Mediator.held_out`; unlabelled pairs: after `correct_prior`). Leaves: a probability a pair.
- No feature grows with the size of a person, so what is learnt on people with five images holds for
  one with five hundred.
- Labelled people usually have two images or more; in the wild, many have one, and their best
  neighbour is wrong. The second mediator is therefore also taught with people reduced to one image
  (`thin_identities`); without that it merges strangers (measured on LFW: BCubed precision .89
  instead of .97).
- One view is looked at at a time, and pairs are described in parts: beside the view, its averaged
  copy and the pairs stand some 40 bytes a pair, and 4 a pair and view that may lie on disk. The
  same bits whatever the number of threads.

Source: ours. Averaging with sure neighbours is query expansion (Chum et al. 2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numba import njit

from cdp.agglomeration import Agglomeration, agglomerate
from cdp.cosine import count_threads, make_unit
from cdp.errors import DataError
from cdp.lessons import thin_identities
from cdp.mediator import Mediator, MediatorSettings
from cdp.metrics import score_amid_strangers, score_bcubed, score_pairwise
from cdp.prior import PriorCorrection, correct_evenly, weigh_images
from cdp.scratch import allocate
from cdp.types import PairTable

View = np.ndarray | Callable[[], np.ndarray]

CONTEXT_SHARES = (0.0, 0.5, 0.8)
"""Shares of labelled people reduced to one image, one lesson each."""
THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
"""Cuts tried on the held-out people."""
CUTS = (*THRESHOLDS, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Cuts whose precision on the held-out people is kept, for a target precision."""
_GAIN = 0.015
"""Of BCubed F: what a threshold must win on held-out people to be preferred to one half. Smaller
gains did not carry over to strangers (LFW at 24 and 16 px), those of .02 to .05 did (at 12 px).
Pairwise F is not asked: one merge with a person of 500 images decides it."""
FRIENDS = 5
"""An image is averaged with at most so many others: the surest ones."""
_EVIDENCE_LIMIT = 12.0
_BLOCK = 1 << 16
_PART = 16 * _BLOCK
_PAIR_NAMES = (
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


def name_context(view_count: int) -> list[str]:
    """The columns of `describe_context`, in order.

    For a pair (a, b) of probability p and log-odds z, and the images c that are candidates of both:
    z; z minus the weaker and the stronger of the best log-odds that a and b have with anybody;
    the share of the probability a (b) gives to the shared candidates that b (a) gives too (higher
    and lower of the two, and over their union); the mean log-odds between a and b's friends, and
    between b and a's (lower, higher); the strongest two-step path a - c - b (its weaker step).
    Then for each view the cosine between a and b, each averaged with its surest friends.
    """
    return [*_PAIR_NAMES, *(f"expanded_affinity_{view}" for view in range(view_count))]


def describe_context(
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
    (m, 9 + views) float32, columns as in `name_context`.

    Raises
    ------
    DataError
        Lengths that differ, a probability outside [0, 1], or a bad vector.
    """
    value = _check_probability(pairs, probability)
    around = _Surroundings(views, pairs, value, count, count_threads(threads))
    out = np.empty((len(pairs), len(_PAIR_NAMES) + len(views)), np.float32)
    around.describe(slice(0, len(pairs)), out)
    return out


def _check_probability(pairs: PairTable, probability: np.ndarray) -> np.ndarray:
    value = np.asarray(probability, np.float64)
    if value.shape != (len(pairs),):
        raise DataError(f"expected one probability a pair, got {len(pairs)} pairs, {value.shape}")
    if len(value) and not (value.min() >= 0 and value.max() <= 1):
        raise DataError(
            f"probabilities must lie in [0, 1], got [{value.min()}, {value.max()}] (NaN counts as "
            "outside)"
        )
    return value


class _Surroundings:
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
            out[place, len(_PAIR_NAMES) :] = self.affinity[:, rows].T

        self._share(work, part)

    def describe_parts(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All pairs, part by part; the next part is written over the last."""
        count = len(self.pairs)
        block = np.empty((min(_PART, count), len(_PAIR_NAMES) + len(self.affinity)), np.float32)
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


@dataclass(frozen=True)
class CrowdReading:
    """The pairs among labelled and unlabelled rows as the first mediator reads them.

    views : over all rows. pairs : all candidates. probability : (m,) float in [0, 1], held-out
    where an end is labelled. identity : (n,) int64, below zero and unique for an unlabelled row.
    """

    views: Sequence[View]
    pairs: PairTable
    probability: np.ndarray
    identity: np.ndarray


@dataclass(frozen=True)
class SecondReading:
    """A second mediator, and the threshold its probabilities are agglomerated with.

    even_rate : its mean held-out probability, images heard more evenly, for
        `cdp.prior.correct_evenly`; NaN where not every labelled pair was held out.
    threshold : in (0, 1), for `cdp.agglomeration.agglomerate`, chosen on held-out people: amid the
        unlabelled where they were given, else alone. One half where the views are good; where they
        are poor, pairs repeat each other's doubts and the best cut lies below.
    purity : (t, 2) float64, rising thresholds and the pairwise precision that the held-out people
        had when cut there, the mean over the lessons, never falling. No row where not every
        labelled pair was held out.
    """

    mediator: Mediator
    even_rate: float
    threshold: float
    purity: np.ndarray

    def correct(self, probability: np.ndarray, pairs: PairTable, count: int) -> PriorCorrection:
        """Its scores of all candidate pairs of a set at that set's own share of true pairs; as they
        are where the mediator's settings say so."""
        if not self.mediator.settings.correct_prior or math.isnan(self.even_rate):
            return self.mediator.correct(probability)
        return correct_evenly(
            probability, self.mediator.training_rate, self.even_rate, pairs, count
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        own = {"even_rate": self.even_rate, "threshold": self.threshold, "purity": self.purity}
        arrays = {name: np.asarray(value) for name, value in own.items()}
        return {**self.mediator.state(), **arrays}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> SecondReading:
        """The inverse of `state`; DataError where something is missing."""
        names = ("even_rate", "threshold", "purity")
        lacking = [name for name in names if name not in state]
        if lacking:
            raise DataError(
                f"expected the state of a second reading, but it lacks {', '.join(lacking)}"
            )
        rest = {name: value for name, value in state.items() if name not in names}
        rate, threshold = float(state["even_rate"]), float(state["threshold"])
        return cls(Mediator.from_state(rest), rate, threshold, state["purity"])


def fit_context(
    views: Sequence[View],
    pairs: PairTable,
    held_out: np.ndarray,
    identity: np.ndarray,
    *,
    crowd: CrowdReading | None = None,
    settings: MediatorSettings | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> SecondReading:
    """Train the second mediator on labelled pairs, and find where to cut.

    Parameters
    ----------
    views, pairs : of the labelled images, as the first mediator had them.
    held_out : (m,) float, what `Mediator.held_out` of the first says of these pairs. Probabilities
        of a mediator that has seen the two people would promise more than strangers keep.
    identity : (n,) int64, of the labelled rows.
    crowd : the labelled amid the unlabelled, as one more lesson; or None.
    settings : as for `Mediator.fit`; the variant's name becomes "context".

    Raises
    ------
    DataError
        As `describe_context` and `Mediator.fit`.
    """
    chosen = replace(settings or MediatorSettings(patience=4), variant="context")
    identity = np.asarray(identity)
    loaded = [make_unit(view() if callable(view) else view)[0] for view in views]
    features, lessons = [], []
    for lesson, share in enumerate(CONTEXT_SHARES):
        kept = thin_identities(identity, share, seed + lesson)
        inside = kept[pairs.source] & kept[pairs.target]
        place = np.cumsum(kept) - 1
        few = pairs.take(inside)
        left = PairTable(place[few.source], place[few.target], few.listings)
        features.append(
            describe_context(
                [view if kept.all() else view[kept] for view in loaded],
                left,
                held_out[inside],
                int(kept.sum()),
                threads=threads,
            )
        )
        lessons.append((left, identity[kept]))
    taught = list(lessons)
    amid = None
    if crowd is not None:
        amid = _Amid(crowd, threads)
        features.append(amid.describe_own())
        taught.append((amid.taught, crowd.identity))
    source = np.concatenate([person[left.source] for left, person in taught])
    target = np.concatenate([person[left.target] for left, person in taught])
    mediator = Mediator.fit(
        np.concatenate(features),
        source == target,
        source,
        target,
        settings=chosen,
        seed=seed,
        threads=threads,
    )
    held = mediator.held_out
    if held is None or not len(pairs) or not np.isfinite(held).all():
        return SecondReading(mediator, math.nan, 0.5, np.empty((0, 2)))
    ends = np.cumsum([len(left) for left, _ in taught])[:-1]
    scores = np.split(held, ends)
    read = [(*lesson, score) for lesson, score in zip(lessons, scores, strict=False)]
    voice = [
        weigh_images(left, mediator.correct(score).probability, len(person))
        for left, person, score in read
    ]
    if amid is not None:
        score = amid.score(mediator, scores[-1])
        voice.append(amid.weigh_own(mediator.correct(score).probability))
    heard = mediator.voice * np.concatenate(voice)
    rate = float(np.average(held, weights=heard))
    reading = SecondReading(mediator, rate, 0.5, np.empty((0, 2)))
    cut = _cut_lessons(reading, read)
    f = _judge_lessons(cut) if amid is None else amid.judge(reading, score)
    return replace(reading, threshold=_choose_threshold(f), purity=_measure_purity(cut))


class _Amid:
    """The labelled among the unlabelled: pairs to learn from, then a place to try thresholds."""

    def __init__(self, crowd: CrowdReading, threads: int | None) -> None:
        self.crowd = crowd
        pairs, count = crowd.pairs, len(crowd.identity)
        value = _check_probability(pairs, crowd.probability)
        self.around = _Surroundings(crowd.views, pairs, value, count, count_threads(threads))
        labelled = crowd.identity >= 0
        self.own = labelled[pairs.source] | labelled[pairs.target]
        self.taught = pairs.take(self.own)

    def describe_own(self) -> np.ndarray:
        """The pairs that have a labelled end, described among all of them."""
        width = len(_PAIR_NAMES) + len(self.crowd.views)
        described = np.empty((len(self.taught), width), np.float32)
        row = 0
        for part, block in self.around.describe_parts():
            kept = block[self.own[part]]
            described[row : row + len(kept)] = kept
            row += len(kept)
        return described

    def score(self, mediator: Mediator, held_out: np.ndarray) -> np.ndarray:
        """What the mediator says of all pairs, (m,) float32; held-out where an end is labelled."""
        score = self.around.score(mediator)
        score[self.own] = held_out
        return score

    def weigh_own(self, probability: np.ndarray) -> np.ndarray:
        """How much each of the pairs with a labelled end counts, see `cdp.prior.weigh_images`."""
        return weigh_images(self.crowd.pairs, probability, len(self.crowd.identity))[self.own]

    def judge(self, reading: SecondReading, score: np.ndarray) -> np.ndarray:
        """(thresholds,) BCubed F of the labelled people, clustered together with everybody."""
        person = self.crowd.identity
        probability = reading.correct(score, self.crowd.pairs, len(person)).probability
        found = agglomerate(self.crowd.pairs, probability, len(person), threshold=min(THRESHOLDS))
        cuts = [found.cut(threshold) for threshold in THRESHOLDS]
        return np.array([score_amid_strangers(person, label)[2] for label in cuts])


def _cut_lessons(
    reading: SecondReading, lessons: Sequence[tuple[PairTable, np.ndarray, np.ndarray]]
) -> list[tuple[Agglomeration, np.ndarray]]:
    """Each lesson agglomerated as an unlabelled set would be, and who is who in it."""
    found = []
    for pairs, identity, score in lessons:
        probability = reading.correct(score, pairs, len(identity)).probability
        merged = agglomerate(pairs, probability, len(identity), threshold=min(THRESHOLDS))
        found.append((merged, identity))
    return found


def _judge_lessons(lessons: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """(thresholds,) BCubed F of the held-out people, the mean over the lessons."""
    cuts = [
        [score_bcubed(identity, merged.cut(threshold))[2] for threshold in THRESHOLDS]
        for merged, identity in lessons
    ]
    return np.mean(cuts, axis=0)


def _measure_purity(lessons: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """The `purity` of a second reading."""
    precision = np.zeros(len(CUTS))
    for merged, identity in lessons:
        precision += [score_pairwise(identity, merged.cut(cut))[0] for cut in CUTS]
    return np.column_stack([CUTS, np.maximum.accumulate(precision / len(lessons))])


def _choose_threshold(f: np.ndarray) -> float:
    """One half, unless the best of `THRESHOLDS` wins `_GAIN` on it.

    f : (thresholds,) F of held-out people, compared once averaged with its neighbours.
    """
    padded = np.pad(f, 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    best = int(smooth.argmax())
    return THRESHOLDS[best] if smooth[best] > smooth[THRESHOLDS.index(0.5)] + _GAIN else 0.5


def score_context(
    reading: SecondReading,
    views: Sequence[View],
    pairs: PairTable,
    probability: np.ndarray,
    count: int,
    *,
    threads: int | None = None,
) -> PriorCorrection:
    """Score pairs by the second mediator, and move the scores to the set's own rate of true pairs.

    Parameters
    ----------
    reading : from `fit_context`.
    views, pairs, count : of the unlabelled images.
    probability : (m,) the first mediator's, after `correct_prior`.

    Returns
    -------
    PriorCorrection
        Probabilities (m,) float32 and the share of true pairs; uncorrected where the mediator's
        settings say so.
    """
    value = _check_probability(pairs, probability)
    around = _Surroundings(views, pairs, value, count, count_threads(threads))
    return reading.correct(around.score(reading.mediator), pairs, count)


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
