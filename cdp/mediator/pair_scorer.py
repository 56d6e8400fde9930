"""Pair scoring from end to end: views and graphs to the probability that a pair is positive.

    trained = PairScorer.fit(labelled_views, labelled_graphs, identity, settings=...)
    pairs = make_pairs(graphs, candidates=trained.candidates)
    scores = trained.score(views, graphs, pairs)

`PairScorer` is trained on labelled rows: features of the committee, the mediator, prior-shift
correction and, with "extended" features, the second stage. `cdp.mediator.pair_voter.PairVoter` has
the same interface and needs no labels, so that estimator and pipeline run one chain with either.

The contract:
- `score` is the whole chain over all candidate pairs of a set. `score_block` is its first stage for
  any part of the pairs, in any process; `finish` is the rest. Both ways give the same bits, with
  any number of threads.
- "paper" and "released" are trained on the labelled identities as they are; "extended" on all steps
  of `cdp.mediator.curriculum`, with the WCCN cosine (`cdp.committee.wccn`) as one more feature, and
  on the pairs of the joint set if it is given.
- A fit trains on all rows it is given and holds the features of their pairs: with five views some
  240 bytes a pair, 15 KB a row. `choose_distinct_labelled` bounds the rows, as the estimator and
  the stages do before they fit. Scoring holds one block's features, and one cosine a pair and view
  that may lie on disk.

Source: paper section 3; curriculum, WCCN feature, prior correction and second stage are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from cdp.arrays.scratch import allocate
from cdp.arrays.threads import count_threads
from cdp.committee.features import describe_pairs, measure_affinity
from cdp.committee.pairs import check_candidates, choose_candidates
from cdp.committee.wccn import Wccn, measure_cosines
from cdp.errors import ConfigError, DataError
from cdp.mediator.curriculum import JointSet
from cdp.mediator.ensemble import Mediator
from cdp.mediator.pair_voter import PairScores
from cdp.mediator.prior_shift import CONTRADICTED
from cdp.mediator.second_stage import SecondStage
from cdp.mediator.settings import MediatorSettings
from cdp.mediator.shortage import ShortageError, describe_shortage
from cdp.mediator.training_pairs import TrainingPairs
from cdp.propagation.missed_pairs import MissedPairs
from cdp.propagation.threshold import NEUTRAL_THRESHOLD
from cdp.types import Graph, PairTable, View, load_graph

BLOCK = 1 << 18
"""Pairs whose features are held at once while scoring."""


@dataclass(frozen=True)
class PairScorer:
    """The trained chain: `PairScorer.fit(...)`, then `score`. Immutable.

    mediator : the first stage. wccn : the whitening of its last feature; None without "extended".
    second_stage : None where there is none.
    candidates : "base" or "all", the pairs it was trained on and should score.

    `calibrated` is True: scores are probabilities. `threshold` and `precision_curve` are those of
    the second stage, chosen on held-out identities; one half and None without it.
    """

    mediator: Mediator
    wccn: Wccn | None
    second_stage: SecondStage | None
    candidates: str
    calibrated: ClassVar[bool] = True
    _parts: ClassVar[tuple[str, ...]] = ("mediator", "wccn", "second_stage")

    @property
    def threshold(self) -> float:
        return NEUTRAL_THRESHOLD if self.second_stage is None else self.second_stage.threshold

    @property
    def precision_curve(self) -> np.ndarray | None:
        return None if self.second_stage is None else self.second_stage.precision_curve

    @property
    def missed(self) -> MissedPairs:
        """How many positive pairs of held-out people were missed; see `SecondStage`."""
        return MissedPairs() if self.second_stage is None else self.second_stage.missed

    @classmethod
    def fit(
        cls,
        views: Sequence[View],
        graphs: Sequence[Graph],
        identity: np.ndarray,
        *,
        settings: MediatorSettings,
        candidates: str | None = None,
        joint: JointSet | None = None,
        second_stage: bool = True,
        seed: int = 0,
        threads: int | None = None,
    ) -> PairScorer:
        """Train all stages on labelled rows.

        Parameters
        ----------
        views, graphs : one each a model over the same n rows, the base first, or functions that
            load them. All rows are used, at some 15 KB a row: of more than some ten thousand choose
            (`cdp.mediator.labelled_rows.choose_distinct_labelled`) and search the chosen ones; on
            drawn sets 3,000 rows gave the same F within .1.
        identity : (n,) integers.
        settings : of the mediator; its variant names the features.
        candidates : "base" or "all", as for `cdp.committee.make_pairs`; None: the variant's default
            (`choose_candidates`).
        joint : labelled and unlabelled rows in one set of graphs; with the variant "extended" only.
            Leave it out where many unlabelled images show labelled identities.
        second_stage : whether to train the second stage; with the variant "extended" only.
        seed : decides folds, initial weights, order of the pairs and resampling.
        threads : at most so many; None: all cores. Never changes the result.

        Raises
        ------
        ConfigError
            A second stage with fewer MLPs than folds: it needs every labelled pair held out.
        ShortageError
            The labelled people are too few (`cdp.mediator.shortage`): let the committee vote.
        DataError
            As `describe_pairs` and `Mediator.fit`.
        """
        shortage = describe_shortage(identity)
        if shortage:
            raise ShortageError(f"{shortage}. Label more people, or let the committee vote")
        extended = settings.variant == "extended"
        candidates = candidates or choose_candidates(settings.variant)
        check_candidates(candidates)
        if extended and second_stage and settings.ensemble_size != settings.folds:
            raise ConfigError(
                "second_stage needs every labelled pair held out once: give mediator_settings an "
                f"ensemble_size equal to folds, got {settings.ensemble_size} and {settings.folds}, "
                "or set second_stage=False"
            )
        training = TrainingPairs(
            views,
            graphs,
            np.asarray(identity).astype(np.int64),
            settings,
            candidates,
            joint if extended else None,
            seed,
            threads,
        )
        mediator, held_out = training.fit()
        first = cls(mediator, training.wccn, None, candidates)
        if not (extended and second_stage):
            return first
        raw = None
        if training.joint is not None:
            unlabelled = training.joint_pairs.take(~training.is_labelled)
            raw = first.score_first_stage(
                training.joint.views, training.joint.graphs, unlabelled, threads=threads
            )
        return replace(first, second_stage=training.fit_second_stage(mediator, held_out, raw))

    def whiten(self, views: Sequence[View], *, threads: int | None = None) -> np.ndarray | None:
        """The whitened rows that `score_block` needs, (n, p) float32; None without WCCN feature."""
        if self.wccn is None:
            return None
        return self.wccn.whiten(self.wccn.project(views, threads=threads), threads=threads)

    def score_block(
        self,
        graphs: Sequence[Graph],
        pairs: PairTable,
        affinity: np.ndarray,
        whitened: np.ndarray | None = None,
        *,
        threads: int | None = 1,
    ) -> np.ndarray:
        """First-stage probabilities of any part of the pairs, before the prior correction.

        Parameters
        ----------
        graphs : one a view over all rows, the base first, or functions that load them.
        pairs : any candidate pairs, of rows of the whole set.
        affinity : (m, N + 1) float32, their cosines in each view, see `measure_affinity`.
        whitened : from `whiten`, of all rows.
        threads : at most so many; None: all cores. Never changes the result.

        Returns
        -------
        (m,) float32 in (0, 1).

        Raises
        ------
        DataError
            As `cdp.committee.describe_pairs` and `Mediator.score`.
        """
        features = describe_pairs(
            (),
            graphs,
            pairs,
            variant=self.mediator.settings.variant,
            affinity=affinity,
            wccn=None if whitened is None else measure_cosines(whitened, pairs),
            threads=threads,
        )
        return self.mediator.score(features, threads=count_threads(threads))

    def finish(
        self,
        views: Sequence[View],
        pairs: PairTable,
        probability: np.ndarray,
        count: int,
        *,
        threads: int | None = None,
    ) -> PairScores:
        """Correct the prior of first-stage scores, then apply the second stage.

        Parameters
        ----------
        views : one (count, d_v) array a model, or a function that loads it.
        pairs : all candidate pairs of the set.
        probability : (m,) float32, from `score_block`, of all pairs in order.
        count : number of rows.
        """
        scores = self.mediator.correct(probability)
        refused = scores.refused
        if self.second_stage is not None and len(pairs):
            scores = self.second_stage.score(
                views, pairs, scores.probability, count, threads=threads
            )
        doubts = (CONTRADICTED,) if refused or scores.refused else ()
        return PairScores(scores.probability, scores.rate, doubts=doubts)

    def score(
        self,
        views: Sequence[View],
        graphs: Sequence[Graph],
        pairs: PairTable,
        *,
        threads: int | None = None,
    ) -> PairScores:
        """Score all candidate pairs of a set by all stages.

        Parameters
        ----------
        views, graphs : one each a model over the same rows, the base first, or functions that load
            them.
        pairs : all candidate pairs, `make_pairs(graphs, candidates=self.candidates)`.
        threads : at most so many; None: all cores. Never changes the result.

        Raises
        ------
        DataError
            As `score_block`, or the pairs name rows that the views do not have.
        """
        loaded = [load_graph(graph) for graph in graphs]
        probability = self.score_first_stage(views, loaded, pairs, threads=threads)
        return self.finish(views, pairs, probability, len(loaded[0]), threads=threads)

    def score_first_stage(
        self,
        views: Sequence[View],
        graphs: Sequence[Graph],
        pairs: PairTable,
        *,
        threads: int | None = None,
    ) -> np.ndarray:
        """`score_block` over all pairs, `BLOCK` at a time, (m,) float32."""
        loaded = [load_graph(graph) for graph in graphs]
        affinity = allocate((len(views), len(pairs)))
        for number, view in enumerate(views):
            measure_affinity(view, pairs, out=affinity[number], threads=threads)
        whitened = self.whiten(views, threads=threads)
        probability = np.empty(len(pairs), np.float32)
        for start in range(0, len(pairs), BLOCK):
            part = slice(start, min(start + BLOCK, len(pairs)))
            probability[part] = self.score_block(
                loaded, pairs.take(part), affinity.T[part], whitened, threads=threads
            )
        return probability

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone.

        The keys are `candidates` (ASCII bytes), and those of each part's own state after
        `mediator.`, `wccn.` and `second_stage.`.
        """
        state = {"candidates": np.frombuffer(self.candidates.encode(), np.uint8).copy()}
        for prefix in self._parts:
            part = getattr(self, prefix)
            if part is not None:
                state |= {f"{prefix}.{name}": array for name, array in part.state().items()}
        return state

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> PairScorer:
        """The inverse of `state`.

        Raises
        ------
        DataError
            Something is missing: the arrays are not a pair scorer's.
        """
        if "candidates" not in state:
            raise DataError(
                "expected the state of a PairScorer, but it lacks candidates; fit it again"
            )
        mediator, wccn, second_stage = (
            {
                name.removeprefix(f"{prefix}."): np.asarray(array)
                for name, array in state.items()
                if name.startswith(f"{prefix}.")
            }
            for prefix in cls._parts
        )
        return cls(
            Mediator.from_state(mediator),
            Wccn.from_state(wccn) if wccn else None,
            SecondStage.from_state(second_stage) if second_stage else None,
            bytes(np.asarray(state["candidates"])).decode(),
        )
