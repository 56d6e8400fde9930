"""Missed pairs: how many positive pairs lie in different clusters, measured on held-out people.

The contract:
- Enters: labelled people that were held out, clustered together with the unlabelled rows. Leaves:
  `MissedPairs`, by which an estimate of recall is adjusted.
- Of every two clusters with candidate pairs between them the log-odds that they are one identity
  are known (`cdp.propagation.group_pairs`). For held-out rows, the pairs that they expect and those
  that are positive can be compared: one number is added to all log-odds, so that both sums are
  equal. It is never below zero: recall is not estimated higher than the pairs themselves say.
- Of pairs of clusters without a candidate pair, the share is measured by a person's number of
  images (`cdp.propagation.unlisted`).
- Unlabelled people have other numbers of images than labelled ones, and most have one. So people
  also count with one, two, four and eight of their images, and a held-out row weighs more where its
  number of images is more frequent among the unlabelled rows (`_EVENNESS`).

Source: ours. On nine sets (LFW at 16 px, piles of 14 to 40 px, synthetic ones; the weights were
chosen on them) .8 to 2.7 times as many pairs were missed as are estimated; before 1.0 to 8.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cdp.arrays.log_odds import to_probability
from cdp.propagation.group_pairs import compare_groups
from cdp.propagation.unlisted import fit_unlisted
from cdp.types import UNLABELLED, PairTable

_COUNTS = (1, 2, 4, 8)
"""Images of a person, at most, in the thinned sets; one more set has all."""
_SIZES = np.array([1, 2, 3, 6, 12, 24])
"""Numbers of images from which on a row is in the next class of sizes."""
_EVENNESS = 0.75
"""Exponent of the weight of a class of sizes: 0 weighs every held-out row alike; 1 gives a class
the part that it has of the unlabelled rows, and then few rows decide."""
_MOST = 10.0
"""Log-odds that are added at most."""
_BISECTIONS = 40
"""Halvings of that interval."""


@dataclass(frozen=True)
class MissedPairs:
    """How many positive pairs a clustering misses.

    unlisted : (s, 2) float64, of `fit_unlisted`: share of a person's pairs in two clusters without
        any candidate pair between them, by number of images; no row where unknown.
    log_odds : >= 0, added to the log-odds that two clusters with candidate pairs are one identity.
    """

    unlisted: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))
    log_odds: float = 0.0


def measure_missed(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    identity: np.ndarray,
    seed: int = 0,
) -> MissedPairs:
    """How many positive pairs of held-out people a clustering with unlabelled rows misses.

    Parameters
    ----------
    label : (n,) int64, the clusters of all rows; -1 none.
    pairs : all candidate pairs. probability : (m,) float in [0, 1], calibrated.
    identity : (n,) int64; below zero an unlabelled row.
    seed : which images the thinned sets keep.
    """
    group = np.where(label == UNLABELLED, label.max(initial=-1) + 1 + np.arange(len(label)), label)
    sets = [
        _HeldOut.compare(group, pairs, probability, identity, kept, counted)
        for kept, counted in _thin(identity, seed)
    ]
    size = np.concatenate([each.size for each in sets])
    share = np.concatenate([each.unlisted for each in sets])
    unlabelled = _count_sizes(np.bincount(group)[group[identity < 0]])
    shown = sum(_count_sizes(each.size, each.size) for each in sets)
    weight = (unlabelled / np.maximum(shown, 1)) ** _EVENNESS
    several = size >= 2
    return MissedPairs(
        unlisted=fit_unlisted(size[several], share[several]),
        log_odds=_balance(
            np.concatenate([each.log_odds for each in sets]),
            np.concatenate([each.expected @ weight for each in sets]),
            sum(float(each.positive @ weight[_classify(each.size)]) for each in sets),
        ),
    )


def _thin(identity: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of each set, and those of them whose people count in it, (n,) bool each.

    All unlabelled rows are in every set. A person counts where images were left out, and once with
    all images.
    """
    random = np.random.default_rng([seed, 0x6D697373])
    order = random.permutation(len(identity))
    people = pd.Series(identity[order]).groupby(identity[order])
    rank, size = np.empty((2, len(identity)), np.int64)
    rank[order], size[order] = people.cumcount(), people.transform("size")
    held = identity >= 0
    for count in _COUNTS:
        yield ~held | (rank < count), held & (rank < count) & (size > count)
    yield np.ones(len(identity), bool), held


@dataclass(frozen=True)
class _HeldOut:
    """Held-out people of one set, and the pairs of groups that their rows are in.

    size : (p,) images of each person. unlisted : (p,) share of their pairs that no list names.
    positive : (p,) positive pairs in two groups with candidate pairs, seen from both rows.
    log_odds : (q,) of each pair of groups. expected : (q, classes) pairs of a held-out row in one
        group and any row in the other, by the class of the held-out person's size.
    """

    size: np.ndarray
    unlisted: np.ndarray
    positive: np.ndarray
    log_odds: np.ndarray
    expected: np.ndarray

    @classmethod
    def compare(
        cls,
        group: np.ndarray,
        pairs: PairTable,
        probability: np.ndarray,
        identity: np.ndarray,
        kept: np.ndarray,
        held: np.ndarray,
    ) -> _HeldOut:
        groups = int(group.max(initial=-1)) + 1
        counts = np.zeros(groups, bool)
        counts[group[held]] = True
        one, other = group[pairs.source], group[pairs.target]
        used = kept[pairs.source] & kept[pairs.target]
        used &= (one == other) | counts[one] | counts[other]
        place = np.cumsum(kept) - 1
        few = pairs.take(used)
        few = PairTable(place[few.source], place[few.target], few.listings)
        group, identity, held = group[kept], identity[kept], held[kept]
        found = compare_groups(group, few, probability[used])
        _, person, size = np.unique(identity[held], return_inverse=True, return_counts=True)

        rows = np.bincount(group, minlength=groups).astype(float)
        own = np.zeros((groups, len(_SIZES)))
        np.add.at(own, (group[held], _classify(size[person])), 1)
        first, second = found.first, found.second
        expected = own[first] * rows[second, None] + own[second] * rows[first, None]

        parts = pd.DataFrame({"person": person, "group": group[held]}).value_counts()
        parts = parts.reset_index(name="rows")
        two = parts.merge(parts, on="person", suffixes=("", "_other"))
        two = two[two.group < two.group_other]
        listed = np.isin(two.group * groups + two.group_other, first * groups + second)
        number = (two.rows * two.rows_other).to_numpy(np.float64)
        apart = np.bincount(two.person, number * ~listed, len(size))
        return cls(
            size=size,
            unlisted=apart / np.maximum(size * (size - 1) / 2, 1),
            positive=2 * np.bincount(two.person, number * listed, len(size)),
            log_odds=found.log_odds,
            expected=expected,
        )


def _classify(size: np.ndarray) -> np.ndarray:
    return np.searchsorted(_SIZES, size, side="right") - 1


def _count_sizes(size: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    """Rows in each class of sizes."""
    return np.bincount(_classify(size), rows, len(_SIZES))


def _balance(log_odds: np.ndarray, expected: np.ndarray, positive: float) -> float:
    """What log-odds lack, so that they expect as many positive pairs as there are; not below 0."""
    low, high = 0.0, _MOST
    if to_probability(log_odds) @ expected >= positive:
        return low
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if to_probability(log_odds + middle) @ expected < positive:
            low = middle
        else:
            high = middle
    return (low + high) / 2
