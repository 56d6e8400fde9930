"""evaluate: metrics of the pseudo-labels, and of the recognizers on held-out identities.

The contract:
- Pseudo-labels are scored only where the truth of every unlabelled image is known; images without
  a pseudo-label count as singletons.
- Three recognizers embed the same faces of identities that no training used: `labelled_only`,
  `labelled_pseudo` and, with truth, `supervised`, which is trained here because no earlier stage
  may read the truth. `gap_closed` is the share of supervised - labelled_only that
  labelled_pseudo reaches, NaN where there is no gap. The committee's ONNX models are judged beside
  them, by their names: which to use depends on the size of the faces.
- A recognizer embeds as users of it do: one vector of a face and its mirror image.
- Protocols, each with a kind of probe (a face reduced to some pixels, and degraded where the probe
  names a degradation): `verification` (accuracy over k folds of drawn pairs, TAR@FAR over all pairs
  and the cosine that gives each FAR), `listed pairs` (accuracy over the folds of the data set's own
  list, LFW's for instance), `identification` (one gallery image an identity: rank-k),
  `identification with distractors` and `open set` (half of the identities enrolled, the others
  distractors or not in the gallery: rank-k, TPIR@FPIR). Both images of a pair are probes. `sets`
  identifies an identity by up to 1, 2, 4 or 8 pictures at once, weighed by their norms or quality;
  `rejecting` is rank-1 without the probes of the smallest norms, `rejecting by consistency` and
  `by confidence` without those of the smallest such quality, where the recognizer has it
  (`cdp.recognizer.quality`), `by quality` of the pictures where that weighs sets.
- Where the manifest names a gallery and real probes, those are the protocols instead: see
  `pipelines.real_probes`.
- `low` and `high` bound 95 % of a bootstrap over the held-out identities; NaN where there is none.
- A protocol for which there are too few held-out identities is left out, with a line in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.members import open_embedder, reduce_to
from pipelines.real_probes import Subjects, list_subjects, score_real_probes
from pipelines.stage import Stage, Work
from pipelines.training.sets import describe_job, select_clusters, select_labelled
from pipelines.training.trained import copy_model, train_once

log = logging.getLogger("cdp")

METRICS = pa.schema(
    [
        ("subject", pa.string()),
        ("protocol", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("count", pa.int64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
PART_SIZE = 512
Row = tuple[str, str, str, float, int, float, float]
NONE = float("nan")
LEAST_QUALITY = 1e-3
"""Of a picture in a set: a set of blank pictures has a vector too."""
Probe = tuple[int | None, str]
Vectors = tuple[np.ndarray, dict[str, np.ndarray]]
"""Unit vectors and the qualities of the faces, by name."""
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
        if work.dataset.manifest.has_real_probes:
            rows += score_real_probes(work, samples, models)
        else:
            rows += _score_recognizers(work, held_out, list_subjects(work, models))
    work.write("metrics", dict(zip(METRICS.names, zip(*rows, strict=True), strict=True)) if rows
               else METRICS.empty_table())  # fmt: skip
    return _pick_facts(rows)


def _train_supervised(work: Work, samples: Any, truth: Any) -> Path:
    """The upper bound: the same recognizer with the true identity of every unlabelled image."""
    settings = work.config.retrain
    known = samples.drop(columns="identity").merge(truth, on="sample_id")
    supervised = select_clusters(
        known,
        "identity",
        settings.min_cluster_size,
        weigh=False,
        alone=settings.leftovers == "alone",
    )
    people = samples[samples.split == "labelled"].identity.nunique()
    labelled = select_labelled(work) if people >= 2 else None
    job = describe_job(work, "supervised", labelled, supervised)
    return copy_model(work, train_once(work, job), "supervised")


def _score_labels(work: Work, truth: Any) -> list[Row]:
    from cdp.metrics.clustering import score_bcubed, score_nmi, score_pairwise

    labels = work.read("propagate.labels", columns=["sample_id", "pseudo_label"]).to_pandas()
    both = labels.merge(truth, on="sample_id", validate="one_to_one")
    identity = both.identity.factorize()[0].astype(np.int64)
    label = both.pseudo_label.to_numpy()
    rows: list[Row] = []
    for kind, score in (("pairwise", score_pairwise), ("bcubed", score_bcubed)):
        for name, value in zip(("precision", "recall", "f"), score(identity, label), strict=True):
            rows.append(_make_label_row(f"{kind}_{name}", value, len(label)))
    rows.append(_make_label_row("nmi", score_nmi(identity, label), len(label)))
    return rows


def _make_label_row(metric: str, value: float, count: int) -> Row:
    return ("pseudo_labels", "clustering", metric, value, count, NONE, NONE)


def _score_recognizers(work: Work, held_out: Any, models: Subjects) -> list[Row]:
    from cdp.metrics.protocols import Score, gap_closed

    scores: dict[tuple[str, str, str], Score] = {}
    held_out_protocols = _Protocols(work, held_out)
    views = _embed_held_out(work, held_out.path.tolist(), models)
    for probe in _list_probes(work):
        for subject in models:
            small = views[subject, probe]
            large = small if work.config.evaluate.gallery == "probe" else views[subject, GALLERY]
            for protocol, score in held_out_protocols.score(*small, large[0]):
                scores[subject, f"{protocol} {_format_probe(probe)}", score.metric] = score
    rows: list[Row] = [
        (*key, score.value, score.count, *score.interval()) for key, score in scores.items()
    ]
    if "supervised" in models and "labelled_pseudo" in models:
        for (subject, protocol, metric), low in scores.items():
            if subject != "labelled_only" or low.draws is None:
                continue
            if metric.startswith("threshold@"):
                continue  # a cosine: neither better nor worse
            middle = scores["labelled_pseudo", protocol, metric]
            high = scores["supervised", protocol, metric]
            assert middle.draws is not None
            assert high.draws is not None
            # Resample by resample: the three are measured on the same draw of identities.
            draws = [
                gap_closed(*each) for each in zip(low.draws, middle.draws, high.draws, strict=True)
            ]
            gap = Score(
                metric,
                gap_closed(low.value, middle.value, high.value),
                low.count,
                np.array(draws),
            )
            rows.append(("gap_closed", protocol, metric, gap.value, gap.count, *gap.interval()))
    return rows


def _list_probes(work: Work) -> tuple[Probe, ...]:
    """Every degradation at every size."""
    settings = work.config.evaluate
    return tuple((px, name) for name in settings.degradations for px in settings.probe_px)


def _embed_held_out(
    work: Work, paths: list[str], models: Subjects
) -> dict[tuple[str, Probe], Vectors]:
    """Every held-out face by every subject, as every probe and as gallery."""
    probes = (GALLERY, *_list_probes(work))
    retrain = work.config.retrain
    parts = int(retrain.head_options.get("parts", 8)) if retrain.head == "subspheres" else None
    jobs = [
        (work.dataset, paths[row : row + PART_SIZE], row, dict(models), probes, work.seed,
         work.runtime.device, parts, work.config.evaluate.set_weights == "quality")
        for row in range(0, len(paths), PART_SIZE)
    ]  # fmt: skip
    found = list(work.engine.map(embed_held_out_part, jobs, label="evaluate"))
    return {
        key: (
            np.concatenate([part[key][0] for part in found]),
            {
                name: np.concatenate([part[key][1][name] for part in found])
                for name in found[0][key][1]
            },
        )
        for key in found[0]
    }


def embed_held_out_part(
    dataset: Dataset,
    paths: list[str],
    first_row: int,
    models: Subjects,
    probes: tuple[Probe, ...],
    seed: int,
    device: str,
    parts: int | None,
    rated: bool,
) -> dict[tuple[str, Probe], Vectors]:
    """Vectors and norms of a part of the held-out faces, decoded once for all of them.

    rated : with the quality of the pictures too.
    """
    from cdp.images.quality import rate_crops

    faces = dataset.read_faces(paths)
    seeds = seed * 2**32 + np.arange(first_row, first_row + len(paths))
    views = {}
    for probe in probes:
        shown = _make_probes(faces, seeds, probe)
        pictures = {"quality": rate_crops(shown)} if rated else {}
        for subject, (path, way) in models.items():
            embedder = open_embedder(path, device, way)
            vectors, norm = embedder.embed(shown, flip=True)
            others = _measure_qualities(embedder, shown, parts)
            views[subject, probe] = vectors, {"norm": norm, **pictures, **others}
    return views


def _measure_qualities(
    embedder: Any, faces: np.ndarray, parts: int | None
) -> dict[str, np.ndarray]:
    """The qualities beside the norm that a recognizer has; `parts` of the head `subspheres`."""
    from cdp.recognizer.quality import measure_quality

    backbone, found = getattr(embedder, "backbone", None), {}
    if backbone is None:  # an ONNX model has no such quality
        return {}
    if backbone.spec.neck == "subdecisions":
        found["consistency"] = measure_quality(backbone, faces, "consistency")
    if parts is not None and backbone.spec.embedding_dim % parts == 0:
        found["confidence"] = measure_quality(backbone, faces, "confidence", parts=parts)
    return found


def _make_probes(faces: np.ndarray, seeds: np.ndarray, probe: Probe) -> np.ndarray:
    """Faces reduced and degraded as a probe: (n, s, s, 3) uint8 -> (n, px, px, 3) uint8."""
    from cdp.images.degradation import degrade_pixels, get_degradation

    size_px, name = probe
    if name == "none" or size_px is None:
        return reduce_to(faces, size_px)
    return degrade_pixels(faces, seeds, get_degradation(name), size_px)


def _format_probe(probe: Probe) -> str:
    size_px, name = probe
    return f"{size_px}px" if name == "none" else f"{size_px}px {name}"


class _Protocols:
    """The protocols of one set of identities, drawn once and the same for every recognizer."""

    def __init__(self, work: Work, held_out: Any) -> None:
        from cdp import metrics
        from cdp.metrics import protocols

        self.settings = settings = work.config.evaluate
        self.identity = identity = held_out.identity.factorize()[0].astype(np.int64)
        self.resamples = protocols.Resamples(identity, settings.draws, work.seed)
        self.compared = protocols.pick_images(identity, settings.pair_images, work.seed)
        self.probes, self.gallery = metrics.sample_probe_gallery(identity, work.seed)
        self.folds = {
            "verification": _try(
                metrics.sample_verification_pairs,
                identity, settings.pairs_per_fold, settings.folds, work.seed,
            ),
            "listed pairs": find_listed_pairs(work.dataset, held_out.path.tolist()),
        }  # fmt: skip
        self.sets = _try(protocols.sample_sets, identity, work.seed)
        self.open_set = _try(protocols.sample_open_set, identity, settings.enrolled, work.seed)

    def score(
        self, small: np.ndarray, quality: Mapping[str, np.ndarray], large: np.ndarray
    ) -> Iterator[tuple[str, Any]]:
        """Every metric of one recognizer: probes `small` with their qualities (n,), gallery
        `large`, (n, d) unit vectors."""
        from cdp.metrics import protocols
        from cdp.metrics.identification import identify
        from cdp.metrics.verification import compare_pairs

        settings, resamples, identity = self.settings, self.resamples, self.identity
        for protocol, pairs in self.folds.items():
            if pairs is not None:
                similarity = compare_pairs(small, pairs.source, pairs.target)
                for score in protocols.score_folds(similarity, pairs, resamples):
                    yield protocol, score
        found = _try(protocols.score_all_pairs, small, self.compared, resamples, settings.far)
        for score in found or ():
            yield "verification", score
        if len(self.probes):
            closed = identify(
                small[self.probes], identity[self.probes],
                large[self.gallery], identity[self.gallery],
            )  # fmt: skip
            for score in protocols.score_ranks(closed, self.probes, resamples, settings.ranks):
                yield "identification", score
            for name, values in quality.items():
                for score in protocols.score_rejection(
                    closed, values[self.probes], self.probes, resamples, settings.rejected
                ):
                    yield "rejecting" if name == "norm" else f"rejecting by {name}", score
        if self.sets is not None:
            weight = quality["norm"]
            if settings.set_weights == "quality":  # squared, as `Recognizer.embed_set` does
                weight = np.maximum(quality["quality"], LEAST_QUALITY) ** 2
            yield from self._score_sets(small, weight, large)
        if self.open_set is not None:
            yield from self._score_open_set(small, large)

    def _score_sets(
        self, small: np.ndarray, weight: np.ndarray, large: np.ndarray
    ) -> Iterator[tuple[str, Any]]:
        from cdp.aggregation import pool_vectors
        from cdp.metrics import protocols
        from cdp.metrics.identification import identify

        gallery = self.sets.gallery
        for size in self.settings.set_sizes:
            rows = self.sets.take(size)
            names, first = np.unique(self.identity[rows], return_index=True)
            pooled = pool_vectors(small[rows], self.identity[rows], weight[rows])
            found = identify(pooled, names, large[gallery], self.identity[gallery])
            for score in protocols.score_ranks(found, rows[first], self.resamples, (1,)):
                yield "sets", replace(score, metric=f"rank-1 by {size}")

    def _score_open_set(self, small: np.ndarray, large: np.ndarray) -> Iterator[tuple[str, Any]]:
        from cdp.metrics import protocols
        from cdp.metrics.identification import identify

        settings, identity, chosen = self.settings, self.identity, self.open_set
        gallery, names = large[chosen.gallery], identity[chosen.gallery]
        closed = identify(
            small[chosen.mated], identity[chosen.mated], gallery, names,
            distractor=large[chosen.unmated],
        )  # fmt: skip
        for score in protocols.score_ranks(closed, chosen.mated, self.resamples, settings.ranks):
            yield "identification with distractors", score
        probes = np.concatenate([chosen.mated, chosen.unmated])
        opened = identify(small[probes], identity[probes], gallery, names)
        for score in protocols.score_open_set(
            opened, probes, self.resamples, settings.fpir, rank=settings.fpir_rank
        ):
            yield "open set", score


def _try(make: Any, *arguments: Any) -> Any:
    """The result of `make`; None, and a line in the log, when there are too few identities."""
    try:
        return make(*arguments)
    except DataError as error:
        log.info("          left out: %s", error)
        return None


def find_listed_pairs(dataset: Dataset, paths: list[str]) -> Any:
    """The data set's own pairs of which both images are held out; None without two folds."""
    from cdp.metrics.verification import VerificationPairs

    row_of = {path.rpartition(".")[0]: row for row, path in enumerate(paths)}
    listed = [
        (row_of[pair.source], row_of[pair.target], pair.same, pair.fold)
        for pair in dataset.read_pairs()
        if pair.source in row_of and pair.target in row_of
    ]
    if len({fold for *_, fold in listed}) < 2:
        return None
    source, target, same, fold = (np.array(column) for column in zip(*listed, strict=True))
    return VerificationPairs(source, target, same, fold)


def _pick_facts(rows: list[Row]) -> dict[str, Any]:
    wanted = {
        ("pseudo_labels", "clustering", "pairwise_f"): "pairwise_f",
        ("pseudo_labels", "clustering", "bcubed_f"): "bcubed_f",
    }
    facts = {wanted[row[:3]]: round(row[3], 4) for row in rows if row[:3] in wanted}
    return {**facts, "metrics": len(rows)}


STAGE = Stage(
    name="evaluate",
    version=6,
    inputs=("ingest.samples", "ingest.truth", "propagate.labels", "retrain.history"),
    outputs={"metrics": METRICS},
    reads=("retrain", "evaluate", "committee"),
    run=run,
)
