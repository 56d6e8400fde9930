"""Sizes of people: have the labelled people as many images as those of the unlabelled set?

The contract:
- Size is measured alike in both sets: the neighbours of an image above the median cosine of genuine
  pairs (two images of one labelled person), k at most. In the unlabelled set, as many as impostor
  pairs reach are subtracted; in the labelled set genuine pairs alone count.
- No person stands for more than `MOST_SHARE` of the images of either set. Which share an unlabelled
  person has is measured among a sample of the rows, for lists name k at most.
- Leaves: the logarithm of the ratio of both means, and a reason why the labelled people have too
  few images, or "".

Source: ours. A mediator trained on people of few images has seen no neighbour list full of one
person, and splits the people who fill theirs.
"""

from __future__ import annotations

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import limit_blas
from cdp.types import UNLABELLED, KnnGraph, View, load_view

LARGEST_GAP = 0.55
"""The largest logarithm of the ratio of sizes at which labels train a mediator. On LFW it was -.14
to .42 with all images of the labelled people (24 draws), where a mediator is better than votes, and
-.73 to .40 where one unlabelled person is half of the images. With at most 20, 16 or 12 images of
each it was .63 to .70, .76 to .86 and .86 to 1.01 at 24 px, and pairwise F .97 to .99, .54 to .78
and .25 to .54 (votes .93 to .99); at 16 px .57 to .61, .55 to .71 and .75 to .91, and F .72 to .82,
.68 and .24 to .52 (votes .89 to .93). On a synthetic set of people of four images or one it was .2
with three labelled images each, where F was .83 to .88 (votes .65 to .71)."""
MOST_SHARE = 0.05
"""Share of the images of a set that one person stands for at most."""
COMPARED_ROWS = 2_000
"""Most rows of either set that are compared."""


def describe_size_gap(
    unit: np.ndarray, identity: np.ndarray, unlabelled: View, graph: KnnGraph
) -> str:
    """Why the labelled people have too few images to train a mediator; "" where they have not.

    Parameters as of `measure_size_gap`.
    """
    gap = measure_size_gap(unit, identity, unlabelled, graph)
    if gap <= LARGEST_GAP:
        return ""
    return (
        f"people of the unlabelled images have about {np.exp(gap):.1f} times as many images as the "
        "labelled ones, and a mediator trained on few images of each would split them; labelling "
        "all images of a few frequent people would help"
    )


def measure_size_gap(
    unit: np.ndarray, identity: np.ndarray, unlabelled: View, graph: KnnGraph
) -> float:
    """How much larger the people of the unlabelled set are than the labelled ones.

    Parameters
    ----------
    unit : (n, d) float32 unit rows, the base embeddings of the labelled images.
    identity : (n,) int64, the person of each, 0 or more.
    unlabelled : (m, d), the base embeddings of the unlabelled images, checked before, or a function
        that loads them.
    graph : their graph.

    Returns
    -------
    float: the logarithm of the ratio of the mean sizes; 0 where one of the two cannot be measured,
        as where other people's images fill the lists by chance.
    """
    level, own = _count_own(unit, identity)
    own = np.minimum(own, graph.k)
    some = _choose_evenly(np.arange(len(unit)), COMPARED_ROWS)
    with limit_blas():
        above = unit[some] @ unit.T > level
    others = identity[some, None] != identity
    chance = float((above & others).sum() / max(others.sum(), 1))
    if not own.any() or chance * len(graph) >= graph.k:
        return 0.0
    near = ((graph.similarity > level) & (graph.neighbour != UNLABELLED)).sum(axis=1)
    near = near - chance * len(graph)
    seen = np.flatnonzero(near > 0)
    if not len(seen):
        return 0.0
    chosen = _choose_evenly(seen, COMPARED_ROWS)
    wanted = _average(near[chosen], _estimate_shares(unlabelled, chosen, level))
    shown = np.flatnonzero(own)
    images = np.bincount(identity[shown])[identity[shown]]
    return float(np.log(wanted / _average(own[shown], images / len(shown))))


def _count_own(unit: np.ndarray, identity: np.ndarray) -> tuple[np.float32, np.ndarray]:
    """The median cosine of two images of one person, the median over people; and how many of its
    person's others are above it, (n,) int64, for each image."""
    order = np.argsort(identity, kind="stable")
    people = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    several = [rows for rows in people if len(rows) > 1]
    own = np.zeros(len(unit), np.int64)
    if not several:
        return np.float32(1), own
    with limit_blas():
        cosines = [unit[rows] @ unit[rows].T for rows in several]
    medians = [np.median(each[~np.eye(len(each), dtype=bool)]) for each in cosines]
    level = np.float32(np.median(medians))
    for rows, each in zip(several, cosines, strict=True):
        own[rows] = (each > level).sum(axis=1) - (each.diagonal() > level)
    return level, own


def _estimate_shares(unlabelled: View, rows: np.ndarray, level: np.float32) -> np.ndarray:
    """About which share of the rows shows the person of each row.

    Half of a person's images are above the level, from a central one more and from others fewer: so
    it is the median over the images that are.
    """
    some = make_unit(load_view(unlabelled)[rows])[0]
    with limit_blas():
        above = some @ some.T > level
    shares = 2 * (above.sum(axis=1) - above.diagonal()) / len(rows)
    return np.array([np.median(shares[each]) for each in above])


def _choose_evenly(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[:: -(-len(rows) // most)]


def _average(sizes: np.ndarray, shares: np.ndarray) -> float:
    """The mean of the rows' sizes, by the share of the rows that shows the person of each."""
    return float(np.average(sizes, weights=MOST_SHARE / np.maximum(shares, MOST_SHARE)))
