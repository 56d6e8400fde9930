"""Self-training: a pair scorer trained on the clusters that the committee votes for.

Where no labelled image can train a mediator (there is none, they are too few, or they differ from
the unlabelled ones), the unlabelled images are clustered by votes first. Their clusters are then
taken for labelled people, checked as labels are (`cdp.label_check`): images that do not fit are
left out, and clusters of one person are joined.

The contract:
- Enters: views and graphs of the unlabelled rows, and a voter. Leaves: a pair scorer for the same
  rows; `ShortageError` where the clusters are too few or too small.
- It is trained on at most `cdp.mediator.curriculum.LABELLED_ROWS` rows: whole clusters, and beside
  them degraded copies of labelled images, at most half, where there are any. Both are checked
  together, so a person in both is one. The other rows are distractors, but those of the same
  clusters and those that may show their people.
- Nobody was held out whose name is known: its probabilities and the precision on held-out clusters
  are optimistic, so no quality may be estimated from them (`SELF_TRAINED`).

Source: ours. On LFW at 24 px without any label pairwise / BCubed F rose from .61 / .93 to .97 / .95
(with labels .99 / .96), at 16 px from .74 / .82 to .87 / .84; a second round gained no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.committee.pairs import make_pairs
from cdp.knn.graph import build_knn_graphs
from cdp.label_check import check_labels
from cdp.label_check.people import APART
from cdp.mediator.curriculum import LABELLED_ROWS, choose_labelled
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.pair_voter import PairVoter, choose_first_level
from cdp.mediator.settings import MediatorSettings
from cdp.mediator.shortage import ShortageError, describe_shortage
from cdp.mediator.training_set import TrainingSet, build_joint_set
from cdp.propagation.clustering import cluster_pairs
from cdp.propagation.doubt import holds_most_rows
from cdp.types import UNLABELLED, Graph, View, load_graph, load_view

SELF_TRAINED = (
    "the mediator was trained on clusters that the committee voted for, and on no label that could "
    "be held out"
)
"""Why no quality is estimated."""
DEGRADED = (
    "the mediator was trained on degraded copies of sharper labelled pictures, which are easier to "
    "compare than the unlabelled ones: an estimate was up to .29 too high"
)
"""Why no quality is estimated after a training on degraded copies."""
LEAST_CLUSTER = 3
"""Images of a cluster that is trained on."""
LEAST_DENSITY = 0.4
"""Kept pairs of a cluster's image as a share of those that k would allow. A chain of people has
few: on a synthetic set clusters of 50 to 200 images and 2 to 8 % of one person had .13 to .15, on
LFW nearly all of 100 images or more .9 to 1.3."""


def describe_fallback(shortage: str, *, trained: bool, copies: bool = False) -> str:
    """The warning where no label can train a mediator.

    shortage : why, from `cdp.mediator.shortage` or `set_gap`. trained : whether votes trained one.
    copies : whether degraded copies of labelled images were trained on beside them.
    """
    own = ", and a mediator was trained on its clusters" if trained else ""
    own += " and on degraded copies of the labelled images" if trained and copies else ""
    return f"{shortage}. The committee voted instead{own}; no quality is estimated"


def fit_on_votes(
    views: Sequence[View],
    graphs: Sequence[Graph],
    voter: PairVoter,
    *,
    settings: MediatorSettings,
    copies: TrainingSet | None = None,
    candidates: str | None = None,
    second_stage: bool = True,
    seed: int = 0,
    threads: int | None = None,
) -> PairScorer:
    """Vote, cluster, and train a pair scorer on the clusters.

    Parameters
    ----------
    views, graphs : one each a model over the same n rows, the base first, or functions that load
        them.
    voter : what votes on the pairs.
    copies : degraded copies of labelled images, which are trained on too; None: none.
    settings, candidates, second_stage, seed, threads : as for `PairScorer.fit`; the variant is
        "extended".

    Raises
    ------
    ShortageError
        The clusters cannot train a mediator (`describe_shortage`), or one holds most of the rows.
    """
    label, density = _vote(views, graphs, voter, threads)
    if holds_most_rows(label):
        raise ShortageError("one cluster of the votes holds most of the images")
    beside = np.empty(0, np.int64)
    if copies is not None:
        beside = choose_labelled(copies.identity, limit=LABELLED_ROWS // 2, seed=seed)
    rows = _choose_clustered(label, density, LABELLED_ROWS - len(beside), seed)
    shortage = describe_shortage(label[rows])
    if shortage:
        raise ShortageError(shortage)
    chosen = [make_unit(load_view(view)[rows])[0] for view in views]
    shown = label[rows]
    if copies is not None and len(beside):
        chosen = [
            np.concatenate([one, make_unit(load_view(other)[beside])[0]])
            for one, other in zip(chosen, copies.views, strict=True)
        ]
        shown = np.concatenate([shown, label.max() + 1 + copies.identity[beside]])
    check = check_labels(chosen, shown, seed=seed)
    kept = check.trained
    identity = check.person[kept]
    if describe_shortage(identity):
        raise ShortageError(describe_shortage(identity))
    left_out = np.isin(label, label[rows])
    if check.people is not None:
        left_out |= check.people.find(views).probability > APART
    labelled = [view[kept] for view in chosen]
    k = load_graph(graphs[0]).neighbour.shape[1]
    own = build_knn_graphs(labelled, k, backend="exact", seed=seed, threads=threads)
    joint = build_joint_set(
        labelled, own, identity, views, graphs, left_out=left_out, threads=threads
    )
    return PairScorer.fit(
        labelled,
        own,
        identity,
        settings=settings,
        candidates=candidates,
        joint=joint,
        second_stage=second_stage,
        seed=seed,
        threads=threads,
    )


def _vote(
    views: Sequence[View], graphs: Sequence[Graph], voter: PairVoter, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The clusters that the committee votes for, (n,) int64, -1 none; the density of each."""
    pairs = make_pairs(graphs, candidates=voter.candidates)
    scored = voter.score(views, graphs, pairs, threads=threads)
    count, k = load_graph(graphs[0]).neighbour.shape
    assert scored.cosine is not None
    first = choose_first_level(scored.cosine)
    found = cluster_pairs(pairs, scored.probability, count, threshold=first, calibrated=False)
    kept = scored.probability > 0
    return found.label, _measure_density(found.label, pairs.source[kept], pairs.target[kept], k)


def _measure_density(
    label: np.ndarray, source: np.ndarray, target: np.ndarray, k: int
) -> np.ndarray:
    """Pairs inside each cluster, as a share of those that lists of k names allow; (c,) float64."""
    size = np.bincount(label[label != UNLABELLED], minlength=1)
    inside = label[source][(label[source] == label[target]) & (label[source] != UNLABELLED)]
    pairs = np.bincount(inside, minlength=len(size))
    density: np.ndarray = 2 * pairs / np.maximum(size * np.minimum(size - 1, k), 1)
    return density


def _choose_clustered(label: np.ndarray, density: np.ndarray, limit: int, seed: int) -> np.ndarray:
    """Rows of clusters that are large and dense enough, whole clusters, at most `limit`."""
    inside = np.flatnonzero(label != UNLABELLED)
    size = np.bincount(label[inside], minlength=1)
    fit = (size >= LEAST_CLUSTER) & (density >= LEAST_DENSITY)
    several = inside[fit[label[inside]]]
    return several[choose_labelled(label[several], limit=limit, seed=seed)]
