"""Order of review: the questions whose answers are expected to remove most wrong pairs come first.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. No truth.
- A question shows a reviewer one or two groups of rows. `bridge`: do the two sides of a cluster's
  last merge belong together? `merge`: are two clusters one person? `cluster`: is all of it one
  person?
- Its worth is the expected number of wrong pairs of images that an answer removes: the probability
  that the labels are wrong there, times the pairs affected. All kinds share this scale.
- Order: worth, then larger groups, then smaller rows. The same input gives the same order.
- `QuestionRanking` ranks anew after each answer: only the clusters that the answer changed are
  merged again, and the result is that of `rank_questions`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.arrays.log_odds import to_probability
from cdp.arrays.scratch import copy_as
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.group_pairs import compare_groups
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.quality import QualityEstimate, estimate_again
from cdp.propagation.representatives import RowGroups
from cdp.propagation.scored_pairs import take_inside
from cdp.propagation.thin_merges import ThinMerges
from cdp.review.constraints import Constraints
from cdp.types import UNLABELLED, PairTable

Kind = Literal["bridge", "merge", "cluster"]
KINDS: tuple[Kind, ...] = ("bridge", "merge", "cluster")


@dataclass(frozen=True)
class Question:
    """One question about one cluster or two.

    one, other : (a,), (b,) int64 rows, ascending; `other` is empty for `cluster`.
    chance : probability, in [0, 1], that the two groups are one identity; for `cluster` the
        expected share of its pairs that are positive.
    worth : expected wrong pairs an answer removes.
    """

    kind: Kind
    one: np.ndarray
    other: np.ndarray
    chance: float
    worth: float


def rank_questions(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    *,
    kinds: tuple[Kind, ...] = KINDS,
    limit: int | None = None,
    representative: np.ndarray | None = None,
) -> list[Question]:
    """The most useful questions about a clustering, best first.

    Source: ours; the expected pairs follow `cdp.propagation.quality`.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    kinds : which to ask.
    limit : how many at most.
    representative : as for `estimate_quality`.
    """
    ranking = QuestionRanking(pairs, representative)
    return ranking.rank(label, probability, kinds=kinds, limit=limit)


class QuestionRanking:
    """The questions of one labelling after another of the same rows, as a review corrects them.

    missed : as for `estimate_quality`; recall is estimated with it, and no question depends on it.
    quality : estimate of the labels ranked last, as of `estimate_quality`; None before the first.
    """

    def __init__(
        self,
        pairs: PairTable,
        representative: np.ndarray | None = None,
        *,
        missed: MissedPairs | None = None,
    ) -> None:
        self.pairs, self.representative, self.missed = pairs, representative, missed
        self.quality: QualityEstimate | None = None
        self._label: np.ndarray | None = None
        self._probability = np.empty(0)
        self._bridges: list[Question] = []
        self._merges = ThinMerges.none()

    def rank(
        self,
        label: np.ndarray,
        probability: np.ndarray,
        *,
        kinds: tuple[Kind, ...] = KINDS,
        limit: int | None = None,
    ) -> list[Question]:
        """The most useful questions, best first; parameters as of `rank_questions`.

        Both arrays are kept until the next call, and must not be written to.
        """
        label = np.asarray(label, np.int64)
        value = copy_as(np.asarray(probability), np.float64)
        self._update(label, np.asarray(probability), value)
        questions: list[Question] = []
        if "bridge" in kinds:
            questions += self._bridges
        if "merge" in kinds:
            questions += _list_merges(label, self.pairs, value, limit, self.representative)
        if "cluster" in kinds:
            assert self.quality is not None
            questions += _list_clusters(label, self.quality.expected_precision, self._bridges)
        questions.sort(key=_order)
        return questions[:limit]

    def _update(self, label: np.ndarray, probability: np.ndarray, value: np.ndarray) -> None:
        """Merge the clusters again that are not those of the labels before."""
        new = np.ones(int(label.max(initial=UNLABELLED)) + 1, bool)
        if self._label is not None:
            new = find_new_clusters(self._label, label)
            changed = np.flatnonzero(probability != self._probability)
            own = label[self.pairs.source[changed]]
            inside = (own != UNLABELLED) & (own == label[self.pairs.target[changed]])
            new[own[inside]] = True
        is_new = np.append(new, True)[label]  # of -1 the last: a row without label
        bridges = [each for each in self._bridges if not is_new[each.one[0]]]
        bridges += _list_bridges(np.where(is_new, label, UNLABELLED), self.pairs, value)
        self.quality, self._merges = estimate_again(
            label,
            self.pairs,
            value,
            self.representative,
            self._merges,
            new,
            missed=self.missed,
        )
        self._label, self._probability, self._bridges = label, probability, bridges


def find_new_clusters(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(clusters of now,) bool: those whose rows are not the rows of one cluster before.

    before, now : (n,) int64, 0 .. clusters - 1; -1 none.
    """
    rows = np.flatnonzero(now != UNLABELLED)
    own = now[rows]
    _, first, size = np.unique(own, return_index=True, return_counts=True)
    old = before[rows[first]]
    size_before = np.bincount(before[before != UNLABELLED], minlength=1)
    new = (old == UNLABELLED) | (size_before[old] != size)
    new[own[before[rows] != old[own]]] = True
    return np.asarray(new)


def filter_answered(
    questions: Sequence[Question],
    constraints: Constraints,
    *,
    checked: Collection[frozenset[int]] = (),
) -> list[Question]:
    """Remove the questions whose answer follows from the constraints; the order is kept.

    checked : groups of rows that a reviewer looked through whole; `cluster` is not asked of them.
    """
    atom = constraints.link_rows()
    apart = constraints.list_apart(atom)
    is_apart = np.zeros(len(atom) + 1, bool)
    is_apart[apart // len(atom)] = is_apart[apart % len(atom)] = True
    found = []
    for question in questions:
        one, other = atom[question.one], atom[question.other]
        if (one == one[0]).all() and (other == one[0]).all():
            continue
        if question.kind == "cluster" and frozenset(question.one.tolist()) in checked:
            continue
        if is_apart[one].any() and is_apart[other].any():
            low = np.minimum(one[:, None], other)
            keys = low * len(atom) + np.maximum(one[:, None], other)
            if np.isin(keys, apart).any():
                continue
        found.append(question)
    return found


def _order(question: Question) -> tuple[float, int, int, int]:
    size = len(question.one) + len(question.other)
    second = int(question.other[0]) if len(question.other) else -1
    return -question.worth, -size, int(question.one[0]), second


def _list_bridges(label: np.ndarray, pairs: PairTable, value: np.ndarray) -> list[Question]:
    """For each cluster the two sides that average linkage merges last."""
    tree = agglomerate(*take_inside(label, pairs, value), len(label), threshold=1e-12)
    if not len(tree.merge):
        return []
    cluster = label[tree.merge[:, 0]]
    last = len(cluster) - 1 - np.unique(cluster[::-1], return_index=True)[1]
    rest = np.delete(tree.merge, last, axis=0)
    links = coo_matrix((np.ones(len(rest)), (rest[:, 0], rest[:, 1])), shape=(len(label),) * 2)
    side = connected_components(links, directed=False)[1]
    size = np.bincount(label[label != UNLABELLED])
    rows_of = _group_rows(side)
    found = []
    for merge in last.tolist():
        one, other = (rows_of[int(side[row])] for row in tree.merge[merge])
        if len(one) + len(other) != size[label[one[0]]]:
            continue  # connected by a must-link, not by pairs
        if len(one) < len(other):
            one, other = other, one
        chance = to_probability(tree.height[merge])
        worth = (1 - chance) * len(one) * len(other)
        found.append(Question("bridge", one, other, float(chance), float(worth)))
    return found


def _list_merges(
    label: np.ndarray,
    pairs: PairTable,
    value: np.ndarray,
    limit: int | None,
    representative: np.ndarray | None,
) -> list[Question]:
    """Pairs of clusters (an image without label counts as one) with candidate pairs between."""
    alone = label == UNLABELLED
    group = label.copy()
    group[alone] = label.max(initial=UNLABELLED) + 1 + np.arange(int(alone.sum()))
    if representative is None:
        apart = compare_groups(group, pairs, value)
    else:
        rows = RowGroups.of(representative, group)
        apart = compare_groups(group[rows.rows], *rows.reduce_pairs(pairs, value))
    size = np.bincount(group)
    worth = apart.chance * size[apart.first] * size[apart.second]
    best = np.argsort(-worth, kind="stable")[:limit]
    rows_of = _group_rows(group)
    return [
        Question(
            "merge",
            rows_of[int(apart.first[i])],
            rows_of[int(apart.second[i])],
            float(apart.chance[i]),
            float(worth[i]),
        )
        for i in best
    ]


def _list_clusters(
    label: np.ndarray, precision: np.ndarray, bridges: Sequence[Question]
) -> list[Question]:
    """All of a cluster at once, for its wrong pairs other than those across its last merge."""
    across = {int(label[bridge.one[0]]): bridge.worth for bridge in bridges}
    rows_of = _group_rows(label)
    nothing = np.empty(0, np.int64)
    found = []
    for cluster, expected in enumerate(precision.tolist()):
        rows = rows_of[cluster]
        wrong = (1 - expected) * len(rows) * (len(rows) - 1) / 2
        rest = max(wrong - across.get(cluster, 0.0), 0.0)
        found.append(Question("cluster", rows, nothing, float(expected), rest))
    return found


def _group_rows(group: np.ndarray) -> dict[int, np.ndarray]:
    """Group -> its rows, ascending."""
    order = np.argsort(group, kind="stable")
    names, first = np.unique(group[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, first[1:]), strict=True))
