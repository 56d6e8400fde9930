"""Second-stage pair scoring: rescore each pair from the scores of neighbouring pairs.

The mediator scores each pair by itself. Once every candidate pair has a probability, a second
mediator rescores the pair from the pairs around it (`cdp.mediator.neighbourhood`): shared
neighbours, and the cosine after query expansion. This recovers blurred images, which match their
identity weakly but share its neighbours.

The contract:
- Enters: the views, the candidate pairs and their probabilities (labelled pairs: held-out ones, see
  `cdp.mediator.ensemble.HeldOut`; unlabelled pairs: after `correct_prior`). Leaves: a probability a
  pair, at the positive rate of the set.
- Labelled identities usually have two images or more; in the wild most have one, and the nearest
  neighbour of such an image is of another identity. The second mediator is therefore also trained
  with identities reduced to one image (`thin_identities`); without that it merges identities
  (measured on LFW: BCubed precision .89 instead of .97).
- One view is held at a time, and pairs are described in parts: beside the view and its averaged
  copy some 40 bytes a pair are held, and 4 a pair and view that may lie on disk. The same bits
  whatever the number of threads.

Source: ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import count_threads
from cdp.errors import DataError
from cdp.mediator.curriculum import thin_identities
from cdp.mediator.ensemble import Mediator
from cdp.mediator.neighbourhood import (
    PAIR_FEATURES,
    Neighbourhood,
    describe_neighbourhood,
)
from cdp.mediator.prior_shift import PriorCorrection, correct_evenly, weigh_images
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.clustering import score_bcubed, score_with_distractors
from cdp.propagation.average_linkage import Agglomeration, agglomerate
from cdp.propagation.missed_pairs import MissedPairs, measure_missed
from cdp.propagation.scored_pairs import check_probability
from cdp.propagation.threshold import (
    NEUTRAL_THRESHOLD,
    THRESHOLDS,
    choose_threshold,
    measure_precision_curve,
)
from cdp.types import PairTable, View, load_view

SINGLETON_SHARES = (0.0, 0.5, 0.8)
"""Shares of labelled identities reduced to one image, one training step each."""
Step = tuple[PairTable, np.ndarray]
"""Labelled pairs, and the identity of each row."""
ScoredStep = tuple[PairTable, np.ndarray, np.ndarray]
"""The same, and the held-out probability of each pair."""


@dataclass(frozen=True)
class JointScores:
    """The first stage's scores of all pairs among labelled and unlabelled rows.

    views : over all rows. pairs : all candidates. probability : (m,) float in [0, 1], held-out
    where an end is labelled. identity : (n,) int64, below zero and unique for an unlabelled row.
    """

    views: Sequence[View]
    pairs: PairTable
    probability: np.ndarray
    identity: np.ndarray


@dataclass(frozen=True)
class SecondStage:
    """The fitted second stage: its mediator, and the threshold its probabilities are cut at.

    even_rate : mean held-out probability under the weights of `weigh_images`, for
        `cdp.mediator.prior_shift.correct_evenly`; NaN where not every labelled pair was held out.
    threshold : in (0, 1), for `cdp.propagation.cluster_pairs`, chosen on held-out identities,
        clustered together with the unlabelled rows if given, else alone. One half where the views
        are good; lower where they are poor, since the errors of neighbouring pairs are correlated.
    precision_curve : (t, 2) float64, rising thresholds and the pairwise precision of the held-out
        identities when cut there, the mean over the steps, never falling. No row where not every
        labelled pair was held out.
    missed : how many positive pairs of held-out people lie in two clusters, clustered together with
        the unlabelled rows at `threshold`; zero where unknown.
    """

    mediator: Mediator
    even_rate: float
    threshold: float
    precision_curve: np.ndarray
    missed: MissedPairs = field(default_factory=MissedPairs)

    def score(
        self,
        views: Sequence[View],
        pairs: PairTable,
        probability: np.ndarray,
        count: int,
        *,
        threads: int | None = None,
    ) -> PriorCorrection:
        """Rescore the candidate pairs of an unlabelled set, at the set's own positive rate.

        Parameters
        ----------
        views, pairs, count : of the unlabelled images; all candidate pairs.
        probability : (m,) float in [0, 1], the first stage's, after `correct_prior`.
        threads : at most so many; None: all cores. Never changes the result.

        Returns
        -------
        PriorCorrection
            Probabilities (m,) float32 and the positive rate; uncorrected where the mediator's
            settings say so.

        Raises
        ------
        DataError
            As `describe_neighbourhood`.
        """
        value = check_probability(probability, len(pairs))
        around = Neighbourhood(views, pairs, value, count, count_threads(threads))
        return self.correct(around.score(self.mediator), pairs, count)

    def correct(self, probability: np.ndarray, pairs: PairTable, count: int) -> PriorCorrection:
        """Rescale the mediator's scores of all candidate pairs of a set to its positive rate, if
        the settings ask for it."""
        if not self.mediator.settings.correct_prior or math.isnan(self.even_rate):
            return self.mediator.correct(probability)
        return correct_evenly(
            probability,
            self.mediator.training_rate,
            self.even_rate,
            pairs,
            count,
            self.mediator.report.reliability,
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        own = {
            "even_rate": self.even_rate,
            "threshold": self.threshold,
            "precision_curve": self.precision_curve,
            "unlisted": self.missed.unlisted,
            "missed_log_odds": self.missed.log_odds,
        }
        arrays = {name: np.asarray(value) for name, value in own.items()}
        return {**self.mediator.state(), **arrays}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> SecondStage:
        """The inverse of `state`; DataError where something is missing."""
        names = ("even_rate", "threshold", "precision_curve", "unlisted", "missed_log_odds")
        lacking = [name for name in names if name not in state]
        if lacking:
            raise DataError(
                f"expected the state of a second stage, but it lacks {', '.join(lacking)}"
            )
        rest = {name: value for name, value in state.items() if name not in names}
        rate, threshold = float(state["even_rate"]), float(state["threshold"])
        missed = MissedPairs(state["unlisted"], float(state["missed_log_odds"]))
        mediator = Mediator.from_state(rest)
        return cls(mediator, rate, threshold, state["precision_curve"], missed)


def fit_second_stage(
    views: Sequence[View],
    pairs: PairTable,
    held_out: np.ndarray,
    identity: np.ndarray,
    *,
    joint: JointScores | None = None,
    settings: MediatorSettings | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> SecondStage:
    """Train the second mediator on labelled pairs, and choose the threshold to cut at.

    Parameters
    ----------
    views, pairs : of the labelled images, as in the first stage.
    held_out : (m,) float, the first mediator's held-out probabilities of these pairs. Those of MLPs
        trained on the identities would be better than the probabilities of new identities are.
    identity : (n,) int64, of the labelled rows.
    joint : labelled and unlabelled rows together, as one more training step; or None.
    settings : as for `Mediator.fit`; the variant's name becomes "context".

    Raises
    ------
    DataError
        As `describe_neighbourhood` and `Mediator.fit`.
    """
    chosen = replace(settings or MediatorSettings(), variant="context")
    steps, features = _describe_steps(views, pairs, held_out, np.asarray(identity), seed, threads)
    trained_on = list(steps)
    together = None
    if joint is not None:
        together = _JointTraining(joint, threads)
        features.append(together.describe_labelled())
        trained_on.append((together.labelled_pairs, joint.identity))
    source = np.concatenate([who[listed.source] for listed, who in trained_on])
    target = np.concatenate([who[listed.target] for listed, who in trained_on])
    mediator, held = Mediator.fit(
        np.concatenate(features),
        source == target,
        source,
        target,
        settings=chosen,
        seed=seed,
        threads=threads,
    )
    unknown = SecondStage(mediator, math.nan, NEUTRAL_THRESHOLD, np.empty((0, 2)))
    if not len(pairs) or not np.isfinite(held.probability).all():
        return unknown
    ends = np.cumsum([len(listed) for listed, _ in trained_on])[:-1]
    scores = np.split(held.probability, ends)
    scored = [(*step, score) for step, score in zip(steps, scores, strict=False)]
    image_weight = [
        weigh_images(listed, mediator.correct(score).probability, len(who))
        for listed, who, score in scored
    ]
    if together is not None:
        score = together.score(mediator, scores[-1])
        image_weight.append(together.weigh_labelled(mediator.correct(score).probability))
    weight = held.weight * np.concatenate(image_weight)
    rate = float(np.average(held.probability, weights=weight))
    stage = replace(unknown, even_rate=rate)
    clustered = _cluster_steps(stage, scored)
    curve = measure_precision_curve(clustered)
    if together is None:
        return replace(
            stage, threshold=choose_threshold(_score_steps(clustered)), precision_curve=curve
        )
    probability = together.correct(stage, score)
    found = together.agglomerate(probability)
    threshold = choose_threshold(together.score_thresholds(found))
    missed = together.measure_missed(found.cut(threshold), probability, seed)
    return replace(stage, threshold=threshold, precision_curve=curve, missed=missed)


def _describe_steps(
    views: Sequence[View],
    pairs: PairTable,
    held_out: np.ndarray,
    identity: np.ndarray,
    seed: int,
    threads: int | None,
) -> tuple[list[Step], list[np.ndarray]]:
    """The labelled pairs and their features, once for each of `SINGLETON_SHARES`."""
    loaded = [make_unit(load_view(view))[0] for view in views]
    steps, features = [], []
    for number, share in enumerate(SINGLETON_SHARES):
        kept = thin_identities(identity, share, seed + number)
        inside = kept[pairs.source] & kept[pairs.target]
        place = np.cumsum(kept) - 1
        few = pairs.take(inside)
        renumbered = PairTable(place[few.source], place[few.target], few.listings)
        features.append(
            describe_neighbourhood(
                [view if kept.all() else view[kept] for view in loaded],
                renumbered,
                held_out[inside],
                int(kept.sum()),
                threads=threads,
            )
        )
        steps.append((renumbered, identity[kept]))
    return steps, features


class _JointTraining:
    """Labelled and unlabelled rows together: pairs to train on, and a set to try thresholds on."""

    def __init__(self, joint: JointScores, threads: int | None) -> None:
        self.joint = joint
        pairs, count = joint.pairs, len(joint.identity)
        value = check_probability(joint.probability, len(pairs))
        self.around = Neighbourhood(joint.views, pairs, value, count, count_threads(threads))
        labelled = joint.identity >= 0
        self.chosen = labelled[pairs.source] | labelled[pairs.target]
        self.labelled_pairs = pairs.take(self.chosen)

    def describe_labelled(self) -> np.ndarray:
        """Features of the pairs with a labelled end, among all pairs."""
        width = len(PAIR_FEATURES) + len(self.joint.views)
        described = np.empty((len(self.labelled_pairs), width), np.float32)
        row = 0
        for part, block in self.around.describe_parts():
            kept = block[self.chosen[part]]
            described[row : row + len(kept)] = kept
            row += len(kept)
        return described

    def score(self, mediator: Mediator, held_out: np.ndarray) -> np.ndarray:
        """Scores of all pairs, (m,) float32; held-out ones where an end is labelled."""
        score = self.around.score(mediator)
        score[self.chosen] = held_out
        return score

    def weigh_labelled(self, probability: np.ndarray) -> np.ndarray:
        """The weight of each pair with a labelled end, see `weigh_images`."""
        return weigh_images(self.joint.pairs, probability, len(self.joint.identity))[self.chosen]

    def correct(self, stage: SecondStage, score: np.ndarray) -> np.ndarray:
        """The probabilities of all pairs, (m,) float32."""
        return stage.correct(score, self.joint.pairs, len(self.joint.identity)).probability

    def agglomerate(self, probability: np.ndarray) -> Agglomeration:
        """All rows clustered together, to be cut at any of `THRESHOLDS`."""
        pairs, count = self.joint.pairs, len(self.joint.identity)
        return agglomerate(pairs, probability, count, threshold=min(THRESHOLDS))

    def score_thresholds(self, found: Agglomeration) -> np.ndarray:
        """(thresholds,) BCubed F of the labelled rows, clustered together with the unlabelled."""
        cuts = [found.cut(threshold) for threshold in THRESHOLDS]
        return np.array([score_with_distractors(self.joint.identity, label)[2] for label in cuts])

    def measure_missed(self, label: np.ndarray, probability: np.ndarray, seed: int) -> MissedPairs:
        """The positive pairs of labelled people that a clustering of all rows misses."""
        return measure_missed(label, self.joint.pairs, probability, self.joint.identity, seed)


def _cluster_steps(
    stage: SecondStage, steps: Sequence[ScoredStep]
) -> list[tuple[Agglomeration, np.ndarray]]:
    """Each step clustered as an unlabelled set would be, and the identity of each row."""
    found = []
    for pairs, identity, score in steps:
        probability = stage.correct(score, pairs, len(identity)).probability
        merged = agglomerate(pairs, probability, len(identity), threshold=min(THRESHOLDS))
        found.append((merged, identity))
    return found


def _score_steps(steps: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """(thresholds,) BCubed F of the held-out identities, the mean over the steps."""
    cuts = [
        [score_bcubed(identity, merged.cut(threshold))[2] for threshold in THRESHOLDS]
        for merged, identity in steps
    ]
    return np.mean(cuts, axis=0)
