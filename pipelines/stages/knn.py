"""knn: views -> one k-nearest-neighbour graph a view and split, by cosine.

The contract:
- One index a view and split is built, saved, and queried in parts by the workers; the parts do not
  depend on the number of workers.
- The recall of each graph against exact search, on a seeded sample, is in the manifest.
- Neighbours are `sample_id`s, nearest first, without the sample itself.
- Where embed made degraded copies of the labelled images, these stand in their place.
- Of the labelled images only those are searched that the mediator is trained on
  (`cdp.mediator.curriculum.choose_labelled`), without those whose label is doubted and with the
  unlabelled images of their people, in the table `adopted` (`cdp.mediator.believed_rows`;
  `knn.label_check: false` trusts all labels and adopts none), and none where all these are too few
  to train one on (`cdp.mediator.shortage`). A list of fewer than k other images is padded with -1.
- Copies of other files (`ingest.samples.copy_of`) are not searched. Near-equal images
  (`cdp.knn.near_equal`) are searched as one: graphs hold the image that stands for them;
  `knn.near_equal: false` omits it. `near_equal` lists the images that others stand for.
- The split `joint` is the graph over labelled and unlabelled images together, restricted to the
  labelled ones, which come first, and those that share a list with one (`cdp.knn.joint`);
  `knn.joint: false` omits it.
  Unlabelled images that may show a labelled person are not in it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.arrays.threads import list_blocks
from cdp.errors import DataError
from cdp.types import UNLABELLED, KnnGraph
from pipelines.config import KnnSettings
from pipelines.copies import COPIES, find_originals, find_trained_split
from pipelines.decisions import ON_DOUBTS
from pipelines.files import save_arrays
from pipelines.label_check import ADOPTED, LABEL_ISSUES, check_splits
from pipelines.stage import Stage, Work
from pipelines.tables import JOINT, SPLITS, read_vectors, read_view, vector_column, write_table

if TYPE_CHECKING:
    from cdp.knn.index import KnnIndex
    from cdp.knn.near_equal import NearEqual

NEAR_EQUAL = pa.schema(
    [("sample_id", pa.int64()), ("representative", pa.int64()), ("similarity", pa.float32())]
)
PART_SIZE = 16384
"""Rows queried at once: each part reads the whole index of its view."""
_WHOLE = 100_000
"""Up to so many rows a search that compares all pairs has one part, and compares each pair once."""


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
    from cdp.mediator.shortage import describe_shortage

    settings = work.config.knn
    embedded = work.input_facts("embed")
    counts = {split: int(embedded[split]) for split in SPLITS}
    counts["labelled"] = int(embedded.get(COPIES, counts["labelled"]))
    _require_enough(SPLITS[1], counts[SPLITS[1]], settings.k)
    members = [member.name for member in work.config.committee.all]
    chosen, near = _choose_labelled(work, members, counts["labelled"])
    counts["labelled"] = len(chosen)
    views = [(split, member) for split in SPLITS if counts[split] for member in members]
    places = {view: work.scratch / f"{view[0]}-{view[1]}" for view in views}
    tables = {view: work.path("neighbours", "/".join(view)) for view in views}
    ids = {SPLITS[0]: chosen}
    copies = _list_copies(work)
    if len(copies):
        ids[SPLITS[1]] = _leave_out(work, members[0], copies)
        counts[SPLITS[1]] = len(ids[SPLITS[1]])
        _require_enough(SPLITS[1], counts[SPLITS[1]], settings.k)
    pile = [view for view in views if view[0] == SPLITS[1]]
    _search(work, pile, places, tables, ids)
    if settings.near_equal and pile:
        found = _represent(work, pile, places, tables)
        near[SPLITS[1]] = found
        if found.collapsed:
            ids[SPLITS[1]] = found.kept
            counts[SPLITS[1]] = len(found.kept)
            for view in pile:
                _set_aside(tables[view], work.scratch / f"first-{view[1]}")
                places[view] = places[view].with_name(f"{places[view].name}-distinct")
            _search(work, pile, places, tables, ids)
    _write_near_equal(work, near, copies)
    left_out = np.zeros(counts[SPLITS[1]], bool)
    adopted, person = chosen[:0], _number_people(work, chosen)
    facts: dict[str, Any] = {}
    if len(chosen) and settings.label_check:
        lists = tables[SPLITS[1], members[0]] if pile else None
        vectors, compared = [places[view] for view in pile], not embedded.get(COPIES)
        checked = check_splits(work, chosen, members, vectors, lists, compared=compared)
        chosen, adopted, person = checked.trained, checked.adopted, checked.person
        left_out, facts = checked.left_out, checked.facts
    else:
        work.write("label_issues", LABEL_ISSUES.empty_table())
        work.write("adopted", ADOPTED.empty_table())
    shortage = ""
    if embedded.get(COPIES):
        chosen = _take_copies(work, members[0], ids[SPLITS[0]], chosen, near.get(SPLITS[0]))
        adopted = adopted[:0]
    elif shortage := describe_shortage(person):
        chosen, adopted = chosen[:0], adopted[:0]
    ids[SPLITS[0]] = np.union1d(chosen, adopted)
    counts[SPLITS[0]] = len(ids[SPLITS[0]])
    views = [view for view in views if counts[view[0]]]
    labelled = [view for view in views if view[0] == SPLITS[0]]
    _search(work, labelled, places, tables, ids, adopted=bool(len(adopted)))
    joint = settings.joint and all(counts.values())
    if joint:
        _join_splits(work, members, places, tables, left_out)
    sample = [(places[view], tables[view], settings.recall_sample, work.seed) for view in views]
    recalls = list(work.engine.map(measure_view, sample, label="knn measures recall"))
    return {
        "k": settings.k,
        "backend": settings.backend,
        "graphs": len(views) + len(members) * joint,
        "labelled_searched": counts[SPLITS[0]],
        "adopted_searched": len(adopted),
        **({"shortage": shortage} if shortage else {}),
        "near_equal": {split: each.facts for split, each in near.items() if each.collapsed},
        "joint": joint,
        **facts,
        "lowest_recall": round(min(recalls), 4),
        "recall": {"/".join(v): round(recall, 4) for v, recall in zip(views, recalls, strict=True)},
    }


def _require_enough(split: str, count: int, k: int) -> None:
    if count <= k:
        raise DataError(
            f"the {split} split has {count} images to search, and knn.k={k} needs at least "
            f"{k + 1}. Add images or lower knn.k"
        )


def _search(
    work: Work,
    views: list[tuple[str, str]],
    places: Mapping[tuple[str, str], Path],
    tables: Mapping[tuple[str, str], Path],
    ids: Mapping[str, np.ndarray],
    *,
    adopted: bool = False,
) -> None:
    """Search the neighbours of every image of some views.

    views : (split, member). ids : split -> ascending sample ids to search; all where it is missing.
    adopted : whether images of the other split are among them.
    """
    settings = work.config.knn
    split_of = {SPLITS[0]: find_trained_split(work.input_facts("embed"))}
    build = [
        (
            [
                work.locate("embed.embeddings", f"{split_of.get(split, split)}/{view[1]}")
                for split in (SPLITS if adopted else view[:1])
            ],
            places[view],
            settings,
            work.seed,
        )
        + ((ids[view[0]],) if view[0] in ids else ())
        for view in views
    ]
    for _ in work.engine.map(build_view, build, label="knn builds indexes"):
        pass
    queries = [
        (places[view], settings.k, rows, tables[view] / f"part-{number:05d}.parquet")
        for view in views
        for number, rows in enumerate(_list_parts(settings, _count_rows(places[view])))
    ]
    for _ in work.engine.map(query_part, queries, label="knn searches"):
        pass


def _take_copies(
    work: Work, member: str, asked: np.ndarray, trained: np.ndarray, near: Represented | None
) -> np.ndarray:
    """The sample ids of the degraded copies to train on, ascending.

    asked, trained : sample ids of labelled images, before and after the check of their labels. Left
    out are copies of images with a doubted label, and of those that another one stands for.
    """
    place = work.locate("embed.embeddings", f"{COPIES}/{member}")
    ids = np.sort(pq.read_table(place, columns=["sample_id"])["sample_id"].to_numpy())
    doubted = np.setdiff1d(asked, trained)
    moved = np.empty(0, np.int64) if near is None else near.moved
    return ids[~np.isin(find_originals(ids), np.concatenate([doubted, moved]))]


def _count_rows(place: Path) -> int:
    return len(np.load(place / "ids.npy", mmap_mode="r"))


def _list_parts(settings: KnnSettings, count: int) -> list[slice]:
    """The rows of each part that a view of so many rows is searched in."""
    from cdp.knn.index import compares_all

    whole = count <= _WHOLE and compares_all(settings.backend, settings.options, count)
    return list_blocks(0, count, max(count, 1) if whole else PART_SIZE)


def _set_aside(table: Path, first: Path) -> None:
    """Move the table of a first search away, once: the second one is written in its place."""
    if not first.exists():
        table.rename(first)


# ------------------------------------------------------------------------------------ near-equal


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


def _choose_labelled(
    work: Work, members: list[str], count: int
) -> tuple[np.ndarray, dict[str, Represented]]:
    """The sample ids of the labelled images that the mediator is trained on, ascending."""
    from cdp.mediator.curriculum import choose_labelled

    if not count:
        return np.empty(0, np.int64), {}
    tables = [work.locate("embed.embeddings", f"{SPLITS[0]}/{member}") for member in members]
    ids = np.sort(pq.read_table(tables[0], columns=["sample_id"])["sample_id"].to_numpy())
    identity = _number_people(work, ids)
    if not work.config.knn.near_equal:
        rows = choose_labelled(identity, seed=work.seed)
        return ids[rows], {}
    target = work.scratch / "labelled-near.npz"
    for _ in work.engine.map(choose_rows, [(tables, identity, work.seed, target)], label="knn"):
        pass
    rows, found = np.load(target)["rows"], {SPLITS[0]: Represented.load(target, ids)}
    return ids[rows], found


def _number_people(work: Work, ids: np.ndarray) -> np.ndarray:
    """The identity of some labelled images, numbered in the order of the names."""
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


def _represent(
    work: Work,
    views: list[tuple[str, str]],
    places: Mapping[tuple[str, str], Path],
    tables: Mapping[tuple[str, str], Path],
) -> Represented:
    """The near-equal images of the unlabelled split."""
    first = work.scratch / f"first-{views[0][1]}"
    table = first if first.exists() else tables[views[0]]
    target = work.scratch / "unlabelled-near.npz"
    job = ([places[view] for view in views], table, work.seed, target)
    for _ in work.engine.map(find_near, [job], label="knn finds near-equal images"):
        pass
    return Represented.load(target, np.load(places[views[0]] / "ids.npy"))


def find_near(places: list[Path], table: Path, seed: int, target: Path) -> None:
    """The near-equal images of one split, by the vectors of all views and the base graph."""
    from cdp.knn.near_equal import find_near_equal

    if target.exists():
        return
    views = [np.load(place / "vectors.npy", mmap_mode="r") for place in places]
    _save_near(target, find_near_equal(views, _read_graph(places[0], table), seed=seed), views[0])


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


def _list_copies(work: Work) -> Any:
    """The unlabelled images that are copies of another file: sample_id -> the other's."""
    samples = work.read("ingest.samples", columns=["sample_id", "copy_of"]).to_pandas()
    return samples.dropna().astype(np.int64).set_index("sample_id").copy_of


def _leave_out(work: Work, member: str, copies: Any) -> np.ndarray:
    """The sample ids of the unlabelled images that are no copies, ascending."""
    place = work.locate("embed.embeddings", f"{SPLITS[1]}/{member}")
    ids = np.sort(pq.read_table(place, columns=["sample_id"])["sample_id"].to_numpy())
    return ids[~np.isin(ids, copies.index)]


def _write_near_equal(work: Work, near: Mapping[str, Represented], copies: Any) -> None:
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


def _join_splits(
    work: Work,
    members: list[str],
    places: dict[tuple[str, str], Path],
    tables: dict[tuple[str, str], Path],
    left_out: np.ndarray,
) -> None:
    """Write the joint graphs, from the graphs of both splits without the images left out."""
    jobs = [
        (
            [places[split, member] for split in SPLITS],
            [tables[split, member] for split in SPLITS],
            left_out,
            work.scratch / f"{JOINT}-{member}.npz",
        )
        for member in members
    ]
    for _ in work.engine.map(find_lists, jobs, label="knn joins the splits"):
        pass
    kept = np.flatnonzero(np.any([np.load(job[3])["near"] for job in jobs], axis=0))
    joint = [
        (*job, kept, work.path("neighbours", f"{JOINT}/{member}") / "part-00000.parquet")
        for job, member in zip(jobs, members, strict=True)
    ]
    for _ in work.engine.map(write_joint, joint, label="knn writes joint graphs"):
        pass


def build_view(
    embeddings: list[Path],
    place: Path,
    settings: KnnSettings,
    seed: int,
    chosen: np.ndarray | None = None,
) -> None:
    """Save the vectors of one view, for mapping, and an index over them.

    embeddings : its table, one a split. chosen : ascending sample ids to keep; None: all.
    """
    from cdp.knn.index import build_index

    if place.exists():
        return
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    ids, vectors = read_view(embeddings)
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


@lru_cache(maxsize=1)
def _open_view(place: Path) -> tuple[KnnIndex, np.ndarray, np.ndarray]:
    from cdp.knn.index import load_index

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    return load_index(place / "index.npz", vectors), vectors, np.load(place / "ids.npy")


def query_part(place: Path, k: int, rows: slice, target: Path) -> None:
    """Search the neighbours of some rows and write them."""
    from cdp.knn.index import query_index

    if target.exists():
        return
    index, vectors, ids = _open_view(place)
    graph = query_index(index, vectors, rows, min(k, index.k), threads=1)
    graph = _pad_lists(graph, k)
    write_table(
        target,
        {
            "sample_id": ids[rows],
            "neighbour": vector_column(_name_neighbours(graph.neighbour, ids)),
            "similarity": vector_column(graph.similarity),
        },
        describe_neighbours(k),
    )


def find_lists(places: list[Path], tables: list[Path], left_out: np.ndarray, target: Path) -> None:
    """The lists of one view that joining the labelled and the unlabelled split changes."""
    from cdp.knn.joint import find_joint_lists

    if target.exists():
        return
    sides: list[Any] = []
    for place, table, kept in zip(places, tables, (None, ~left_out), strict=True):
        sides += [_read_vectors(place, kept), _read_graph(place, table, kept)]
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
    places: list[Path],
    tables: list[Path],
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
    labelled, unlabelled = (np.load(place / "ids.npy") for place in places)
    unlabelled = unlabelled[~left_out]
    found = JointLists(
        KnnGraph(stored["neighbour"], stored["similarity"]),
        stored["changed"],
        KnnGraph(stored["changed_neighbour"], stored["changed_similarity"]),
        len(unlabelled),
    )
    graph = take_lists(found, _read_graph(places[1], tables[1], ~left_out), kept)
    ids = np.concatenate([labelled, unlabelled])
    write_table(
        target,
        {
            "sample_id": np.concatenate([labelled, unlabelled[kept]]),
            "neighbour": vector_column(_name_neighbours(graph.neighbour, ids)),
            "similarity": vector_column(graph.similarity),
        },
        describe_neighbours(graph.k),
    )


def _read_vectors(place: Path, kept: np.ndarray | None) -> np.ndarray:
    vectors: np.ndarray = np.load(place / "vectors.npy", mmap_mode="r")
    return vectors if kept is None or kept.all() else vectors[kept]


def _read_graph(place: Path, neighbours: Path, kept: np.ndarray | None = None) -> KnnGraph:
    """A published graph, neighbours as positions in the ascending sample ids of its split.

    kept : (n,) bool, rows to restrict it to; None: all.
    """
    ids = np.load(place / "ids.npy")
    named = read_vectors(neighbours, "neighbour")
    neighbour = np.where(named == UNLABELLED, UNLABELLED, np.searchsorted(ids, named))
    graph = KnnGraph(neighbour, read_vectors(neighbours, "similarity"))
    if kept is None or kept.all():
        return graph
    from cdp.knn.graph import restrict_graph

    return restrict_graph(graph, kept)


def _pad_lists(graph: KnnGraph, k: int) -> KnnGraph:
    """The graph with lists of k, padded where there are fewer other images."""
    lacking = ((0, 0), (0, k - graph.k))
    return KnnGraph(
        np.pad(graph.neighbour, lacking, constant_values=UNLABELLED),
        np.pad(graph.similarity, lacking),
    )


def _name_neighbours(neighbour: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows as sample ids; padding stays."""
    return np.where(neighbour == UNLABELLED, UNLABELLED, ids[neighbour])


def measure_view(place: Path, neighbours: Path, sample: int, seed: int) -> float:
    """Recall of one published graph against exact search over the same vectors."""
    from cdp.knn.graph import measure_recall

    vectors = np.load(place / "vectors.npy", mmap_mode="r")
    graph = _read_graph(place, neighbours)
    return float(measure_recall(vectors, graph, sample=sample, seed=seed))


STAGE = Stage(
    name="knn",
    version=14,
    inputs=("ingest.samples", "embed.embeddings"),
    outputs={
        "neighbours": describe_neighbours(0),
        "label_issues": LABEL_ISSUES,
        "adopted": ADOPTED,
        "near_equal": NEAR_EQUAL,
    },
    reads=("committee", "knn"),
    run=run,
    corrected=ON_DOUBTS,
)
