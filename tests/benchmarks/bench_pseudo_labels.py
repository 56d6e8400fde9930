"""Our pseudo-labels, without a threshold, against peers at their oracle thresholds.

    python -m tests.benchmarks.bench_pseudo_labels [--seeds 3] [--sets lfw many]
        [--px 16 --views DIR | --views DIR | --run runs/default]

The data is `lfw_features` under `CDP_DATA_ROOT` (or `../shared/data`): real faces at 24 px, five
networks, in the layout of the authors' release. Seed 0 uses its split into labelled and unlabelled
identities; other seeds draw a fifth of the identities with two images or more as labelled. Set
"many" keeps identities with eight images or more, at most 60 of each, a third of them labelled.
`--px` reduces the faces of `lfw112` to that side, `--degradation surveillance` degrades them to it,
and the networks of `onnx` embed them; the vectors are kept in `--views DIR`. `--views DIR` alone
reads one `<name>.npy` (n, d) a network and `identity.npy`; `--run` reads the views of a finished
run with ground truth, and splits as it did.

Peers cluster the base view at their oracle threshold: the best of a sweep, tuned on the test
labels. Ours chooses its own. Images without a label count as clusters of one. The networks may have
been trained on some of these identities.
Infomap is run where it is installed (`pip install infomap`, GPL: no dependency of the project).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cdp.committee.pairs import make_pairs
from cdp.knn.graph import build_knn_graphs
from cdp.knn.joint import join_graphs
from cdp.mediator.curriculum import JointSet, choose_labelled
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.calibration import measure_reliability
from cdp.metrics.clustering import score_bcubed, score_pairwise
from cdp.propagation.clustering import cluster_pairs, sweep_thresholds
from cdp.propagation.quality import estimate_quality
from cdp.types import UNLABELLED, KnnGraph

K = 20
Split = tuple[list[np.ndarray], np.ndarray, list[np.ndarray], np.ndarray]
Row = tuple[str, str, np.ndarray, str]


def read_release(root: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Views and identities of both halves, and which rows are labelled."""
    dimensions = dict(line.split() for line in (root / "dims.txt").read_text().splitlines())
    halves, names = [], []
    for half in ("labeled", "unlabeled"):
        halves.append(
            [
                np.fromfile(root / half / f"features/{model}.bin", np.float32).reshape(-1, int(d))
                for model, d in dimensions.items()
            ]
        )
        listed = (root / half / "list.txt").read_text().split("\n")
        names.append([line.split("/")[0] for line in listed if line])
    views = [np.concatenate(pair) for pair in zip(*halves, strict=True)]
    identity = np.unique(np.concatenate(names), return_inverse=True)[1]
    return views, identity, np.arange(len(identity)) < len(names[0])


def read_run(run: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The same of a finished run: views, identities, and which rows are labelled."""
    from pipelines.tables import read_vectors

    samples = pd.concat(
        [
            pd.read_parquet(run / "ingest" / f"{table}.parquet", columns=["sample_id", "identity"])
            for table in ("samples", "truth")
        ]
    ).dropna()
    name_of = samples.set_index("sample_id").identity
    places = [run / "embed" / "embeddings" / split for split in ("labelled", "unlabelled")]
    names = sorted((path.stem for path in places[0].iterdir()), key=lambda name: name != "base")
    views, listed = [], []
    for name in names:
        tables = [place / f"{name}.parquet" for place in places]
        views.append(np.concatenate([read_vectors(table, "embedding") for table in tables]))
    for place in places:
        listed.append(pd.read_parquet(place / f"{names[0]}.parquet", columns=["sample_id"]))
    identity = name_of[pd.concat(listed).sample_id].factorize()[0]
    return views, identity, np.arange(len(identity)) < len(listed[0])


def embed_faces(
    root: Path, size_px: int, degradation: str | None, kept: Path
) -> tuple[list[np.ndarray], np.ndarray]:
    """Views and identities of all faces of `lfw112` at a side of `size_px`, base first."""
    from cdp.embedding import OnnxEmbedder
    from cdp.images.decode import decode_image
    from cdp.images.degradation import DEGRADATIONS, degrade_pixels, reduce_faces

    paths = sorted((root / "lfw112").glob("*/*.jpg"))
    models = [
        OnnxEmbedder(path.read_bytes(), threads=2, name=path.stem)
        for path in sorted((root / "onnx").glob("*.onnx"))
    ]
    parts: list[list[np.ndarray]] = [[] for _ in models]
    for start in tqdm(range(0, len(paths), 512), desc="embed", leave=False):
        faces = np.stack([decode_image(path.read_bytes()) for path in paths[start : start + 512]])
        if degradation:
            seeds = np.arange(start, start + len(faces))
            faces = degrade_pixels(faces, seeds, DEGRADATIONS[degradation], size_px)
        else:
            faces = reduce_faces(faces, size_px)
        for model, found in zip(models, parts, strict=True):
            found.append(model.embed(faces)[0])
    identity = np.unique([path.parent.name for path in paths], return_inverse=True)[1]
    views = [np.concatenate(found) for found in parts]
    kept.mkdir(parents=True, exist_ok=True)
    for model, view in zip(models, views, strict=True):
        np.save(kept / f"{model.name}.npy", view)
    np.save(kept / "identity.npy", identity)
    return views, identity


def split_wild(identity: np.ndarray, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    several = random.permutation(np.flatnonzero(np.bincount(identity) >= 2))
    return np.isin(identity, several[: len(several) // 5])


def split_many(identity: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labelled and unlabelled rows of identities with many images."""
    random = np.random.default_rng(seed)
    many = random.permutation(np.flatnonzero(np.bincount(identity) >= 8))
    rows = [random.permutation(np.flatnonzero(identity == each))[:60] for each in many]
    cut = len(many) // 3
    return np.sort(np.concatenate(rows[:cut])), np.sort(np.concatenate(rows[cut:]))


def fit_scorer(split: Split, graphs: list[KnnGraph], seed: int, candidates: str) -> PairScorer:
    """The pair scorer of the labelled rows, at default settings; `graphs` are of the others."""
    labelled, identity, views, _ = split
    rows = choose_labelled(identity, seed=seed)
    labelled, identity = [view[rows] for view in labelled], identity[rows]
    own = build_knn_graphs(labelled, K, backend="exact")
    kept, joint_graphs = join_graphs(labelled, own, views, graphs)
    joined = [
        np.concatenate([one, other[kept]]) for one, other in zip(labelled, views, strict=True)
    ]
    unlabelled = np.full(len(kept), UNLABELLED)
    return PairScorer.fit(
        labelled,
        own,
        identity,
        settings=MediatorSettings(),
        candidates=candidates,
        joint=JointSet(joined, joint_graphs, np.concatenate([identity, unlabelled])),
        seed=seed,
    )


def run_ours(split: Split, seed: int, candidates: str) -> Iterator[Row]:
    views, truth = split[2:]
    count = len(views[0])
    graphs = build_knn_graphs(views, K, backend="exact")
    scorer = fit_scorer(split, graphs, seed, candidates)
    pairs = make_pairs(graphs, candidates=candidates)
    raw = scorer.score_first_stage(views, graphs, pairs)
    same = truth[pairs.source] == truth[pairs.target]
    for name, stages in (
        ("first stage", replace(scorer, second_stage=None)),
        ("both stages", scorer),
    ):
        scores = stages.finish(views, pairs, raw, count)
        probability, threshold = scores.probability, stages.threshold
        label = cluster_pairs(pairs, probability, count, threshold=threshold).label
        estimate = estimate_quality(label, pairs, probability)
        error = measure_reliability(probability, same).expected_calibration_error
        note = (
            f"ECE {error:.3f}, rate {scores.rate:.3f} (true {same.mean():.3f}), "
            f"estimated P {100 * estimate.precision:.1f} R {100 * estimate.recall:.1f} "
            f"F {100 * estimate.f:.1f}"
        )
        yield f"ours, {name}", f"auto ({threshold:.2f})", label, note
    for target in (0.99, 0.995):
        found = cluster_pairs(
            pairs,
            probability,
            count,
            threshold=scorer.threshold,
            target_precision=target,
            precision_curve=scorer.precision_curve,
        )
        yield f"ours, target precision {target}", f"auto ({found.threshold:.2f})", found.label, ""
    tried = (0.5, 0.7, 0.8, 0.9, 0.96, 0.98, 0.99, 0.995)
    cuts = sweep_thresholds(
        pairs, probability, count, tried, split="raise_threshold", max_size=600, step=0.05
    )
    yield pick("both stages, rising threshold", cuts, [f"{t}" for t in tried], truth)


def run_inputs(split: Split, seed: int) -> Iterator[Row]:
    """Features and candidates of the mediator compared: first stage, no joint set, rest as ours."""
    labelled, identity, views, truth = split
    graphs = [build_knn_graphs(each, K, backend="exact") for each in (labelled, views)]
    for variant in ("released", "paper", "extended"):
        for candidates in ("base", "all"):
            scorer = PairScorer.fit(
                labelled,
                graphs[0],
                identity,
                settings=MediatorSettings(variant=variant),
                candidates=candidates,
                second_stage=False,
                seed=seed,
            )
            pairs = make_pairs(graphs[1], candidates=candidates)
            probability = scorer.score(views, graphs[1], pairs).probability
            label = cluster_pairs(pairs, probability, len(views[0])).label
            same = truth[pairs.source] == truth[pairs.target]
            error = measure_reliability(probability, same).expected_calibration_error
            yield f"{variant} inputs, {candidates}", "auto (0.50)", label, f"ECE {error:.3f}"


def run_peers(split: Split) -> Iterator[Row]:
    import fast_hdbscan
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.sparse import csr_matrix
    from sklearn.cluster import DBSCAN

    base, truth = split[2][0].astype(np.float32), split[3]
    base = base / np.linalg.norm(base, axis=1, keepdims=True)
    distance = np.clip(1 - base @ base.T, 0, 2)
    condensed = distance[np.triu_indices(len(base), 1)].astype(np.float64)
    tree = linkage(condensed, "average")
    del condensed
    cuts = np.arange(0.05, 0.95, 0.025)
    found = [fcluster(tree, cut, "distance") for cut in cuts]
    yield pick("average linkage", found, [f"{cut:.3f}" for cut in cuts], truth)

    # the sparse path of fast_hdbscan: mutual neighbours within its 60 nearest, euclidean
    nearest = np.argpartition(distance, 60, axis=1)[:, :60]
    row = np.repeat(np.arange(len(base)), 60)
    near = csr_matrix(
        (np.sqrt(2 * distance[row, nearest.ravel()]) + 1e-6, (row, nearest.ravel())),
        shape=distance.shape,
    )
    near = near.maximum(near.T)
    found, names = [], []
    for smallest in (2, 3, 5):
        for samples in (1, 2, 3, 5):
            for method in ("eom", "leaf"):
                model = fast_hdbscan.HDBSCAN(
                    min_cluster_size=smallest,
                    min_samples=samples,
                    metric="precomputed",
                    cluster_selection_method=method,
                )
                found.append(model.fit_predict(near))
                names.append(f"{smallest}/{samples}/{method}")
    yield pick("HDBSCAN (fast_hdbscan)", found, names, truth)

    found, names = [], []
    for radius in np.arange(0.05, 0.7, 0.025):
        for samples in (2, 3, 5):
            model = DBSCAN(eps=radius, min_samples=samples, metric="precomputed")
            found.append(model.fit_predict(distance))
            names.append(f"{radius:.3f}/{samples}")
    yield pick("DBSCAN", found, names, truth)

    if find_spec("infomap") is None:
        yield "Infomap", "not installed", np.arange(len(base)), ""
        return
    from infomap import Infomap

    nearest = np.argsort(distance, axis=1)[:, : K + 1]
    found, names = [], []
    for least in np.arange(0.1, 0.95, 0.05):
        network = Infomap(two_level=True, silent=True, seed=1, num_trials=1)
        link = np.column_stack([np.repeat(np.arange(len(base)), K + 1), nearest.ravel()])
        similarity = 1 - distance[link[:, 0], link[:, 1]]
        use = (similarity >= least) & (link[:, 0] != link[:, 1])
        network.add_links(np.column_stack([link[use], similarity[use]]))
        network.run()
        label = np.full(len(base), -1)
        for node, module in network.get_modules().items():
            label[node] = module
        found.append(label)
        names.append(f"{least:.2f}")
    yield pick("Infomap, k=20", found, names, truth)


def pick(name: str, found: list[np.ndarray], names: list[str], truth: np.ndarray) -> Row:
    """The labels with the best sum of both F against the ground truth."""
    total = [score_pairwise(truth, label)[2] + score_bcubed(truth, label)[2] for label in found]
    best = int(np.argmax(total))
    return name, f"oracle {names[best]}", np.asarray(found[best]), ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sets", nargs="+", default=["lfw", "many"], choices=["lfw", "many"])
    parser.add_argument("--px", type=int, help="side the faces of lfw112 are reduced to")
    parser.add_argument("--degradation", help="of --px: a preset; by default area averages alone")
    parser.add_argument("--views", type=Path, help="folder of <name>.npy and identity.npy")
    parser.add_argument("--run", type=Path, help="a finished run with ground truth")
    parser.add_argument("--inputs", action="store_true", help="compare the mediator's inputs")
    parser.add_argument("--candidates", default="all", choices=["base", "all"])
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    data = Path(os.environ.get("CDP_DATA_ROOT", "../shared/data"))
    if arguments.px and not arguments.views:
        parser.error("--px needs --views DIR, where the vectors are kept")
    if arguments.px and not (arguments.views / "identity.npy").exists():
        views, identity = embed_faces(data, arguments.px, arguments.degradation, arguments.views)
        given = split_wild(identity, 0)
    elif arguments.views:
        identity = np.load(arguments.views / "identity.npy")
        files = sorted(arguments.views.glob("*.npy"))
        views = [np.load(file) for file in files if file.stem != "identity"]
        given = split_wild(identity, 0)
    elif arguments.run:
        views, identity, given = read_run(arguments.run)
    else:
        views, identity, given = read_release(data / "lfw_features")
    results = []
    form = "{:5} {:4} {:31} {:21} {:>5} {:>5} {:>5}  {:>5} {:>5} {:>5}  {}"
    heads = ["P", "R", "F", "B-P", "B-R", "B-F"]
    print(form.format("set", "seed", "method", "threshold", *heads, ""))
    for name in arguments.sets:
        for seed in range(arguments.seeds):
            if name == "many":
                labelled, rest = split_many(identity, seed)
            else:
                mark = given if seed == 0 else split_wild(identity, seed)
                labelled, rest = np.flatnonzero(mark), np.flatnonzero(~mark)
            split = (
                *([view[labelled] for view in views], identity[labelled]),
                *([view[rest] for view in views], identity[rest]),
            )
            rows = [run_inputs(split, seed)] if arguments.inputs else []
            rows += [run_ours(split, seed, arguments.candidates)]
            rows += [] if arguments.no_peers else [run_peers(split)]
            for method, threshold, label, note in (row for part in rows for row in part):
                figures = [*score_pairwise(split[3], label), *score_bcubed(split[3], label)]
                shown = [f"{100 * figure:.1f}" for figure in figures]
                print(form.format(name, seed, method, threshold, *shown, note), flush=True)
                results.append((name, method, 100 * figures[2], 100 * figures[5]))
    if arguments.seeds > 1:
        table = pd.DataFrame(results, columns=["set", "method", "F", "B-F"])
        over = table.groupby(["set", "method"], sort=False).agg(["mean", "std"]).round(1)
        print(f"\nover {arguments.seeds} seeds\n{over.to_string()}")


if __name__ == "__main__":
    main()
