"""Labelled views and their graphs -> the mediator, and its second reading.

The contract:
- Enters: the views and graphs of labelled rows, and who they show. Leaves: a fitted `Mediator` and,
  with "extended" features, a fitted `SecondReading` or None.
- "paper" and "released" learn from the labelled people as they are; "extended" from all lessons of
  `cdp.lessons`, amid the unlabelled crowd too where it is given, with the cosine of
  `cdp.discriminant` as one more input.
- The features of all labelled pairs are held at once: some 60 columns of float32 a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from cdp.committee import describe_pairs, make_pairs
from cdp.context import CrowdReading, SecondReading, fit_context
from cdp.discriminant import fit_discriminant
from cdp.errors import ConfigError
from cdp.lessons import LESSONS, Crowd, make_lessons
from cdp.mediator import Mediator, MediatorSettings
from cdp.scoring import score_pairs
from cdp.types import KnnGraph

View = np.ndarray | Callable[[], np.ndarray]
Graph = KnnGraph | Callable[[], KnnGraph]


def teach_mediator(
    views: Sequence[View],
    graphs: Sequence[Graph],
    identity: np.ndarray,
    *,
    settings: MediatorSettings,
    candidates: str = "base",
    crowd: Crowd | None = None,
    second_reading: bool = True,
    seed: int = 0,
    threads: int | None = None,
) -> tuple[Mediator, SecondReading | None]:
    """Fit the mediator on labelled pairs, and the second reading on what it says of them.

    Parameters
    ----------
    views, graphs : one each a model over the same n rows, the base first, or functions that load
        them.
    identity : (n,) integers.
    settings : of the mediator; its variant names the features.
    candidates : "base" or "all", as for `cdp.committee.make_pairs`.
    crowd : the same rows amid the unlabelled ones; with the variant "extended" only. Leave it out
        where many unlabelled images show labelled people.
    second_reading : with the variant "extended" only.

    Raises
    ------
    ConfigError
        A second reading of a mediator that holds not every pair out.
    DataError
        As `describe_pairs` and `Mediator.fit`.
    """
    extended = settings.variant == "extended"
    if extended and second_reading and settings.members != settings.folds:
        raise ConfigError(
            "second_reading needs every labelled pair held out once: give mediator_settings as "
            f"many members as folds, got {settings.members} and {settings.folds}, or set "
            "second_reading=False"
        )
    identity = np.asarray(identity).astype(np.int64)
    lessons = make_lessons(
        graphs, identity, lessons=LESSONS if extended else LESSONS[:1], seed=seed
    )
    pairs = [make_pairs(lesson.graphs, candidates=candidates) for lesson in lessons]
    features = [
        describe_pairs(
            [partial(_take_rows, view, lesson.rows) for view in views],
            lesson.graphs,
            listed,
            variant=settings.variant,
            threads=threads,
        )
        for lesson, listed in zip(lessons, pairs, strict=True)
    ]
    discriminant = None
    if extended:
        discriminant, fold = fit_discriminant(
            views, identity, around=None if crowd is None else crowd.views, seed=seed,
            threads=threads,
        )  # fmt: skip
        coordinates = discriminant.project(views, threads=threads)
        for number, (lesson, listed) in enumerate(zip(lessons, pairs, strict=True)):
            even = discriminant.measure(
                coordinates[lesson.rows], listed, fold[lesson.rows], threads=threads
            )
            features[number] = np.column_stack([features[number], even])
    taught = [(listed, lesson.identity) for lesson, listed in zip(lessons, pairs, strict=True)]
    everyone = person = None
    if crowd is not None and extended:
        everyone, person = make_pairs(crowd.graphs, candidates=candidates), crowd.name_rows()
        own = (person[everyone.source] >= 0) | (person[everyone.target] >= 0)
        known = everyone.take(own)
        taught.append((known, person))
        assert discriminant is not None
        even = discriminant.measure(
            discriminant.project(crowd.views, threads=threads),
            known,
            _deal_crowd(crowd.identity, identity, fold),
            threads=threads,
        )
        described = describe_pairs(
            crowd.views, crowd.graphs, known, variant=settings.variant, threads=threads
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
    mediator.discriminant = discriminant
    if not (extended and second_reading):
        return mediator, None
    held_out = mediator.held_out
    assert held_out is not None
    read = None
    if crowd is not None and everyone is not None and person is not None:
        probability = score_pairs(mediator, crowd.views, crowd.graphs, everyone, threads=threads)
        probability[own] = held_out[len(held_out) - len(known) :]
        probability = mediator.correct(probability).probability
        read = CrowdReading(crowd.views, everyone, probability, person)
    reading = fit_context(
        views,
        pairs[0],
        held_out[: len(pairs[0])],
        identity,
        crowd=read,
        seed=seed,
        threads=threads,
    )
    return mediator, reading


def _deal_crowd(crowd: np.ndarray, identity: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The fold of each row of the crowd; -1 for an unlabelled one."""
    people, first = np.unique(identity, return_index=True)
    place = np.minimum(np.searchsorted(people, crowd), len(people) - 1)
    return np.where(crowd < 0, -1, fold[first][place])


def _take_rows(view: View, rows: np.ndarray) -> np.ndarray:
    loaded = view() if callable(view) else view
    return loaded if len(rows) == len(loaded) else loaded[rows]
