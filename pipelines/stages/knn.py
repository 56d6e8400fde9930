"""knn: views -> one k-nearest-neighbour graph a view and split, by cosine.

The contract:
- One index a view and split is built, saved, and queried in parts (`pipelines.graphs.search`).
- The recall of each graph against exact search, on a seeded sample, is in the manifest.
- Neighbours are `sample_id`s, nearest first, without the sample itself. A list of fewer than k
  other images is padded with -1.
- Where embed made degraded copies of the labelled images, these stand in their place.
- Of the labelled images only those are searched that the mediator is trained on
  (`cdp.mediator.curriculum.choose_labelled`), without those whose label is doubted and with the
  unlabelled images of their people, in the table `adopted` (`cdp.mediator.believed_rows`;
  `knn.label_check: false` trusts all labels and adopts none), and none where all these are too few
  to train one on (`cdp.mediator.shortage`).
- Copies of other files are not searched, and near-equal images are searched as one
  (`pipelines.graphs.near_equal`). `near_equal` lists the images that others stand for.
- The split `joint` is the graph over labelled and unlabelled images together
  (`pipelines.graphs.joint`); `knn.joint: false` omits it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdp.errors import DataError
from pipelines.copies import COPIES, find_originals
from pipelines.decisions import APPLIED_BY
from pipelines.graphs.joint import join_splits
from pipelines.graphs.label_check import ADOPTED, LABEL_ISSUES, check_splits
from pipelines.graphs.near_equal import (
    NEAR_EQUAL,
    Represented,
    choose_labelled,
    describe_equal,
    list_copies,
    number_people,
    represent,
    search_distinct,
    write_near_equal,
)
from pipelines.graphs.search import measure_view, search_views
from pipelines.graphs.view import View, describe_neighbours, list_embedded
from pipelines.stage import Stage, Work
from pipelines.tables import SPLITS
from pipelines.training.sets import describe_kept_of

LABELLED_SPLIT, UNLABELLED_SPLIT = SPLITS


@dataclass(frozen=True)
class _Trained:
    """The images that the mediator is trained on.

    ids : ascending sample ids. adopted : how many of them are unlabelled images.
    left_out : (u,) bool, unlabelled rows that may show a labelled person.
    """

    ids: np.ndarray
    adopted: int
    left_out: np.ndarray
    facts: dict[str, Any]


def run(work: Work) -> Mapping[str, Any]:
    settings = work.config.knn
    embedded = work.input_facts("embed")
    members = [member.name for member in work.config.committee.all]
    count = int(embedded.get(COPIES, embedded[LABELLED_SPLIT]))
    _require_enough(int(embedded[UNLABELLED_SPLIT]), settings.k)
    chosen, near = choose_labelled(work, members, count)
    pile, equal = _search_unlabelled(work, members, near)
    trained = _choose_trained(work, members, chosen, pile, near.get(LABELLED_SPLIT))
    labelled = [View.of(work, LABELLED_SPLIT, member) for member in members if len(trained.ids)]
    search_views(work, labelled, {LABELLED_SPLIT: trained.ids}, adopted=bool(trained.adopted))
    joint = settings.joint and bool(labelled)
    if joint:
        join_splits(work, list(zip(labelled, pile, strict=True)), trained.left_out)
    views = [*labelled, *pile]
    sample = [(view, settings.recall_sample, work.seed) for view in views]
    recalls = list(work.engine.map(measure_view, sample, label="knn measures recall"))
    return {
        "k": settings.k,
        "backend": settings.backend,
        "graphs": len(views) + len(members) * joint,
        "labelled_searched": len(trained.ids),
        "adopted_searched": trained.adopted,
        "near_equal": {split: each.facts for split, each in near.items() if each.collapsed},
        "joint": joint,
        "warnings": [equal] if equal else [],
        **trained.facts,
        "lowest_recall": round(min(recalls), 4),
        "recall": {
            view.name: round(recall, 4) for view, recall in zip(views, recalls, strict=True)
        },
    }


def _require_enough(count: int, k: int) -> None:
    if count <= k:
        raise DataError(
            f"the {UNLABELLED_SPLIT} split has {count} images to search, and knn.k={k} needs at "
            f"least {k + 1}. Add images or lower knn.k"
        )


def _search_unlabelled(
    work: Work, members: list[str], near: dict[str, Represented]
) -> tuple[list[View], str]:
    """Search the unlabelled images, without copies and with one of near-equal ones.

    Returns their views, and which images have one and the same vector.
    near : the near-equal images of the labelled split; those of this one are added to it.
    """
    views = [View.of(work, UNLABELLED_SPLIT, member) for member in members]
    ids = {}
    copies = list_copies(work)
    if len(copies):
        embedded = list_embedded(
            work.locate("embed.embeddings", f"{UNLABELLED_SPLIT}/{members[0]}")
        )
        ids[UNLABELLED_SPLIT] = embedded[~np.isin(embedded, copies.index)]
        _require_enough(len(ids[UNLABELLED_SPLIT]), work.config.knn.k)
    search_views(work, views, ids)
    (equal,) = work.engine.map(describe_equal, [(views,)], label="knn looks for equal vectors")
    if work.config.knn.near_equal:
        near[UNLABELLED_SPLIT] = represent(work, views)
        if near[UNLABELLED_SPLIT].collapsed:
            ids[UNLABELLED_SPLIT] = near[UNLABELLED_SPLIT].kept
            views = search_distinct(work, views)
            search_views(work, views, ids)
    write_near_equal(work, near, copies)
    return views, equal


def _choose_trained(
    work: Work,
    members: list[str],
    chosen: np.ndarray,
    pile: list[View],
    near: Represented | None,
) -> _Trained:
    """Check the labels of the `chosen` images, and choose which images to train on.

    chosen : ascending sample ids. near : which labelled images others stand for.
    """
    from cdp.mediator.shortage import describe_shortage

    copied = bool(work.input_facts("embed").get(COPIES))
    trained, adopted, person = chosen, chosen[:0], number_people(work, chosen)
    left_out = np.zeros(pile[0].count_rows(), bool)
    facts: dict[str, Any] = {}
    if len(chosen) and work.config.knn.label_check:
        checked = check_splits(work, chosen, members, pile, compared=not copied)
        trained, adopted, person = checked.trained, checked.adopted, checked.person
        left_out, facts = checked.left_out, checked.facts
    else:
        work.write("label_issues", LABEL_ISSUES.empty_table())
        work.write("adopted", ADOPTED.empty_table())
    if copied:
        trained, adopted = _take_copies(work, members[0], chosen, trained, near), adopted[:0]
    elif shortage := describe_shortage(person):
        trained, adopted = trained[:0], adopted[:0]
        kept = len(np.unique(number_people(work, chosen)))
        shortage += describe_kept_of(work, kept)
        facts = {"shortage": shortage, **facts}
    return _Trained(np.union1d(trained, adopted), len(adopted), left_out, facts)


def _take_copies(
    work: Work, member: str, asked: np.ndarray, trained: np.ndarray, near: Represented | None
) -> np.ndarray:
    """The sample ids of the degraded copies to train on, ascending.

    asked, trained : sample ids of labelled images, before and after the check of their labels. Left
    out are copies of images with a doubted label, and of those that another one stands for.
    """
    ids = list_embedded(work.locate("embed.embeddings", f"{COPIES}/{member}"))
    doubted = np.setdiff1d(asked, trained)
    moved = np.empty(0, np.int64) if near is None else near.moved
    return ids[~np.isin(find_originals(ids), np.concatenate([doubted, moved]))]


STAGE = Stage(
    name="knn",
    version=16,
    inputs=("ingest.samples", "embed.embeddings"),
    outputs={
        "neighbours": describe_neighbours(0),
        "label_issues": LABEL_ISSUES,
        "adopted": ADOPTED,
        "near_equal": NEAR_EQUAL,
    },
    reads=("committee", "knn"),
    run=run,
    corrected=APPLIED_BY["knn"],
)
