"""evaluate: pseudo-labels against the truth, recognizers against each other, on held-out people.

The contract:
- Pseudo-labels are scored only where the truth of every unlabelled image is known; images without
  a pseudo-label count as singletons.
- Three subjects are shown the same faces of people no training has seen: `labelled_only`,
  `labelled_pseudo` and, with truth, `supervised`, which is trained here because no earlier stage
  may read the truth. `gap_closed` is the share of supervised - labelled_only that
  labelled_pseudo reaches, NaN where there is no gap.
- Protocols: `verification <px>px` (k folds by person: accuracy, TAR@FAR) and
  `identification <px>px` (one gallery image a person, the rest are probes: rank-k). Both images of
  a pair, and probes but not the gallery, are reduced to <px> pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.dataset import Dataset
from pipelines.models import copy_model, open_embedder, reduce_to, train_once
from pipelines.stage import Stage, Work
from pipelines.stages.retrain import describe_job, select_clusters
from pipelines.stages.train import select_labelled

METRICS = pa.schema(
    [
        ("subject", pa.string()),
        ("protocol", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("count", pa.int64()),
    ]
)
PART_SIZE = 512
Row = tuple[str, str, str, float, int]


def run(work: Work) -> Mapping[str, Any]:
    samples = work.read("ingest.samples").to_pandas()
    truth = work.read("ingest.truth").to_pandas()
    truth_known = bool(work.input_facts("ingest")["truth_known"])
    rows: list[Row] = []
    if truth_known:
        rows += _score_labels(work, truth)
    held_out = samples[samples.split == "evaluation"]
    has_images = work.dataset.kind != "features"
    if has_images and len(held_out):
        models = {
            subject: work.locate("retrain.history").parent / f"{subject}.safetensors"
            for subject in work.input_facts("retrain")["subjects"]
        }
        if truth_known and work.config.evaluate.supervised:
            models["supervised"] = _train_supervised(work, samples, truth)
        rows += _score_recognizers(work, held_out, models)
    work.write("metrics", dict(zip(METRICS.names, zip(*rows, strict=True), strict=True)) if rows
               else METRICS.empty_table())  # fmt: skip
    return _pick_facts(rows)


def _train_supervised(work: Work, samples: Any, truth: Any) -> Path:
    """The upper bound: the same recognizer with the true identity of every unlabelled image."""
    settings = work.config.retrain
    known = samples.drop(columns="identity").merge(truth, on="sample_id")
    supervised = select_clusters(known, "identity", settings.min_cluster_size, weigh=False)
    sets = tuple(each for each in (select_labelled(work), supervised) if each is not None)
    return copy_model(work, train_once(work, describe_job(work, "supervised", sets)), "supervised")


def _score_labels(work: Work, truth: Any) -> list[Row]:
    from cdp.metrics import score_bcubed, score_nmi, score_pairwise

    labels = work.read("propagate.labels", columns=["sample_id", "pseudo_label"]).to_pandas()
    both = labels.merge(truth, on="sample_id", validate="one_to_one")
    identity = both.identity.factorize()[0].astype(np.int64)
    label = both.pseudo_label.to_numpy()
    rows: list[Row] = []
    for kind, score in (("pairwise", score_pairwise), ("bcubed", score_bcubed)):
        for name, value in zip(("precision", "recall", "f"), score(identity, label), strict=True):
            rows.append(("pseudo_labels", "clustering", f"{kind}_{name}", value, len(label)))
    rows.append(("pseudo_labels", "clustering", "nmi", score_nmi(identity, label), len(label)))
    return rows


def _score_recognizers(work: Work, held_out: Any, models: Mapping[str, Any]) -> list[Row]:
    from cdp.metrics import gap_closed

    scores: dict[tuple[str, str, str], tuple[float, int]] = {}
    identity = held_out.identity.factorize()[0].astype(np.int64)
    views = _embed_held_out(work, held_out.path.tolist(), models)
    for probe_px in work.config.evaluate.probe_px:
        for subject in models:
            small, large = views[subject, probe_px], views[subject, None]
            for protocol, metric, value, count in _score_one(
                work, identity, small, large, probe_px
            ):
                scores[subject, protocol, metric] = value, count
    rows: list[Row] = [(*key, value, count) for key, (value, count) in scores.items()]
    if "supervised" in models and "labelled_pseudo" in models:
        for (subject, protocol, metric), (low, count) in scores.items():
            if subject == "labelled_only":
                middle, high = (
                    scores[other, protocol, metric][0] for other in ("labelled_pseudo", "supervised")
                )
                share = gap_closed(low, middle, high)
                rows.append(("gap_closed", protocol, metric, share, count))
    return rows


def _embed_held_out(
    work: Work, paths: list[str], models: Mapping[str, Path]
) -> dict[tuple[str, int | None], np.ndarray]:
    """Unit vectors of every held-out face by every subject, at every probe size and unreduced."""
    sizes = (None, *work.config.evaluate.probe_px)
    parts = [
        (work.dataset, paths[row : row + PART_SIZE], dict(models), sizes, work.runtime.device)
        for row in range(0, len(paths), PART_SIZE)
    ]
    found = list(work.engine.map(embed_held_out_part, parts, label="evaluate"))
    return {key: np.concatenate([part[key] for part in found]) for key in found[0]}


def embed_held_out_part(
    dataset: Dataset,
    paths: list[str],
    models: dict[str, Path],
    sizes: tuple[int | None, ...],
    device: str,
) -> dict[tuple[str, int | None], np.ndarray]:
    """One part of the held-out faces, decoded once for all subjects and sizes."""
    faces = dataset.read_faces(paths)
    views = {}
    for size in sizes:
        reduced = reduce_to(faces, size)
        for subject, path in models.items():
            embedder = open_embedder(path, path.stat().st_mtime_ns, device)
            views[subject, size] = embedder.embed(reduced)[0]
    return views


def _score_one(
    work: Work, identity: np.ndarray, small: np.ndarray, large: np.ndarray, probe_px: int
) -> list[tuple[str, str, float, int]]:
    from cdp.metrics import (
        compare_pairs,
        rank_k,
        sample_probe_gallery,
        sample_verification_pairs,
        tar_at_far,
        verification_accuracy,
    )

    settings, seed = work.config.evaluate, work.seed
    pairs = sample_verification_pairs(identity, settings.pairs_per_fold, settings.folds, seed)
    similarity = compare_pairs(small, pairs.source, pairs.target)
    accuracy, spread = verification_accuracy(similarity, pairs.same, pairs.fold)
    name = f"verification {probe_px}px"
    rows = [
        (name, "accuracy", accuracy, len(similarity)),
        (name, "accuracy_std", spread, len(similarity)),
    ]
    genuine, impostor = similarity[pairs.same], similarity[~pairs.same]
    for far in settings.far:
        rows.append((name, f"tar@far={far:g}", tar_at_far(genuine, impostor, far), len(genuine)))
    probe, gallery = sample_probe_gallery(identity, seed)
    ranks = rank_k(
        small[probe], identity[probe], large[gallery], identity[gallery], settings.ranks
    )
    for rank, value in ranks.items():
        rows.append((f"identification {probe_px}px", f"rank-{rank}", value, len(probe)))
    return rows


def _pick_facts(rows: list[Row]) -> dict[str, Any]:
    wanted = {
        ("pseudo_labels", "clustering", "pairwise_f"): "pairwise_f",
        ("pseudo_labels", "clustering", "bcubed_f"): "bcubed_f",
    }
    facts = {wanted[row[:3]]: round(row[3], 4) for row in rows if row[:3] in wanted}
    return {**facts, "metrics": len(rows)}


STAGE = Stage(
    name="evaluate",
    version=1,
    inputs=("ingest.samples", "ingest.truth", "propagate.labels", "retrain.history"),
    outputs={"metrics": METRICS},
    reads=("retrain", "evaluate"),
    run=run,
)
