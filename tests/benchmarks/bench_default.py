"""The default chain, step by step: seconds, CPU seconds, memory and quality.

    python -m tests.benchmarks.bench_default [--labelled 20000] [--unlabelled 20000 ...]
        [--views 5] [--dimension 256] [--backend nmslib] [--no-unit]

The steps are those of `ConsensusClusterer()` with labels; the last row is the estimator itself,
which also looks for near-equal images and checks the labels. Labelled and unlabelled identities are
disjoint halves of the seeded embeddings of `bench_clustering`. Each size runs in a process of its
own on mapped views; code is compiled before the clock starts. A unit is one exact faiss search of
20,000 rows of 256 numbers, timed in the same run. "own MB" is the most memory beside mapped files.
`--public` measures real faces instead: `lfw_features` under `CDP_DATA_ROOT`, identities with four
images or more, a third of them labelled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_clustering import measure_unit, open_views, watch_memory
from tests.benchmarks.embeddings import draw_views

K = 20
ESTIMATOR = "the estimator"
Table = list[dict[str, Any]]


def draw_halves(labelled: int, unlabelled: int, shape: tuple[int, ...], folder: Path) -> None:
    """Write the views and identities of disjoint labelled and unlabelled identities."""
    views, identity = draw_views(int(1.1 * (labelled + unlabelled)), shape, seed=1, noise=0.5)
    order = np.random.default_rng(0).permutation(identity.max() + 1)
    size = np.cumsum(np.bincount(identity)[order])
    known = np.zeros(len(order), bool)
    known[order[: np.searchsorted(size, labelled * 1.03)]] = True
    write_halves(views, identity, known[identity], labelled, unlabelled, folder)


def read_public(root: Path, folder: Path) -> None:
    """Write the views of real faces."""
    from tests.benchmarks.bench_pseudo_labels import read_release

    views, identity, _ = read_release(root / "lfw_features")
    size = np.bincount(identity)
    several = np.random.default_rng(0).permutation(np.flatnonzero(size >= 4))
    known = np.isin(identity, several[: len(several) // 3])
    kept = size[identity] >= 4
    views = [view[kept] / np.linalg.norm(view[kept], axis=1, keepdims=True) for view in views]
    write_halves(views, identity[kept], known[kept], len(identity), len(identity), folder)


def write_halves(
    views: list[np.ndarray],
    identity: np.ndarray,
    known: np.ndarray,
    labelled: int,
    unlabelled: int,
    folder: Path,
) -> None:
    for name, rows in (
        ("labelled", np.flatnonzero(known)[:labelled]),
        ("unlabelled", np.flatnonzero(~known)[:unlabelled]),
    ):
        place = folder / name
        place.mkdir(parents=True)
        for number, view in enumerate(views):
            np.save(place / f"view-{number}.npy", view[rows])
        np.save(place / "identity.npy", identity[rows])


def run_chain(folder: Path, backend: str, table: Table) -> None:
    """The chain of the estimator; a row a step goes into the table."""
    from cdp.clusterer import ConsensusClusterer
    from cdp.committee.pairs import choose_candidates, make_pairs
    from cdp.knn.graph import build_knn_graphs
    from cdp.knn.joint import join_graphs
    from cdp.mediator.curriculum import JointSet, choose_labelled
    from cdp.mediator.pair_scorer import PairScorer
    from cdp.mediator.settings import MediatorSettings
    from cdp.metrics.clustering import score_bcubed, score_pairwise
    from cdp.propagation.clustering import cluster_pairs
    from cdp.propagation.quality import estimate_quality

    labelled, unlabelled = (open_views(folder / name) for name in ("labelled", "unlabelled"))
    known, truth = (np.load(folder / n / "identity.npy") for n in ("labelled", "unlabelled"))
    step = StepClock(table)
    graphs = step("knn, unlabelled", lambda: build_knn_graphs(unlabelled, K, backend=backend))
    rows = choose_labelled(known)
    few = [np.ascontiguousarray(view[rows]) for view in labelled]
    own = step("knn, labelled", lambda: build_knn_graphs(few, K, backend=backend))
    kept, joint = step("joint graphs", lambda: join_graphs(few, own, unlabelled, graphs))
    both = [np.concatenate([one, other[kept]]) for one, other in zip(few, unlabelled, strict=True)]
    identity = np.concatenate([known[rows], np.full(len(kept), -1)])
    scorer = step(
        "fit",
        lambda: PairScorer.fit(
            few,
            own,
            known[rows],
            settings=MediatorSettings(),
            joint=JointSet(both, joint, identity),
        ),
    )
    pairs = step("pairs", lambda: make_pairs(graphs, candidates=choose_candidates("extended")))
    scores = step("score", lambda: scorer.score(unlabelled, graphs, pairs).probability)
    label = step(
        "propagate",
        lambda: cluster_pairs(pairs, scores, len(truth), threshold=scorer.threshold).label,
    )
    f, bcubed = score_pairwise(truth, label)[2], score_bcubed(truth, label)[2]
    estimate = estimate_quality(label, pairs, scores).f
    table[-1]["notes"] = (
        f"{len(rows)} labelled rows, {len(kept)} joint, {len(pairs)} pairs; F {100 * f:.1f}, "
        f"BCubed {100 * bcubed:.1f}, estimated F {100 * estimate:.1f}"
    )
    clusterer = ConsensusClusterer(backend=backend)
    step(
        ESTIMATOR,
        lambda: clusterer.fit(unlabelled, labelled_views=labelled, labelled_ids=known),
    )


class StepClock:
    """Runs steps and notes what each took."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        with measure_step(self.table, name):
            return work()


@contextmanager
def measure_step(table: Table, name: str) -> Iterator[None]:
    with watch_memory() as own:
        start, cpu = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    table.append({"step": name, "seconds": seconds, "cpu": cpu, "own_mb": own[0]})


def run_size(options: argparse.Namespace) -> Table:
    """Compile, then run the chain in this process."""
    with tempfile.TemporaryDirectory() as place:
        warm = Path(place)
        shape = (options.dimension,) * options.views
        draw_halves(1500, 2600, shape, warm)
        run_chain(warm, options.backend, [])
        if options.backend != "exact":
            from cdp.knn.graph import build_knn_graphs

            build_knn_graphs(open_views(warm / "unlabelled")[:1], K, exact_limit=0)
    table: Table = []
    run_chain(options.folder, options.backend, table)
    return table


def print_table(name: str, table: Table, unit: float) -> None:
    steps = table[:-1]
    total = {
        "step": "whole",
        "seconds": sum(row["seconds"] for row in steps),
        "cpu": sum(row["cpu"] for row in steps),
        "own_mb": max(row["own_mb"] for row in steps),
    }
    print(f"\n{name}\n{'step':<18}{'s':>8}{'cpu s':>8}{'units':>8}{'own MB':>8}")
    for row in [*steps, total, table[-1]]:
        units = f"{row['seconds'] / unit:.2f}" if unit else "-"
        line = f"{row['step']:<18}{row['seconds']:>8.2f}{row['cpu']:>8.2f}{units:>8}"
        print(f"{line}{row['own_mb']:>8.0f}  {row.get('notes', '')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--labelled", type=int, default=20_000)
    parser.add_argument("--unlabelled", type=int, nargs="+", default=[20_000])
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--backend", default="nmslib")
    parser.add_argument("--no-unit", action="store_true")
    parser.add_argument("--public", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        print(json.dumps(run_size(options)))
        return
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    unit = 0.0 if options.no_unit else measure_unit()
    print(f"unit: {unit:.2f} s")
    for size in options.unlabelled:
        with tempfile.TemporaryDirectory() as place:
            folder, name = Path(place), f"{options.labelled} labelled + {size} unlabelled"
            if options.public:
                read_public(Path(os.environ.get("CDP_DATA_ROOT", "../shared/data")), folder)
                name = "LFW, identities with 4 images or more"
            else:
                shape = (options.dimension,) * options.views
                draw_halves(options.labelled, size, shape, folder)
            command = [sys.executable, "-m", "tests.benchmarks.bench_default", "--folder", place]
            command += ["--backend", options.backend, "--views", str(options.views)]
            command += ["--dimension", str(options.dimension)]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print_table(name, json.loads(found.splitlines()[-1]), unit)


if __name__ == "__main__":
    main()
