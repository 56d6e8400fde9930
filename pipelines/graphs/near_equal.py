"""Near-equal images of a run: which image stands for which, in both splits.

The contract:
- Near-equal images (`cdp.knn.near_equal`) are searched as one: graphs hold the image that stands
  for them. `knn.near_equal: false` omits it.
- Copies of other files (`ingest.samples.copy_of`) follow their twin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.files import save_arrays
from pipelines.graphs.view import View, list_embedded
from pipelines.stage import Work
from pipelines.tables import SPLITS, read_view

if TYPE_CHECKING:
    from cdp.knn.near_equal import NearEqual

NEAR_EQUAL = pa.schema(
    [("sample_id", pa.int64()), ("representative", pa.int64()), ("similarity", pa.float32())]
)


@dataclass(frozen=True)
class Represented:
    """Near-equal images of one split.

    kept : ascending sample ids of those that stand for themselves. moved, representative : sample
    ids of the others, and of those that stand for them. similarity : their base cosines.
    """

    kept: np.ndarray
    moved: np.ndarray
    representative: np.ndarray
    similarity: np.ndarray
    radius: float

    @classmethod
    def load(cls, path: Path, ids: np.ndarray) -> Represented:
        stored = np.load(path)
        row = stored["representative"]
        moved = np.flatnonzero(row != np.arange(len(ids)))
        kept = ids[row == np.arange(len(ids))]
        return cls(kept, ids[moved], ids[row[moved]], stored["similarity"], float(stored["radius"]))

    @property
    def collapsed(self) -> int:
        return len(self.moved)

    @property
    def facts(self) -> dict[str, float]:
        groups = len(np.unique(self.representative))
        return {"images": self.collapsed, "groups": groups, "radius": round(self.radius, 5)}


def choose_labelled(
    work: Work, members: list[str], count: int
) -> tuple[np.ndarray, dict[str, Represented]]:
    """The sample ids of the labelled images that the mediator is trained on, ascending.

    Of near-equal ones it is trained on one. count : how many labelled images there are.
    """
    from cdp.mediator.curriculum import choose_labelled

    if not count:
        return np.empty(0, np.int64), {}
    tables = [work.locate("embed.embeddings", f"{SPLITS[0]}/{member}") for member in members]
    ids = list_embedded(tables[0])
    identity = number_people(work, ids)
    if not work.config.knn.near_equal:
        rows = choose_labelled(identity, seed=work.seed)
        return ids[rows], {}
    target = work.scratch / "labelled-near.npz"
    for _ in work.engine.map(choose_rows, [(tables, identity, work.seed, target)], label="knn"):
        pass
    rows, found = np.load(target)["rows"], {SPLITS[0]: Represented.load(target, ids)}
    return ids[rows], found


def number_people(work: Work, ids: np.ndarray) -> np.ndarray:
    """(n,) int64, the identity of some labelled images, numbered in the order of the names."""
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    number: np.ndarray = samples.set_index("sample_id").identity[ids].factorize(sort=True)[0]
    return number


def choose_rows(tables: list[Path], identity: np.ndarray, seed: int, target: Path) -> None:
    """The labelled rows to train on, and which of them are near-equal."""
    from cdp.knn.near_equal import NearEqual
    from cdp.mediator.labelled_rows import choose_distinct_labelled

    if target.exists():
        return
    views = [partial(_read_split, table) for table in tables]
    rows, near = choose_distinct_labelled(views, identity, seed=seed, threads=1)
    _save_near(target, near or NearEqual(np.arange(len(identity)), 0.0), views[0](), rows=rows)


def _read_split(table: Path) -> np.ndarray:
    return read_view([table])[1]


def represent(work: Work, views: Sequence[View]) -> Represented:
    """The near-equal images of the unlabelled split, whose views were searched."""
    target = work.scratch / "unlabelled-near.npz"
    job = (list(views), _first_table(work, views[0]), work.seed, target)
    for _ in work.engine.map(find_near, [job], label="knn finds near-equal images"):
        pass
    return Represented.load(target, views[0].read_ids())


def find_near(views: list[View], table: Path, seed: int, target: Path) -> None:
    """The near-equal images of one split, by the vectors of all views and the base graph."""
    from cdp.knn.near_equal import find_near_equal

    if target.exists():
        return
    vectors = [view.map_vectors() for view in views]
    graph = replace(views[0], table=table).read_graph()
    _save_near(target, find_near_equal(vectors, graph, seed=seed), vectors[0])


def describe_equal(views: list[View]) -> str:
    """Which images of a split have one and the same vector; "" where few do."""
    from cdp.knn.equal_rows import describe_equal_rows

    maps = [view.map_vectors for view in views]
    names, ids = [view.member for view in views], views[0].read_ids()
    return describe_equal_rows(maps, names, "unlabelled images", ids)


def search_distinct(work: Work, views: Sequence[View]) -> list[View]:
    """The views for a second search, of the images that stand for themselves alone.

    The tables of the first search are moved away once: the second one is written in their place.
    """
    for view in views:
        first = _first_place(work, view)
        if not first.exists():
            view.table.rename(first)
    return [view.move("distinct") for view in views]


def _first_place(work: Work, view: View) -> Path:
    return work.scratch / f"first-{view.member}"


def _first_table(work: Work, view: View) -> Path:
    first = _first_place(work, view)
    return first if first.exists() else view.table


def _save_near(target: Path, near: NearEqual, base: np.ndarray, **more: np.ndarray) -> None:
    from cdp.arrays.cosine import as_readonly, measure_pairs

    moved = np.flatnonzero(near.representative != np.arange(len(near.representative)))
    similarity = np.empty(len(moved), np.float32)
    measure_pairs(as_readonly(base), moved, near.representative[moved], similarity)
    save_arrays(
        target,
        representative=near.representative,
        radius=np.asarray(near.radius),
        similarity=similarity,
        **more,
    )


def list_copies(work: Work) -> Any:
    """The unlabelled images that are copies of another file: sample_id -> the other's."""
    samples = work.read("ingest.samples", columns=["sample_id", "copy_of"]).to_pandas()
    return samples.dropna().astype(np.int64).set_index("sample_id").copy_of


def write_near_equal(work: Work, near: Mapping[str, Represented], copies: Any) -> None:
    """Write which image stands for which: near-equal ones, then copies, which follow their twin."""
    moved = [np.empty(0, np.int64), *(each.moved for each in near.values())]
    stands = [np.empty(0, np.int64), *(each.representative for each in near.values())]
    similarity = [np.empty(0, np.float32), *(each.similarity for each in near.values())]
    follow = dict(zip(np.concatenate(moved), np.concatenate(stands), strict=True))
    work.write(
        "near_equal",
        {
            "sample_id": np.concatenate([*moved, copies.index]),
            "representative": np.concatenate([*stands, [follow.get(i, i) for i in copies]]),
            "similarity": np.concatenate([*similarity, np.ones(len(copies), np.float32)]),
        },
    )
