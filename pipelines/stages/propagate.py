"""propagate: scored pairs -> pseudo-labels, and the size and quality of each cluster.

The contract:
- `labels` has a row for every unlabelled image, in the order of `sample_id`; -1 is "none".
- `clusters` has a row for every pseudo-label. `weakest_edge` is the lowest probability on the
  cluster's maximum spanning tree; above it the cluster would fall apart. The medoid is the image
  with the largest summed probability to the rest.
- `soft_labels` gives each image weights over nearby pseudo-labels, by diffusion along the pairs
  above the threshold; images without a label may have some.
- Near-equal images (`representative`) have one label, unless a reviewer says otherwise: evidence,
  soft labels and medoids count them once, sizes as the images that they are.
- The labels satisfy every decision of the review; see `cdp.review.constraints`.
- Nothing above this stage depends on its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cdp.types import UNLABELLED, PairTable
from pipelines.decisions import find_keys, list_active, resolve_decisions
from pipelines.stage import Stage, Work
from pipelines.tables import list_pairs

if TYPE_CHECKING:
    from cdp.propagation.clustering import Clustering

LABELS = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),
        ("pseudo_label", pa.int64()),
        ("cluster_size", pa.int64()),
        ("confidence", pa.float32()),
        ("cut_threshold", pa.float32()),
        ("representative", pa.int64()),
    ]
)
CLUSTERS = pa.schema(
    [
        ("pseudo_label", pa.int64()),
        ("size", pa.int64()),
        ("mean_probability", pa.float32()),
        ("expected_precision", pa.float32()),
        ("weakest_edge", pa.float32()),
        ("medoid_sample_id", pa.int64()),
    ]
)
SOFT_LABELS = pa.schema(
    [("sample_id", pa.int64()), ("pseudo_label", pa.int64()), ("weight", pa.float32())]
)


def run(work: Work) -> Mapping[str, Any]:
    from cdp.propagation.quality import estimate_quality
    from cdp.propagation.representatives import RowGroups
    from cdp.propagation.soft_labels import diffuse_labels, repeat_rows
    from cdp.review.constraints import apply_constraints, bar_labels, settle_pairs

    samples = work.read("ingest.samples", columns=["sample_id", "path", "split", "sha256"])
    samples = samples.to_pandas()
    samples = samples[samples.split == "unlabelled"]
    sample_id = samples.sample_id.to_numpy()
    needed = ["source", "target", "listings", "probability"]
    table = work.read("mediate.pairs", columns=needed).to_pandas()
    pairs = list_pairs(table, sample_id)
    probability = table.probability.to_numpy()
    corrections, gone = resolve_decisions(work.decisions, find_keys(samples))
    if corrections:
        probability = settle_pairs(pairs, probability, corrections)
    representative = _read_representatives(work, sample_id)
    found = _cluster(work, pairs, probability, representative)
    label, threshold = found.label, found.threshold
    facts: dict[str, Any] = {"split": found.split, "threshold": threshold}
    if work.decisions:
        label = apply_constraints(label, pairs, probability, corrections, threshold=threshold)
        facts |= {"corrections": len(list_active(work.decisions)), "corrected_images_gone": gone}
    groups = RowGroups.of(representative, label)
    few, score = groups.reduce_pairs(pairs, probability)
    clusters = _describe_clusters(few, score, label[groups.rows])
    quality = estimate_quality(label, pairs, probability, representative)
    clusters["expected_precision"] = quality.expected_precision
    size = np.bincount(label[label != UNLABELLED], minlength=1)
    work.write(
        "labels",
        {
            "sample_id": sample_id,
            "path": samples.path.to_numpy(),
            "pseudo_label": label,
            "cluster_size": np.where(label == UNLABELLED, 0, size[label]),
            "confidence": quality.confidence,
            "cut_threshold": found.cut_threshold,
            "representative": sample_id[representative],
        },
    )
    clusters["medoid_sample_id"] = sample_id[groups.rows[clusters.pop("medoid")]]
    clusters["size"] = np.bincount(label[label != UNLABELLED], minlength=len(clusters["size"]))
    work.write("clusters", clusters)
    spread = work.config.propagate.soft_labels
    soft = diffuse_labels(
        label[groups.rows], few, score, threshold=threshold, **spread.model_dump()
    )
    soft = repeat_rows(soft, groups.group)
    if corrections:
        soft = bar_labels(soft, label, corrections)
    work.write(
        "soft_labels",
        {
            "sample_id": sample_id[soft.row],
            "pseudo_label": soft.label,
            "weight": soft.weight,
        },
    )
    return {
        "clusters": len(clusters["size"]),
        "labelled": int((label != UNLABELLED).sum()),
        "unlabelled": int((label == UNLABELLED).sum()),
        "largest": int(size.max()),
        "estimated_precision": round(quality.precision, 4),
        "estimated_recall": round(quality.recall, 4),
        "estimated_f": round(quality.f, 4),
        **facts,
    }


def _read_representatives(work: Work, sample_id: np.ndarray) -> np.ndarray:
    """The row that stands for each row of the ascending `sample_id`."""
    rows = np.arange(len(sample_id))
    if not work.locate("knn.near_equal").exists():  # a run of an earlier version
        return rows
    table = work.read("knn.near_equal").to_pandas()
    table = table[table.sample_id.isin(sample_id)]
    moved = np.searchsorted(sample_id, table.sample_id.to_numpy())
    rows[moved] = np.searchsorted(sample_id, table.representative.to_numpy())
    return rows


def _cluster(
    work: Work, pairs: PairTable, probability: np.ndarray, representative: np.ndarray
) -> Clustering:
    from cdp.propagation.clustering import cluster_pairs

    settings, scored = work.config.propagate, work.input_facts("mediate")
    calibrated = scored["method"] != "vote"
    threshold = settings.threshold
    if threshold == "auto":
        threshold = scored.get("threshold", 0.5) if calibrated else 0.0
    return cluster_pairs(
        pairs,
        probability,
        len(representative),
        split=settings.split,
        threshold=float(threshold),
        max_size=settings.max_size,
        step=settings.step,
        target_precision=settings.target_precision,
        precision_curve=np.array(scored.get("precision_curve", [])),
        calibrated=calibrated,
        representative=representative,
    )


def _describe_clusters(
    pairs: PairTable, probability: np.ndarray, label: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of `clusters`, with the medoid as a row."""
    from cdp.propagation.rising_threshold import build_forest

    inside = (label[pairs.source] == label[pairs.target]) & (label[pairs.source] != UNLABELLED)
    source, target, value = pairs.source[inside], pairs.target[inside], probability[inside]
    count, clusters = len(label), int(label.max(initial=UNLABELLED)) + 1
    weight = value.astype(np.float64)
    summed = np.bincount(source, weight, count) + np.bincount(target, weight, count)
    members = np.flatnonzero(label != UNLABELLED)
    order = members[np.lexsort((members, -summed[members], label[members]))]
    medoid = order[np.searchsorted(label[order], np.arange(clusters))]
    within = label[source]
    mean = np.bincount(within, weight, clusters) / np.maximum(
        np.bincount(within, minlength=clusters), 1
    )
    weakest = np.ones(clusters, np.float32)
    forest = build_forest(PairTable(source, target), value, count)
    np.minimum.at(weakest, label[forest.source], forest.score.astype(np.float32))
    size = np.bincount(label[members], minlength=clusters)
    mean[size == 1] = 1  # near-equal images alone
    return {
        "pseudo_label": np.arange(clusters),
        "size": size,
        "mean_probability": mean.astype(np.float32),
        "weakest_edge": weakest,
        "medoid": medoid,
    }


STAGE = Stage(
    name="propagate",
    version=6,
    inputs=("ingest.samples", "knn.near_equal", "mediate.pairs"),
    outputs={"labels": LABELS, "clusters": CLUSTERS, "soft_labels": SOFT_LABELS},
    reads=("propagate",),
    run=run,
    corrected=True,
)
