"""The labelled pairs a pair scorer is trained on: every step of the curriculum, with features.

The contract:
- Enters: the views and graphs of labelled rows and their identities; maybe the joint set. Leaves: a
  mediator with its held-out probabilities, then a second stage trained on those.
- The WCCN cosine of a labelled pair comes from a fit without its identities (`Wccn.measure`).
- The features of all labelled pairs are held until the mediator is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from cdp.committee.features import describe_pairs
from cdp.committee.pairs import make_pairs
from cdp.committee.wccn import Wccn, fit_wccn
from cdp.mediator.curriculum import CURRICULUM, CurriculumStep, JointSet, make_curriculum
from cdp.mediator.ensemble import HeldOut, Mediator
from cdp.mediator.pair_sample import sample_pairs
from cdp.mediator.second_stage import JointScores, SecondStage, fit_second_stage
from cdp.mediator.settings import MediatorSettings
from cdp.types import Graph, PairTable, View, take_rows


class TrainingPairs:
    """The labelled pairs of every step of the curriculum, with their features.

    wccn : the fitted whitening, None without "extended".
    joint_pairs : all candidate pairs of the joint set, where there is one.
    """

    def __init__(
        self,
        views: Sequence[View],
        graphs: Sequence[Graph],
        identity: np.ndarray,
        settings: MediatorSettings,
        candidates: str,
        joint: JointSet | None,
        seed: int,
        threads: int | None,
    ) -> None:
        self.views, self.identity, self.joint = views, identity, joint
        self.seed, self.threads, self.settings = seed, threads, settings
        extended = settings.variant == "extended"
        steps = make_curriculum(
            graphs, identity, steps=CURRICULUM if extended else CURRICULUM[:1], seed=seed
        )
        self.pairs: list[PairTable] = []
        self.weight: list[np.ndarray] = []
        self.row_identity = [step.identity for step in steps]
        for number, step in enumerate(steps):
            listed = make_pairs(step.graphs, candidates=candidates)
            weight = np.ones(len(listed), np.float32)
            if number:  # the first step's pairs are all wanted by the second stage
                listed, weight = _sample(listed, step.identity, settings.pair_budget, seed + number)
            self.pairs.append(listed)
            self.weight.append(weight)
        self.wccn: Wccn | None = None
        cosines: Sequence[np.ndarray | None] = [None] * len(steps)
        if extended:
            cosines = self._fit_wccn(steps)
        self.features = [
            describe_pairs(
                [partial(take_rows, view, step.rows) for view in views],
                step.graphs,
                listed,
                variant=settings.variant,
                wccn=cosine,
                threads=threads,
            )
            for step, listed, cosine in zip(steps, self.pairs, cosines, strict=True)
        ]
        if joint is not None:
            self._add_joint(joint, candidates)

    def _fit_wccn(self, steps: Sequence[CurriculumStep]) -> list[np.ndarray]:
        """Fit the whitening; the cosines of each step's pairs, without their identities' folds."""
        wccn, self.fold = fit_wccn(
            self.views,
            self.identity,
            around=None if self.joint is None else self.joint.views,
            seed=self.seed,
            threads=self.threads,
        )
        self.wccn = wccn
        coordinates = wccn.project(self.views, threads=self.threads)
        return [
            wccn.measure(coordinates[step.rows], listed, self.fold[step.rows], threads=self.threads)
            for step, listed in zip(steps, self.pairs, strict=True)
        ]

    def _add_joint(self, joint: JointSet, candidates: str) -> None:
        """One more step: the pairs of the joint set that have a labelled end."""
        assert self.wccn is not None
        number = joint.number_rows()
        everything = make_pairs(joint.graphs, candidates=candidates)
        is_labelled = (number[everything.source] >= 0) | (number[everything.target] >= 0)
        self.joint_pairs, self.is_labelled = everything, is_labelled
        listed = everything.take(is_labelled)
        cosine = self.wccn.measure(
            self.wccn.project(joint.views, threads=self.threads),
            listed,
            _find_folds(joint.identity, self.identity, self.fold),
            threads=self.threads,
        )
        self.pairs.append(listed)
        self.weight.append(np.ones(len(listed), np.float32))
        self.row_identity.append(number)
        self.features.append(
            describe_pairs(
                joint.views,
                joint.graphs,
                listed,
                variant=self.settings.variant,
                wccn=cosine,
                threads=self.threads,
            )
        )

    def fit(self) -> tuple[Mediator, HeldOut]:
        """Train the mediator on all steps; the features are dropped."""
        listed = list(zip(self.pairs, self.row_identity, strict=True))
        source = np.concatenate([identity[pairs.source] for pairs, identity in listed])
        target = np.concatenate([identity[pairs.target] for pairs, identity in listed])
        features = np.concatenate(self.features)
        self.features.clear()
        return Mediator.fit(
            features,
            source == target,
            source,
            target,
            weight=np.concatenate(self.weight),
            settings=self.settings,
            seed=self.seed,
            threads=self.threads,
        )

    def fit_second_stage(
        self, mediator: Mediator, held_out: HeldOut, joint_probability: np.ndarray | None
    ) -> SecondStage:
        """Train the second stage on the held-out probabilities of the first.

        joint_probability : first-stage scores of the `joint_pairs` without a labelled end, before
            the prior correction; None without joint set.
        """
        joint = None
        if self.joint is not None and joint_probability is not None:
            last = len(held_out.probability) - len(self.pairs[-1])
            raw = np.empty(len(self.joint_pairs), np.float32)
            raw[~self.is_labelled] = joint_probability
            raw[self.is_labelled] = held_out.probability[last:]
            probability = mediator.correct(raw).probability
            joint = JointScores(
                self.joint.views, self.joint_pairs, probability, self.row_identity[-1]
            )
        return fit_second_stage(
            self.views,
            self.pairs[0],
            held_out.probability[: len(self.pairs[0])],
            self.identity,
            joint=joint,
            settings=self.settings,
            seed=self.seed,
            threads=self.threads,
        )


def _sample(
    pairs: PairTable, identity: np.ndarray, budget: int | None, seed: int
) -> tuple[PairTable, np.ndarray]:
    """A weighted sample of a step's pairs, half as many as all MLPs train on."""
    same = identity[pairs.source] == identity[pairs.target]
    least = None if budget is None else budget // 2
    chosen, weight = sample_pairs(same, np.ones(len(pairs), np.float32), least, seed)
    return pairs.take(chosen), weight * np.float32(len(pairs) / max(weight.sum(), 1))


def _find_folds(joint: np.ndarray, identity: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The fold of each row of the joint set; -1 for an unlabelled one."""
    known, first = np.unique(identity, return_index=True)
    place = np.minimum(np.searchsorted(known, joint), len(known) - 1)
    return np.where(joint < 0, -1, fold[first][place])
