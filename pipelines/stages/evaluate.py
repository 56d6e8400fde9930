"""evaluate: pseudo-labels against the truth, recognizers against each other, on held-out people.

The contract:
- Pseudo-labels are scored only where the truth of every unlabelled image is known; images without
  a pseudo-label count as singletons.
- Three subjects are shown the same faces of people no training has seen: `labelled_only`,
  `labelled_pseudo` and, with truth, `supervised`, which is trained here because no earlier stage
  may read the truth. `gap_closed` is the share of supervised - labelled_only that
  labelled_pseudo reaches, NaN where there is no gap.
- Protocols: `verification <probe>` (k folds by person: accuracy, TAR@FAR) and `identification
  <probe>` (one gallery image a person, the rest are probes: rank-k). A probe is a face reduced to
  some pixels, and seen through a degradation where it names one; both images of a pair are probes,
  the gallery is as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.dataset import Dataset
from pipelines.models import (
    copy_model,
    open_embedder,
    reduce_to,
    train_once,
)
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
Probe = tuple[int | None, str]
GALLERY: Probe = (None, "none")


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
    labelled = select_labelled(work) if (samples.split == "labelled").any() else None
    job = describe_job(work, "supervised", labelled, supervised)
    return copy_model(work, train_once(work, job), "supervised")


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
    for probe in _list_probes(work):
        for subject in models:
            small, large = views[subject, probe], views[subject, GALLERY]
            for protocol, metric, value, count in _score_one(work, identity, small, large, probe):
                scores[subject, protocol, metric] = value, count
    rows: list[Row] = [(*key, value, count) for key, (value, count) in scores.items()]
    if "supervised" in models and "labelled_pseudo" in models:
        for (subject, protocol, metric), (low, count) in scores.items():
            if subject == "labelled_only" and metric != "accuracy_std":
                middle = scores["labelled_pseudo", protocol, metric][0]
                high = scores["supervised", protocol, metric][0]
                share = gap_closed(low, middle, high)
                rows.append(("gap_closed", protocol, metric, share, count))
    return rows


def _list_probes(work: Work) -> tuple[Probe, ...]:
    """Every degradation at every size."""
    settings = work.config.evaluate
    return tuple((px, name) for name in settings.degradations for px in settings.probe_px)


def _embed_held_out(
    work: Work, paths: list[str], models: Mapping[str, Path]
) -> dict[tuple[str, Probe], np.ndarray]:
    """Unit vectors of every held-out face by every subject, as every probe and as gallery."""
    probes = (GALLERY, *_list_probes(work))
    parts = [
        (work.dataset, paths[row : row + PART_SIZE], row, dict(models), probes, work.seed,
         work.runtime.device)
        for row in range(0, len(paths), PART_SIZE)
    ]  # fmt: skip
    found = list(work.engine.map(embed_held_out_part, parts, label="evaluate"))
    return {key: np.concatenate([part[key] for part in found]) for key in found[0]}


def embed_held_out_part(
    dataset: Dataset,
    paths: list[str],
    first_row: int,
    models: dict[str, Path],
    probes: tuple[Probe, ...],
    seed: int,
    device: str,
) -> dict[tuple[str, Probe], np.ndarray]:
    """One part of the held-out faces, decoded once for all subjects and probes."""
    faces = dataset.read_faces(paths)
    seeds = seed * 2**32 + np.arange(first_row, first_row + len(paths))
    views = {}
    for probe in probes:
        seen = _see(faces, seeds, probe)
        for subject, path in models.items():
            embedder = open_embedder(path, path.stat().st_mtime_ns, device)
            views[subject, probe] = embedder.embed(seen)[0]
    return views


def _see(faces: np.ndarray, seeds: np.ndarray, probe: Probe) -> np.ndarray:
    """Faces as a probe: (n, s, s, 3) uint8 -> (n, px, px, 3) uint8."""
    import torch

    from cdp.images.degradation import degrade, get_degradation

    size_px, name = probe
    if name == "none" or size_px is None:
        return reduce_to(faces, size_px)
    degradation = get_degradation(name)
    degraded = degrade(torch.from_numpy(faces), torch.from_numpy(seeds), degradation, size_px)
    pixels = ((degraded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy())


def _tell_probe(probe: Probe) -> str:
    size_px, name = probe
    return f"{size_px}px" if name == "none" else f"{size_px}px {name}"


def _score_one(
    work: Work, identity: np.ndarray, small: np.ndarray, large: np.ndarray, probe: Probe
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
    name = f"verification {_tell_probe(probe)}"
    rows = [
        (name, "accuracy", accuracy, len(similarity)),
        (name, "accuracy_std", spread, len(similarity)),
    ]
    genuine, impostor = similarity[pairs.same], similarity[~pairs.same]
    for far in settings.far:
        rows.append((name, f"tar@far={far:g}", tar_at_far(genuine, impostor, far), len(genuine)))
    probes, gallery = sample_probe_gallery(identity, seed)
    ranks = rank_k(
        small[probes], identity[probes], large[gallery], identity[gallery], settings.ranks
    )
    for rank, value in ranks.items():
        rows.append((f"identification {_tell_probe(probe)}", f"rank-{rank}", value, len(probes)))
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
