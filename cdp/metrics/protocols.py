"""Evaluation protocols on held-out identities, each figure with a bootstrap interval.

Verification by listed pairs in folds (LFW), verification by all pairs (TAR@FAR), closed-set
identification with and without distractors (TinyFace), open-set identification (SurvFace).

The contract:
- The definitions are those of `cdp.metrics.verification` and `cdp.metrics.identification`.
- The interval is a percentile bootstrap over identities, not images: each resample draws as many
  identities as there are, with replacement, with all their images. An identity drawn w times counts
  w times; a pair of two identities counts with the product; thresholds are set anew in every
  resample.
- The same identities and seed give the same resamples, whatever is scored: figures of two
  recognizers can be compared resample by resample.
- A rate so low that no impostor may pass cannot be measured and is left out.
- `bootstrap_interval` is library surface: the interval of any mean, without a protocol.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.metrics.identification import Identification, sample_probe_gallery
from cdp.metrics.verification import (
    VerificationPairs,
    check_scores,
    decide_by_folds,
    threshold_at_far,
)


def bootstrap_interval(
    value: np.ndarray,
    identity: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, resampling identities and not images.

    Images of one identity are not independent; an interval over images would be too narrow.

    Parameters
    ----------
    value : (m,) float, for instance 1 for each correct decision.
    identity : (m,) integer, the identity (or, for pairs, the fold or first identity) of each value.
    level : coverage, in (0, 1). draws : resamples, >= 1. seed : same seed, same interval.

    Returns
    -------
    (low, high) : floats; equal when there is one identity.

    Raises
    ------
    DataError : no value, shapes that differ, NaN, or a level outside (0, 1).
    """
    value, _ = check_scores(value, np.zeros(np.shape(identity), bool), "value")
    if not 0.0 < level < 1.0 or draws < 1:
        raise DataError(f"expected level in (0, 1) and draws >= 1, got {level} and {draws}")
    place = np.unique(np.asarray(identity), return_inverse=True)[1]
    total = np.bincount(place, weights=value)
    size = np.bincount(place)
    count = len(size)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    mean = (drawn @ total) / (drawn @ size)
    low, high = np.quantile(mean, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def gap_closed(labelled_only: float, with_pseudo: float, supervised: float) -> float:
    """The share of the gap between labelled-only and fully supervised that pseudo-labels close.

    Arguments are one metric, higher is better, of the three subjects on the same identities. 0 is
    no gain, 1 is as good as true labels; it may leave [0, 1]. nan when supervision itself gains
    nothing (no gap to close). The paper's headline: 61.78, 78.18, 78.52 -> .98.
    """
    gap = supervised - labelled_only
    return (with_pseudo - labelled_only) / gap if gap > 0.0 else math.nan


_BLOCK = 512
"""Images compared with all later ones at once."""


@dataclass(frozen=True)
class Score:
    """One figure of a protocol.

    metric : its name, such as `rank-1`.
    value : float
    count : int, the number of decisions it is the mean of.
    draws : (draws,) float64, the figure in every resample, NaN where it is undefined; None for a
        figure without an interval.
    """

    metric: str
    value: float
    count: int
    draws: np.ndarray | None = None

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Percentile interval of the resamples; (nan, nan) without any."""
        if self.draws is None or np.isnan(self.draws).all():
            return float("nan"), float("nan")
        low, high = np.nanquantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


class Resamples:
    """Bootstrap over identities: how often each is drawn, in every resample.

    Parameters
    ----------
    identity : (n,) integer, the identity of each image.
    draws : number of resamples.
    seed : of the draws.

    Attributes
    ----------
    identity : (n,) int64, the same, renumbered 0 .. c - 1.
    weight : (draws, c) float64, times drawn; each row sums to c, the number of identities.
    """

    def __init__(self, identity: np.ndarray, draws: int = 200, seed: int = 0) -> None:
        if not len(identity) or draws < 1:
            raise DataError(f"images and draws expected, got {len(identity)} and {draws}")
        self.identity = np.unique(identity, return_inverse=True)[1].astype(np.int64)
        count = int(self.identity.max()) + 1
        rng = np.random.default_rng(seed)
        self.weight = rng.multinomial(count, np.full(count, 1 / count), size=draws).astype(float)

    def average(self, value: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Mean of one value an image, in every resample; rows : (m,) the images. (draws,)."""
        count = self.weight.shape[1]
        total = np.bincount(self.identity[rows], weights=value, minlength=count)
        return _divide(
            self.weight @ total,
            self.weight @ np.bincount(self.identity[rows], minlength=count),
        )


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)


def score_folds(
    similarity: np.ndarray, pairs: VerificationPairs, resamples: Resamples
) -> list[Score]:
    """Accuracy over folds, as LFW defines it, its standard deviation over folds (`accuracy_std`)
    and the standard error of the mean (`accuracy_standard_error`, as LFW reports it).

    similarity : (m,) float, of the pairs. The thresholds are those of the folds, not set anew.
    """
    right = decide_by_folds(similarity, pairs.same, pairs.fold)
    by_fold = [right[pairs.fold == fold].mean() for fold in np.unique(pairs.fold)]
    source, target = resamples.identity[pairs.source], resamples.identity[pairs.target]
    draws = []
    for weight in resamples.weight:
        both = weight[source] * np.where(pairs.same, 1.0, weight[target])
        draws.append((both @ right) / both.sum() if both.any() else np.nan)
    spread = float(np.std(by_fold))
    error = float(np.std(by_fold, ddof=1) / math.sqrt(len(by_fold))) if len(by_fold) > 1 else spread
    return [
        Score("accuracy", float(np.mean(by_fold)), len(right), np.array(draws)),
        Score("accuracy_std", spread, len(right)),
        Score("accuracy_standard_error", error, len(right)),
    ]


def pick_images(identity: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """Draw at most `most` images an identity, so that none dominates all pairs; rows, ascending."""
    order = np.random.default_rng(seed).permutation(len(identity))
    grouped = order[np.argsort(identity[order], kind="stable")]
    _, first, size = np.unique(identity[grouped], return_index=True, return_counts=True)
    place = np.arange(len(grouped)) - np.repeat(first, size)
    return np.sort(grouped[place < most])


def score_all_pairs(
    embedding: np.ndarray, rows: np.ndarray, resamples: Resamples, rates: Sequence[float]
) -> list[Score]:
    """TAR@FAR over all pairs of some images, and the cosine above which a pair is accepted at each.

    Parameters
    ----------
    embedding : (n, d) float32, unit length, of the images the resamples are of.
    rows : (m,) int64, the images that are compared with each other.
    rates : false acceptance rates in (0, 1); one that allows no impostor pair is left out.

    Raises
    ------
    DataError : no pair of one identity, or none of two.
    """
    identity = resamples.identity[rows]
    size = np.bincount(identity, minlength=resamples.weight.shape[1])
    images = resamples.weight * size
    allowed = (images.sum(1) ** 2 - (images**2).sum(1)) / 2
    share = 1.5 * max(rates)
    while True:
        genuine, owner, top, first, second, impostors = _compare_all(
            embedding[rows], identity, share
        )
        # A resample of few identities may need more of the list than all of them together.
        reach = [(weight[first] * weight[second]).sum() for weight in resamples.weight]
        if len(top) == impostors or np.all(reach > max(rates) * allowed * (1 + 1e-12)):
            break
        share *= 2
    if not len(genuine) or not impostors:
        raise DataError(
            f"pairs of one identity and of two expected, got {len(genuine)} and {impostors}; keep "
            "more identities for evaluation"
        )
    measurable = [rate for rate in rates if rate * impostors >= 1]
    order = np.argsort(-genuine, kind="stable")
    genuine, owner = genuine[order], owner[order]
    draws = np.empty((len(measurable), len(resamples.weight)))
    cuts = np.empty_like(draws)
    for number, weight in enumerate(resamples.weight):
        passed = np.cumsum(weight[first] * weight[second])
        accepted = np.concatenate([[0.0], np.cumsum(weight[owner])])
        for line, rate in enumerate(measurable):
            place = np.searchsorted(passed, rate * allowed[number] * (1 + 1e-12), side="right")
            threshold = top[min(place, len(top) - 1)]
            cuts[line, number] = threshold
            above = np.searchsorted(-genuine, -threshold, side="left")
            draws[line, number] = accepted[above] / accepted[-1] if accepted[-1] else np.nan
    scores = []
    for line, rate in enumerate(measurable):
        threshold = top[int(rate * impostors + 1e-9)]
        value = float(np.mean(genuine > threshold))
        scores.append(Score(f"tar@far={rate:g}", value, len(genuine), draws[line]))
    for line, rate in enumerate(measurable):
        threshold = float(top[int(rate * impostors + 1e-9)])
        scores.append(Score(f"threshold@far={rate:g}", threshold, impostors, cuts[line]))
    return scores


def _compare_all(
    vectors: np.ndarray, identity: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """Compare all pairs once; memory is that of the share kept, not of all pairs.

    Returns the genuine similarities and their identity; the top `share` of the impostor ones,
    descending, and their two identities; and the number of impostor pairs.
    """
    count = len(vectors)
    size = np.bincount(identity)
    impostors = int((count**2 - (size.astype(np.int64) ** 2).sum()) // 2)
    kept = min(impostors, int(share * impostors) + 2)
    genuine, owner = [np.empty(0, np.float32)], [np.empty(0, np.int64)]
    top = np.empty(0, np.float32)
    pair = np.empty(0, np.int64)
    for low in range(0, count, _BLOCK):
        part = np.arange(low, min(low + _BLOCK, count))
        similarity = vectors[part] @ vectors[low:].T
        later = np.arange(low, count)[None, :] > part[:, None]
        same = identity[part][:, None] == identity[None, low:]
        row, column = np.nonzero(later & same)
        genuine.append(similarity[row, column])
        owner.append(identity[part[row]])
        row, column = np.nonzero(later & ~same)
        top = np.concatenate([top, similarity[row, column]])
        pair = np.concatenate([pair, part[row] * count + column + low])
        if len(top) > kept:
            best = np.argpartition(-top, kept - 1)[:kept]
            top, pair = top[best], pair[best]
    order = np.lexsort((pair, -top))
    top, pair = top[order], pair[order]
    return (
        np.concatenate(genuine),
        np.concatenate(owner),
        top,
        identity[pair // count],
        identity[pair % count],
        impostors,
    )


def score_ranks(
    found: Identification, rows: np.ndarray, resamples: Resamples, ranks: Sequence[int]
) -> list[Score]:
    """Closed-set rank-k; rows : (p,) int64, the image of each probe."""
    scores = []
    for rank in ranks:
        right = (found.rank <= rank).astype(float)
        draws = resamples.average(right, rows)
        scores.append(Score(f"rank-{rank}", float(right.mean()), len(rows), draws))
    return scores


def score_open_set(
    found: Identification,
    rows: np.ndarray,
    resamples: Resamples,
    rates: Sequence[float],
    *,
    rank: int = 20,
) -> list[Score]:
    """Open-set TPIR@FPIR; rows : (p,) int64, the image of each probe, mated and unmated ones.

    A rate that allows no unmated probe is left out. Raises DataError without probes of both kinds.
    """
    mated = found.mated
    if mated.all() or not mated.any():
        raise DataError(
            f"mated and unmated probes expected, got {mated.sum()} mated of {len(mated)}; keep "
            "more identities for evaluation"
        )
    order = np.argsort(-found.other[~mated], kind="stable")
    impostor = found.other[~mated][order]
    impostor_weight = resamples.weight[:, resamples.identity[rows[~mated]][order]]
    # A mate beyond the rank is never found, whatever the threshold.
    best = np.where(found.rank <= rank, found.best, -np.inf)[mated]
    mate_weight = resamples.weight[:, resamples.identity[rows[mated]]]
    scores = []
    for rate in rates:
        if rate * len(impostor) < 1:
            continue
        value = float(np.mean(best > threshold_at_far(impostor, rate)))
        draws = np.full(len(resamples.weight), np.nan)
        for number, (unmated, mate) in enumerate(zip(impostor_weight, mate_weight, strict=True)):
            if not unmated.any() or not mate.any():
                continue
            passed = np.cumsum(unmated)
            place = np.searchsorted(passed, rate * passed[-1] * (1 + 1e-12), side="right")
            draws[number] = mate @ (best > impostor[min(place, len(impostor) - 1)]) / mate.sum()
        scores.append(Score(f"tpir{rank}@fpir={rate:g}", value, int(mated.sum()), draws))
    return scores


@dataclass(frozen=True)
class OpenSet:
    """Rows of an open-set protocol.

    gallery : (g,) int64, one image of each enrolled identity.
    mated : (m,) int64, the other images of enrolled identities: probes with a mate.
    unmated : (u,) int64, all images of other identities: probes without one, or distractors.
    """

    gallery: np.ndarray
    mated: np.ndarray
    unmated: np.ndarray


def sample_open_set(identity: np.ndarray, enrolled: float = 0.5, seed: int = 0) -> OpenSet:
    """Enrol a random share of the identities with two images or more; at least one.

    identity : (n,) integer. Raises DataError when none has two images, or none would be left.
    """
    names, identity, size = np.unique(identity, return_inverse=True, return_counts=True)
    rng = np.random.default_rng(seed)
    able = rng.permutation(np.flatnonzero(size > 1))
    wanted = max(1, round(enrolled * len(able)))
    if not len(able) or wanted >= len(names):
        raise DataError(
            f"identities with two images, and others for unmated probes, expected; got {len(able)} "
            f"with two of {len(names)}; keep more identities for evaluation"
        )
    inside = np.isin(identity, able[:wanted])
    shuffled = rng.permutation(np.flatnonzero(inside))
    gallery = np.sort(shuffled[np.unique(identity[shuffled], return_index=True)[1]])
    mated = np.setdiff1d(np.flatnonzero(inside), gallery)
    return OpenSet(gallery, mated, np.flatnonzero(~inside))


@dataclass(frozen=True)
class ProbeSets:
    """Rows of the protocol of several pictures a probe.

    gallery : (g,) int64, one image of each identity.
    row : (m,) int64, the other images of identities with two or more, in a drawn order an identity.
    place : (m,) int64, the number of each of them within its identity, from 0.
    """

    gallery: np.ndarray
    row: np.ndarray
    place: np.ndarray

    def take(self, size: int) -> np.ndarray:
        """The rows of sets of `size` images, or all an identity has: larger sets hold smaller ones.

        Returns (k,) int64.
        """
        return self.row[self.place < size]


def sample_sets(identity: np.ndarray, seed: int = 0) -> ProbeSets:
    """Draw a gallery image of each identity, and an order of its other images.

    identity : (n,) integer. Raises DataError when none has two images.
    """
    probes, gallery = sample_probe_gallery(identity, seed)
    if not len(probes):
        raise DataError("identities with two images expected; keep more of them for evaluation")
    shuffled = np.random.default_rng(seed).permutation(probes)
    row = shuffled[np.argsort(identity[shuffled], kind="stable")]
    _, first, size = np.unique(identity[row], return_index=True, return_counts=True)
    return ProbeSets(gallery, row, np.arange(len(row)) - np.repeat(first, size))


def score_rejection(
    found: Identification,
    quality: np.ndarray,
    rows: np.ndarray,
    resamples: Resamples,
    shares: Sequence[float],
) -> list[Score]:
    """Rank-1 of the probes that are left when those of the lowest quality are rejected.

    Parameters
    ----------
    found : Identification
        Of all probes.
    quality : (p,) float, larger is better; probes of equal quality go in their order.
    rows : (p,) int64, the image of each probe.
    shares : shares of the probes that are rejected, in 0..1; at least one probe is kept.

    Notes
    -----
    The error-versus-discard curve (Grother and Tabassi 2007): a quality that means something makes
    the figure rise with the share.
    """
    order = np.argsort(quality, kind="stable")
    scores = []
    for share in shares:
        kept = np.sort(order[min(round(share * len(order)), len(order) - 1) :])
        right = (found.rank[kept] <= 1).astype(float)
        draws = resamples.average(right, rows[kept])
        name = f"rank-1, {share:.0%} rejected"
        scores.append(Score(name, float(right.mean()), len(kept), draws))
    return scores
