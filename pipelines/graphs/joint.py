"""The split `joint`: the graphs over labelled and unlabelled images together.

The contract:
- A graph is restricted to the labelled images, which come first, and to those unlabelled ones that
  share a list with one in some view (`cdp.knn.joint`).
- Unlabelled images that may show a labelled person are not in it.
- It is made from the graphs of both splits; nothing is searched again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdp.types import KnnGraph
from pipelines.files import save_arrays
from pipelines.graphs.view import View, write_graph
from pipelines.stage import Work
from pipelines.tables import JOINT


def join_splits(work: Work, pairs: Sequence[tuple[View, View]], left_out: np.ndarray) -> None:
    """Write the joint graphs.

    pairs : the labelled and the unlabelled view of each member, both searched.
    left_out : (u,) bool, the unlabelled rows that the graphs are made without.
    """
    jobs = [(*pair, left_out, work.scratch / f"{JOINT}-{pair[0].member}.npz") for pair in pairs]
    for _ in work.engine.map(find_lists, jobs, label="knn joins the splits"):
        pass
    kept = np.flatnonzero(np.any([np.load(job[3])["near"] for job in jobs], axis=0))
    joint = [
        (*job, kept, work.path("neighbours", f"{JOINT}/{job[0].member}") / "part-00000.parquet")
        for job in jobs
    ]
    for _ in work.engine.map(write_joint, joint, label="knn writes joint graphs"):
        pass


def find_lists(labelled: View, unlabelled: View, left_out: np.ndarray, target: Path) -> None:
    """The lists of one view that joining the labelled and the unlabelled split changes."""
    from cdp.knn.joint import find_joint_lists

    if target.exists():
        return
    sides: list[Any] = []
    for view, kept in ((labelled, None), (unlabelled, ~left_out)):
        sides += [view.map_vectors(kept), view.read_graph(kept)]
    found = find_joint_lists(*sides, threads=1)
    save_arrays(
        target,
        near=found.near,
        neighbour=found.labelled.neighbour,
        similarity=found.labelled.similarity,
        changed=found.changed,
        changed_neighbour=found.lists.neighbour,
        changed_similarity=found.lists.similarity,
    )


def write_joint(
    labelled: View,
    unlabelled: View,
    left_out: np.ndarray,
    lists: Path,
    kept: np.ndarray,
    target: Path,
) -> None:
    """Write one joint graph: the labelled images and the `kept` rows of the unlabelled ones.

    Rows of the unlabelled images are counted without those that are left out.
    """
    if target.exists():
        return
    from cdp.knn.joint import JointLists, take_lists

    stored = np.load(lists)
    others = unlabelled.read_ids()[~left_out]
    found = JointLists(
        KnnGraph(stored["neighbour"], stored["similarity"]),
        stored["changed"],
        KnnGraph(stored["changed_neighbour"], stored["changed_similarity"]),
        len(others),
    )
    graph = take_lists(found, unlabelled.read_graph(~left_out), kept)
    ids = np.concatenate([labelled.read_ids(), others])
    rows = np.concatenate([labelled.read_ids(), others[kept]])
    write_graph(target, rows, graph, ids, graph.k)
