"""A hundred million candidate pairs through mediate and propagate, in bounded memory.

    python -m tests.benchmarks.bench_pairs [--pairs 100000000] [--lists 60] [--keep DIR]

The run is that of `bench_million` with two views of 32 numbers, but for two things: the unlabelled
graphs are not searched, and the run ends before the report, which splits at 16 thresholds. Each
list holds the nearest of as many rows of the same and the next identities as it is long, and as
many from anywhere, with the true cosines; so pairs are as many as wanted. All stages before and
after are the usual ones; the labelled graphs are searched, and there is no joint graph. F means
little here: lists hold what was drawn, not what is near.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from cdp.types import KnnGraph
from tests.benchmarks import bench_million

VIEWS = ("base", "second")
DIMENSION = 32
LABELLED = 20_000
BLOCK = 8192
PAIRS_A_NEIGHBOUR = 1.0
"""Different pairs, over the neighbours in the list of one view."""


def draw_lists(vectors: np.ndarray, identity: np.ndarray, k: int, seed: int) -> Any:
    """Yield (rows, neighbour, similarity) of blocks: drawn neighbours, each once, nearest first."""
    random = np.random.default_rng(seed)
    count = len(vectors)
    order = np.argsort(identity, kind="stable")
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    window = np.arange(-(k // 2), k - k // 2)
    for start in range(0, count, BLOCK):
        rows = np.arange(start, min(start + BLOCK, count))
        near = random.integers(0, count, (len(rows), 2 * k))
        near[:, :k] = order[(place[rows, None] + window) % count]
        near.sort(axis=1)
        again = near == rows[:, None]
        again[:, 1:] |= near[:, 1:] == near[:, :-1]
        cosine = np.einsum("rd,rkd->rk", vectors[rows], vectors[near]).astype(np.float32)
        cosine = np.clip(cosine, -1, 1)
        cosine[again] = -np.inf
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        yield rows, np.take_along_axis(near, best, 1), np.take_along_axis(cosine, best, 1)


def write_drawn(embeddings: Path, identity: np.ndarray, k: int, seed: int, place: Path) -> None:
    """One unlabelled graph in the form of the stage knn."""
    from pipelines.graphs.view import write_graph
    from pipelines.tables import read_view

    ids, vectors = read_view([embeddings])
    for number, (rows, near, cosine) in enumerate(draw_lists(vectors, identity, k, seed)):
        write_graph(place / f"part-{number:05d}.parquet", ids[rows], KnnGraph(near, cosine), ids, k)


def draw_graphs(work: Any) -> Mapping[str, Any]:
    """The stage knn, but for the search of the unlabelled rows."""
    from pipelines.graphs.label_check import ADOPTED, LABEL_ISSUES
    from pipelines.graphs.near_equal import choose_labelled, list_copies, write_near_equal
    from pipelines.graphs.search import search_views
    from pipelines.graphs.view import View

    settings, members = work.config.knn, [member.name for member in work.config.committee.all]
    chosen, near = choose_labelled(work, members, work.input_facts("embed")["labelled"])
    write_near_equal(work, near, list_copies(work))
    work.write("label_issues", LABEL_ISSUES.empty_table())
    work.write("adopted", ADOPTED.empty_table())
    views = [View.of(work, "labelled", member) for member in members]
    search_views(work, views, {"labelled": chosen})
    truth = work.read("ingest.samples", columns=["split", "row"]).to_pandas()
    identity = np.load(work.runtime.dataset.root / "unlabelled" / "identity.npy")
    identity = identity[truth.row[truth.split == "unlabelled"].to_numpy()]
    jobs = [
        (
            work.locate("embed.embeddings", f"unlabelled/{member}"),
            np.unique(identity, return_inverse=True)[1],
            settings.k,
            work.seed + number,
            work.path("neighbours", f"unlabelled/{member}"),
        )
        for number, member in enumerate(members)
    ]
    for job in jobs:
        write_drawn(*job)
    return {
        "k": settings.k,
        "backend": "drawn",
        "joint": False,
        "labelled_searched": len(chosen),
        "adopted_searched": 0,
        "recall": {},
        "lowest_recall": 0.0,
    }


def run_drawn(arguments: list[str]) -> int:
    """`cdp run` with drawn unlabelled graphs."""
    from pipelines import run
    from pipelines.stages import STAGES

    stages = tuple(
        replace(stage, run=draw_graphs, reads=(*stage.reads, "seed"))
        if stage.name == "knn"
        else stage
        for stage in STAGES
    )
    with patch.object(run, "STAGES", stages):
        return run.main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000_000)
    parser.add_argument("--lists", type=int, default=60, help="rows a list")
    parser.add_argument("--keep", type=Path, help="keep features and run in this folder")
    options, extra = parser.parse_known_args()
    rows = int(options.pairs / options.lists / PAIRS_A_NEIGHBOUR)
    bench_million.VIEWS = VIEWS
    with tempfile.TemporaryDirectory() as place:
        folder = (options.keep or Path(place)) / f"drawn-{options.pairs}"
        print(f"{rows} rows, lists of {options.lists} in {len(VIEWS)} views, "
              f"load {os.getloadavg()[0]:.1f}")  # fmt: skip
        if not (folder / "million.yaml").exists():
            folder.mkdir(parents=True, exist_ok=True)
            bench_million.write_features(rows, LABELLED, DIMENSION, folder)
        drawn = [sys.executable, "-m", "tests.benchmarks.bench_pairs", "--drawn"]
        settings = [f"knn.k={options.lists}", "knn.joint=false"]
        usage = bench_million.run_pipeline(
            folder, [*settings, "--until", "evaluate", *extra], drawn
        )
        bench_million.print_usage(usage, None)
        print(bench_million.describe_run(folder))


if __name__ == "__main__":
    if "--drawn" in sys.argv:
        sys.argv.remove("--drawn")
        sys.exit(run_drawn(sys.argv[1:]))
    main()
