"""Do the labelled images differ from the unlabelled ones as a set: sharper, another camera?

The contract:
- Enters: the joint graphs and the identities. Leaves: a reason why the labelled images are not like
  the unlabelled ones, or "".
- Looked at are the neighbours of a labelled image that are not of its identity. If both sets are
  alike, labelled ones are among them by chance.

Source: the nearest-neighbour test of two samples (Schilling 1986); leaving out the own identity is
ours.
"""

from __future__ import annotations

import numpy as np

from cdp.mediator.curriculum import JointSet
from cdp.types import UNLABELLED, KnnGraph, load_graph

MOST_FREQUENT = 1.4
"""Times that labelled neighbours may be as frequent as by chance. Mean over the models: .92 to 1.10
on LFW at 24, 16 and 12 px and on synthetic sets, .94 to 1.2 with 45 people of 3 or 14 photos of the
pile's quality, 1.7 to 2.5 with sharp photos and a poor pile (three draws each)."""
DEVIATIONS = 3.0
"""Standard deviations of the count by chance that come on top."""
COPIES_MOST_FREQUENT, COPIES_DEVIATIONS = 1.25, 1.0
"""The same of copies that were degraded to look like the pile: 1.0 to 1.1 at 16 px of surveillance,
where training on them alone is best, and 1.6 to 1.9 on 14 to 40 px with little noise, where it
costs 5 points of F and more (draws 0 and 1)."""


def describe_gap(joint: JointSet, unlabelled_count: int, *, copies: bool = False) -> str:
    """Why the labelled images cannot stand for the unlabelled ones; "" where they can.

    Parameters
    ----------
    joint : labelled and unlabelled rows; labelled rows have their full lists.
    unlabelled_count : number of all unlabelled rows, of which `joint` may have a part.
    copies : whether the labelled rows are degraded copies of sharper images.
    """
    counts = [
        _count_labelled(load_graph(each), joint.identity, unlabelled_count) for each in joint.graphs
    ]
    found, expected = np.mean(counts, axis=0)
    times, deviations = (
        (COPIES_MOST_FREQUENT, COPIES_DEVIATIONS) if copies else (MOST_FREQUENT, DEVIATIONS)
    )
    if found <= times * expected + deviations * np.sqrt(times * expected):
        return ""
    if copies:
        return (
            "even degraded until they look like the unlabelled images, the labelled ones differ "
            "from them: among the neighbours of a copy that show others, copies are "
            f"{found / max(expected, 1e-9):.1f} times as frequent as by chance"
        )
    return (
        "the labelled images differ from the unlabelled ones, as sharp photos differ from those of "
        "a camera: among the neighbours of a labelled image that show others, labelled ones are "
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
