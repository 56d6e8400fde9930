"""propagate: scored pairs -> pseudo-labels, and the size and quality of each cluster.

The contract:
- `labels` has a row for every unlabelled image, in the order of `sample_id`; -1 is "none".
- `clusters` has a row for every pseudo-label. `weakest_edge` is the lowest probability on the
  cluster's maximum spanning tree; above it the cluster would fall apart. The medoid is the image
  of the best quality among those nearly as probable with the rest as the most probable one.
- `soft_labels` gives each image weights over nearby pseudo-labels, by diffusion along the pairs
  above the threshold; images without a label may have some.
- Near-equal images (`representative`) have one label, unless a reviewer says otherwise: evidence,
  soft labels and medoids count them once, sizes as the images that they are.
- `assignments` has a row for every unlabelled image that shows a labelled person, with a
  probability above one half, by its cluster and by itself (`cdp.label_check.people`).
- The labels satisfy every decision of the review; see `cdp.review.constraints`.
- Nothing above this stage depends on its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import DataError
from cdp.types import UNLABELLED, PairTable
from pipelines.decisions import APPLIED_BY, find_keys, find_names, resolve_decisions
from pipelines.graphs.label_check import ASSIGNMENTS, FOUND, PEOPLE
from pipelines.missed_pairs import read_missed
from pipelines.stage import Stage, Work
from pipelines.tables import SPLITS, read_pairs, read_vectors
from pipelines.track_constraints import find_track_constraints

if TYPE_CHECKING:
    import pandas as pd

    from cdp.label_check.people import FoundPeople, LabelledPeople
    from cdp.propagation.clustering import Clustering
    from cdp.propagation.quality import QualityEstimate
    from cdp.review.constraints import Constraints

LABELS = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("path", pa.string()),
        ("pseudo_label", pa.int64()),
        ("cluster_size", pa.int64()),
        ("confidence", pa.float32()),
        ("cut_threshold", pa.float32()),
        ("representative", pa.int64()),
        ("quality", pa.float32()),
        ("norm", pa.float32()),
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

ALIKE = 1e-3
"""Norms that differ by less, as a share of the largest, are those of unit vectors."""
VOTED = "the committee voted: its scores are cosines, and no quality can be estimated from them"


def run(work: Work) -> Mapping[str, Any]:
    from cdp.propagation.doubt import describe_doubt
    from cdp.propagation.quality import average_inside
    from cdp.propagation.representatives import RowGroups
    from cdp.propagation.soft_labels import diffuse_labels, repeat_rows
    from cdp.review.constraints import apply_constraints, bar_labels, settle_pairs

    needed = ["sample_id", "path", "split", "sha256", "track", "frame", "clip"]
    samples = work.read("ingest.samples", columns=needed)
    samples = samples.to_pandas()
    samples = samples[samples.split == "unlabelled"]
    sample_id = samples.sample_id.to_numpy()
    unmeasured = bool(work.input_facts("mediate").get("self_trained"))
    columns = ("probability", "base_similarity") if unmeasured else ("probability",)
    pairs, scored = read_pairs(work.locate("mediate.pairs"), sample_id, columns)
    probability = scored["probability"]
    corrections, gone = resolve_decisions(work.decisions, find_keys(samples))
    constraints, linked = _add_tracks(work, samples, corrections)
    if constraints:
        probability = settle_pairs(pairs, probability, constraints)
    representative = _read_representatives(work, sample_id)
    found = _cluster(work, pairs, probability, representative)
    label, threshold = found.label, found.threshold
    _stop_at_one_cluster(work, label)
    facts: dict[str, Any] = {"split": found.split, "threshold": threshold}
    if constraints:
        label = apply_constraints(label, pairs, probability, constraints, threshold=threshold)
    if linked:
        facts["tracks"] = linked
    if work.decisions:
        facts |= {"corrections": len(work.decisions), "corrected_images_gone": gone}
    doubt = describe_doubt(label)
    groups = RowGroups.of(representative, label)
    few, score = groups.reduce_pairs(pairs, probability)
    seen = _read_quality(work, sample_id)
    clusters = _describe_clusters(few, score, label[groups.rows], seen["quality"][groups.rows])
    quality = _estimate(work, label, pairs, probability, representative)
    voted = work.input_facts("mediate")["method"] == "vote"
    confidence = quality.confidence
    if voted:  # cosines are no probabilities
        confidence = average_inside(label[groups.rows], few, score, threshold)[groups.group]
    elif unmeasured:  # nor are scores that were measured on nobody
        few, cosine = groups.reduce_pairs(pairs, scored["base_similarity"])
        confidence = average_inside(label[groups.rows], few, cosine, -1)[groups.group]
    clusters["expected_precision"] = quality.expected_precision
    size = np.bincount(label[label != UNLABELLED], minlength=1)
    work.write(
        "labels",
        {
            "sample_id": sample_id,
            "path": samples.path.to_numpy(),
            "pseudo_label": label,
            "cluster_size": np.where(label == UNLABELLED, 0, size[label]),
            "confidence": confidence,
            "cut_threshold": found.cut_threshold,
            "representative": sample_id[representative],
            **{name: pa.array(value, mask=np.isnan(value)) for name, value in seen.items()},
        },
    )
    assigned = _assign_people(work, samples, label, confidence, representative)
    clusters["medoid_sample_id"] = sample_id[groups.rows[clusters.pop("medoid")]]
    clusters["size"] = np.bincount(label[label != UNLABELLED], minlength=len(clusters["size"]))
    work.write("clusters", clusters)
    spread = work.config.propagate.soft_labels
    soft = diffuse_labels(
        label[groups.rows], few, score, threshold=threshold, **spread.model_dump()
    )
    soft = repeat_rows(soft, groups.group)
    if constraints:
        soft = bar_labels(soft, label, constraints)
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
        **{
            f"estimated_{name}": None if value is None else round(value, 4)
            for name, value in (
                ("precision", quality.precision),
                ("recall", quality.recall),
                ("f", quality.f),
            )
        },
        "withheld": list(quality.reasons),
        "assigned": assigned,
        **facts,
        "warnings": [doubt] if doubt else [],
    }


def _estimate(
    work: Work,
    label: np.ndarray,
    pairs: PairTable,
    probability: np.ndarray,
    representative: np.ndarray,
) -> QualityEstimate:
    """The quality of the labels, withheld where its assumptions are seen to fail."""
    from cdp.mediator.shortage import describe_reach
    from cdp.propagation.quality import FULL_LISTS, are_lists_full, estimate_quality
    from cdp.propagation.representatives import RowGroups

    scored, k = work.input_facts("mediate"), int(work.input_facts("knn")["k"])
    missed = read_missed(scored)
    found = estimate_quality(label, pairs, probability, representative, missed=missed)
    if scored["method"] == "vote":
        return found.withhold(VOTED).withhold_clusters()
    largest = int(np.bincount(label[label != UNLABELLED], minlength=1).max())
    found = found.withhold(*scored.get("doubts", []))
    if scored.get("self_trained"):
        return found.withhold_clusters()
    groups = RowGroups.of(representative, label)
    few = groups.reduce_pairs(pairs, probability)[0]
    full = FULL_LISTS if are_lists_full(label[groups.rows], few, k) else ""
    return found.withhold(describe_reach(scored["largest_person"], largest), full, recall_only=True)


def _stop_at_one_cluster(work: Work, label: np.ndarray) -> None:
    """DataError where the committee voted most images into one cluster, and nobody said it may."""
    from cdp.propagation.doubt import EVERYTHING, holds_most_rows

    scored, settings = work.input_facts("mediate"), work.config.propagate
    if scored["method"] != "vote" or settings.max_size is not None or not holds_most_rows(label):
        return
    largest = int(np.bincount(label[label != UNLABELLED]).max())
    raise DataError(
        f"voting joined {largest:,} of {len(label):,} images into one cluster, at the cosine "
        f"{scored['cosine']:.2f}. {EVERYTHING}. `cdp check` says whether a model separates "
        "labelled people, if there are any. If the embeddings are right, raise "
        "mediate.vote.min_similarity; if one person does dominate, allow it by "
        f"propagate.max_size={largest}"
    )


def _read_representatives(work: Work, sample_id: np.ndarray) -> np.ndarray:
    """The row that stands for each row of the ascending `sample_id`."""
    rows = np.arange(len(sample_id))
    if not work.locate("knn.near_equal").exists():  # a run of an earlier version
        return rows
    table = work.read("knn.near_equal").to_pandas()
    table = table[table.sample_id.isin(sample_id) & table.representative.isin(sample_id)]
    moved = np.searchsorted(sample_id, table.sample_id.to_numpy())
    rows[moved] = np.searchsorted(sample_id, table.representative.to_numpy())
    return rows


def _add_tracks(work: Work, samples: pd.DataFrame, decided: Constraints) -> tuple[Constraints, int]:
    """The decisions of reviewers, and what tracks add to them; the number of tracks that do."""
    from cdp.review.tracks import give_way

    if not work.config.propagate.tracks:
        return decided, 0
    members = [member.name for member in work.config.committee.all]
    views = [work.locate("embed.embeddings", f"{SPLITS[1]}/{member}") for member in members]
    found = find_track_constraints(samples, views, seed=work.seed)
    return give_way(found, decided), len(found.same)


def _assign_people(
    work: Work,
    samples: pd.DataFrame,
    label: np.ndarray,
    confidence: np.ndarray,
    representative: np.ndarray,
) -> int:
    """Write the unlabelled images that show a labelled person; their number.

    Of near-equal images the one that stands for them is compared.
    """
    from safetensors.numpy import load_file

    from cdp.label_check.people import BELIEVED, LabelledPeople

    place = work.locate("knn.label_issues").with_name(PEOPLE)
    state = load_file(place) if place.exists() else {}
    if not state:
        none = np.empty(0, np.int64)
        return _write_assignments(work, samples, none, none.astype(object), none.astype(np.float32))
    people, kept = LabelledPeople.from_state(state), np.unique(representative)
    members = [member.name for member in work.config.committee.all]
    tables = [work.locate("embed.embeddings", f"{SPLITS[1]}/{member}") for member in members]
    views = [partial(_read_rows, table, kept) for table in tables]
    sample_id = samples.sample_id.to_numpy()
    found = _read_found(place.with_name(FOUND), people, sample_id[kept])
    person, probability = people.assign(views, label[kept], confidence[kept], found)
    identity = work.read("ingest.samples", columns=["identity", "split"]).to_pandas()
    names = np.sort(identity.identity[identity.split == SPLITS[0]].unique())
    group = np.searchsorted(kept, representative)
    row = np.flatnonzero(probability[group] > BELIEVED)
    shown = group[row]
    return _write_assignments(
        work, samples, sample_id[row], names[person[shown]], probability[shown]
    )


def _read_rows(table: Path, rows: np.ndarray) -> np.ndarray:
    return read_vectors(table, "embedding")[rows]


def _read_found(place: Path, people: LabelledPeople, sample_id: np.ndarray) -> FoundPeople | None:
    """Whom each image shows by itself, as the stage knn found it; None where not of all images."""
    from cdp.label_check.people import FoundPeople

    if not place.exists():
        return None
    stored = np.load(place)
    if not np.array_equal(stored["ids"], sample_id):
        return None
    return FoundPeople.from_state(stored, people)


def _write_assignments(
    work: Work,
    samples: pd.DataFrame,
    sample_id: np.ndarray,
    identity: np.ndarray,
    probability: np.ndarray,
) -> int:
    """Write the assignments; a copy of a labelled image is of its person, at probability 1."""
    import pandas as pd

    every = work.read("ingest.samples", columns=["sample_id", "identity", "copy_of"]).to_pandas()
    named = every.set_index("sample_id").identity.dropna()
    copies = every.dropna(subset="copy_of").set_index("sample_id").copy_of.astype(np.int64)
    copies = copies[copies.isin(named.index)].map(named)
    found = pd.DataFrame({"identity": identity, "probability": probability}, index=sample_id)
    exact = pd.DataFrame({"identity": copies, "probability": np.float32(1)}, index=copies.index)
    whole = pd.concat([found[~found.index.isin(exact.index)], exact]).sort_index()
    whole = _follow_reviewers(work, samples, whole)
    paths = samples.set_index("sample_id").path[whole.index]
    work.write(
        "assignments",
        {
            "sample_id": whole.index.to_numpy(),
            "path": paths.to_numpy(),
            "identity": whole.identity.to_numpy(object),
            "probability": whole.probability.to_numpy(np.float32),
        },
    )
    return len(whole)


def _follow_reviewers(work: Work, samples: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """The assignments as reviewers corrected them: named at probability 1, denied ones left out.

    found : identity and probability by sample_id.
    """
    import pandas as pd

    if not work.decisions:
        return found
    sample_id = samples.sample_id.to_numpy()
    names = find_names(work.decisions, find_keys(samples))
    row = np.searchsorted(sample_id, found.index)
    out = np.array([names.identity[at] is not None for at in row], bool)
    for identity, rows in names.denied.items():
        out |= rows[row] & (found.identity == identity).to_numpy()
    named = np.flatnonzero(names.identity != None)  # noqa: E711
    added = pd.DataFrame(
        {"identity": names.identity[named], "probability": np.float32(1)}, index=sample_id[named]
    )
    return pd.concat([found[~out], added]).sort_index()


def _cluster(
    work: Work, pairs: PairTable, probability: np.ndarray, representative: np.ndarray
) -> Clustering:
    from cdp.mediator.pair_voter import choose_first_level
    from cdp.propagation.clustering import cluster_pairs

    settings, scored = work.config.propagate, work.input_facts("mediate")
    if settings.target_precision is not None and scored.get("self_trained"):
        raise DataError(
            "propagate.target_precision needs labelled images to measure precision on, and "
            f"{scored['doubts'][0]}. Label 24 people or more of the unlabelled images, all images "
            "of each, or leave the target out"
        )
    calibrated = scored["method"] != "vote"
    threshold = None if settings.threshold == "auto" else settings.threshold
    if not calibrated:
        replaced = bool(scored.get("shortage"))  # votes instead of probabilities
        threshold = choose_first_level(scored["cosine"], None if replaced else threshold)
    elif threshold is None:
        threshold = float(scored.get("threshold", 0.5))
    return cluster_pairs(
        pairs,
        probability,
        len(representative),
        split=settings.split,
        threshold=threshold,
        max_size=settings.max_size,
        step=settings.step,
        target_precision=settings.target_precision,
        precision_curve=np.array(scored.get("precision_curve", [])),
        calibrated=calibrated,
        representative=representative,
    )


def _read_quality(work: Work, sample_id: np.ndarray) -> dict[str, np.ndarray]:
    """(n,) float32 `quality` of each image and `norm` of its embedding, NaN where not known.

    The norm is that of the base; a model that gives unit vectors has none.
    """
    unknown = np.full(len(sample_id), np.nan, np.float32)
    quality = unknown.copy()
    table = work.read("ingest.qualities", columns=["sample_id", "quality"]).to_pandas()
    table = table[table.sample_id.isin(sample_id)]
    quality[np.searchsorted(sample_id, table.sample_id)] = table.quality.to_numpy(np.float32)
    base = f"{SPLITS[1]}/{work.config.committee.base.name}"
    stored = pq.read_table(work.locate("embed.embeddings", base), columns=["norm"])
    norm = stored["norm"].to_numpy().astype(np.float32)
    says = np.ptp(norm) > ALIKE * norm.max() if len(norm) else False
    return {"quality": quality, "norm": norm if says else unknown}


def _describe_clusters(
    pairs: PairTable, probability: np.ndarray, label: np.ndarray, quality: np.ndarray
) -> dict[str, np.ndarray]:
    """Columns of `clusters`, with the medoid as a row."""
    from cdp.propagation.medoids import choose_medoids
    from cdp.propagation.quality import sum_inside
    from cdp.propagation.rising_threshold import build_forest
    from cdp.propagation.scored_pairs import take_inside

    few, value = take_inside(label, pairs, probability)
    count, clusters = len(label), int(label.max(initial=UNLABELLED)) + 1
    mean = sum_inside(label, few, value)[1]
    members = np.flatnonzero(label != UNLABELLED)
    medoid = choose_medoids(few, value, label, quality)
    weakest = np.ones(clusters, np.float32)
    forest = build_forest(few, value, count)
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
    version=15,
    inputs=(
        "ingest.samples",
        "ingest.qualities",
        "embed.embeddings",
        "knn.neighbours",
        "knn.label_issues",
        "knn.near_equal",
        "mediate.pairs",
    ),
    outputs={
        "labels": LABELS,
        "clusters": CLUSTERS,
        "soft_labels": SOFT_LABELS,
        "assignments": ASSIGNMENTS,
    },
    reads=("committee", "propagate"),
    run=run,
    corrected=APPLIED_BY["propagate"],
)
