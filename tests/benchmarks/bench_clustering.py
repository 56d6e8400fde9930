"""Seconds and peak memory of every clustering step, beside the published way of doing it.

    python -m tests.benchmarks.bench_clustering [--sizes 50000 200000] [--plain-sizes 50000]

Each step runs in a process of its own on embeddings mapped from disk; "peak" is the most resident
memory of that process, mapped pages included, less what it held before the step. Compiling is done
before the clock starts. The plain kNN search is timed on one view and multiplied by their number;
the plain mediator reads its rows one by one through a loader, as released.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cdp.types import KnnGraph, PairTable
from tests.benchmarks import released
from tests.benchmarks.embeddings import draw_views

K = 15
BLOCK = 1 << 18
STEPS = ("knn", "pairs", "features", "train", "score", "propagate")
TARGETS = {"knn": 8, "features": 8, "train": 10, "score": 10, "propagate": 20, "whole": 10}


def open_views(folder: Path) -> list[np.ndarray]:
    return [np.load(path, mmap_mode="r") for path in sorted(folder.glob("view-*.npy"))]


def open_graphs(folder: Path) -> list[KnnGraph]:
    return [
        KnnGraph(np.load(path), np.load(path.with_name(path.name.replace("near", "cosine"))))
        for path in sorted(folder.glob("near-*.npy"))
    ]


def open_pairs(folder: Path) -> PairTable:
    table = np.load(folder / "pairs.npy")
    return PairTable(np.ascontiguousarray(table[0]), np.ascontiguousarray(table[1]))


def run_step(step: str, plain: bool, folder: Path, backend: str) -> dict[str, Any]:
    """Run one step; what the next one needs is left in the folder by our version."""
    from cdp.committee import describe_pairs, make_pairs, measure_affinity
    from cdp.knn import build_knn_graphs, measure_recall
    from cdp.mediator import Mediator, MediatorSettings
    from cdp.propagation import propagate_labels

    views = open_views(folder)
    identity = np.load(folder / "identity.npy")
    settings = MediatorSettings.named("released")
    warm, _ = draw_views(2500, (16, 16), seed=9)
    if not plain:
        graphs = build_knn_graphs(warm, K, backend=backend)
        build_knn_graphs(warm, K, backend="exact")
        pairs = make_pairs(graphs)
        describe_pairs(warm, graphs, pairs, variant="released")
        propagate_labels(pairs, measure_affinity(warm[0], pairs), 2500)
    if step == "train":
        # the library loads much of itself at the first step
        few = np.random.default_rng(0).normal(size=(2000, 4)).astype(np.float32)
        one, other = np.random.default_rng(1).integers(0, 9, (2, 2000))
        if plain:
            released.train_mediator(few[:50], (one == other)[:50], 1)
        else:
            Mediator.fit(few, one == other, one, other, settings=settings)
    graphs = open_graphs(folder) if step != "knn" else []
    pairs = PairTable(*np.zeros((2, 0), np.int64))
    if step not in ("knn", "pairs"):
        pairs = open_pairs(folder)
    table = np.column_stack([pairs.source, pairs.target])
    features = np.empty((0, 0), np.float32)
    if step in ("train", "score"):
        features = np.load(folder / "features.npy", mmap_mode="r")
    same = identity[pairs.source] == identity[pairs.target]
    extra: dict[str, Any] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    factor = 1
    result: Any = None
    if step == "knn" and plain:
        import nmslib

        factor = len(views)
        index = nmslib.init(method="hnsw", space="cosinesimil")
        index.addDataPointBatch(views[0])
        index.createIndex({"post": 2})
        answers = index.knnQueryBatch(views[0], k=K + 1, num_threads=os.cpu_count() or 1)
        result = [near for near, _ in answers]
    elif step == "knn":
        result = build_knn_graphs(views, K, backend=backend)
    elif step == "pairs":
        result = released.list_pairs(graphs[0]) if plain else make_pairs(graphs)
    elif step == "features" and plain:
        loaded = [np.array(view) for view in views]
        result = released.describe(loaded, graphs, table, "released")
    elif step == "features":
        width = 3 * len(views) - 1
        affinity = np.lib.format.open_memmap(
            folder / "affinity.npy", "w+", np.float32, (len(views), len(pairs))
        )
        for number, view in enumerate(views):
            measure_affinity(view, pairs, out=affinity[number])
        result = np.lib.format.open_memmap(
            folder / "features.npy", "w+", np.float32, (len(pairs), width)
        )
        for low in range(0, len(pairs), BLOCK):
            rows = slice(low, min(low + BLOCK, len(pairs)))
            result[rows] = describe_pairs(
                (), graphs, pairs, variant="released", rows=rows, affinity=affinity.T
            )
    elif step == "train" and plain:
        released.train_mediator(features, same, 2)
    elif step == "train":
        result = Mediator.fit(
            np.asarray(features),
            same,
            identity[pairs.source],
            identity[pairs.target],
            settings=settings,
        )
    elif step == "score" and plain:
        net = released.make_network(features.shape[1])
        released.score_pairs(net, features)
    elif step == "score":
        model = Mediator.from_state(dict(np.load(folder / "mediator.npz")))
        result = np.concatenate(
            [
                model.score(np.asarray(features[low : low + BLOCK]), threads=os.cpu_count() or 1)
                for low in range(0, len(pairs), BLOCK)
            ]
        )
    elif plain:
        score = np.load(folder / "score.npy")
        result = released.propagate(
            table, score, len(identity), threshold=0.5, max_size=300, step=0.05
        )
    else:
        score = np.load(folder / "score.npy")
        result = propagate_labels(
            pairs, score, len(identity), threshold=0.5, max_size=300, step=0.05
        ).label
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if step == "knn" and plain:
        near = np.full((len(identity), K), -1, np.int64)
        for row, found in enumerate(result):
            others = found[found != row][:K]
            near[row, : len(others)] = others
        graph = KnnGraph(near, np.zeros(near.shape, np.float32))
        extra["recall"] = measure_recall(views[0], graph, sample=500)
    elif step == "knn":
        for number, graph in enumerate(result):
            np.save(folder / f"near-{number}.npy", graph.neighbour)
            np.save(folder / f"cosine-{number}.npy", graph.similarity)
        extra["recall"] = min(
            measure_recall(view, graph, sample=500)
            for view, graph in zip(views, result, strict=True)
        )
    elif step == "pairs" and plain:
        extra["same"] = bool((result == open_pairs_table(folder)).all())
    elif step == "pairs":
        np.save(folder / "pairs.npy", np.stack([result.source, result.target]))
        extra["pairs"] = len(result)
    elif step == "features" and plain:
        ours = np.load(folder / "features.npy", mmap_mode="r")
        extra["same"] = float(np.abs(ours - result).max()) <= 1e-5
    elif step == "train" and not plain:
        np.savez(folder / "mediator.npz", **result.state())
    elif step == "score" and not plain:
        np.save(folder / "score.npy", result)
    elif step == "propagate" and plain:
        extra["same"] = bool((result == np.load(folder / "label.npy")).all())
    elif step == "propagate":
        np.save(folder / "label.npy", result)
    return {
        "seconds": seconds * factor, "cpu": cpu * factor, "peak_mb": (peak - before) / 1024, **extra
    }  # fmt: skip


def open_pairs_table(folder: Path) -> np.ndarray:
    return np.load(folder / "pairs.npy").T


def spawn(step: str, plain: bool, folder: Path, backend: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.bench_clustering", "--step", step]
    command += ["--folder", str(folder), "--backend", backend] + (["--plain"] if plain else [])
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_unit() -> float:
    """Seconds of one exact faiss search of 20,000 x 256-d, the unit of comparison."""
    import faiss

    view = draw_views(20_000, (256,), seed=1)[0][0]
    index = faiss.IndexFlatIP(256)
    index.add(view)
    start = time.perf_counter()
    index.search(view, K + 1)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--plain-sizes", type=int, nargs="*", default=[50_000])
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--backend", default="nmslib")
    parser.add_argument("--step", choices=STEPS)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run_step(options.step, options.plain, options.folder, options.backend)))
        return
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before, backend {options.backend}, k={K}")
    if options.plain_sizes:
        print(f"unit (one exact faiss search of 20,000 x 256): {measure_unit():.2f} s")
    header = f"{'rows':>7} {'step':<10}{'s':>9}{'cpu s':>9}{'peak MB':>9}"
    print(header + f"{'plain s':>10}{'plain cpu':>10}{'plain MB':>10}{'ratio':>7}  notes")
    first: dict[str, float] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            views, identity = draw_views(
                size, (options.dimension,) * options.views, seed=1, noise=options.noise
            )
            for number, view in enumerate(views):
                np.save(folder / f"view-{number}.npy", view)
            np.save(folder / "identity.npy", identity)
            del views
            total, total_plain = 0.0, 0.0
            for step in STEPS:
                ours = spawn(step, False, folder, options.backend)
                total += ours["seconds"]
                row = f"{size:>7} {step:<10}{ours['seconds']:>9.2f}{ours['cpu']:>9.2f}"
                row += f"{ours['peak_mb']:>9.0f}"
                notes = []
                if size in options.plain_sizes:
                    plain = spawn(step, True, folder, options.backend)
                    total_plain += plain["seconds"]
                    row += f"{plain['seconds']:>10.2f}{plain['cpu']:>10.2f}"
                    row += f"{plain['peak_mb']:>10.0f}"
                    row += f"{plain['seconds'] / ours['seconds']:>7.1f}"
                    if step in TARGETS:
                        notes.append(f"target {TARGETS[step]}")
                    if "recall" in plain:
                        notes.append(f"plain recall {plain['recall']:.4f}")
                    if "same" in plain:
                        notes.append("same result" if plain["same"] else "RESULTS DIFFER")
                else:
                    row += " " * 37
                if "recall" in ours:
                    notes.append(f"recall {ours['recall']:.4f}")
                if "pairs" in ours:
                    notes.append(f"{ours['pairs']} pairs")
                if step in first:
                    growth = ours["seconds"] / first[step]
                    notes.append(f"x{growth:.1f} of {options.sizes[0]} rows")
                else:
                    first[step] = ours["seconds"]
                print(row + "  " + ", ".join(notes), flush=True)
            row = f"{size:>7} {'whole':<10}{total:>9.2f}{'':>18}"
            if total_plain:
                row += f"{total_plain:>10.2f}{'':>20}{total_plain / total:>7.1f}  target 10"
            print(row, flush=True)


if __name__ == "__main__":
    main()
