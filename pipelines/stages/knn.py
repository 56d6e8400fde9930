"""knn: views -> one k-nearest-neighbour graph a view and split, by cosine.

The contract:
- One index a view and split is built, saved, and queried in parts by the workers; the parts do not
  depend on the number of workers.
- The recall of each graph against exact search, on a seeded sample, is in the manifest.
- Neighbours are `sample_id`s, nearest first, without the sample itself.
- Where embed made degraded copies of the labelled images, these stand in their place.
- Of the labelled images only those are searched that the mediator is trained on
  (`cdp.mediator.curriculum.choose_labelled`).
- The split `joint` is the graph over labelled and unlabelled images together, restricted to the
  labelled ones and those that share a list with one (`cdp.knn.joint`); `knn.joint: false` omits it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import DataError
from cdp.types import KnnGraph
from pipelines.config import KnnSettings
from pipelines.copies import COPIES, find_originals, find_trained_split
from pipelines.files import save_arrays
from pipelines.stage import Stage, Work
from pipelines.tables import JOINT, SPLITS, read_vectors, read_view, vector_column, write_table

if TYPE_CHECKING:
    from cdp.knn.index import KnnIndex

PART_SIZE = 4096
"""Rows queried at once."""


def describe_neighbours(k: int) -> pa.Schema:
    """The table of one graph; k = 0 means any k."""
    return pa.schema(
        [
            ("sample_id", pa.int64()),
            ("neighbour", pa.list_(pa.int64(), k)),
            ("similarity", pa.list_(pa.float32(), k)),
        ]
    )


def run(work: Work) -> Mapping[str, Any]:
    settings = work.config.knn
    embedded = work.input_facts("embed")
    counts = {split: int(embedded[split]) for split in SPLITS}
    counts["labelled"] = int(embedded.get(COPIES, counts["labelled"]))
    split_of = dict(zip(SPLITS, (find_trained_split(embedded), SPLITS[1]), strict=True))
    for split, count in counts.items():
        if 0 < count <= settings.k:
            raise DataError(
                f"the {split} split has {count} images to search (of the labelled ones, those kept "
                f"for the mediator), and knn.k={settings.k} needs at least {settings.k + 1}. Add "
                "images, raise train.mediator_share or lower knn.k"
            )
    chosen = _choose_labelled(work) if counts["labelled"] else np.empty(0, np.int64)
    counts["labelled"] = len(chosen)
    members = [member.name for member in work.config.committee.all]
    views = [(split, member) for split in SPLITS if counts[split] for member in members]
    places = {view: work.scratch / f"{view[0]}-{view[1]}" for view in views}
    tables = {view: work.path("neighbours", "/".join(view)) for view in views}
    build = [
        (
            work.locate("embed.embeddings", f"{split_of[view[0]]}/{view[1]}"),
            places[view],
            settings,
            work.seed,
        )
        + ((chosen,) if view[0] == SPLITS[0] else ())
        for view in views
    ]
    for _ in work.engine.map(build_view, build, label="knn builds indexes"):
        pass
    queries = [
        (places[view], settings.k, row, tables[view] / f"part-{number:05d}.parquet")
        for view in views
        for number, row in enumerate(range(0, counts[view[0]], PART_SIZE))
    ]
    for _ in work.engine.map(query_part, queries, label="knn searches"):
        pass
    joint = settings.joint and all(counts.values())
    if joint:
        _join_splits(work, members, places, tables)
    sample = [(places[view], tables[view], settings.recall_sample, work.seed) for view in views]
    recalls = list(work.engine.map(measure_view, sample, label="knn measures recall"))
    return {
        "k": settings.k,
        "backend": settings.backend,
        "graphs": len(views) + len(members) * joint,
        "labelled_searched": len(chosen),
        "joint": joint,
        "lowest_recall": round(min(recalls), 4),
        "recall": {"/".join(v): round(recall, 4) for v, recall in zip(views, recalls, strict=True)},
    }


def _choose_labelled(work: Work) -> np.ndarray:
    """The sample ids of the labelled images that the mediator is trained on, ascending."""
    from cdp.mediator.curriculum import choose_labelled

    member = work.config.committee.all[0].name
    split = find_trained_split(work.input_facts("embed"))
    place = work.locate("embed.embeddings", f"{split}/{member}")
    ids = np.sort(pq.read_table(place, columns=["sample_id"])["sample_id"].to_numpy())
    samples = work.read("ingest.samples", columns=["sample_id", "identity"]).to_pandas()
    identity = samples.set_index("sample_id").identity[find_originals(ids)].factorize(sort=True)[0]
    return ids[choose_labelled(identity, seed=work.seed)]


def _join_splits(
    work: Work,
    members: list[str],
    places: dict[tuple[str, str], Path],
    tables: dict[tuple[str, str], Path],
) -> None:
    """Write the joint graphs, from the graphs of both splits."""
    jobs = [
        (
            [places[split, member] for split in SPLITS],
            [tables[split, member] for split in SPLITS],
            work.scratch / f"{JOINT}-{member}.npz",
        )
        for member in members
    ]
    for _ in work.engine.map(find_lists, jobs, label="knn joins the splits"):
        pass
    kept = np.flatnonzero(np.any([np.load(job[2])["near"] for job in jobs], axis=0))
    joint = [
        (*job, kept, work.path("neighbours", f"{JOINT}/{member}") / "part-00000.parquet")
        for job, member in zip(jobs, members, strict=True)
    ]
    for _ in work.engine.map(write_joint, joint, label="knn writes joint graphs"):
        pass


def build_view(
    embeddings: Path,
    place: Path,
    settings: KnnSettings,
    seed: int,
    chosen: np.ndarray | None = None,
) -> None:
    """Save the vectors of one view, for mapping, and an index over them.

    chosen : ascending sample ids to keep; None: all.
    """
    from cdp.knn.index import build_index

    if place.exists():
        return
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    ids, vectors = read_view([embeddings])
    if chosen is not None and len(chosen) < len(ids):
        rows = np.searchsorted(ids, chosen)
        ids, vectors = ids[rows], vectors[rows]
    np.save(draft / "vectors.npy", vectors)
    np.save(draft / "ids.npy", ids)
    index = build_index(
        vectors,
        settings.backend,
        k=settings.k,
        settings=settings.options,
        seed=seed,
        threads=1,
    )
    index.save(draft / "index.npz")
    draft.rename(place)


@lru_cache(maxsize=2)
def _open_view(place: Path) -> tuple[KnnIndex, np.ndarray, np.ndarray]:
    from cdp.knn.index import load_index

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    return load_index(place / "index.npz", vectors), vectors, np.load(place / "ids.npy")


def query_part(place: Path, k: int, row: int, target: Path) -> None:
    """Search the neighbours of one block of rows and write them."""
    from cdp.knn.index import query_index

    if target.exists():
        return
    index, vectors, ids = _open_view(place)
    rows = slice(row, min(row + PART_SIZE, len(vectors)))
    graph = query_index(index, vectors, rows, k, threads=1)
    write_table(
        target,
        {
            "sample_id": ids[rows],
            "neighbour": vector_column(ids[graph.neighbour]),
            "similarity": vector_column(graph.similarity),
        },
        describe_neighbours(k),
    )


def find_lists(places: list[Path], tables: list[Path], target: Path) -> None:
    """The lists of one view that joining the labelled and the unlabelled split changes."""
    from cdp.knn.joint import find_joint_lists

    if target.exists():
        return
    sides: list[Any] = []
    for place, table in zip(places, tables, strict=True):
        sides += [np.load(place / "vectors.npy", mmap_mode="r"), _read_graph(place, table)]
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
    places: list[Path], tables: list[Path], lists: Path, kept: np.ndarray, target: Path
) -> None:
    """Write one joint graph: the labelled images and the `kept` rows of the unlabelled ones."""
    if target.exists():
        return
    from cdp.knn.joint import JointLists, take_lists

    stored = np.load(lists)
    labelled, unlabelled = (np.load(place / "ids.npy") for place in places)
    found = JointLists(
        KnnGraph(stored["neighbour"], stored["similarity"]),
        stored["changed"],
        KnnGraph(stored["changed_neighbour"], stored["changed_similarity"]),
        len(unlabelled),
    )
    graph = take_lists(found, _read_graph(places[1], tables[1]), kept)
    ids = np.concatenate([labelled, unlabelled])
    sample_id = np.concatenate([labelled, unlabelled[kept]])
    order = np.argsort(sample_id)
    write_table(
        target,
        {
            "sample_id": sample_id[order],
            "neighbour": vector_column(ids[graph.neighbour[order]]),
            "similarity": vector_column(graph.similarity[order]),
        },
        describe_neighbours(graph.k),
    )


def _read_graph(place: Path, neighbours: Path) -> KnnGraph:
    """A published graph, neighbours as positions in the ascending sample ids of its split."""
    ids = np.load(place / "ids.npy")
    neighbour = np.searchsorted(ids, read_vectors(neighbours, "neighbour"))
    return KnnGraph(neighbour, read_vectors(neighbours, "similarity"))


def measure_view(place: Path, neighbours: Path, sample: int, seed: int) -> float:
    """Recall of one published graph against exact search over the same vectors."""
    from cdp.knn.graph import measure_recall

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    graph = _read_graph(place, neighbours)
    return float(measure_recall(vectors, graph, sample=sample, seed=seed))


STAGE = Stage(
    name="knn",
    version=9,
    inputs=("ingest.samples", "embed.embeddings"),
    outputs={"neighbours": describe_neighbours(0)},
    reads=("committee", "knn"),
    run=run,
)
