"""Believed rows: labelled rows whose label is believed, and unlabelled rows of their people.

The contract:
- Enters: labelled rows and their labels, and the unlabelled rows. Leaves: the labelled rows to
  train on (`cdp.label_check`), the unlabelled rows that are trained on beside them, and those that
  may show a labelled person, which are no negative examples.
- An unlabelled row is adopted where it shows a labelled person with a probability above
  `cdp.label_check.people.BELIEVED`, as a labelled row is believed; none is where people are then
  clearly less like those of the unlabelled set in size (`SIZE_TOLERANCE`). Without such rows
  nothing changes.
- Where a part of the labelled rows differs from the unlabelled ones, as sharp photos among poor
  ones, it is left out. On LFW, 14 photos of 45 people and a pile of 14 to 40 px, half of the photos
  sharp, F was .68 with them and is .73 (.75 where all have the pile's quality; three draws).
- At most `cdp.mediator.curriculum.LABELLED_ROWS` rows together; one of each near-equal group.

Source: ours. On LFW, where half of the images of each labelled person were unlabelled, pairwise /
BCubed F without adopted rows was .982 / .938, with them .989 / .957, with other people of as many
images .990 / .958 (one draw).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.knn.near_equal import choose_distinct
from cdp.label_check import LabelCheck, check_labels
from cdp.label_check.people import APART, BELIEVED, FoundPeople
from cdp.mediator.curriculum import LABELLED_ROWS
from cdp.mediator.labelled_rows import find_near_rows
from cdp.mediator.person_sizes import measure_size_gap
from cdp.mediator.set_gap import find_unlike
from cdp.types import Graph, KnnGraph, View, load_graph, load_view

SIZE_TOLERANCE = 0.1
"""How much further adopted rows may take the sizes of the labelled people from those of the
unlabelled set (`cdp.mediator.person_sizes`). It was -.5 to .06 on LFW at 24 and 16 px with 10, 50
and 100 % of the people shared (18 draws), where adopted rows gain, and .13 to .72 on a synthetic
set with 50 and 100 % (six draws), where with 100 % they cost 3 to 9 points of F."""


@dataclass(frozen=True)
class BelievedRows:
    """What a pair scorer is trained on.

    check : of the labels. labelled : (r,) int64, ascending rows of the labelled views.
    adopted : (a,) int64, ascending rows of the unlabelled views. identity : (r + a,) int64, of
    both. left_out : (u,) bool, the unlabelled rows that may show a labelled person. found : the
    labelled person that each unlabelled row shows by itself; None where nobody was looked for.
    unlike : how many believed labelled rows were left out because they differ from the unlabelled
    ones (`cdp.mediator.set_gap.find_unlike`).
    """

    check: LabelCheck
    labelled: np.ndarray
    adopted: np.ndarray
    identity: np.ndarray
    left_out: np.ndarray
    found: FoundPeople | None = None
    unlike: int = 0


def choose_believed(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    distinct: bool = True,
    confirmed: np.ndarray | None = None,
    compared: bool = True,
    seed: int = 0,
    threads: int | None = None,
) -> BelievedRows:
    """Check the labels, and look for the labelled people among the unlabelled rows.

    Parameters
    ----------
    labelled, unlabelled : one array a model, or a function that loads it; no unlabelled view where
        there is no such row.
    graph : the base graph of the unlabelled rows, or a function that loads it.
    identity : (n,) int64, the labels.
    distinct : whether of near-equal rows one is chosen.
    compared : whether labelled rows unlike the unlabelled ones are left out.
    confirmed : (n,) bool, labels that are right whatever the check finds; None: none.
    seed : of the check, and of the choice where there are too many rows.
    threads : at most so many; None: all cores. Never changes the result.
    """
    check = check_labels(labelled, identity, seed=seed)
    trained = check.trained if confirmed is None else check.trained | confirmed
    rows = np.flatnonzero(trained)
    person = check.person[rows]
    nobody = np.empty(0, np.int64)
    if not len(unlabelled) or check.people is None:
        count = len(load_view(unlabelled[0])) if len(unlabelled) else 0
        return BelievedRows(check, rows, nobody, person, np.zeros(count, bool))
    found = check.people.find(unlabelled)
    unlike = np.zeros(len(rows), bool)
    if compared:
        believed = [load_view(view)[rows] for view in labelled]
        unlike = find_unlike(believed, person, unlabelled, graph, seed=seed)
        rows, person = rows[~unlike], person[~unlike]
    shown, probability = found.label, found.probability
    adopted = np.flatnonzero((probability > BELIEVED) & np.isin(shown, person))
    room = max(LABELLED_ROWS - len(rows), 0)
    adopted = np.sort(np.random.default_rng([seed, 0x6164]).permutation(adopted)[:room])
    left_out = probability > APART
    both = np.concatenate([person, shown[adopted]])
    fits = False
    if len(adopted):
        unit = stack_rows(labelled[0], rows, unlabelled[0], adopted)
        fits = _match_sizes(unit, both, len(rows), unlabelled[0], load_graph(graph))
    if not fits:
        return BelievedRows(check, rows, nobody, person, left_out, found, int(unlike.sum()))
    if distinct:
        views = [
            stack_rows(one, rows, other, adopted)
            for one, other in zip(labelled, unlabelled, strict=True)
        ]
        kept = choose_distinct(find_near_rows(views, seed, threads), both)
        adopted, rows = adopted[kept[kept >= len(rows)] - len(rows)], rows[kept[kept < len(rows)]]
        both = both[kept]
    return BelievedRows(check, rows, adopted, both, left_out, found, int(unlike.sum()))


def _match_sizes(
    unit: np.ndarray, person: np.ndarray, labelled: int, unlabelled: View, graph: KnnGraph
) -> bool:
    """Whether with the adopted rows people are about as like those of the other set in size.

    A mediator expects people of the size that it was trained on.

    unit, person : of the labelled rows, then of the adopted ones. labelled : number of those.
    unlabelled : the base view of the unlabelled rows. graph : their graph.
    """
    without, together = (
        abs(measure_size_gap(unit[:count], person[:count], unlabelled, graph))
        for count in (labelled, len(person))
    )
    return together < without + SIZE_TOLERANCE


def stack_rows(one: View, rows: np.ndarray, other: View, more: np.ndarray) -> np.ndarray:
    """Some rows of one set of vectors, and below them some of another, at unit length."""
    few = make_unit(load_view(one)[rows])[0]
    return np.concatenate([few, make_unit(load_view(other)[more])[0]]) if len(more) else few
