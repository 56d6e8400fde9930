"""What people said about images, and labels that honour every word of it.

A person who looks at faces knows things no model does: these are one person, those are not, this is
no usable face. Their word is law here; everything they did not speak of is left to the evidence.

The contract:
- Enters: groups of rows that are one person (`same`), pairs of groups that share no person
  (`apart`), rows that get no label (`rejected`). Contradictions are refused, never resolved.
- Leaves: labels in which every `same` group is in one cluster, no cluster holds two rows kept
  apart, and a rejected row has no label. A limit on cluster size does not outrank a person.
- A cluster no correction touches keeps its rows. What people did not name follows the mean log-odds
  of the pairs, as in `cdp.propagation.average_linkage`.
- Results do not depend on the order of the corrections or of the rows inside them.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.errors import DataError
from cdp.propagation.soft_labels import SoftLabels
from cdp.types import UNLABELLED, PairTable

EVIDENCE_LIMIT = 15.0
"""Log-odds beyond this count as this, as in `cdp.propagation.average_linkage`."""


@dataclass(frozen=True)
class Constraints:
    """What is known of `count` rows.

    same : groups of rows, each one person, (g,) int64.
    apart : pairs of groups of rows that show no person in common.
    rejected : (r,) int64 rows that get no label.
    """

    count: int
    same: tuple[np.ndarray, ...] = ()
    apart: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    rejected: np.ndarray | None = None

    def __bool__(self) -> bool:
        return bool(self.same or self.apart or (self.rejected is not None and len(self.rejected)))

    def atoms(self) -> np.ndarray:
        """(count,) int64: rows said to be one person share a number, everybody else has its own."""
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


def find_conflict(corrections: Constraints) -> str | None:
    """Say how corrections contradict each other; None when all can hold at once."""
    atom = corrections.atoms()
    keys = corrections.list_apart(atom)
    clash = keys // corrections.count == keys % corrections.count
    if clash.any():
        row = int(np.flatnonzero(atom == keys[clash][0] // corrections.count)[0])
        return f"the images that are one person with row {row} are also said to be different people"
    if corrections.rejected is not None and len(corrections.rejected):
        size = np.bincount(atom, minlength=1)
        linked = np.asarray(corrections.rejected)[size[atom[corrections.rejected]] > 1]
        if len(linked):
            return f"row {int(linked[0])} is rejected and also said to be one person with others"
    return None


def settle_pairs(pairs: PairTable, probability: np.ndarray, corrections: Constraints) -> np.ndarray:
    """Replace the probability of pairs that people decided, so that the evidence follows them.

    Parameters
    ----------
    pairs : candidate pairs of rows below `corrections.count`.
    probability : (m,) float in [0, 1].

    Returns
    -------
    (m,) of the same dtype: 1 for one person, 0 for different people or a rejected image.
    """
    atom = corrections.atoms()
    one, other = atom[pairs.source], atom[pairs.target]
    settled = np.array(probability, copy=True)
    keys = np.minimum(one, other) * corrections.count + np.maximum(one, other)
    settled[np.isin(keys, corrections.list_apart(atom))] = 0
    settled[one == other] = 1
    if corrections.rejected is not None and len(corrections.rejected):
        out = np.zeros(corrections.count, bool)
        out[corrections.rejected] = True
        settled[out[pairs.source] | out[pairs.target]] = 0
    return settled


def apply_constraints(
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    corrections: Constraints,
    *,
    threshold: float = 0.5,
) -> np.ndarray:
    """Change labels as little as the corrections demand, and make every one of them hold.

    Parameters
    ----------
    label : (n,) int64 pseudo-labels, -1 none; n is `corrections.count`.
    pairs, probability : the candidate pairs, best after `settle_pairs`.
    threshold : probability above which groups that a correction broke off may merge again, in
        (0, 1); where it lies outside, .5.

    Returns
    -------
    (n,) int64, 0 .. clusters - 1 numbered by each cluster's smallest row; -1 for a row alone.

    Raises
    ------
    DataError
        The corrections contradict each other, or speak of another number of rows.

    Source: ours. Rows said to be one person move to the cluster that holds most of them; a cluster
    that holds people kept apart is merged anew from its parts, best mean log-odds first, never
    across a line that people drew.

    Examples
    --------
    >>> pairs = PairTable(np.array([0, 1, 2]), np.array([1, 2, 3]))
    >>> apart = Constraints(4, apart=((np.array([0, 1]), np.array([2, 3])),))
    >>> apply_constraints(np.zeros(4, np.int64), pairs, np.array([0.9, 0.8, 0.9]), apart)
    array([0, 0, 1, 1])
    """
    label = np.asarray(label, np.int64)
    if len(label) != corrections.count:
        raise DataError(
            f"expected corrections of {len(label)} rows, got those of {corrections.count}"
        )
    if not corrections:
        return label.copy()
    conflict = find_conflict(corrections)
    if conflict:
        raise DataError(f"the corrections contradict each other: {conflict}. Undo one of them")
    atom = corrections.atoms()
    keys = corrections.list_apart(atom)
    rejected = np.zeros(len(label), bool)
    if corrections.rejected is not None:
        rejected[corrections.rejected] = True

    group = label.copy()
    lone = (label == UNLABELLED) | rejected
    group[lone] = label.max(initial=UNLABELLED) + 1 + np.arange(int(lone.sum()))
    home = _find_homes(atom, group, label)
    broken = set(group[home != group].tolist()) | set(home[home != group].tolist())
    low, high = keys // len(label), keys % len(label)
    home_of = np.empty(len(label), np.int64)
    home_of[atom] = home
    split = set(home_of[low[home_of[low] == home_of[high]]].tolist())
    # What is merged anew: the atoms of a cluster with a line through it one by one, the remains
    # and the gains of a cluster that lost or won rows as they are.
    affected = np.isin(home, list(broken | split)) & ~rejected
    fine = np.isin(home, list(split))
    node = np.where(fine, atom, len(label) + home)
    region = _find_regions(group, home)
    near = affected[pairs.source] & (region[pairs.source] == region[pairs.target])
    near &= affected[pairs.target]
    joints = pairs.take(near)
    merged = _merge_nodes(
        node, atom, affected, joints, np.asarray(probability)[near], keys, _find_log_odds(threshold)
    )
    final = np.where(affected, merged, 2 * len(label) + node)
    final[rejected] = 4 * len(label) + group.max(initial=0) + np.flatnonzero(rejected)
    return _number(final)


def bar_labels(soft: SoftLabels, label: np.ndarray, corrections: Constraints) -> SoftLabels:
    """Take from soft labels what people ruled out; what is left of a row sums to 1 again.

    soft : weights spread from `label`, labels that honour the corrections.
    """
    atom, clusters = corrections.atoms(), int(label.max(initial=UNLABELLED)) + 1
    barred = [np.empty(0, np.int64)]
    for pair in corrections.apart:
        for here, there in (pair, pair[::-1]):
            rows = np.flatnonzero(np.isin(atom, atom[here]))
            others = np.unique(label[there])
            others = others[others != UNLABELLED]
            barred.append((rows[:, None] * clusters + others).ravel())
    kept = ~np.isin(soft.row * clusters + soft.label, np.concatenate(barred))
    if corrections.rejected is not None:
        kept &= ~np.isin(soft.row, corrections.rejected)
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
    """(n,) clusters that exchange rows are one region; merging anew stays inside it."""
    count = int(group.max()) + 1
    links = coo_matrix((np.ones(len(group)), (group, home)), shape=(count, count))
    return connected_components(links, directed=False)[1][home].astype(np.int64)


def _find_log_odds(threshold: float) -> float:
    if not 0 < threshold < 1:
        return 0.0
    return math.log(threshold) - math.log1p(-threshold)


def _merge_nodes(
    node: np.ndarray,
    atom: np.ndarray,
    affected: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    keys: np.ndarray,
    stop: float,
) -> np.ndarray:
    """(n,) the node each affected row ends in: average linkage that never crosses a line."""
    count = len(node)
    evidence: dict[int, dict[int, tuple[float, int]]] = defaultdict(dict)
    one, other = node[pairs.source], node[pairs.target]
    value = np.clip(probability.astype(np.float64), 1e-12, 1 - 1e-7)
    odds = np.clip(np.log(value) - np.log1p(-value), -EVIDENCE_LIMIT, EVIDENCE_LIMIT)
    said = zip(one.tolist(), other.tolist(), odds.tolist(), pairs.weight.tolist(), strict=True)
    for a, b, v, times in said:
        if a != b:
            total, number = evidence[a].get(b, (0.0, 0))
            evidence[a][b] = evidence[b][a] = (total + times * v, number + times)
    enemies: dict[int, set[int]] = defaultdict(set)
    nodes_of: dict[int, set[int]] = defaultdict(set)
    rows = np.flatnonzero(affected)
    for a, n in zip(atom[rows].tolist(), node[rows].tolist(), strict=True):
        nodes_of[a].add(n)
    for low, high in zip((keys // count).tolist(), (keys % count).tolist(), strict=True):
        for a in nodes_of.get(low, ()):
            for b in nodes_of.get(high, ()):
                enemies[a].add(b)
                enemies[b].add(a)
    final = _agglomerate_apart(evidence, enemies, stop)
    merged = node.copy()
    merged[rows] = [_follow(final, each) for each in node[rows].tolist()]
    return merged


def _agglomerate_apart(
    evidence: dict[int, dict[int, tuple[float, int]]], enemies: dict[int, set[int]], stop: float
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
        if a in went or b in went or b in enemies[a]:
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
        for enemy in enemies.pop(b, set()):
            enemies[enemy].discard(b)
            enemies[enemy].add(a)
            enemies[a].add(enemy)
    return went


def _follow(went: dict[int, int], node: int) -> int:
    while node in went:
        node = went[node]
    return node


def _number(group: np.ndarray) -> np.ndarray:
    """Groups -> labels by smallest row; a row alone has none."""
    _, first, place, size = np.unique(
        group, return_index=True, return_inverse=True, return_counts=True
    )
    label = np.full(len(size), UNLABELLED, np.int64)
    several = np.flatnonzero(size > 1)
    label[several[np.argsort(first[several])]] = np.arange(len(several))
    return label[place]
