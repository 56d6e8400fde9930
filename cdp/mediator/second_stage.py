"""The second reading: what the pairs around a pair say about it.

The mediator reads each pair alone. Once every candidate pair has a probability, a pair can be read
again in its surroundings: do the two images agree about the images they both know, and do they look
alike once each is averaged with the images it surely shows the same person as? A second mediator
learns that from the labelled pairs, and it is what recovers the blurred images of a person: each
alone resembles nobody, all its friends resemble each other.

The contract:
- Enters: the views, the candidate pairs and their probabilities (labelled pairs: held-out ones,
  `Mediator.held_out`; unlabelled pairs: after `correct_prior`). Leaves: a probability a pair.
- No feature grows with the size of a person, so what is learnt on people with five images holds for
  one with five hundred.
- Labelled people usually have two images or more; in the wild, many have one, and their best
  neighbour is wrong. The second mediator is therefore also taught with people reduced to one image
  (`thin_identities`); without that it merges strangers (measured on LFW: BCubed precision .89
  instead of .97).
- One view is looked at at a time, and pairs are described in parts: beside the view, its averaged
  copy and the pairs stand some 40 bytes a pair, and 4 a pair and view that may lie on disk. The
  same bits whatever the number of threads.

Source: ours. Averaging with sure neighbours is query expansion (Chum et al. 2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import count_threads
from cdp.errors import DataError
from cdp.mediator.curriculum import thin_identities
from cdp.mediator.ensemble import Mediator
from cdp.mediator.neighbourhood import (
    PAIR_FEATURES,
    Neighbourhood,
    View,
    check_probability,
    describe_neighbourhood,
)
from cdp.mediator.prior_shift import PriorCorrection, correct_evenly, weigh_images
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.clustering import score_bcubed, score_with_distractors
from cdp.propagation.average_linkage import Agglomeration, agglomerate
from cdp.propagation.threshold import THRESHOLDS, choose_threshold, measure_precision_curve
from cdp.types import PairTable

SINGLETON_SHARES = (0.0, 0.5, 0.8)
"""Shares of labelled people reduced to one image, one step each."""


@dataclass(frozen=True)
class JointScores:
    """The pairs among labelled and unlabelled rows as the first mediator reads them.

    views : over all rows. pairs : all candidates. probability : (m,) float in [0, 1], held-out
    where an end is labelled. identity : (n,) int64, below zero and unique for an unlabelled row.
    """

    views: Sequence[View]
    pairs: PairTable
    probability: np.ndarray
    identity: np.ndarray


@dataclass(frozen=True)
class SecondStage:
    """A second mediator, and the threshold its probabilities are agglomerated with.

    even_rate : its mean held-out probability, images heard more evenly, for
        `cdp.mediator.prior_shift.correct_evenly`; NaN where not every labelled pair was held out.
    threshold : in (0, 1), for `cdp.propagation.agglomerate`, chosen on held-out people: amid the
        unlabelled where they were given, else alone. One half where the views are good; where they
        are poor, pairs repeat each other's doubts and the best cut lies below.
    precision_curve : (t, 2) float64, rising thresholds and the pairwise precision of the held-out
        people when cut there, the mean over the steps, never falling. No row where not every
        labelled pair was held out.
    """

    mediator: Mediator
    even_rate: float
    threshold: float
    precision_curve: np.ndarray

    def correct(self, probability: np.ndarray, pairs: PairTable, count: int) -> PriorCorrection:
        """Its scores of all candidate pairs of a set at that set's own share of true pairs; as they
        are where the mediator's settings say so."""
        if not self.mediator.settings.correct_prior or math.isnan(self.even_rate):
            return self.mediator.correct(probability)
        return correct_evenly(
            probability, self.mediator.training_rate, self.even_rate, pairs, count
        )

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        own = {
            "even_rate": self.even_rate,
            "threshold": self.threshold,
            "precision_curve": self.precision_curve,
        }
        arrays = {name: np.asarray(value) for name, value in own.items()}
        return {**self.mediator.state(), **arrays}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> SecondStage:
        """The inverse of `state`; DataError where something is missing."""
        names = ("even_rate", "threshold", "precision_curve")
        lacking = [name for name in names if name not in state]
        if lacking:
            raise DataError(
                f"expected the state of a second reading, but it lacks {', '.join(lacking)}"
            )
        rest = {name: value for name, value in state.items() if name not in names}
        rate, threshold = float(state["even_rate"]), float(state["threshold"])
        return cls(Mediator.from_state(rest), rate, threshold, state["precision_curve"])


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
    """Train the second mediator on labelled pairs, and find where to cut.

    Parameters
    ----------
    views, pairs : of the labelled images, as the first mediator had them.
    held_out : (m,) float, what `Mediator.held_out` of the first says of these pairs. Probabilities
        of a mediator that has seen the two people would promise more than strangers keep.
    identity : (n,) int64, of the labelled rows.
    joint : the labelled amid the unlabelled, as one more step; or None.
    settings : as for `Mediator.fit`; the variant's name becomes "context".

    Raises
    ------
    DataError
        As `describe_neighbourhood` and `Mediator.fit`.
    """
    chosen = replace(settings or MediatorSettings(patience=4), variant="context")
    identity = np.asarray(identity)
    loaded = [make_unit(view() if callable(view) else view)[0] for view in views]
    features, steps = [], []
    for step, share in enumerate(SINGLETON_SHARES):
        kept = thin_identities(identity, share, seed + step)
        inside = kept[pairs.source] & kept[pairs.target]
        place = np.cumsum(kept) - 1
        few = pairs.take(inside)
        left = PairTable(place[few.source], place[few.target], few.listings)
        features.append(
            describe_neighbourhood(
                [view if kept.all() else view[kept] for view in loaded],
                left,
                held_out[inside],
                int(kept.sum()),
                threads=threads,
            )
        )
        steps.append((left, identity[kept]))
    taught = list(steps)
    amid = None
    if joint is not None:
        amid = _JointTraining(joint, threads)
        features.append(amid.describe_own())
        taught.append((amid.taught, joint.identity))
    source = np.concatenate([person[left.source] for left, person in taught])
    target = np.concatenate([person[left.target] for left, person in taught])
    mediator = Mediator.fit(
        np.concatenate(features),
        source == target,
        source,
        target,
        settings=chosen,
        seed=seed,
        threads=threads,
    )
    held = mediator.held_out
    if held is None or not len(pairs) or not np.isfinite(held).all():
        return SecondStage(mediator, math.nan, 0.5, np.empty((0, 2)))
    ends = np.cumsum([len(left) for left, _ in taught])[:-1]
    scores = np.split(held, ends)
    read = [(*step, score) for step, score in zip(steps, scores, strict=False)]
    pair_weight = [
        weigh_images(left, mediator.correct(score).probability, len(person))
        for left, person, score in read
    ]
    if amid is not None:
        score = amid.score(mediator, scores[-1])
        pair_weight.append(amid.weigh_own(mediator.correct(score).probability))
    heard = mediator.weight * np.concatenate(pair_weight)
    rate = float(np.average(held, weights=heard))
    reading = SecondStage(mediator, rate, 0.5, np.empty((0, 2)))
    cut = _cut_steps(reading, read)
    f = _score_steps(cut) if amid is None else amid.judge(reading, score)
    return replace(
        reading, threshold=choose_threshold(f), precision_curve=measure_precision_curve(cut)
    )


class _JointTraining:
    """The labelled among the unlabelled: pairs to learn from, then a place to try thresholds."""

    def __init__(self, joint: JointScores, threads: int | None) -> None:
        self.joint = joint
        pairs, count = joint.pairs, len(joint.identity)
        value = check_probability(pairs, joint.probability)
        self.around = Neighbourhood(joint.views, pairs, value, count, count_threads(threads))
        labelled = joint.identity >= 0
        self.own = labelled[pairs.source] | labelled[pairs.target]
        self.taught = pairs.take(self.own)

    def describe_own(self) -> np.ndarray:
        """The pairs that have a labelled end, described among all of them."""
        width = len(PAIR_FEATURES) + len(self.joint.views)
        described = np.empty((len(self.taught), width), np.float32)
        row = 0
        for part, block in self.around.describe_parts():
            kept = block[self.own[part]]
            described[row : row + len(kept)] = kept
            row += len(kept)
        return described

    def score(self, mediator: Mediator, held_out: np.ndarray) -> np.ndarray:
        """What the mediator says of all pairs, (m,) float32; held-out where an end is labelled."""
        score = self.around.score(mediator)
        score[self.own] = held_out
        return score

    def weigh_own(self, probability: np.ndarray) -> np.ndarray:
        """How much each of the pairs with a labelled end counts, see `weigh_images`."""
        return weigh_images(self.joint.pairs, probability, len(self.joint.identity))[self.own]

    def judge(self, reading: SecondStage, score: np.ndarray) -> np.ndarray:
        """(thresholds,) BCubed F of the labelled people, clustered together with everybody."""
        person = self.joint.identity
        probability = reading.correct(score, self.joint.pairs, len(person)).probability
        found = agglomerate(self.joint.pairs, probability, len(person), threshold=min(THRESHOLDS))
        cuts = [found.cut(threshold) for threshold in THRESHOLDS]
        return np.array([score_with_distractors(person, label)[2] for label in cuts])


def _cut_steps(
    reading: SecondStage, steps: Sequence[tuple[PairTable, np.ndarray, np.ndarray]]
) -> list[tuple[Agglomeration, np.ndarray]]:
    """Each step agglomerated as an unlabelled set would be, and who is who in it."""
    found = []
    for pairs, identity, score in steps:
        probability = reading.correct(score, pairs, len(identity)).probability
        merged = agglomerate(pairs, probability, len(identity), threshold=min(THRESHOLDS))
        found.append((merged, identity))
    return found


def _score_steps(steps: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """(thresholds,) BCubed F of the held-out people, the mean over the steps."""
    cuts = [
        [score_bcubed(identity, merged.cut(threshold))[2] for threshold in THRESHOLDS]
        for merged, identity in steps
    ]
    return np.mean(cuts, axis=0)


def score_second_stage(
    reading: SecondStage,
    views: Sequence[View],
    pairs: PairTable,
    probability: np.ndarray,
    count: int,
    *,
    threads: int | None = None,
) -> PriorCorrection:
    """Score pairs by the second mediator, and move the scores to the set's own rate of true pairs.

    Parameters
    ----------
    reading : from `fit_second_stage`.
    views, pairs, count : of the unlabelled images.
    probability : (m,) the first mediator's, after `correct_prior`.

    Returns
    -------
    PriorCorrection
        Probabilities (m,) float32 and the share of true pairs; uncorrected where the mediator's
        settings say so.
    """
    value = check_probability(pairs, probability)
    around = Neighbourhood(views, pairs, value, count, count_threads(threads))
    return reading.correct(around.score(reading.mediator), pairs, count)
