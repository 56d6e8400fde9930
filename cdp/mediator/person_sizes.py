"""Sizes of people: have the labelled people as many images as those of the unlabelled set?

The contract:
- Size is measured alike in both sets: the images in a base list whose cosine is above that of two
  images of one labelled person (the median). In the unlabelled set, as many as other people's
  images reach by chance are taken off; in the labelled set an image's own people alone count.
- No person stands for more than `MOST_SHARE` of the labelled images.
- Leaves: the logarithm of the ratio of both means, and a reason why the labelled people have too
  few images, or "".

Source: ours. A mediator that was shown no list which one person fills splits the people who fill
theirs.
"""

from __future__ import annotations

import numpy as np

from cdp.arrays.threads import limit_blas
from cdp.types import UNLABELLED, KnnGraph

LARGEST_GAP = 0.55
"""The largest logarithm of the ratio of sizes at which labels train a mediator. On LFW it was -.25
to .49 with all images of the labelled people (24 draws), where a mediator is better than votes.
With at most 20, 16 or 12 of each it was .63 to .82, .77 to .95 and .93 to 1.11 at 24 px, and
pairwise F .97 to .99, .54 to .78 and .25 to .54 (votes .93 to .99); at 16 px .59 to .70, .58 to .79
and .78 to .97, and F .72 to .82, .68 and .24 to .52 (votes .89 to .93). On a synthetic set of
people of four images or one it was .2 with three labelled images each, where F was .83 to .88
(votes .65 to .71)."""
MOST_SHARE = 0.05
"""Share of the labelled images that one person stands for at most."""
COMPARED_ROWS = 1_000
"""Most labelled rows that are compared with other people's."""


def describe_size_gap(unit: np.ndarray, identity: np.ndarray, graph: KnnGraph) -> str:
    """Why the labelled people have too few images to train a mediator; "" where they have not.

    Parameters as of `measure_size_gap`.
    """
    gap = measure_size_gap(unit, identity, graph)
    if gap <= LARGEST_GAP:
        return ""
    return (
        f"people of the unlabelled images have about {np.exp(gap):.1f} times as many images as the "
        "labelled ones, and a mediator trained on few images of each would split them; labelling "
        "all images of a few frequent people would help"
    )


def measure_size_gap(unit: np.ndarray, identity: np.ndarray, graph: KnnGraph) -> float:
    """How much larger the people of the unlabelled set are than the labelled ones.

    Parameters
    ----------
    unit : (n, d) float32 unit rows, the base embeddings of the labelled images.
    identity : (n,) int64, the person of each, 0 or more.
    graph : the base graph of the unlabelled images.

    Returns
    -------
    float: the logarithm of the ratio of the mean sizes; 0 where one of the two cannot be measured,
        as where other people's images fill the lists by chance.
    """
    order = np.argsort(identity, kind="stable")
    people = np.split(order, np.flatnonzero(np.diff(identity[order])) + 1)
    with limit_blas():
        several = [rows for rows in people if len(rows) > 1]
        cosines = [unit[rows] @ unit[rows].T for rows in several]
        if not several:
            return 0.0
        medians = [np.median(each[~np.eye(len(each), dtype=bool)]) for each in cosines]
        level = np.float32(np.median(medians))
        some = np.arange(0, len(unit), -(-len(unit) // COMPARED_ROWS))
        above = unit[some] @ unit.T > level
    others = identity[some, None] != identity
    chance = (above & others).sum() / max(others.sum(), 1)
    if chance * len(graph) >= graph.k:
        return 0.0
    near = ((graph.similarity > level) & (graph.neighbour != UNLABELLED)).sum(axis=1)
    near = near - chance * len(graph)
    own = np.zeros(len(unit), np.int64)
    for rows, each in zip(several, cosines, strict=True):
        own[rows] = np.minimum((each > level).sum(axis=1) - (each.diagonal() > level), graph.k)
    if not (near > 0).any() or not own.any():
        return 0.0
    shown = own > 0
    images = np.bincount(identity[shown])[identity[shown]]
    weight = np.minimum(1, MOST_SHARE * shown.sum() / images)
    return float(np.log(near[near > 0].mean() / np.average(own[shown], weights=weight)))
