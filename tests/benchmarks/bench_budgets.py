"""Learning curves: how labels and calibration depend on what a pair scorer is trained on.

    python -m tests.benchmarks.bench_budgets --views DIR [DIR ...] [--seeds 3] [--jobs 2]
        [--sets wild many] [--curves pairs epochs ...]

Each curve changes one budget and leaves the others at their defaults: labelled pairs the MLPs train
on, epochs, MLPs, labelled rows, steps of the curriculum, and the joint set. A folder holds one
`<name>.npy` (n, d) a network, the base first by name, and `identity.npy`, as `bench_pseudo_labels
--px` leaves it. "wild" labels a fifth of the identities with two images or more, "many" a third of
those with eight or more, at most 60 images of each; the rest is to be labelled.

A row is the mean over the seeds: average precision and calibration error of the pairs, pairwise and
BCubed F, their means over the thresholds .3 to .6, distance of the estimated F, the threshold, and
CPU seconds of training. One process a task, one thread each.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score

from cdp.committee.pairs import make_pairs
from cdp.knn.graph import build_knn_graphs
from cdp.knn.joint import join_graphs
from cdp.mediator import training_pairs
from cdp.mediator.curriculum import CURRICULUM, LABELLED_ROWS, JointSet, choose_labelled
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.calibration import measure_reliability
from cdp.metrics.clustering import score_bcubed, score_pairwise
from cdp.propagation.clustering import cluster_pairs, sweep_thresholds
from cdp.propagation.quality import estimate_quality
from cdp.types import UNLABELLED, KnnGraph
from tests.benchmarks.bench_pseudo_labels import K, split_many, split_wild

CURVES: dict[str, list[dict[str, Any]]] = {
    "default": [{}],
    "pairs": [{"pair_budget": n} for n in (25_000, 50_000, 200_000, None)],
    "epochs": [{"epochs": n} for n in (4, 16)],
    "rows": [{"rows": n} for n in (500, 1000, 2000)],
    "curriculum": [{"steps": n} for n in (1, 2, 3)],
    "joint": [{"joint": False}],
    "mlps": [{"ensemble_size": n, "folds": n} for n in (2, 3, 8)],
    "before": [{"epochs": 60, "anneal": False, "learning_rate": 0.002, "pair_budget": None}],
}


def read_graphs(views: list[np.ndarray], place: Path) -> list[KnnGraph]:
    """The exact graphs of the views, searched once and kept in a file."""
    if not place.exists():
        graphs = build_knn_graphs(views, K, backend="exact", threads=1)
        arrays = {f"near{i}": graph.neighbour for i, graph in enumerate(graphs)}
        arrays |= {f"cosine{i}": graph.similarity for i, graph in enumerate(graphs)}
        np.savez(place, **arrays)
    with np.load(place) as kept:
        return [KnnGraph(kept[f"near{i}"], kept[f"cosine{i}"]) for i in range(len(views))]


def split_rows(name: str, identity: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if name == "many":
        return split_many(identity, seed)
    mark = split_wild(identity, seed)
    return np.flatnonzero(mark), np.flatnonzero(~mark)


def measure(task: tuple[Path, str, int, dict[str, Any]]) -> dict[str, Any]:
    folder, name, seed, change = task
    identity = np.load(folder / "identity.npy")
    files = sorted(file for file in folder.glob("*.npy") if file.stem != "identity")
    labelled, rest = split_rows(name, identity, seed)
    everything = [np.load(file).astype(np.float32) for file in files]
    views, truth = [view[rest] for view in everything], identity[rest]
    graphs = read_graphs(views, folder / f"{name}-{seed}.npz")
    wanted = dict(change)
    limit, steps = wanted.pop("rows", LABELLED_ROWS), wanted.pop("steps", len(CURRICULUM))
    with_joint = wanted.pop("joint", True)
    start = time.process_time()
    rows = labelled[choose_labelled(identity[labelled], limit=limit, seed=seed)]
    known = [view[rows] for view in everything]
    own = build_knn_graphs(known, K, backend="exact", threads=1)
    joint = None
    if with_joint:
        kept, joint_graphs = join_graphs(known, own, views, graphs, threads=1)
        both = [np.concatenate([one, other[kept]]) for one, other in zip(known, views, strict=True)]
        named = np.concatenate([identity[rows], np.full(len(kept), UNLABELLED)])
        joint = JointSet(both, joint_graphs, named)
    with patch.object(training_pairs, "CURRICULUM", CURRICULUM[:steps]):
        scorer = PairScorer.fit(
            known,
            own,
            identity[rows],
            settings=replace(MediatorSettings(), **wanted),
            joint=joint,
            seed=seed,
            threads=1,
        )
    seconds = time.process_time() - start
    pairs = make_pairs(graphs, candidates=scorer.candidates)
    scores = scorer.score(views, graphs, pairs, threads=1).probability
    label = cluster_pairs(pairs, scores, len(truth), threshold=scorer.threshold).label
    same = truth[pairs.source] == truth[pairs.target]
    f = score_pairwise(truth, label)[2]
    cuts = sweep_thresholds(pairs, scores, len(truth), (0.3, 0.4, 0.5, 0.6))
    return {
        "set": f"{folder.name} {name}",
        "seed": seed,
        "change": json.dumps(change) if change else "default",
        "AP": 100 * average_precision_score(same, scores),
        "F": 100 * f,
        "BCubed": 100 * score_bcubed(truth, label)[2],
        "mean F": 100 * float(np.mean([score_pairwise(truth, cut)[2] for cut in cuts])),
        "mean BCubed": 100 * float(np.mean([score_bcubed(truth, cut)[2] for cut in cuts])),
        "ECE": 100 * measure_reliability(scores, same).expected_calibration_error,
        "estimate off": 100 * abs(estimate_quality(label, pairs, scores).f - f),
        "threshold": scorer.threshold,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--views", type=Path, nargs="+", required=True)
    parser.add_argument("--sets", nargs="+", default=["wild"], choices=["wild", "many"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--out", type=Path, help="write each result here as it comes, JSON lines")
    options = parser.parse_args()
    changes = [change for curve in options.curves for change in CURVES[curve]]
    # the graphs of a set are searched by its first task, so the others come after it
    tasks = list(product(options.views, options.sets, range(options.seeds), changes[:1]))
    later = product(options.views, options.sets, range(options.seeds), changes[1:])
    later = sorted(later, key=lambda task: changes.index(task[3]))
    found = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for part in (tasks, later):
            for row in pool.map(measure, part):
                found.append(row)
                if options.out:
                    with options.out.open("a") as stream:
                        stream.write(json.dumps(row) + "\n")
    table = pd.DataFrame(found).drop(columns="seed").groupby(["set", "change"], sort=False)
    print(table.mean().round(2).to_string())


if __name__ == "__main__":
    main()
