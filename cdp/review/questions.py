"""What to ask a person first: the questions whose answers put most pairs of images right.

The contract:
- Enters: labels, the scored candidate pairs and their calibrated probabilities. No truth.
- A question shows one or two groups of rows. `bridge`: do the two sides of a cluster's weakest
  joint belong together? `merge`: are two clusters one person? `cluster`: is all of it one person?
- Its worth is the expected number of wrong pairs of images an answer removes: the chance that what
  the labels claim is wrong, times the pairs at stake. All kinds are on that one scale.
- Order: worth, then larger groups, then smaller rows. The same input gives the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.quality import compare_groups, estimate_quality
from cdp.review.constraints import Constraints
from cdp.types import UNLABELLED, PairTable

Kind = Literal["bridge", "merge", "cluster"]


@dataclass(frozen=True)
class Question:
    """One question about one cluster or two.

    one, other : (a,), (b,) int64 rows, ascending; `other` is empty for `cluster`.
    chance : probability, in [0, 1], that the two groups are one person; for `cluster` the expected
        share of its pairs that are.
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
    kinds: tuple[Kind, ...] = ("bridge", "merge", "cluster"),
    limit: int | None = None,
) -> list[Question]:
    """The most useful questions about a clustering, best first.

    Parameters
    ----------
    label : (n,) int64, 0 .. clusters - 1; -1 none.
    pairs : all candidate pairs.
    probability : (m,) float in [0, 1], calibrated.
    kinds : which to ask. limit : how many at most.

    Source: ours; the expected pairs follow `cdp.propagation.quality`.
    """
    label = np.asarray(label, np.int64)
    value = np.asarray(probability, np.float64)
    questions: list[Question] = []
    bridges = _list_bridges(label, pairs, value) if {"bridge", "cluster"} & set(kinds) else []
    if "bridge" in kinds:
        questions += bridges
    if "merge" in kinds:
        questions += _list_merges(label, pairs, value, limit)
    if "cluster" in kinds:
        questions += _list_clusters(label, pairs, value, bridges)
    questions.sort(key=_order)
    return questions[:limit]


def filter_answered(
    questions: Sequence[Question],
    corrections: Constraints,
    *,
    checked: Collection[frozenset[int]] = (),
) -> list[Question]:
    """The questions whose answer does not follow from what people said already, in their order.

    checked : groups of rows somebody looked through whole, about which `cluster` is not asked.
    """
    atom = corrections.atoms()
    apart = corrections.list_apart(atom)
    has_line = np.zeros(len(atom) + 1, bool)
    has_line[apart // len(atom)] = has_line[apart % len(atom)] = True
    found = []
    for question in questions:
        one, other = atom[question.one], atom[question.other]
        if (one == one[0]).all() and (other == one[0]).all():
            continue
        if question.kind == "cluster" and frozenset(question.one.tolist()) in checked:
            continue
        if has_line[one].any() and has_line[other].any():
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
    """For each cluster the two sides that average linkage would join last."""
    inside = (label[pairs.source] == label[pairs.target]) & (label[pairs.source] != UNLABELLED)
    within = pairs.take(inside)
    tree = agglomerate(within, value[inside], len(label), threshold=1e-12)
    if not len(tree.merge):
        return []
    # The last merge inside each cluster is its weakest joint.
    cluster = label[tree.merge[:, 0]]
    last = len(cluster) - 1 - np.unique(cluster[::-1], return_index=True)[1]
    rest = np.delete(tree.merge, last, axis=0)
    links = coo_matrix((np.ones(len(rest)), (rest[:, 0], rest[:, 1])), shape=(len(label),) * 2)
    side = connected_components(links, directed=False)[1]
    size = np.bincount(label[label != UNLABELLED])
    rows_of = _group_rows(side)
    found = []
    for joint in last.tolist():
        one, other = (rows_of[int(side[row])] for row in tree.merge[joint])
        if len(one) + len(other) != size[label[one[0]]]:
            continue  # held together by a person's word, not by pairs
        if len(one) < len(other):
            one, other = other, one
        chance = 1 / (1 + np.exp(-tree.height[joint]))
        worth = (1 - chance) * len(one) * len(other)
        found.append(Question("bridge", one, other, float(chance), float(worth)))
    return found


def _list_merges(
    label: np.ndarray, pairs: PairTable, value: np.ndarray, limit: int | None
) -> list[Question]:
    """Pairs of clusters (an image without label counts as one) with candidate pairs between."""
    lone = label == UNLABELLED
    group = label.copy()
    group[lone] = label.max(initial=UNLABELLED) + 1 + np.arange(int(lone.sum()))
    apart = compare_groups(group, pairs, value)
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
    label: np.ndarray, pairs: PairTable, value: np.ndarray, bridges: Sequence[Question]
) -> list[Question]:
    """All of a cluster at once, for what is wrong in it beside its weakest joint."""
    joint = {int(label[bridge.one[0]]): bridge.worth for bridge in bridges}
    precision = estimate_quality(label, pairs, value).expected_precision
    rows_of = _group_rows(label)
    nothing = np.empty(0, np.int64)
    found = []
    for cluster, expected in enumerate(precision.tolist()):
        rows = rows_of[cluster]
        wrong = (1 - expected) * len(rows) * (len(rows) - 1) / 2
        rest = max(wrong - joint.get(cluster, 0.0), 0.0)
        found.append(Question("cluster", rows, nothing, float(expected), rest))
    return found


def _group_rows(group: np.ndarray) -> dict[int, np.ndarray]:
    """Group -> its rows, ascending."""
    order = np.argsort(group, kind="stable")
    names, first = np.unique(group[order], return_index=True)
    return dict(zip(names.tolist(), np.split(order, first[1:]), strict=True))
