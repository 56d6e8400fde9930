"""Seconds and peak memory of every clustering step, beside the published way of doing it.

    python -m tests.benchmarks.bench_clustering [--sizes 50000 200000] [--plain-sizes 50000]
    python -m tests.benchmarks.bench_clustering --keep DIR --steps knn --sizes 200000   # in pieces
    python -m tests.benchmarks.bench_clustering --propagation 1000000 20000000

Each step runs in a process of its own on embeddings mapped from disk. "peak MB" is the most memory
resident in that process, mapped pages included, less what it held before the step; "own MB" leaves
out pages of mapped files, which the system takes back when it needs them (sampled). Compiling is
done before the clock starts. The plain kNN search is timed on one view and multiplied by their
number; the plain mediator reads its rows one by one through a loader, as released. With --keep,
embeddings and figures stay in the folder, and what was measured is not measured again: delete
`figures.json` there to repeat. Plain versions run at --plain-sizes only: more takes too long.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cdp.types import KnnGraph, PairTable
from tests.benchmarks import released
from tests.benchmarks.embeddings import draw_views

K = 15
BLOCK = 1 << 18
STEPS = ("knn", "pairs", "features", "train", "score", "propagate")
TARGETS = {"knn": 8, "features": 8, "train+score": 10, "propagate": 20, "whole": 10}


def read_own_mb() -> float:
    """Memory of this process that no file backs, in MiB; 0 where the system does not show it."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    parts = [line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")]
    return int(parts[0]) / 1024 if parts else 0.0


@contextmanager
def watch_memory() -> Iterator[list[float]]:
    """Yield a list that holds the most that `read_own_mb` gave meanwhile, less the start."""
    start, most, done = read_own_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], read_own_mb() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


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
    from cdp.committee.features import describe_pairs, measure_affinity
    from cdp.committee.pairs import make_pairs
    from cdp.knn.graph import build_knn_graphs, measure_recall
    from cdp.mediator.ensemble import Mediator
    from cdp.mediator.settings import MediatorSettings
    from cdp.propagation.rising_threshold import propagate_labels

    views = open_views(folder)
    identity = np.load(folder / "identity.npy")
    settings = MediatorSettings.named("released")
    warm, _ = draw_views(2500, (16, 16), seed=9)
    for view in warm:  # as mapped views are: code is compiled for either kind
        view.setflags(write=False)
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
    factor = 1
    result: Any = None
    with watch_memory() as own:
        start, cpu = time.perf_counter(), time.process_time()
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
            result, _ = Mediator.fit(
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
                    model.score(
                        np.asarray(features[low : low + BLOCK]), threads=os.cpu_count() or 1
                    )
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
        "seconds": seconds * factor,
        "cpu": cpu * factor,
        "peak_mb": (peak - before) / 1024,
        "own_mb": own[0],
        **extra,
    }


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


def measure_propagation(rows: int, edges: int) -> dict[str, dict[str, Any]]:
    """Seconds and memory of either split alone over a random graph of heavy-tailed degrees."""
    from cdp.propagation.average_linkage import agglomerate
    from cdp.propagation.rising_threshold import propagate_labels

    generator = np.random.default_rng(0)
    splits: dict[str, Any] = {
        "rising threshold": partial(propagate_labels, threshold=0.5, max_size=300, step=0.05),
        "consensus": partial(agglomerate, threshold=0.5, max_size=300),
    }
    for split in splits.values():
        split(np.array([[0, 1]]), np.array([0.5], np.float32), 2)
    # some rows are met far more often than others; near rows more often than far ones
    source = (rows * generator.random(edges) ** 1.5).astype(np.int64)
    target = (source + 1 + (generator.pareto(0.6, edges) * 3).clip(0, rows).astype(np.int64)) % rows
    score = (1 - 0.6 * generator.random(edges, dtype=np.float32) ** 2).astype(np.float32)
    table = np.column_stack([source, target])
    del source, target
    figures = {}
    for name, split in splits.items():
        with watch_memory() as own:
            start, cpu = time.perf_counter(), time.process_time()
            count = split(table, score, rows).cluster_count
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        figures[name] = {"seconds": seconds, "cpu": cpu, "own_mb": own[0], "clusters": count}
    return figures


def measure_size(size: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure the steps asked for, those already in the folder's figures left out."""
    folder.mkdir(parents=True, exist_ok=True)
    noted = folder / "figures.json"
    figures: dict[str, Any] = json.loads(noted.read_text()) if noted.exists() else {}
    if not (folder / "identity.npy").exists():
        shape = (options.dimension,) * options.views
        views, identity = draw_views(size, shape, seed=1, noise=options.noise)
        for number, view in enumerate(views):
            np.save(folder / f"view-{number}.npy", view)
        np.save(folder / "identity.npy", identity)
        del views
    for step in options.steps:
        for kind in ("ours", "plain") if size in options.plain_sizes else ("ours",):
            if f"{step} {kind}" not in figures:
                found = spawn(step, kind == "plain", folder, options.backend)
                figures[f"{step} {kind}"] = found
                noted.write_text(json.dumps(figures, indent=1))
                line = f"{size} {step} {kind}: {found['seconds']:.2f} s"
                print(line, file=sys.stderr, flush=True)
    return figures


def print_table(table: dict[int, dict[str, Any]]) -> None:
    """All sizes and steps in one table; growth is against the first size."""
    header = f"{'rows':>7} {'step':<10}{'s':>8}{'cpu s':>8}{'peak MB':>9}{'own MB':>8}{'growth':>8}"
    header += f"{'plain s':>9}{'plain cpu':>10}{'plain MB':>9}{'ratio':>7}{'cpu':>6}"
    print(header + "  notes")
    first: dict[str, float] = {}
    for size, figures in table.items():
        steps = [step for step in STEPS if f"{step} ours" in figures]
        mediator = [step for step in ("train", "score") if step in steps]
        rows = [(step, [step]) for step in steps]
        rows += [("train+score", mediator)] if len(mediator) == 2 else []
        rows += [("whole", steps)] if len(steps) == len(STEPS) else []
        for name, parts in rows:
            ours = [figures[f"{part} ours"] for part in parts]
            plain = [figures[f"{part} plain"] for part in parts if f"{part} plain" in figures]
            seconds, cpu = (sum(one[key] for one in ours) for key in ("seconds", "cpu"))
            row = f"{size:>7} {name:<11}{seconds:>7.2f}{cpu:>8.2f}"
            row += f"{max(one['peak_mb'] for one in ours):>9.0f}"
            row += f"{max(one['own_mb'] for one in ours):>8.0f}"
            growth = seconds / first.setdefault(name, seconds)
            row += f"{f'x{growth:.1f}' if growth != 1 else '':>8}"
            notes = []
            if len(plain) == len(parts):
                slow, slow_cpu = (sum(one[key] for one in plain) for key in ("seconds", "cpu"))
                row += f"{slow:>9.2f}{slow_cpu:>10.2f}"
                row += f"{max(one['peak_mb'] for one in plain):>9.0f}"
                row += f"{slow / seconds:>7.1f}{slow_cpu / cpu:>6.1f}"
                notes += [f"target {TARGETS[name]}"] if name in TARGETS else []
                notes += [f"plain recall {one['recall']:.4f}" for one in plain if "recall" in one]
                for one in plain:
                    if "same" in one:
                        notes.append("same result" if one["same"] else "RESULTS DIFFER")
            else:
                row += f"{'-':>9}{'-':>10}{'-':>9}{'-':>7}{'-':>6}"
            notes += [f"lowest recall {one['recall']:.4f}" for one in ours if "recall" in one]
            notes += [f"{one['pairs']} pairs" for one in ours if "pairs" in one and name != "whole"]
            print(f"{row}  {', '.join(notes)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--plain-sizes", type=int, nargs="*", default=[50_000])
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--views", type=int, default=5)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.5)
    parser.add_argument("--backend", default="nmslib")
    parser.add_argument("--keep", type=Path, help="keep embeddings and figures in this folder")
    parser.add_argument("--propagation", type=int, nargs=2, metavar=("ROWS", "EDGES"))
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run_step(options.step, options.plain, options.folder, options.backend)))
        return
    if options.propagation:
        rows, edges = options.propagation
        for name, found in measure_propagation(rows, edges).items():
            print(
                f"{name}, {rows} rows, {edges} pairs: {found['seconds']:.1f} s "
                f"({found['cpu']:.1f} cpu s), own {found['own_mb']:.0f} MB, "
                f"{found['clusters']} clusters"
            )
        return
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} before, backend {options.backend}, k={K}")
    with tempfile.TemporaryDirectory() as place:
        root = options.keep or Path(place)
        table = {
            size: measure_size(size, options, root / f"{options.backend}-{size}")
            for size in options.sizes
        }
    if options.plain_sizes and set(options.steps) == set(STEPS):
        print(f"unit (one exact faiss search of 20,000 x 256): {measure_unit():.2f} s")
    print_table(table)


if __name__ == "__main__":
    main()
