"""propagate: scored pairs -> pseudo-labels, and the size and quality of each cluster.

The contract:
- `labels` has a row for every unlabelled image, in the order of `sample_id`; -1 is "none".
- `clusters` has a row for every pseudo-label. `weakest_edge` is the lowest probability on the
  cluster's maximum spanning tree; above it the cluster would fall apart. The medoid is the image
  with the largest summed probability to the rest.
- `soft_labels` gives each image weights over nearby pseudo-labels, by diffusion along the pairs
  above the threshold; images without a label may have some.
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
from pipelines.tables import read_pairs

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
    from cdp.propagation.soft_labels import diffuse_labels
    from cdp.review.constraints import apply_constraints, bar_labels, settle_pairs

    samples = work.read("ingest.samples", columns=["sample_id", "path", "split", "sha256"])
    samples = samples.to_pandas()
    samples = samples[samples.split == "unlabelled"]
    sample_id = samples.sample_id.to_numpy()
    pairs, scored = read_pairs(work.locate("mediate.pairs"), sample_id)
    probability = scored["probability"]
    corrections, gone = resolve_decisions(work.decisions, find_keys(samples))
    if corrections:
        probability = settle_pairs(pairs, probability, corrections)
    found = _cluster(work, pairs, probability, len(samples))
    label, threshold = found.label, found.threshold
    facts: dict[str, Any] = {"split": found.split, "threshold": threshold}
    if work.decisions:
        label = apply_constraints(label, pairs, probability, corrections, threshold=threshold)
        facts |= {"corrections": len(list_active(work.decisions)), "corrected_images_gone": gone}
    clusters = _describe_clusters(pairs, probability, label)
    quality = estimate_quality(label, pairs, probability)
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
        },
    )
    clusters["medoid_sample_id"] = sample_id[clusters.pop("medoid")]
    work.write("clusters", clusters)
    spread = work.config.propagate.soft_labels
    soft = diffuse_labels(label, pairs, probability, threshold=threshold, **spread.model_dump())
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


def _cluster(work: Work, pairs: PairTable, probability: np.ndarray, count: int) -> Clustering:
    from cdp.propagation.clustering import cluster_pairs

    settings, scored = work.config.propagate, work.input_facts("mediate")
    calibrated = scored["method"] != "vote"
    threshold = settings.threshold
    if threshold == "auto":
        threshold = scored.get("threshold", 0.5) if calibrated else 0.0
    return cluster_pairs(
        pairs,
        probability,
        count,
        split=settings.split,
        threshold=float(threshold),
        max_size=settings.max_size,
        step=settings.step,
        target_precision=settings.target_precision,
        precision_curve=np.array(scored.get("precision_curve", [])),
        calibrated=calibrated,
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
    return {
        "pseudo_label": np.arange(clusters),
        "size": np.bincount(label[members], minlength=clusters),
        "mean_probability": mean.astype(np.float32),
        "weakest_edge": weakest,
        "medoid": medoid,
    }


STAGE = Stage(
    name="propagate",
    version=6,
    inputs=("ingest.samples", "mediate.pairs"),
    outputs={"labels": LABELS, "clusters": CLUSTERS, "soft_labels": SOFT_LABELS},
    reads=("propagate",),
    run=run,
    corrected=True,
)
