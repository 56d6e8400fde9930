"""Labelled views and their graphs -> the mediator, and its second reading.

The contract:
- Enters: the views and graphs of labelled rows, and who they show. Leaves: a fitted `Mediator` and,
  with "extended" features, a fitted `SecondStage` or None.
- "paper" and "released" learn from the labelled people as they are; "extended" from all steps of
  `cdp.mediator.curriculum`, amid the unlabelled joint too where it is given, with the cosine of
  `cdp.committee.wccn` as one more input.
- The features of all labelled pairs are held at once: some 60 columns of float32 a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cdp.arrays.scratch import allocate
from cdp.arrays.threads import count_threads
from cdp.committee.features import describe_pairs, measure_affinity
from cdp.committee.pairs import make_pairs
from cdp.committee.wccn import fit_wccn, measure_cosines
from cdp.errors import ConfigError
from cdp.mediator.curriculum import CURRICULUM, JointSet, make_curriculum
from cdp.mediator.ensemble import Mediator
from cdp.mediator.second_stage import JointScores, SecondStage, fit_second_stage
from cdp.mediator.settings import MediatorSettings
from cdp.types import KnnGraph, PairTable

View = np.ndarray | Callable[[], np.ndarray]
Graph = KnnGraph | Callable[[], KnnGraph]


BLOCK = 1 << 18


def teach_mediator(
    views: Sequence[View],
    graphs: Sequence[Graph],
    identity: np.ndarray,
    *,
    settings: MediatorSettings,
    candidates: str = "base",
    joint: JointSet | None = None,
    second_stage: bool = True,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Mediator, SecondStage | None]:
    """Fit the mediator on labelled pairs, and the second reading on what it says of them.

    Parameters
    ----------
    views, graphs : one each a model over the same n rows, the base first, or functions that load
        them.
    identity : (n,) integers.
    settings : of the mediator; its variant names the features.
    candidates : "base" or "all", as for `cdp.committee.make_pairs`.
    joint : the same rows amid the unlabelled ones; with the variant "extended" only. Leave it out
        where many unlabelled images show labelled people.
    second_stage : with the variant "extended" only.

    Raises
    ------
    ConfigError
        A second reading of a mediator that holds not every pair out.
    DataError
        As `describe_pairs` and `Mediator.fit`.
    """
    extended = settings.variant == "extended"
    if extended and second_stage and settings.members != settings.folds:
        raise ConfigError(
            "second_stage needs every labelled pair held out once: give mediator_settings as "
            f"many members as folds, got {settings.members} and {settings.folds}, or set "
            "second_stage=False"
        )
    identity = np.asarray(identity).astype(np.int64)
    steps = make_curriculum(
        graphs, identity, steps=CURRICULUM if extended else CURRICULUM[:1], seed=seed
    )
    pairs = [make_pairs(step.graphs, candidates=candidates) for step in steps]
    features = [
        describe_pairs(
            [partial(_take_rows, view, step.rows) for view in views],
            step.graphs,
            listed,
            variant=settings.variant,
            threads=threads,
        )
        for step, listed in zip(steps, pairs, strict=True)
    ]
    wccn = None
    if extended:
        wccn, fold = fit_wccn(
            views, identity, around=None if joint is None else joint.views, seed=seed,
            threads=threads,
        )  # fmt: skip
        coordinates = wccn.project(views, threads=threads)
        for number, (step, listed) in enumerate(zip(steps, pairs, strict=True)):
            even = wccn.measure(coordinates[step.rows], listed, fold[step.rows], threads=threads)
            features[number] = np.column_stack([features[number], even])
    taught = [(listed, step.identity) for step, listed in zip(steps, pairs, strict=True)]
    everyone = person = None
    if joint is not None and extended:
        everyone, person = make_pairs(joint.graphs, candidates=candidates), joint.name_rows()
        own = (person[everyone.source] >= 0) | (person[everyone.target] >= 0)
        known = everyone.take(own)
        taught.append((known, person))
        assert wccn is not None
        even = wccn.measure(
            wccn.project(joint.views, threads=threads),
            known,
            _deal_joint(joint.identity, identity, fold),
            threads=threads,
        )
        described = describe_pairs(
            joint.views, joint.graphs, known, variant=settings.variant, threads=threads
        )
        features.append(np.column_stack([described, even]))
    source = np.concatenate([who[listed.source] for listed, who in taught])
    target = np.concatenate([who[listed.target] for listed, who in taught])
    mediator = Mediator.fit(
        np.concatenate(features),
        source == target,
        source,
        target,
        settings=settings,
        seed=seed,
        threads=threads,
    )
    mediator.wccn = wccn
    if not (extended and second_stage):
        return mediator, None
    held_out = mediator.held_out
    assert held_out is not None
    read = None
    if joint is not None and everyone is not None and person is not None:
        probability = score_pairs(mediator, joint.views, joint.graphs, everyone, threads=threads)
        probability[own] = held_out[len(held_out) - len(known) :]
        probability = mediator.correct(probability).probability
        read = JointScores(joint.views, everyone, probability, person)
    reading = fit_second_stage(
        views,
        pairs[0],
        held_out[: len(pairs[0])],
        identity,
        joint=read,
        seed=seed,
        threads=threads,
    )
    return mediator, reading


def _deal_joint(joint: np.ndarray, identity: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The fold of each row of the joint; -1 for an unlabelled one."""
    people, first = np.unique(identity, return_index=True)
    place = np.minimum(np.searchsorted(people, joint), len(people) - 1)
    return np.where(joint < 0, -1, fold[first][place])


def _take_rows(view: View, rows: np.ndarray) -> np.ndarray:
    loaded = view() if callable(view) else view
    return loaded if len(rows) == len(loaded) else loaded[rows]


def score_pairs(
    mediator: Mediator,
    views: Sequence[np.ndarray | Callable[[], np.ndarray]],
    graphs: Sequence[KnnGraph | Callable[[], KnnGraph]],
    pairs: PairTable,
    *,
    threads: int | None = None,
) -> np.ndarray:
    """Score pairs of rows by what the committee knows of them.

    Parameters
    ----------
    views, graphs : one each a model, the base first, or functions that load them.
    pairs : of their rows.

    Returns
    -------
    (m,) float32 in (0, 1).

    Raises
    ------
    DataError
        As `cdp.committee.describe_pairs` and `Mediator.score`.
    """
    workers = count_threads(threads)
    loaded = [graph if isinstance(graph, KnnGraph) else graph() for graph in graphs]
    affinity = allocate((len(views), len(pairs)))
    for number, view in enumerate(views):
        measure_affinity(view, pairs, out=affinity[number], threads=threads)
    found = mediator.wccn
    if found is not None:
        rows = found.whiten(found.project(views, threads=threads), threads=threads)
        even = measure_cosines(rows, pairs)
        del rows
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(pairs), BLOCK):
        part = slice(start, min(start + BLOCK, len(pairs)))
        features = describe_pairs(
            (),
            loaded,
            pairs,
            variant=mediator.settings.variant,
            rows=part,
            affinity=affinity.T,
            threads=threads,
        )
        if found is not None:
            features = np.column_stack([features, even[part]])
        scores[part] = mediator.score(features, threads=workers)
    return scores
