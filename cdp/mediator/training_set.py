"""The set a pair scorer is trained on, and whether it can train one for these unlabelled rows.

The contract:
- Enters: labelled views and identities, the unlabelled rows, and degraded copies where there are
  any. Leaves: a `TrainingSet`: one of each near-equal group, without doubted labels, with the
  unlabelled rows that show a labelled person; or copies of those labelled rows in their place.
- `TrainingSet.require_fit` and `require_no_gap` raise a `ShortageError` that says why the set
  cannot train a mediator: it is too small, or unlike the unlabelled rows.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cdp.arrays.cosine import make_unit, take_unit
from cdp.knn.joint import join_graphs
from cdp.mediator.believed_rows import BelievedRows, choose_believed, stack_rows
from cdp.mediator.curriculum import JointSet, choose_labelled
from cdp.mediator.labelled_rows import choose_distinct_labelled
from cdp.mediator.person_sizes import describe_size_gap
from cdp.mediator.set_gap import describe_difference, describe_gap
from cdp.mediator.shortage import ShortageError, describe_imbalance, describe_shortage
from cdp.mediator.small_set import is_small
from cdp.types import UNLABELLED, Graph, View, load_graph, load_view


@dataclass(frozen=True)
class DegradedCopies:
    """Degraded copies of labelled images.

    views : one (c, d_v) array a model, or a function that loads it. of : (c,) int64, the labelled
    row that each is a copy of.
    """

    views: Sequence[View]
    of: np.ndarray


@dataclass(frozen=True)
class TrainingSet:
    """Rows to train on.

    views : one (n, d_v) array a model, or a function that loads it. identity : (n,) int64 of each
    row. adopted : (n,) bool, the rows that are unlabelled images of a labelled person. are_copies :
    whether the rows are degraded copies of labelled images.
    """

    views: Sequence[View]
    identity: np.ndarray
    adopted: np.ndarray
    are_copies: bool = False

    @property
    def labelled_views(self) -> list[np.ndarray]:
        """One (l, d_v) array a model, the labelled rows alone."""
        return [load_view(view)[~self.adopted] for view in self.views]

    def require_fit(
        self, unlabelled: Sequence[View], graph: Graph, *, compared: bool = True, seed: int = 0
    ) -> None:
        """Raise a `ShortageError` where the set is too small, or unlike the unlabelled rows.

        Parameters
        ----------
        unlabelled : one (m, d_v) array a model, or a function that loads it.
        graph : the base graph of those rows, or a function that loads it.
        compared : whether sizes of people and embeddings of both sets are compared. Copies never
            are: they are compared in joint graphs (`require_no_gap`).
        seed : of the comparison.
        """
        reasons = self._list_reasons(unlabelled, graph, compared and not self.are_copies, seed)
        shortage = next(filter(None, reasons), "")
        if shortage:
            raise ShortageError(shortage)

    def _list_reasons(
        self, unlabelled: Sequence[View], graph: Graph, compared: bool, seed: int
    ) -> Iterator[str]:
        """Why the set cannot train a mediator, the cheapest comparison first; "" where it can."""
        listed = load_graph(graph)
        yield describe_shortage(self.identity)
        yield describe_imbalance(self.identity, len(listed))
        if not compared:
            return
        own = self.labelled_views
        if not is_small(len(listed), len(own[0]), listed.k):
            base = make_unit(load_view(self.views[0]))[0]
            yield describe_size_gap(base, self.identity, unlabelled[0], listed)
        yield describe_difference(own, self.identity[~self.adopted], unlabelled, graph, seed=seed)

    def require_no_gap(self, joint: JointSet | None, unlabelled_count: int) -> None:
        """Raise a `ShortageError` where copies are unlike the unlabelled rows in joint graphs."""
        gap = describe_gap(joint, unlabelled_count) if self.are_copies and joint else ""
        if gap:
            raise ShortageError(gap)


@dataclass(frozen=True)
class ChosenSet:
    """A training set, and how it was chosen.

    trained : the set. rows : (r,) int64, ascending labelled rows whose labels were checked.
    believed : what the check left; None without a check. left_out : (m,) bool, unlabelled rows that
    are no negative examples; None: none.
    """

    trained: TrainingSet
    rows: np.ndarray
    believed: BelievedRows | None
    left_out: np.ndarray | None


def choose_training_set(
    labelled: Sequence[View],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    graph: Graph,
    *,
    copies: DegradedCopies | None = None,
    near_equal: bool = True,
    label_check: bool = True,
    seed: int = 0,
    threads: int | None = None,
) -> ChosenSet:
    """The rows to train on, by the check of their labels; of degraded copies where given.

    Parameters
    ----------
    labelled, unlabelled : one array a model, or a function that loads it, the base first.
    identity : (n,) int64, the labels.
    graph : the base graph of the unlabelled rows, or a function that loads it.
    copies : of the labelled rows, trained on in place of them; None: none.
    near_equal, label_check : whether one of each near-equal group is chosen, and whether labels are
        checked.
    seed, threads : as for `choose_believed`.
    """
    rows, moved = choose_labelled(identity, seed=seed), np.empty(0, np.int64)
    if near_equal:
        rows, near = choose_distinct_labelled(labelled, identity, seed=seed, threads=threads)
        if near is not None:
            moved = np.flatnonzero(near.representative != np.arange(len(identity)))
    own = [take_rows(view, rows) for view in labelled]
    believed, left_out, person, doubted = None, None, identity, np.empty(0, np.int64)
    if label_check:
        believed = choose_believed(
            own,
            identity[rows],
            unlabelled,
            graph,
            distinct=near_equal,
            compared=copies is None,
            seed=seed,
            threads=threads,
        )
        left_out, person = believed.left_out, identity.copy()
        person[rows] = believed.check.person
        doubted = np.setdiff1d(rows, rows[believed.labelled])
    if copies is not None:
        trained = _take_copies(copies, person, np.union1d(moved, doubted), seed)
    elif believed is None:
        trained = TrainingSet(own, identity[rows], np.zeros(len(rows), bool))
    else:
        views = [
            stack_rows(one, believed.labelled, other, believed.adopted)
            for one, other in zip(own, unlabelled, strict=True)
        ]
        adopted = np.arange(len(believed.identity)) >= len(believed.labelled)
        trained = TrainingSet(views, believed.identity, adopted)
    return ChosenSet(trained, rows, believed, left_out)


def _take_copies(
    copies: DegradedCopies, person: np.ndarray, without: np.ndarray, seed: int
) -> TrainingSet:
    """Copies of the labelled rows but those `without`; person : (n,) int64, of labelled rows."""
    kept = np.flatnonzero(~np.isin(copies.of, without))
    kept = kept[choose_labelled(person[copies.of[kept]], seed=seed)]
    views = [take_rows(view, kept) for view in copies.views]
    return TrainingSet(views, person[copies.of[kept]], np.zeros(len(kept), bool), are_copies=True)


def take_rows(view: View, rows: np.ndarray) -> np.ndarray:
    """Some rows of a view as unit vectors, each checked by its own row number."""
    loaded = load_view(view)
    return make_unit(loaded)[0] if len(rows) == len(loaded) else take_unit(loaded, rows)


def build_joint_set(
    labelled: Sequence[View],
    labelled_graphs: Sequence[Graph],
    identity: np.ndarray,
    unlabelled: Sequence[View],
    unlabelled_graphs: Sequence[Graph],
    *,
    left_out: np.ndarray | None = None,
    threads: int | None = None,
) -> JointSet:
    """Labelled rows and the unlabelled ones that share a list with them; see `join_graphs`.

    labelled : (r, d_v) unit rows a model, or a function that loads them. identity : (r,) int64.
    """
    held = [load_view(view) for view in labelled]
    near, graphs = join_graphs(
        held, labelled_graphs, unlabelled, unlabelled_graphs, left_out=left_out, threads=threads
    )
    views = [
        np.concatenate([one, make_unit(load_view(view)[near])[0]])
        for one, view in zip(held, unlabelled, strict=True)
    ]
    unknown = np.full(len(near), UNLABELLED, np.int64)
    return JointSet(views, graphs, np.concatenate([identity, unknown]))
