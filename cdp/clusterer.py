"""ConsensusClusterer: kNN graphs, committee, mediator and propagation behind scikit-learn's face.

The contract:
- Enters: one (n, d) array, or a list of (n, d_v) arrays, the base view first. Any dimensions,
  float16/32/64, memory-mapped or not; a list entry may be a function that loads its array.
- Leaves: `labels_` with -1 for "no identity found". Nothing is ever forced into a cluster.
- With labelled views and ids a mediator is trained and everything it says of two groups decides
  whether they are one (the chain of the pipeline's defaults); without, the committee votes and
  components are split by a rising threshold.
- Pairs are described and scored in blocks, one view at a time: peak memory is one view, its index
  and the pairs, never their features.
- The same input and `random_state` give the same bits, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state

from cdp.arrays.cosine import make_unit
from cdp.committee.features import VARIANTS, measure_affinity
from cdp.committee.pairs import choose_candidates, make_pairs, vote_pairs
from cdp.errors import ConfigError, DataError
from cdp.knn.graph import build_knn_graphs
from cdp.mediator.curriculum import JointSet
from cdp.mediator.ensemble import Mediator
from cdp.mediator.pair_scorer import score_pairs, teach_mediator
from cdp.mediator.second_stage import SecondStage, score_second_stage
from cdp.mediator.settings import MediatorSettings
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.quality import estimate_quality
from cdp.propagation.rising_threshold import MAX_SIZE, propagate_labels
from cdp.types import UNLABELLED, KnnGraph, PairTable

Views = np.ndarray | Sequence[np.ndarray | Callable[[], np.ndarray]]

SPLITS = ("consensus", "raise_threshold")


class ConsensusClusterer(ClusterMixin, BaseEstimator):
    """Cluster faces, or any embeddings, by the consensus of several models.

    Parameters
    ----------
    k : neighbours a row in each view's graph.
    backend : "nmslib", "faiss" or "exact", see `cdp.knn.build_knn_graph`.
    backend_settings : dict of the backend's settings, or None.
    variant : pair features of the mediator: "extended" (ours), "paper" or "released"; with labels
        only. It also chooses the mediator's settings.
    mediator_settings : `cdp.mediator.MediatorSettings` to use instead, or None.
    candidates : "base": pairs are the edges of the base graph (paper); "all": of every graph. None:
        all with labels and the variant "extended", else the base.
    joint : teach the mediator amid the unlabelled rows, searched together with the labelled ones
        for that; with labels and the variant "extended" only. False where many of the unlabelled
        rows show labelled people.
    second_stage : rescore each pair by its neighbouring pairs (`cdp.mediator.second_stage`); with
        labels and the variant "extended" only.
    split : "consensus": groups merge while all evidence between them says so (ours); or
        "raise_threshold" (paper); with labels only.
    threshold : "auto": where the held-out people were served best, one half without a second
        reading; or a probability (paper: .96); with labels only.
    min_similarity : a pair counts when its base cosine is above it; voting only.
    min_votes : ... and at least so many committee members have the edge; voting only. None: half
        of them, rounded up; in a group much larger than k, few edges are in every graph.
    max_size : largest cluster, in rows. None: any size for the consensus split, 600 for the rising
        threshold.
    step : how fast the threshold rises in a cluster that is split, see `cdp.propagate_labels`.
    random_state : int, None or RandomState, as in scikit-learn.
    threads : at most so many; None: all cores. Never changes the result.

    Attributes
    ----------
    labels_ : (n,) int64, 0 .. n_clusters_ - 1; -1 none.
    probabilities_ : (n,) float32, with labels the probability that the row belongs to its cluster
        (`cdp.propagation.quality`), without the mean base cosine (clipped at 0) to it; 0 where the
        label is -1.
    n_clusters_ : int.
    pairs_ : PairTable, the pairs that were scored; voting: those with enough votes.
    pair_scores_ : (m,) float32. Without labels `cdp.propagate_labels(pairs_, pair_scores_, n,
        threshold=threshold_, ...)` gives `labels_`, with labels and the consensus split
        `cdp.agglomerate` does; with other settings they give other labels.
    threshold_ : the threshold on the scores.
    cut_thresholds_ : (n,) float32, the level at which each row's cluster was accepted.
    mediator_ : the trained `cdp.mediator.Mediator`, None where the committee voted.
    second_stage_ : the trained second stage, None where there was none.
    quality_ : `cdp.propagation.QualityEstimate` of the labels; None where the committee voted.

    Examples
    --------
    Ten people, twenty images of each, seen by three models; without labels the committee votes:

    >>> import numpy as np
    >>> from cdp import ConsensusClusterer
    >>> generator = np.random.default_rng(0)
    >>> person = np.repeat(np.arange(10), 20)
    >>> views = [
    ...     generator.normal(size=(10, d))[person] + 0.3 * generator.normal(size=(200, d))
    ...     for d in (64, 32, 48)
    ... ]
    >>> clusterer = ConsensusClusterer(k=8, backend="exact", min_similarity=0.6, min_votes=1)
    >>> labels = clusterer.fit_predict(views)
    >>> clusterer.n_clusters_
    10
    >>> bool((labels == person).all())
    True
    """

    def __init__(
        self,
        *,
        k: int = 20,
        backend: str = "nmslib",
        backend_settings: dict[str, Any] | None = None,
        variant: str = "extended",
        mediator_settings: MediatorSettings | None = None,
        candidates: str | None = None,
        joint: bool = True,
        second_stage: bool = True,
        split: str = "consensus",
        threshold: float | Literal["auto"] = "auto",
        min_similarity: float = 0.5,
        min_votes: int | None = None,
        max_size: int | None = None,
        step: float = 0.1,
        random_state: Any = 0,
        threads: int | None = None,
    ) -> None:
        self.k = k
        self.backend = backend
        self.backend_settings = backend_settings
        self.variant = variant
        self.mediator_settings = mediator_settings
        self.candidates = candidates
        self.joint = joint
        self.second_stage = second_stage
        self.split = split
        self.threshold = threshold
        self.min_similarity = min_similarity
        self.min_votes = min_votes
        self.max_size = max_size
        self.step = step
        self.random_state = random_state
        self.threads = threads

    def fit(
        self,
        views: Views,
        y: Any = None,
        *,
        labelled_views: Views | None = None,
        labelled_ids: np.ndarray | None = None,
    ) -> ConsensusClusterer:
        """Cluster the rows of `views`.

        Parameters
        ----------
        views : (n, d) array, or a list of (n, d_v) arrays of the same rows, the base first.
        y : ignored, as scikit-learn's clusterers do.
        labelled_views : the same models' embeddings of labelled images, as `views`; or None.
        labelled_ids : (l,) integer identities of their rows; or None.

        Returns
        -------
        self

        Raises
        ------
        ConfigError
            A parameter is unknown or out of range.
        DataError
            Views that do not belong together, a bad vector (named), or labelled data a mediator
            cannot learn from.
        BackendError
            The kNN library cannot be imported, or failed.
        """
        for name, known in (("variant", VARIANTS), ("split", SPLITS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if isinstance(self.threshold, str) and self.threshold != "auto":
            raise ConfigError(f"threshold must be 'auto' or a number, got {self.threshold!r}")
        if (labelled_views is None) != (labelled_ids is None):
            raise DataError(
                "labelled_views and labelled_ids belong together: give both to train a mediator, "
                "or neither to let the committee vote"
            )
        seed = self._draw_seed()
        given = _list_views(views, "views")
        mediator, reading = None, None
        if labelled_views is not None:
            mediator, reading = self._train(given, labelled_views, np.asarray(labelled_ids), seed)
        graphs = self._build_graphs(given, seed)
        method = "vote" if mediator is None else self.variant
        pairs = make_pairs(graphs, candidates=self.candidates or choose_candidates(method))
        count = len(graphs[0])
        split, threshold, quality = self.split, self.threshold, None
        if mediator is None:
            split, threshold = "raise_threshold", self.min_similarity
            pairs, scores = self._vote(given, graphs, pairs)
        else:
            scores = self._score(mediator, given, graphs, pairs)
            if reading is not None and len(pairs):
                scores = score_second_stage(
                    reading, given, pairs, scores, count, threads=self.threads
                ).probability
            if threshold == "auto":
                threshold = reading.threshold if reading is not None else 0.5
        level = float(threshold)
        if split == "consensus":
            labels = agglomerate(
                pairs, scores, count, threshold=level, max_size=self.max_size
            ).label
            cut = np.full(count, level, np.float32)
        else:
            limit = MAX_SIZE if self.max_size is None else self.max_size
            found = propagate_labels(
                pairs, scores, count, threshold=level, max_size=limit, step=self.step
            )
            labels, cut = found.label, found.cut_threshold
        if mediator is None:
            self.probabilities_ = _average_inside(labels, pairs, scores, level)
        else:
            quality = estimate_quality(labels, pairs, scores)
            self.probabilities_ = quality.confidence
        self.labels_ = labels
        self.n_clusters_ = int(labels.max(initial=UNLABELLED)) + 1
        self.cut_thresholds_ = cut
        self.pairs_ = pairs
        self.pair_scores_ = scores
        self.threshold_ = level
        self.mediator_ = mediator
        self.second_stage_ = reading
        self.quality_ = quality
        return self

    def fit_predict(self, views: Views, y: Any = None, **labelled: Any) -> np.ndarray:
        """Cluster the rows and return `labels_`; parameters and errors are those of `fit`."""
        return self.fit(views, y, **labelled).labels_

    def _draw_seed(self) -> int:
        if isinstance(self.random_state, int | np.integer):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _build_graphs(self, views: list[Any], seed: int) -> list[KnnGraph]:
        graphs = build_knn_graphs(
            views,
            self.k,
            backend=self.backend,
            seed=seed,
            threads=self.threads,
            **(self.backend_settings or {}),
        )
        counts = [len(graph) for graph in graphs]
        if len(set(counts)) != 1:
            raise DataError(f"all views must show the same rows, got {counts} rows")
        return graphs

    def _train(
        self, views: list[Any], labelled: Views, ids: np.ndarray, seed: int
    ) -> tuple[Mediator, SecondStage | None]:
        taught = _list_views(labelled, "labelled_views")
        if len(taught) != len(views):
            raise DataError(
                f"labelled_views must come from the same models as views, got {len(taught)} views "
                f"for {len(views)}"
            )
        for number, (one, other) in enumerate(zip(taught, views, strict=True)):
            if not (callable(one) or callable(other)) and one.shape[1] != other.shape[1]:
                raise DataError(
                    f"view {number} has {one.shape[1]} dimensions labelled and {other.shape[1]} "
                    "unlabelled: they are not of one model"
                )
        graphs = self._build_graphs(taught, seed)
        if ids.shape != (len(graphs[0]),) or ids.dtype.kind not in "iu":
            raise DataError(
                f"labelled_ids must be {len(graphs[0])} integers, one a labelled row, got shape "
                f"{ids.shape} of {ids.dtype}"
            )
        ids = np.unique(ids, return_inverse=True)[1]
        settings, joint = self._choose_settings(), None
        if self.joint and settings.variant == "extended":
            joined = [partial(_join, one, other) for one, other in zip(taught, views, strict=True)]
            everyone = self._build_graphs(joined, seed)
            identity = np.full(len(everyone[0]), UNLABELLED, np.int64)
            identity[: len(ids)] = ids
            joint = JointSet(joined, everyone, identity)
        return teach_mediator(
            taught,
            graphs,
            ids,
            settings=settings,
            candidates=self.candidates or choose_candidates(self.variant),
            joint=joint,
            second_stage=self.second_stage,
            seed=seed,
            threads=self.threads,
        )

    def _choose_settings(self) -> MediatorSettings:
        if self.mediator_settings is None:
            return MediatorSettings.named(self.variant)
        return replace(self.mediator_settings, variant=self.variant)

    def _score(
        self, mediator: Mediator, views: list[Any], graphs: list[KnnGraph], pairs: PairTable
    ) -> np.ndarray:
        scores = score_pairs(mediator, views, graphs, pairs, threads=self.threads)
        return mediator.correct(scores).probability

    def _vote(
        self, views: list[Any], graphs: list[KnnGraph], pairs: PairTable
    ) -> tuple[PairTable, np.ndarray]:
        needed = len(views) // 2 if self.min_votes is None else self.min_votes
        if not 0 <= needed <= len(views) - 1:
            raise ConfigError(
                f"min_votes must be in 0 .. {len(views) - 1}, the number of committee members "
                f"(views without the base), got {needed}"
            )
        kept = vote_pairs(graphs, pairs) >= needed
        pairs = pairs.take(kept)
        return pairs, measure_affinity(views[0], pairs, threads=self.threads)


def _list_views(views: Views, name: str) -> list[Any]:
    """The views as a list, base first, checked as far as possible without loading any."""
    if isinstance(views, np.ndarray):
        listed: list[Any] = [views] if views.ndim == 2 else list(views)
    elif len(views) and all(not callable(view) and np.ndim(view) == 1 for view in views):
        listed = [np.asarray(views)]
    else:
        listed = [view if callable(view) else np.asarray(view) for view in views]
    if not listed:
        raise DataError(f"{name} must hold at least one (n, d) array, got none")
    arrays = [view for view in listed if not callable(view)]
    if any(array.ndim != 2 for array in arrays):
        raise DataError(
            f"{name} must be an (n, d) array or a list of such, got shapes "
            f"{[array.shape for array in arrays]}"
        )
    if len({len(array) for array in arrays}) > 1:
        raise DataError(
            f"all {name} must show the same rows, got {[len(array) for array in arrays]} rows"
        )
    return listed


def _join(one: Any, other: Any) -> np.ndarray:
    """Labelled rows, then unlabelled ones, each checked by its own row numbers."""
    labelled, rest = (make_unit(view() if callable(view) else view)[0] for view in (one, other))
    if labelled.shape[1] != rest.shape[1]:
        raise DataError(
            f"a view has {labelled.shape[1]} dimensions labelled and {rest.shape[1]} unlabelled: "
            "they are not of one model"
        )
    return np.concatenate([labelled, rest])


def _average_inside(
    label: np.ndarray, pairs: PairTable, scores: np.ndarray, threshold: float
) -> np.ndarray:
    """Mean score of each row's pairs above the threshold within its cluster; 0 without label."""
    inside = (label[pairs.source] == label[pairs.target]) & (label[pairs.source] != UNLABELLED)
    inside &= scores > np.float64(threshold)
    weight = np.clip(scores[inside], 0, 1).astype(np.float64)
    total, number = np.zeros(len(label)), np.zeros(len(label))
    for end in (pairs.source[inside], pairs.target[inside]):
        total += np.bincount(end, weight, len(label))
        number += np.bincount(end, minlength=len(label))
    return (total / np.maximum(number, 1)).astype(np.float32)
