"""Do the labelled images differ from the unlabelled ones as a set: sharper, another camera?

The contract:
- Leaves: a reason why the labelled images are not like the unlabelled ones, or "".
- `describe_difference` looks at embeddings: how well one linear function of them separates the
  sets. `find_unlike` says which labelled rows it separates, where a part of them differs. No person
  is on both sides of the fit, so nobody's looks count, and what is left is how the images were
  taken.
- `describe_gap` looks at joint graphs, for degraded copies: the neighbours of a copy that are not
  of its identity. If both sets are alike, copies are among them by chance.

Source: classifier two-sample tests (Lopez-Paz & Oquab 2017), the nearest-neighbour test of two
samples (Schilling 1986); holding out whole people, and leaving out the own identity, are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import limit_blas
from cdp.mediator.curriculum import JointSet
from cdp.types import UNLABELLED, Graph, KnnGraph, View, load_graph, load_view

MOST_SEPARATE = 0.75
"""How well the sets may be separated, see `measure_separation`: .39 to .55 on LFW at 24 px, with 20
people, with labelled people in the pile and on synthetic sets, .58 to .60 on sets of 72 frequent
people (15 draws); .44 to .51 with 45 people of 14, 3 or 1 photos of the pile's quality, .65 where
half of them are sharp, .87 to 1 with sharp photos and a poor pile (12 draws each); .89 with sharp
photos that a run reduced to 24 px as it did the pile's."""
UNLIKE_RANK = 0.9
"""Share of the unlabelled rows, above which a labelled row is further out than is usual."""
MOST_UNLIKE = 0.2
"""Share of labelled rows above `UNLIKE_RANK`, less two standard errors: at most .14 on LFW at 24
and 16 px with all, 20 or only frequent people, with 45 people of 14 or 3 photos of the pile's
quality, and on synthetic sets (38 draws); .26 to .67 where half of the photos are sharp, .09 to .33
where a quarter is (12 draws each)."""
LEAST_PEOPLE = 8
"""Fewer people in either set are not compared."""
PILE_ROWS = 20_000
"""Most unlabelled rows that are looked at."""
MOST_FREQUENT = 1.25
"""Times that copies may be as frequent as by chance: 1.0 to 1.1 at 16 px of surveillance, where
training on them alone is best, and 1.6 to 1.9 on 14 to 40 px with little noise, where it costs 5
points of F and more (draws 0 and 1)."""
DEVIATIONS = 1.0
"""Standard deviations of the count by chance that come on top."""


def describe_difference(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    seed: int = 0,
) -> str:
    """Why the labelled images cannot stand for the unlabelled ones; "" where they can.

    Parameters as of `separate_sets`.
    """
    found = measure_separation(labelled, identity, unlabelled, graph, seed=seed)
    if found <= MOST_SEPARATE:
        return ""
    return (
        "the labelled images differ from the unlabelled ones, as sharp photos differ from those of "
        "a camera: by an embedding alone, whoever is shown, a labelled one is recognised as "
        f"labelled in at least {found:.0%} of all comparisons with an unlabelled one (half by "
        "chance)"
    )


def measure_separation(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    seed: int = 0,
) -> float:
    """How well one linear function of an embedding separates the labelled from the unlabelled rows.

    Parameters as of `separate_sets`.

    Returns
    -------
    float: the probability that a labelled image has the higher value, the mean over people less two
        standard errors (of both sets' people), of the model that separates best. 0 with fewer than
        `LEAST_PEOPLE` people in either set.
    """
    found = separate_sets(labelled, identity, unlabelled, graph, seed=seed)
    return max((each.separation for each in found), default=0.0)


def find_unlike(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Which labelled rows are unlike the unlabelled ones, where a part of them is.

    Parameters as of `separate_sets`.

    Returns
    -------
    (l,) bool: the rows above `UNLIKE_RANK` of the unlabelled ones, where they are more than
        `MOST_UNLIKE` of all; none where the sets are alike, nor where they differ as a whole
        (`describe_difference`).
    """
    found = separate_sets(labelled, identity, unlabelled, graph, seed=seed)
    none = np.zeros(len(identity), bool)
    if not found or max(each.separation for each in found) > MOST_SEPARATE:
        return none
    furthest = max(found, key=lambda each: each.unlike)
    return furthest.rank > UNLIKE_RANK if furthest.unlike > MOST_UNLIKE else none


@dataclass(frozen=True)
class Separation:
    """How one model separates two sets.

    rank : (l,) float64, the share of the unlabelled rows that have a lower value than each labelled
        row. separation : its mean over people less two standard errors of both sets' people.
    unlike : the share of labelled rows above `UNLIKE_RANK`, the mean over people less two standard
        errors.
    """

    rank: np.ndarray
    separation: float
    unlike: float


def separate_sets(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    seed: int = 0,
) -> list[Separation]:
    """Separate the labelled from the unlabelled rows by one linear function of each embedding.

    The people of both sets are halved. The function is fitted on one half, and its value for the
    labelled images of the other half is compared with that for the unlabelled ones of the other
    half, and the other way round.

    Parameters
    ----------
    labelled : one (l, d_v) array a model, or a function that loads it.
    identity : (l,) int64, of the labelled rows.
    unlabelled : one (n, d_v) array of the same model each, or functions.
    graph : of the unlabelled rows, or a function that loads it: rows that are linked by their
        first neighbours count as one person.
    seed : of the halves, and of the choice of `PILE_ROWS` rows.

    Returns
    -------
    One `Separation` a model; none with fewer than `LEAST_PEOPLE` people in either set.
    """
    random = np.random.default_rng([seed, 0x676170])
    named = _halve(np.asarray(identity), random)
    group = _group_neighbours(load_graph(graph).neighbour[:, 0])
    rows = np.sort(random.permutation(len(group))[:PILE_ROWS])
    rest = _halve(group[rows], random)
    if min(len(named.second), len(rest.second)) < LEAST_PEOPLE:
        return []
    with limit_blas():
        return [
            _separate(load_view(one), named, load_view(other)[rows], rest)
            for one, other in zip(labelled, unlabelled, strict=True)
        ]


@dataclass(frozen=True)
class _People:
    """person : (n,) int64, 0.., of each row. second : (people,) bool, who is in the second half."""

    person: np.ndarray
    second: np.ndarray

    @property
    def side(self) -> np.ndarray:
        """(n,) bool, whether each row is in the second half."""
        return self.second[self.person]

    def average(self, values: np.ndarray) -> tuple[float, float]:
        """The mean over people of (n,) values, and its standard error."""
        mean = np.bincount(self.person, values) / np.bincount(self.person)
        return float(mean.mean()), float(mean.std(ddof=1) / np.sqrt(len(mean)))


def _halve(identity: np.ndarray, random: np.random.Generator) -> _People:
    people, person = np.unique(identity, return_inverse=True)
    return _People(person, random.permutation(len(people)) % 2 == 1)


def _group_neighbours(nearest: np.ndarray) -> np.ndarray:
    """(n,) int32, rows that are linked by their first neighbours, (n,) int64, have one number."""
    row = np.arange(len(nearest))
    other = np.where(nearest == UNLABELLED, row, nearest)
    links = coo_matrix((np.ones(len(row), np.int8), (row, other)), (len(row), len(row)))
    return np.asarray(connected_components(links, directed=False)[1])


def _separate(labelled: np.ndarray, named: _People, pile: np.ndarray, rest: _People) -> Separation:
    """`separate_sets` of one model."""
    own, other = (make_unit(view)[0] for view in (labelled, pile))
    size = 1 / np.bincount(named.person)[named.person]
    above, below = np.empty(len(own)), np.empty(len(other))
    for second in (False, True):
        fitted, judged = named.side == second, named.side != second
        others = rest.side != second
        way = np.average(own[fitted], 0, size[fitted]) - other[~others].mean(0)
        values, other_values = own[judged] @ way, other[others] @ way
        above[judged] = _rank(values, other_values)
        below[others] = 1 - _rank(other_values, values)
    mean, error = named.average(above)
    share, deviation = named.average((above > UNLIKE_RANK).astype(np.float64))
    bound = mean - 2 * float(np.hypot(error, rest.average(below)[1]))
    return Separation(above, bound, share - 2 * deviation)


def _rank(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The share of `among` that each value exceeds."""
    return np.asarray(np.searchsorted(np.sort(among), values) / len(among))


def describe_unlike(unlike: int, labelled: int) -> str:
    """Why no quality is estimated where a part of the labelled images was left out; "" if none."""
    if not unlike:
        return ""
    return (
        f"{unlike} of {labelled} labelled images differ from the unlabelled ones, as sharp photos "
        "do from those of a camera, and were not trained on; others of the kind may have been"
    )


def describe_gap(joint: JointSet, unlabelled_count: int) -> str:
    """Why degraded copies cannot stand for the unlabelled images; "" where they can.

    Parameters
    ----------
    joint : copies and unlabelled rows; copies have their full lists.
    unlabelled_count : number of all unlabelled rows, of which `joint` may have a part.
    """
    counts = [
        _count_labelled(load_graph(each), joint.identity, unlabelled_count) for each in joint.graphs
    ]
    found, expected = np.mean(counts, axis=0)
    if found <= MOST_FREQUENT * expected + DEVIATIONS * np.sqrt(MOST_FREQUENT * expected):
        return ""
    return (
        "even degraded until they look like the unlabelled images, the labelled ones differ "
        "from them: among the neighbours of a copy that show others, copies are "
        f"{found / max(expected, 1e-9):.1f} times as frequent as by chance"
    )


def _count_labelled(
    graph: KnnGraph, identity: np.ndarray, unlabelled_count: int
) -> tuple[float, float]:
    """Labelled neighbours of another identity, in the lists of labelled rows; as many by chance."""
    labelled = np.flatnonzero(identity != UNLABELLED)
    own, listed = identity[labelled], graph.neighbour[labelled]
    inside = (listed >= 0) & (listed < len(identity))
    named = np.where(inside, identity[np.where(inside, listed, 0)], UNLABELLED)
    of_other = (listed >= 0) & (named != own[:, None])
    _, number, size = np.unique(own, return_inverse=True, return_counts=True)
    others = len(own) - size[number]
    share = others / np.maximum(others + unlabelled_count, 1)
    found = (of_other & (named != UNLABELLED)).sum()
    return float(found), float((share * of_other.sum(axis=1)).sum())
