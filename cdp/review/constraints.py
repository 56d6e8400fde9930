"""Reviewer constraints (must-link, cannot-link, rejected images), and labels that satisfy them all.

A person who looks at faces decides some pairs with certainty: these images show one person, those
do not, this is no usable face. Labels follow these decisions exactly; unconstrained pairs follow
their scores.

The contract:
- Enters: groups of rows that are one identity (`same`, must-link), pairs of groups that share no
  identity (`apart`, cannot-link), rows that get no label (`rejected`). Contradictions are refused,
  never resolved.
- Leaves: labels in which every `same` group is in one cluster, no cluster holds two rows kept
  apart, and a rejected row has no label. Constraints outrank a limit on cluster size.
- A cluster that no constraint touches keeps its rows. Unconstrained rows follow the mean log-odds
  of the pairs, as in `cdp.propagation.average_linkage`.
- Results do not depend on the order of the constraints or of the rows inside them.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.arrays.log_odds import convert_threshold, to_log_odds
from cdp.errors import DataError
from cdp.propagation.average_linkage import LOG_ODDS_LIMIT
from cdp.propagation.soft_labels import SoftLabels
from cdp.types import UNLABELLED, PairTable


@dataclass(frozen=True)
class Constraints:
    """Decisions about `count` rows.

    same : groups of rows, each one identity, (g,) int64: must-link.
    apart : pairs of groups of rows without an identity in common: cannot-link.
    rejected : (r,) int64 rows that get no label.
    """

    count: int
    same: tuple[np.ndarray, ...] = ()
    apart: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    rejected: np.ndarray | None = None

    def __bool__(self) -> bool:
        return bool(self.same or self.apart or (self.rejected is not None and len(self.rejected)))

    def link_rows(self) -> np.ndarray:
        """(count,) int64: rows linked by `same` share a number, any other row has its own.

        The rows of one number are an *atom*: no label separates them.
        """
        groups = [np.asarray(group, np.int64) for group in self.same if len(group) > 1]
        first = np.concatenate([group[:-1] for group in groups] or [np.empty(0, np.int64)])
        second = np.concatenate([group[1:] for group in groups] or [np.empty(0, np.int64)])
        links = coo_matrix((np.ones(len(first)), (first, second)), shape=(self.count, self.count))
        return connected_components(links, directed=False)[1].astype(np.int64)

    def list_apart(self, atom: np.ndarray) -> np.ndarray:
        """Pairs of atoms kept apart as sorted unique keys, low * count + high."""
        keys = [np.empty(0, np.int64)]
        for one, other in self.apart:
            first, second = np.unique(atom[one]), np.unique(atom[other])
            low = np.minimum(first[:, None], second)
            keys.append((low * self.count + np.maximum(first[:, None], second)).ravel())
        return np.unique(np.concatenate(keys))


def find_conflict(constraints: Constraints) -> str | None:
    """Describe how constraints contradict each other; None when all can hold at once."""
    atom = constraints.link_rows()
    keys = constraints.list_apart(atom)
    clash = keys // constraints.count == keys % constraints.count
    if clash.any():
        row = int(np.flatnonzero(atom == keys[clash][0] // constraints.count)[0])
        return f"the images linked to row {row} as one person are also marked as different people"
    if constraints.rejected is not None and len(constraints.rejected):
        size = np.bincount(atom, minlength=1)
        linked = np.asarray(constraints.rejected)[size[atom[constraints.rejected]] > 1]
        if len(linked):
            return f"row {int(linked[0])} is rejected and also linked to others as one person"
    return None


def settle_pairs(pairs: PairTable, probability: np.ndarray, constraints: Constraints) -> np.ndarray:
    """Replace the probability of pairs that constraints decide by 1 or 0.

    Parameters
    ----------
    pairs : candidate pairs of rows below `constraints.count`.
    probability : (m,) float in [0, 1].

    Returns
    -------
    (m,) of the same dtype: 1 for one identity, 0 for two identities or a rejected image.
    """
    atom = constraints.link_rows()
    one, other = atom[pairs.source], atom[pairs.target]
    settled = np.array(probability, copy=True)
    keys = np.minimum(one, other) * constraints.count + np.maximum(one, other)
    settled[np.isin(keys, constraints.list_apart(atom))] = 0
    settled[one == other] = 1
    if constraints.rejected is not None and len(constraints.rejected):
        out = np.zeros(constraints.count, bool)
        out[constraints.rejected] = True
        settled[out[pairs.source] | out[pairs.target]] = 0
    return settled


def apply_constraints(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    constraints: Constraints,
    *,
    threshold: float = 0.5,
) -> np.ndarray:
    """Change labels as little as the constraints demand, so that all of them are satisfied.

    Parameters
    ----------
    label : (n,) int64 pseudo-labels, -1 none; n is `constraints.count`.
    pairs, probability : the candidate pairs, best after `settle_pairs`.
    threshold : probability above which groups that a constraint split off may merge again, in
        (0, 1); where it lies outside, .5.

    Returns
    -------
    (n,) int64, 0 .. clusters - 1 numbered by each cluster's smallest row; -1 for a row alone.

    Raises
    ------
    DataError
        The constraints contradict each other, or are of another number of rows.

    Source: ours. Linked rows move to the cluster that holds most of them; a cluster that holds rows
    kept apart is merged anew from its parts, best mean log-odds first, never across a cannot-link.

    Examples
    --------
    >>> pairs = PairTable(np.array([0, 1, 2]), np.array([1, 2, 3]))
    >>> apart = Constraints(4, apart=((np.array([0, 1]), np.array([2, 3])),))
    >>> apply_constraints(np.zeros(4, np.int64), pairs, np.array([0.9, 0.8, 0.9]), apart)
    array([0, 0, 1, 1])
    """
    label = np.asarray(label, np.int64)
    if len(label) != constraints.count:
        raise DataError(
            f"expected constraints on {len(label)} rows, got those on {constraints.count}"
        )
    if not constraints:
        return label.copy()
    conflict = find_conflict(constraints)
    if conflict:
        raise DataError(f"the constraints contradict each other: {conflict}. Undo one of them")
    atom = constraints.link_rows()
    keys = constraints.list_apart(atom)
    rejected = np.zeros(len(label), bool)
    if constraints.rejected is not None:
        rejected[constraints.rejected] = True

    group = label.copy()
    single = (label == UNLABELLED) | rejected
    group[single] = label.max(initial=UNLABELLED) + 1 + np.arange(int(single.sum()))
    home = _find_homes(atom, group, label)
    changed = set(group[home != group].tolist()) | set(home[home != group].tolist())
    low, high = keys // len(label), keys % len(label)
    home_of = np.empty(len(label), np.int64)
    home_of[atom] = home
    split = set(home_of[low[home_of[low] == home_of[high]]].tolist())
    # Merged anew are the atoms of a cluster with a cannot-link inside, one by one, and the rest and
    # the gains of a cluster that lost or gained rows, each as one node.
    affected = np.isin(home, list(changed | split)) & ~rejected
    node = np.where(np.isin(home, list(split)), atom, len(label) + home)
    region = _find_regions(group, home)
    near = affected[pairs.source] & (region[pairs.source] == region[pairs.target])
    near &= affected[pairs.target]
    stop = convert_threshold(threshold) if 0 < threshold < 1 else 0.0
    merged = _merge_nodes(
        node, atom, affected, pairs.take(near), np.asarray(probability)[near], keys, stop
    )
    final = np.where(affected, merged, 2 * len(label) + node)
    final[rejected] = 4 * len(label) + group.max(initial=0) + np.flatnonzero(rejected)
    return _number(final)


def bar_labels(soft: SoftLabels, label: np.ndarray, constraints: Constraints) -> SoftLabels:
    """Remove soft labels that constraints rule out; the rest of a row is rescaled to sum to 1.

    soft : weights diffused from `label`, labels that satisfy the constraints.
    """
    atom, clusters = constraints.link_rows(), int(label.max(initial=UNLABELLED)) + 1
    barred = [np.empty(0, np.int64)]
    for pair in constraints.apart:
        for here, there in (pair, pair[::-1]):
            rows = np.flatnonzero(np.isin(atom, atom[here]))
            others = np.unique(label[there])
            others = others[others != UNLABELLED]
            barred.append((rows[:, None] * clusters + others).ravel())
    kept = ~np.isin(soft.row * clusters + soft.label, np.concatenate(barred))
    if constraints.rejected is not None:
        kept &= ~np.isin(soft.row, constraints.rejected)
    row, weight = soft.row[kept], soft.weight[kept]
    total = np.bincount(row, weight, len(label))
    return SoftLabels(row, soft.label[kept], (weight / total[row]).astype(np.float32))


def _find_homes(atom: np.ndarray, group: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(n,) the group to which each row's atom belongs: where most of its labelled rows are."""
    linked = np.bincount(atom)[atom] > 1
    home = group.copy()
    rows = np.flatnonzero(linked)
    if not len(rows):
        return home
    table, count = np.unique(
        np.stack([atom[rows], label[rows] == UNLABELLED, group[rows]], axis=1),
        axis=0,
        return_counts=True,
    )
    order = np.lexsort((table[:, 2], -count, table[:, 1], table[:, 0]))
    first = order[np.unique(table[order, 0], return_index=True)[1]]
    chosen = dict(zip(table[first, 0].tolist(), table[first, 2].tolist(), strict=True))
    home[rows] = [chosen[each] for each in atom[rows].tolist()]
    return home


def _find_regions(group: np.ndarray, home: np.ndarray) -> np.ndarray:
    """(n,) regions: clusters that exchange rows are one, and merging anew stays inside it."""
    count = int(group.max()) + 1
    links = coo_matrix((np.ones(len(group)), (group, home)), shape=(count, count))
    return connected_components(links, directed=False)[1][home].astype(np.int64)


def _merge_nodes(
    node: np.ndarray,
    atom: np.ndarray,
    affected: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    keys: np.ndarray,
    stop: float,
) -> np.ndarray:
    """(n,) the node each affected row ends in: average linkage that never crosses a cannot-link."""
    evidence = _sum_evidence(node[pairs.source], node[pairs.target], probability, pairs.weight)
    rows = np.flatnonzero(affected)
    nodes_of: dict[int, set[int]] = defaultdict(set)
    for a, n in zip(atom[rows].tolist(), node[rows].tolist(), strict=True):
        nodes_of[a].add(n)
    barred: dict[int, set[int]] = defaultdict(set)
    for key in keys.tolist():
        low, high = divmod(key, len(node))
        for a in nodes_of.get(low, ()):
            for b in nodes_of.get(high, ()):
                barred[a].add(b)
                barred[b].add(a)
    final = _agglomerate_apart(evidence, barred, stop)
    merged = node.copy()
    merged[rows] = [_follow(final, each) for each in node[rows].tolist()]
    return merged


Evidence = dict[int, dict[int, tuple[float, int]]]
"""Node -> other node -> (sum of weighted log-odds, sum of weights) of the pairs between them."""


def _sum_evidence(
    one: np.ndarray, other: np.ndarray, probability: np.ndarray, weight: np.ndarray
) -> Evidence:
    evidence: Evidence = defaultdict(dict)
    log_odds = to_log_odds(probability, LOG_ODDS_LIMIT)
    for a, b, value, times in zip(
        one.tolist(), other.tolist(), log_odds.tolist(), weight.tolist(), strict=True
    ):
        if a != b:
            total, number = evidence[a].get(b, (0.0, 0))
            evidence[a][b] = evidence[b][a] = (total + times * value, number + times)
    return evidence


def _agglomerate_apart(
    evidence: Evidence, barred: dict[int, set[int]], stop: float
) -> dict[int, int]:
    """Merge nodes while the best mean exceeds `stop`; return node -> the node it went into."""
    heap = [
        (-total / number, a, b, number)
        for a, others in evidence.items()
        for b, (total, number) in others.items()
        if a < b
    ]
    heapq.heapify(heap)
    went: dict[int, int] = {}
    while heap:
        mean, a, b, number = heapq.heappop(heap)
        if -mean <= stop:
            break
        if a in went or b in went or b in barred[a]:
            continue
        total, current = evidence[a][b]
        if current != number or -total / current != mean:
            continue  # superseded by a later sum
        went[b] = a
        for each, (gained, gain) in evidence.pop(b).items():
            del evidence[each][b]
            if each == a:
                continue
            total, current = evidence[a].get(each, (0.0, 0))
            evidence[a][each] = evidence[each][a] = (total + gained, current + gain)
            low, high = min(a, each), max(a, each)
            heapq.heappush(heap, (-(total + gained) / (current + gain), low, high, current + gain))
        for each in barred.pop(b, set()):
            barred[each].discard(b)
            barred[each].add(a)
            barred[a].add(each)
    return went


def _follow(went: dict[int, int], node: int) -> int:
    while node in went:
        node = went[node]
    return node


def _number(group: np.ndarray) -> np.ndarray:
    """Groups -> labels numbered by smallest row; a row alone has none."""
    _, first, place, size = np.unique(
        group, return_index=True, return_inverse=True, return_counts=True
    )
    label = np.full(len(size), UNLABELLED, np.int64)
    several = np.flatnonzero(size > 1)
    label[several[np.argsort(first[several])]] = np.arange(len(several))
    return label[place]
