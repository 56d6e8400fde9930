"""propagate: scored pairs -> pseudo-labels, and what is known of each cluster.

The contract:
- `labels` has a row for every unlabelled image, in the order of `sample_id`; -1 is "none".
- `clusters` has a row for every pseudo-label. `weakest_edge` is the lowest probability on the
  cluster's maximum spanning tree: the link that holds it together. The medoid is the image with
  the largest summed probability to the rest.
- `soft_labels` gives each image weights over nearby pseudo-labels, by diffusion along the pairs
  above the threshold; images without a label may have some.
- What people decided in review is honoured, each word of it; see `cdp.review.constraints`.
- Nothing above this stage depends on its settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import ConfigError
from cdp.types import UNLABELLED, PairTable
from pipelines.decisions import find_keys, list_active, resolve_decisions
from pipelines.stage import Stage, Work
from pipelines.tables import list_pairs

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
    needed = ["source", "target", "listings", "probability"]
    table = work.read("mediate.pairs", columns=needed).to_pandas()
    pairs = list_pairs(table, sample_id)
    probability = table.probability.to_numpy()
    corrections, gone = resolve_decisions(work.decisions, find_keys(samples))
    if corrections:
        probability = settle_pairs(pairs, probability, corrections)
    label, cut, facts = _label(work, pairs, probability, len(samples))
    if work.decisions:
        label = apply_constraints(
            label, pairs, probability, corrections, threshold=float(facts["threshold"])
        )
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
            "cut_threshold": cut,
        },
    )
    clusters["medoid_sample_id"] = sample_id[clusters.pop("medoid")]
    work.write("clusters", clusters)
    spread = work.config.propagate.soft_labels
    soft = diffuse_labels(
        label, pairs, probability, threshold=facts["threshold"], **spread.model_dump()
    )
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


def _label(
    work: Work, pairs: PairTable, probability: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    from cdp.propagation.average_linkage import agglomerate
    from cdp.propagation.rising_threshold import propagate_labels
    from cdp.propagation.threshold import choose_cut

    settings = work.config.propagate
    threshold: Any  # "auto" is replaced by a number below
    split, threshold, target = settings.split, settings.threshold, settings.target_precision
    if work.input_facts("mediate")["method"] == "vote":
        # Votes are no probabilities: what was kept is kept, and there are no odds to average.
        split, threshold = "raise_threshold", 0.0 if threshold == "auto" else threshold
        if target is not None:
            raise ConfigError(
                "propagate.target_precision needs probabilities, and mediate.method=vote has none. "
                "Train a mediator on labelled images, or leave the target out"
            )
    precision_curve = None
    if threshold == "auto":
        # Where the evidence turns, unless the held-out people were better served elsewhere.
        told = work.input_facts("mediate")
        threshold = float(told.get("threshold", 0.5))
        if split == "consensus":  # as the held-out people were split
            precision_curve = np.array(told.get("precision_curve", []))
    limit = {} if settings.max_size is None else {"max_size": settings.max_size}

    def raise_threshold(level: float) -> Any:
        return propagate_labels(
            pairs, probability, count, threshold=level, step=settings.step, **limit
        )

    def choose(cut: Callable[[float], np.ndarray]) -> float:
        if target is None:
            return threshold
        return choose_cut(
            cut,
            pairs,
            probability,
            target_precision=target,
            loosest=threshold,
            precision_curve=precision_curve,
        )

    if split == "raise_threshold":
        threshold = choose(lambda level: raise_threshold(level).label)
        found = raise_threshold(threshold)
        return found.label, found.cut_threshold, {"split": split, "threshold": threshold}
    merged = agglomerate(pairs, probability, count, threshold=threshold, **limit)
    threshold = choose(merged.cut)
    cut = np.full(count, threshold, np.float32)
    return merged.cut(threshold), cut, {"split": split, "threshold": threshold}


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
    version=5,
    inputs=("ingest.samples", "mediate.pairs"),
    outputs={"labels": LABELS, "clusters": CLUSTERS, "soft_labels": SOFT_LABELS},
    reads=("propagate",),
    run=run,
    corrected=True,
)
