"""ConsensusClusterer: the whole method as one scikit-learn estimator.

k-NN graphs -> candidate pairs -> `PairScorer` (or `PairVoter`) -> `cluster_pairs`.

The contract:
- Enters: one (n, d) array, or a list of (n, d_v) arrays, the base view first. Arrays, DataFrames or
  tensors of any width, float16/32/64 or integers, memory-mapped or not; an entry of the list may be
  a function that loads its array.
- Leaves: `labels_` with -1 for "no identity found". No row is ever forced into a cluster.
- With labelled views and ids a pair scorer is trained, and its probabilities decide; without, or
  where they are too few (`cdp.mediator.shortage`, with a `CdpWarning`), the committee votes, and
  components are split by a rising threshold. Both are the pipeline's chain with the pipeline's
  defaults: the same views, `k` and seed give the same labels.
- Pairs are scored in blocks, one view at a time: peak memory is one view, its index and the pairs,
  never all their features (but those of the labelled pairs, while training).
- The same input and `random_state` give the same bits, with any number of threads.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from cdp.arrays.cosine import as_readonly, make_unit, measure_pairs
from cdp.assignment import ClusterCentres
from cdp.committee.agreement import (
    describe_disagreement,
    describe_one_sided,
    measure_agreement,
)
from cdp.committee.features import VARIANTS
from cdp.committee.pairs import choose_candidates, make_pairs
from cdp.errors import CdpWarning, ConfigError, DataError
from cdp.inputs import (
    Views,
    check_models,
    keep_rows,
    name_views,
    number_identities,
    read_copies,
    read_views,
)
from cdp.knn.equal_rows import EQUAL_ROWS, describe_equal_rows
from cdp.knn.graph import build_knn_graphs
from cdp.knn.near_equal import find_near_equal
from cdp.label_check import list_issues
from cdp.label_check.people import BELIEVED
from cdp.mediator.believed_rows import BelievedRows
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.pair_voter import PairScores, PairVoter, choose_first_level
from cdp.mediator.self_training import DEGRADED, SELF_TRAINED, describe_fallback, fit_on_votes
from cdp.mediator.set_gap import describe_unlike
from cdp.mediator.settings import MediatorSettings
from cdp.mediator.shortage import (
    ShortageError,
    describe_few_images,
    describe_few_people,
    describe_reach,
    describe_shortage,
)
from cdp.mediator.small_set import SmallSet
from cdp.mediator.training_set import (
    ChosenSet,
    DegradedCopies,
    TrainingSet,
    build_joint_set,
    choose_training_set,
)
from cdp.parameters import check_level, check_number
from cdp.propagation.clustering import SPLITS, cluster_pairs
from cdp.propagation.doubt import describe_doubt
from cdp.propagation.quality import (
    FULL_LISTS,
    QualityEstimate,
    are_lists_full,
    average_inside,
    estimate_quality,
)
from cdp.propagation.representatives import RowGroups, link_rows
from cdp.types import UNLABELLED, KnnGraph, PairTable, View, load_view


class ConsensusClusterer(ClusterMixin, BaseEstimator):
    """Cluster faces, or any embeddings, by the consensus of several models.

    Parameters
    ----------
    k : number of neighbours of a row in each view's graph.
    backend : "nmslib", "faiss" or "exact", see `cdp.knn.build_knn_graph`.
    backend_settings : dict of the backend's settings, or None.
    variant : pair features of the mediator: "extended" (ours), "paper" or "released"; with labels
        only. It also chooses the mediator's settings.
    mediator_settings : `cdp.mediator.MediatorSettings` to use instead, or None.
    candidates : "base": pairs are the edges of the base graph (paper); "all": of every graph. None:
        "all" with labels and the variant "extended", else "base".
    joint : whether the mediator is also trained on labelled and unlabelled rows in one graph, where
        the unlabelled rows serve as distractors, as they will when it is applied; with labels and
        the variant "extended" only. Every pair of a labelled and an unlabelled row is taken for
        negative, but those of rows that may show a labelled identity (`label_check`).
    label_check : whether labels are checked before they are trained on (`cdp.label_check`): rows
        with a wrong label are left out, two labels of one person are joined, labelled people among
        the unlabelled rows are found, and labelled rows unlike the unlabelled ones are left out
        where only a part is (`cdp.mediator.set_gap`); with labels only.
    near_equal : whether near-equal rows, such as the frames of one track, are represented by one of
        them, whose label goes to all (`cdp.knn.near_equal`). Rows without near-equal ones get the
        same labels either way.
    self_training : whether a mediator is trained on the clusters that the committee votes for
        (`cdp.mediator.self_training`) where there is no label to train it on: none is given, they
        are too few, or the labelled rows differ from the unlabelled ones (`joint`). False: votes
        are final there; so they are where `min_similarity` is a number, or `threshold` is one and
        no label is given. With the variant "extended" only.
    second_stage : whether each pair is rescored from the scores of its neighbouring pairs, which
        recovers blurred images (`cdp.mediator.second_stage`); with labels and the variant
        "extended" only. False is faster and holds less memory.
    split : "consensus": groups merge while the mean evidence between them is for it (ours); or
        "raise_threshold" (paper). Without labels always the latter.
    threshold : on the scores: "auto", or a number (paper: .96). "auto" is the threshold chosen on
        held-out identities, one half without second stage; where the committee votes, the cosine
        that kept pairs exceed, and a number below that counts as that.
    min_similarity : a pair is kept if its base cosine exceeds this; voting only. "auto": the lowest
        cosine at which no chain of pairs joins most of the rows (`cdp.mediator.vote_cosine`).
    min_votes : and if at least so many committee members have the edge; voting only. With a single
        view the cosine alone decides.
    max_size : largest cluster, in rows. None: any size for the consensus split,
        `cdp.propagation.rising_threshold.MAX_SIZE` for the rising threshold.
    step : how fast the threshold rises in a cluster that is split, see `cdp.propagate_labels`.
    random_state : int, None or RandomState, as in scikit-learn.
    threads : at most so many; None: all cores. Never changes the result.

    Attributes
    ----------
    labels_ : (n,) int64, 0 .. n_clusters_ - 1; -1 none.
    probabilities_ : (n,) float32; with labels the probability that the row belongs to its cluster
        (`cdp.propagation.quality`), without, where votes decided or trained the mediator, the mean
        base cosine (clipped at 0) to it; 0 where the label is -1.
    n_clusters_ : int.
    n_features_in_ : int, width of the base view; absent if that is given as a function.
    feature_names_in_ : columns of the view, if one DataFrame is given.
    representatives_ : (n,) int64, the row that stands for each row; its own number where that is
        itself.
    pairs_ : PairTable, all candidate pairs; a represented row has one, with its representative.
    pair_scores_ : (m,) float32 in [0, 1], probabilities; voting: base cosines, 0 for pairs that are
        not kept. `cdp.propagation.cluster_pairs(pairs_, pair_scores_, n, threshold=threshold_,
        ...)` gives `labels_`, and other labels with other settings.
    threshold_ : the threshold on the scores.
    cosine_ : the base cosine that kept pairs exceed; None where a mediator scored them.
    cut_thresholds_ : (n,) float32, the threshold at which each row's cluster was accepted.
    scorer_ : the `cdp.mediator.PairScorer` that was trained, or the `PairVoter`.
    mediator_ : its mediator, None where the committee voted.
    second_stage_ : its second stage, None where there is none.
    quality_ : `cdp.propagation.QualityEstimate` of the labels, withheld with its reasons where its
        assumptions are seen to fail, as after self-training; None where the committee voted.
    label_issues_ : DataFrame, a row for each labelled row whose label is doubted: `row`, `issue`
        ("wrong_name" or "second_label"), `label`, `seems` (the label it seems to be, None where
        nobody's) and `probability`. Of many labelled rows, those the scorer is trained on.
    assignments_ : DataFrame, a row for each row of `views` that shows a labelled identity with a
        probability above one half: `row`, `label`, `probability`.

    Examples
    --------
    Ten identities, twenty images of each, embedded by three models; without labels the committee
    votes:

    >>> import numpy as np
    >>> from cdp import ConsensusClusterer
    >>> generator = np.random.default_rng(0)
    >>> identity = np.repeat(np.arange(10), 20)
    >>> views = [
    ...     generator.normal(size=(10, d))[identity] + 0.3 * generator.normal(size=(200, d))
    ...     for d in (64, 32, 48)
    ... ]
    >>> clusterer = ConsensusClusterer(k=8, backend="exact", min_similarity=0.6)
    >>> labels = clusterer.fit_predict(views)
    >>> clusterer.n_clusters_
    10
    >>> bool((labels == identity).all())
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
        near_equal: bool = True,
        label_check: bool = True,
        self_training: bool = True,
        second_stage: bool = True,
        split: str = "consensus",
        threshold: float | Literal["auto"] = "auto",
        min_similarity: float | Literal["auto"] = "auto",
        min_votes: int = 1,
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
        self.near_equal = near_equal
        self.label_check = label_check
        self.self_training = self_training
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
        labelled_ids: Any = None,
        degraded_views: Views | None = None,
        degraded_of: Any = None,
    ) -> ConsensusClusterer:
        """Cluster the rows of `views`.

        Parameters
        ----------
        views : (n, d) array, DataFrame, tensor or Series of vectors, or a list of such, (n, d_v)
            each, of the same rows, the base first; or a dict of them by model. n >= 1.
        y : ignored, as scikit-learn's clusterers do.
        labelled_views : the same models' embeddings of labelled images, as `views`; or None.
        labelled_ids : (l,) integers, strings or floats that are whole numbers, the identities of
            their rows; or None. A row without identity (None, NaN) is a DataError.
        degraded_views : the same models' embeddings of copies of the labelled images, degraded
            until they look like the unlabelled ones (`cdp.images.matching`). They are trained on in
            place of the labelled images, where these are sharper than the unlabelled ones; or None.
        degraded_of : (c,) integers, the row of `labelled_views` that each is a copy of; or None.

        Returns
        -------
        self

        Raises
        ------
        ConfigError
            A parameter is unknown or out of range; it is a ValueError too.
        DataError
            Views that do not belong together, no row, or a bad vector (its row is named; a vector
            of zeros has no cosine); a ValueError.
        BackendError
            The kNN library cannot be imported, or failed.
        TypeError
            A sparse matrix, or values that are no numbers.

        Warns
        -----
        CdpWarning
            Labels were given that cannot train a mediator; views share no neighbours with the
            others; many rows are equal; nothing was found; or one cluster holds most of the rows.
        """
        self._check_parameters()
        if (labelled_views is None) != (labelled_ids is None):
            raise DataError(
                "labelled_views and labelled_ids belong together: give both to train a mediator, "
                "or neither to let the committee vote"
            )
        degraded = read_copies(degraded_views, degraded_of, labelled_ids)
        seed = self._draw_seed()
        given = read_views(views, "views")
        self._note_features(views, given)
        graphs = self._build_graphs(given, seed)
        count = len(graphs[0])
        if not count:
            raise DataError("views must hold at least one row, got 0 sample(s)")
        representative = np.arange(count)
        equal = describe_equal_rows(given, name_views(given), "rows")
        if equal:
            warnings.warn(equal, CdpWarning, stacklevel=2)
        if self.near_equal:
            near = find_near_equal(given, graphs[0], seed=seed)
            representative = near.representative
            if near.collapsed:
                given = [keep_rows(view, near.kept) for view in given]
                graphs = self._build_graphs(given, seed)
        agreement = self._measure_agreement(graphs, "unlabelled rows", stacklevel=3)
        self._believed: BelievedRows | None = None
        self.label_issues_ = list_issues(None)
        scorer, doubts, trained = self._make_scorer(
            given, graphs, agreement, labelled_views, labelled_ids, degraded, seed
        )
        doubts += (EQUAL_ROWS if equal else "",)
        pairs, scored = self._score_pairs(scorer, given, graphs, trained)
        scores = scored.probability
        if len(graphs[0]) < count:
            listings = 2 * len(graphs)
            pairs, scores = link_rows(pairs, scores, representative, listings=listings)
        found = cluster_pairs(
            pairs,
            scores,
            count,
            split=self.split,
            threshold=self._choose_threshold(scorer, scored, labelled_ids),
            max_size=self.max_size,
            step=self.step,
            calibrated=scorer.calibrated,
            representative=representative,
        )
        self.representatives_ = representative
        self.labels_ = found.label
        self.n_clusters_ = int(found.label.max(initial=UNLABELLED)) + 1
        self.cut_thresholds_ = found.cut_threshold
        self.threshold_, self.cosine_ = found.threshold, scored.cosine
        self.pairs_, self.pair_scores_ = pairs, scores
        self.scorer_ = scorer
        self.mediator_ = self.second_stage_ = self.quality_ = None
        if isinstance(scorer, PairScorer):
            self.mediator_, self.second_stage_ = scorer.mediator, scorer.second_stage
            estimate = partial(self._estimate, found.label, pairs, scores, representative)
            self.quality_ = estimate((*doubts, *scored.doubts), scorer, labelled_ids)
            self.probabilities_ = self.quality_.confidence
        kept = np.unique(representative)
        if SELF_TRAINED in doubts:
            self.probabilities_ = self._average_cosines(given[0], -1)
        elif self.quality_ is None:
            self.probabilities_ = self._average_cosines(given[0], found.threshold)
        self.centres_ = ClusterCentres.fit(given, found.label[kept], seed)
        self.assignments_ = self._assign_people(given, kept)
        doubt = describe_doubt(found.label)
        if doubt:
            warnings.warn(doubt, CdpWarning, stacklevel=2)
        return self

    def predict(self, views: Views) -> np.ndarray:
        """The clusters of new images, without clustering again; see `cdp.assignment`.

        Parameters
        ----------
        views : the same models' embeddings of new images, as in `fit`.

        Returns
        -------
        labels : (m,) int64
            -1 where no cluster is near enough. `labels_` may differ for the images of `fit`, whose
            pairs decided.
        """
        check_is_fitted(self, "centres_")
        given = read_views(views, "views")
        if hasattr(self, "n_features_in_") and not isinstance(views, Mapping | list | tuple):
            validate_data(self, views, reset=False, skip_check_array=True)
        return self.centres_.assign(given)

    def fit_predict(self, views: Views, y: Any = None, **labelled: Any) -> np.ndarray:
        """Cluster the rows and return `labels_`; parameters and errors are those of `fit`."""
        return self.fit(views, y, **labelled).labels_

    def _check_parameters(self) -> None:
        for name, known in (("variant", VARIANTS), ("split", SPLITS)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        check_number("k", self.k, "a whole number of neighbours", whole=True)
        check_number("min_votes", self.min_votes, "a whole number of committee members", whole=True)
        check_number("step", self.step, "a number")
        for name in ("max_size", "threads"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "None or a whole number", whole=True)
        check_level("threshold", self.threshold)
        check_level("min_similarity", self.min_similarity, bounds=(-1, 1))

    def _draw_seed(self) -> int:
        state = self.random_state
        if isinstance(state, int | np.integer):
            if state < 0:
                raise ConfigError(f"random_state must be 0 or more, got {state!r}")
            return int(state)
        try:
            return int(check_random_state(state).randint(2**31 - 1))
        except ValueError as error:
            raise ConfigError(
                f"random_state must be a whole number, None or a RandomState, got {state!r}"
            ) from error

    def _note_features(self, views: Views, given: list[View]) -> None:
        """Set `n_features_in_` and `feature_names_in_`, as scikit-learn's conventions ask."""
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                delattr(self, name)
        if not callable(given[0]):
            self.n_features_in_ = given[0].shape[1]
        columns = getattr(views, "columns", None)
        if columns is not None and all(isinstance(name, str) for name in columns):
            self.feature_names_in_ = np.asarray(columns, dtype=object)

    def _build_graphs(self, views: Sequence[View], seed: int) -> list[KnnGraph]:
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

    def _make_scorer(
        self,
        views: list[View],
        graphs: list[KnnGraph],
        agreement: np.ndarray,
        labelled_views: Views | None,
        labelled_ids: Any,
        degraded: DegradedCopies | None,
        seed: int,
    ) -> tuple[PairScorer | PairVoter, tuple[str, ...], TrainingSet | None]:
        """A pair scorer, or a voter where nothing can train one; why its quality is withheld; and
        the labelled rows it was trained on."""
        shortage, copies = "", None
        if labelled_views is not None:
            try:
                if not len(labelled_ids):
                    raise ShortageError(describe_shortage(np.empty(0)))
                chosen = self._choose_set(
                    views, graphs, labelled_views, labelled_ids, degraded, seed
                )
                copies = chosen.trained if chosen.trained.are_copies else None
                scorer, odd = self._fit_scorer(views, graphs, agreement, chosen, seed)
                if copies is not None:
                    return scorer, (DEGRADED, odd), copies
                unlike = 0 if chosen.believed is None else chosen.believed.unlike
                doubts = (
                    describe_unlike(unlike, len(chosen.rows)),
                    odd,
                    describe_few_images(chosen.trained.identity),
                )
                return scorer, doubts, chosen.trained
            except ShortageError as error:
                shortage = str(error)
        candidates = self.candidates or choose_candidates("vote")
        voter = PairVoter(self.min_similarity, self.min_votes, candidates)
        found = self._train_on_votes(views, graphs, voter, bool(shortage), copies, seed)
        if shortage:
            text = describe_fallback(shortage, trained=found is not None, copies=copies is not None)
            warnings.warn(text, CdpWarning, stacklevel=3)
        return (voter, (), None) if found is None else (found, (SELF_TRAINED,), None)

    def _score_pairs(
        self,
        scorer: PairScorer | PairVoter,
        views: list[View],
        graphs: list[KnnGraph],
        trained: TrainingSet | None,
    ) -> tuple[PairTable, PairScores]:
        """All candidate pairs and their scores; few rows are scored among the labelled ones."""
        small = None
        if trained is not None:
            known = trained.labelled_views
            small = SmallSet.of(views, len(graphs[0]), known, self.k, threads=self.threads)
        if small is not None:
            views, graphs = [*small.views], small.graphs
        pairs = make_pairs(graphs, candidates=scorer.candidates)
        scored = scorer.score(views, graphs, pairs, threads=self.threads)
        return (pairs, scored) if small is None else small.keep_own(pairs, scored)

    def _train_on_votes(
        self,
        views: list[View],
        graphs: list[KnnGraph],
        voter: PairVoter,
        labels_given: bool,
        copies: TrainingSet | None,
        seed: int,
    ) -> PairScorer | None:
        """A pair scorer trained on the voted clusters, None where votes are final."""
        final = self.min_similarity != "auto" or not (labels_given or self.threshold == "auto")
        if not self.self_training or self.variant != "extended" or final:
            return None
        try:
            return fit_on_votes(
                views,
                graphs,
                voter,
                settings=self._choose_settings(),
                copies=copies,
                candidates=self.candidates,
                second_stage=self.second_stage,
                seed=seed,
                threads=self.threads,
            )
        except ShortageError:
            return None

    def _estimate(
        self,
        label: np.ndarray,
        pairs: PairTable,
        scores: np.ndarray,
        representative: np.ndarray,
        doubts: Sequence[str],
        scorer: PairScorer,
        labelled_ids: Any,
    ) -> QualityEstimate:
        """The quality of the labels, withheld where its assumptions are seen to fail."""
        found = estimate_quality(label, pairs, scores, representative, missed=scorer.missed)
        if SELF_TRAINED in doubts:
            return found.withhold(*doubts).withhold_clusters()
        largest = int(np.bincount(label[label != UNLABELLED], minlength=1).max())
        size = np.unique(np.asarray(labelled_ids), return_counts=True)[1]
        found = found.withhold(*doubts, describe_few_people(labelled_ids))
        groups = RowGroups.of(representative, label)
        few = groups.reduce_pairs(pairs, scores)[0]
        full = FULL_LISTS if are_lists_full(label[groups.rows], few, self.k) else ""
        return found.withhold(describe_reach(int(size.max()), largest), full, recall_only=True)

    def _average_cosines(self, base: View, threshold: float) -> np.ndarray:
        """(n,) float32, the mean base cosine of a row to its cluster, by pairs above a threshold.

        base : of the rows that stand for all others. threshold : on the votes' cosines; -1: scores
            are no cosines, and all pairs count.
        """
        groups = RowGroups.of(self.representatives_, self.labels_)
        table, value = groups.reduce_pairs(self.pairs_, self.pair_scores_)
        if threshold < 0:
            unit, value = as_readonly(make_unit(load_view(base))[0]), np.empty_like(value)
            measure_pairs(unit, table.source, table.target, value)
        return average_inside(self.labels_[groups.rows], table, value, threshold)[groups.group]

    def _choose_threshold(
        self, scorer: PairScorer | PairVoter, scored: PairScores, labelled_ids: Any
    ) -> float:
        """The threshold; one given for probabilities does not hold for votes in their stead."""
        given = None if self.threshold == "auto" else float(self.threshold)
        if isinstance(scorer, PairVoter):
            assert scored.cosine is not None
            replaced = labelled_ids is not None
            return choose_first_level(scored.cosine, None if replaced else given)
        return scorer.threshold if given is None else given

    def _choose_set(
        self,
        views: list[View],
        graphs: list[KnnGraph],
        labelled_views: Views,
        labelled_ids: Any,
        copies: DegradedCopies | None,
        seed: int,
    ) -> ChosenSet:
        """The rows to train on; sets `label_issues_` and the people to be found."""
        labelled = read_views(labelled_views, "labelled_views")
        check_models(labelled, views)
        if copies is not None:
            check_models(copies.views, views, "degraded_views")
        names, identity = number_identities(labelled_ids, len(load_view(labelled[0])))
        chosen = choose_training_set(
            labelled,
            identity,
            views,
            graphs[0],
            copies=copies,
            near_equal=self.near_equal,
            label_check=self.label_check,
            seed=seed,
            threads=self.threads,
        )
        if chosen.believed is not None:
            check = chosen.believed.check
            self.label_issues_ = list_issues(check, identity[chosen.rows], chosen.rows, names)
            self._believed, self._names = chosen.believed, names
        return chosen

    def _measure_agreement(
        self, graphs: list[KnnGraph], rows: str, *, stacklevel: int
    ) -> np.ndarray:
        """`measure_agreement`; warns of views that share no neighbours with the others."""
        agreement = measure_agreement(graphs)
        odd = describe_disagreement(agreement, name_views(graphs), rows)
        if odd:
            warnings.warn(odd, CdpWarning, stacklevel=stacklevel)
        return agreement

    def _fit_scorer(
        self,
        views: list[View],
        graphs: list[KnnGraph],
        agreement: np.ndarray,
        chosen: ChosenSet,
        seed: int,
    ) -> tuple[PairScorer, str]:
        """The scorer; and why no quality is estimated where views agree in one set alone."""
        settings, joint, trained = self._choose_settings(), None, chosen.trained
        extended = settings.variant == "extended"
        trained.require_fit(views, graphs[0], compared=extended, seed=seed)
        own_graphs = self._build_graphs(trained.views, seed)
        if self.joint and extended:
            joint = build_joint_set(
                trained.views,
                own_graphs,
                trained.identity,
                views,
                graphs,
                left_out=chosen.left_out,
                threads=self.threads,
            )
            trained.require_no_gap(joint, len(graphs[0]))
        own_agreement = self._measure_agreement(own_graphs, "labelled rows", stacklevel=5)
        scorer = PairScorer.fit(
            trained.views,
            own_graphs,
            trained.identity,
            settings=settings,
            candidates=self.candidates,
            joint=joint,
            second_stage=self.second_stage,
            seed=seed,
            threads=self.threads,
        )
        return scorer, describe_one_sided(agreement, own_agreement)

    def _assign_people(self, views: list[View], kept: np.ndarray) -> pd.DataFrame:
        """The rows that show a labelled person; those of near-equal rows as the one for them.

        views : of the rows `kept`, which stand for all others.
        """
        believed = self._believed
        if believed is None or believed.check.people is None:
            return pd.DataFrame({"row": [], "label": [], "probability": []})
        label, confidence = self.labels_[kept], self.probabilities_[kept]
        person, probability = believed.check.people.assign(views, label, confidence, believed.found)
        group = np.searchsorted(kept, self.representatives_)
        row = np.flatnonzero(probability[group] > BELIEVED)
        shown = group[row]
        return pd.DataFrame(
            {"row": row, "label": self._names[person[shown]], "probability": probability[shown]}
        )

    def _choose_settings(self) -> MediatorSettings:
        if self.mediator_settings is None:
            return MediatorSettings.named(self.variant)
        return replace(self.mediator_settings, variant=self.variant)
