"""report: the results of a run as a page, a table and a short text.

The contract:
- `summary` holds every figure of the run as (section, name, value); `summary.txt` shows the main
  ones as text, the verdict (`pipelines.verdict`) last, and is printed at the end of a run.
- `report.html` is one file that needs no network and no other file: figures, tables, face sheets.
  A section without data (images, ground truth, labels) says so.
- Every figure is measured by the stage that owns it, except precision and recall by threshold,
  which are measured here from the pairs and, where known, the ground truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.arrays.scratch import BLOCK
from cdp.arrays.threads import list_blocks
from cdp.errors import DataError
from cdp.types import UNLABELLED, PairTable
from pipelines.config import MemberSettings
from pipelines.files import write_text
from pipelines.headlines import HEADLINES, describe_loss, recommend_subjects
from pipelines.members import (
    describe_origin,
    find_origin,
    open_view,
    read_preprocessing,
    reduce_to,
)
from pipelines.missed_pairs import read_missed
from pipelines.stage import Stage, Work
from pipelines.tables import find_rows, read_pairs, read_vectors
from pipelines.verdict import Finding, compose_verdict, reach_verdict

SUMMARY = pa.schema([("section", pa.string()), ("name", pa.string()), ("value", pa.float64())])
SUBJECTS = ("labelled_only", "labelled_pseudo", "distilled", "adapted", "supervised")
PAGE = "report.html"
LOOKED_AT = 64  # held-out faces whose responses the maps of the filters average
THRESHOLDS = (  # of the curve of precision and recall
    0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999,
)  # fmt: skip


def run(work: Work) -> Mapping[str, Any]:
    rows: list[tuple[str, str, float]] = []
    for stage in work.stage.upstream:
        if stage in work.upstream and stage != "thumbnails":
            rows += [(stage, name, value) for name, value in _list_figures(work.input_facts(stage))]
    metrics = work.read("evaluate.metrics").to_pandas()
    rows += [
        ("evaluate", f"{row.subject}/{row.protocol}/{row.metric}", float(row.value))
        for row in metrics.itertuples()
    ]
    sections, names, values = zip(*rows, strict=True)
    work.write("summary", {"section": sections, "name": names, "value": values})
    run = work.runtime.store.runs_directory / work.config.name
    verdict = reach_verdict(work.upstream, run)
    write_text(work.directory / "summary.txt", _compose(work, metrics, verdict))
    page = _draw_page(work, metrics, verdict)
    write_text(work.directory / PAGE, page)
    return {
        "doubts": sum(finding.level == "doubt" for finding in verdict),
        "figures": len(rows),
        "page_mib": round(len(page.encode()) / 2**20, 2),
    }


def _list_figures(facts: Any, prefix: str = "") -> list[tuple[str, float]]:
    """The numbers among some facts, by name; those that are no integers with six digits."""
    if isinstance(facts, Mapping):
        return [
            figure
            for key, value in facts.items()
            for figure in _list_figures(value, f"{prefix}/{key}".strip("/"))
        ]
    if isinstance(facts, int):
        return [(prefix, float(facts))]
    return [(prefix, float(f"{facts:.6g}"))] if isinstance(facts, float) else []


# ------------------------------------------------------------------------------------- the text


def _compose(work: Work, metrics: Any, verdict: list[Finding]) -> str:
    ingest = work.input_facts("ingest")
    mediate = work.input_facts("mediate")
    propagate = work.input_facts("propagate")
    lines = [
        f"Data      {ingest['labelled']:,} labelled images of {ingest['labelled_people']:,} "
        "people, "
        f"{ingest['unlabelled']:,} unlabelled, {ingest['evaluation']:,} for evaluation, "
        f"{ingest['rejected']:,} set aside",
        *_describe_copies(ingest.get("copies", {})),
        *_describe_near_equal(work),
        f"Pairs     {mediate['pairs']:,} candidate pairs of unlabelled images, scored by "
        f"{mediate['method']}",
        f"Clusters  {propagate['clusters']:,} pseudo-labels on {propagate['labelled']:,} images, "
        f"{propagate['unlabelled']:,} left without; largest {propagate['largest']:,}",
    ]
    lines += _describe_gap(work)
    clustering = metrics[metrics.protocol == "clustering"].set_index("metric").value
    if len(clustering):
        lines.append(
            "Truth     "
            f"pairwise F {clustering['pairwise_f']:.3f} (precision "
            f"{clustering['pairwise_precision']:.3f}, recall {clustering['pairwise_recall']:.3f}), "
            f"BCubed F {clustering['bcubed_f']:.3f}, NMI {clustering['nmi']:.3f}"
        )
    recognition = metrics[~metrics.subject.isin(("pseudo_labels", "gap_closed"))]
    if len(recognition):
        lines += ["", *_tabulate(recognition, metrics[metrics.subject == "gap_closed"])]
        lines += [f"Use       at {text}" for text in recommend_subjects(metrics)]
        lines += [
            f"warning: {text}" for text in [describe_loss(metrics, "labelled_pseudo")] if text
        ]
    return "\n".join([*lines, "", *compose_verdict(verdict)]) + "\n"


def _describe_gap(work: Work) -> list[str]:
    """How far labelled pictures and the pile lie apart, in a line, where they were compared."""
    embed = work.input_facts("embed")
    if "gap" not in embed:
        return []
    trained = ""
    mediate = work.input_facts("mediate")
    if embed.get("copies") and mediate["method"] != "vote":
        clusters = " and on clusters of votes" if mediate["self_trained"] else ""
        trained = (
            f"; the mediator was trained on {embed['copies']:,} copies of them, degraded until "
            f"they look like the pile's{clusters}"
        )
    return [f"Pictures  {embed['gap']}{trained}"]


def _describe_copies(copies: Mapping[str, int]) -> list[str]:
    """A line on the files that are given more than once, where there are any."""
    words = {
        "of_unlabelled": "unlabelled files are copies of another and get its label",
        "of_labelled": "are copies of a labelled file and get its person (assignments)",
        "two_names": "labelled files are under two names and count for neither (rejected)",
    }
    parts = [f"{copies[name]:,} {text}" for name, text in words.items() if copies.get(name)]
    return [f"Copies    {'; '.join(parts)}"] * bool(parts)


def _describe_near_equal(work: Work) -> list[str]:
    """A line on the images that others stand for, where there are any."""
    found = work.input_facts("knn").get("near_equal", {})
    parts = [
        f"{facts['images']:,} {split} images stand behind {facts['groups']:,} near-equal ones"
        for split, facts in found.items()
    ]
    return [f"Repeats   {', '.join(parts)}: searched and scored once, labelled alike"] * bool(parts)


def _order_subjects(named: Iterable[str]) -> list[str]:
    """The run's recognizers in their order, then ready embedders."""
    found = list(dict.fromkeys(named))
    return [s for s in SUBJECTS if s in found] + [s for s in found if s not in SUBJECTS]


def _tabulate(recognition: Any, gap: Any) -> list[str]:
    table = recognition.pivot_table(
        index=["protocol", "metric"], columns="subject", values="value", sort=False
    )
    if table.index.isin(HEADLINES, level="metric").any():
        table = table[table.index.isin(HEADLINES, level="metric")]
    subjects = _order_subjects(table.columns)
    width = 2 + max(len(" ".join(names)) for names in table.index)
    head = f"{'Recognizer on held-out people':{width}}" + "".join(f"{s:>17}" for s in subjects)
    closed = gap.set_index(["protocol", "metric"]).value if len(gap) else None
    lines = [head + (f"{'gap closed':>12}" if closed is not None else "")]
    for (protocol, metric), row in table.iterrows():
        line = f"{protocol + ' ' + metric:{width}}" + "".join(f"{row[s]:17.3f}" for s in subjects)
        if closed is not None and (protocol, metric) in closed.index:
            share = closed[(protocol, metric)]
            line += f"{share:12.0%}" if share == share else f"{'no gap':>12}"
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------- the page


def _draw_page(work: Work, metrics: Any, verdict: list[Finding]) -> str:
    from pipelines.pages import render_report
    from pipelines.pages.compared_sets import compare_sets

    labels = work.read("propagate.labels").to_pandas()
    clusters = work.read("propagate.clusters").to_pandas()
    scores = ("base_similarity", "probability")
    pairs, table = read_pairs(work.locate("mediate.pairs"), labels.sample_id.to_numpy(), scores)
    probability = table["probability"]
    samples = work.read("ingest.samples").to_pandas()
    base = work.config.committee.base.name
    vectors = read_vectors(work.locate("embed.embeddings", f"unlabelled/{base}"), "embedding")
    mapped, drawn_map = _draw_map(vectors, labels, work.seed)
    return render_report(
        name=work.runtime.config.name,
        dataset=work.dataset.manifest,
        facts={stage: work.input_facts(stage) for stage in work.upstream},
        verdict=verdict,
        costs=_list_costs(work),
        funnel=_count_funnel(work, labels, pairs, probability),
        rejected=work.read("ingest.rejected").to_pandas(),
        issues=work.read("knn.label_issues").to_pandas(),
        figures=_draw_figures(work, labels, clusters, pairs, table)
        | _draw_recognition(work, metrics)
        | drawn_map,
        compared=compare_sets(samples, work.read("ingest.qualities").to_pandas()),
        seen=_show_inputs(work, samples),
        metrics=metrics,
        recognizers=_list_recognizers(metrics),
        sheets=_make_sheets(work, labels, clusters, pairs, probability, vectors, mapped),
    )


def _draw_map(vectors: Any, labels: Any, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """The rows of `labels` on the map, and the map by its name; nothing for very few images."""
    from pipelines.pages.embedding_map import choose_rows, draw_map, place_rows

    label = labels.pseudo_label.to_numpy()
    rows = choose_rows(label, seed)
    places = place_rows(vectors[rows], seed)
    if places is None:
        return rows[:0], {}
    return rows, {"map": draw_map(places, label[rows])}


def _show_inputs(work: Work, samples: Any) -> list[Any]:
    """Faces as each committee member is shown them; empty where the images cannot be read."""
    from pipelines.pages.model_inputs import choose_images, show_inputs

    if work.dataset.kind == "features":
        return []
    try:
        faces = {
            title: work.dataset.read_faces(paths)
            for title, paths in choose_images(samples, work.seed).items()
        }
    except (DataError, OSError):
        return []
    members = [
        (member.name, describe_origin(member), partial(_open_member, work, member))
        for member in work.config.committee.all
        if member.features is None
    ]
    return show_inputs(faces, partial(reduce_to, size_px=work.config.embed.reduce_px), members)


def _open_member(work: Work, member: MemberSettings) -> Any:
    origin = find_origin(work, member)
    if origin is None:
        raise DataError("it has ready features")
    way = read_preprocessing(work, member, origin)
    return open_view(work.dataset, member, origin, work.runtime.device, way)


def _list_costs(work: Work) -> list[dict[str, Any]]:
    """Seconds and peak memory of every stage this run has, as their manifests say."""
    return [
        {
            "stage": stage,
            "seconds": float(work.upstream[stage].manifest.get("seconds", 0)),
            "memory_mib": int(work.upstream[stage].manifest.get("peak_memory_mib", 0)),
        }
        for stage in work.stage.upstream
        if stage in work.upstream
    ]


def _count_funnel(
    work: Work, labels: Any, pairs: PairTable, probability: np.ndarray
) -> list[tuple[str, int, str]]:
    """(step, images, explanation), from all files to pseudo-labels."""
    ingest, cut = work.input_facts("ingest"), _find_cut(work)
    paired = np.zeros(len(labels), bool)
    for part in list_blocks(0, len(pairs), BLOCK):
        above = probability[part] > (0 if cut is None else cut)
        paired[pairs.source[part][above]] = paired[pairs.target[part][above]] = True
    labelled = int((labels.pseudo_label != UNLABELLED).sum())
    return [
        ("images", int(ingest["images"]), "files the data manifest names"),
        ("rejected", int(ingest["rejected"]), "unreadable, too small or repeated"),
        ("labelled", int(ingest["labelled"]), "of known identities, to train on"),
        ("held out", int(ingest["evaluation"]), "of other known identities, to evaluate on"),
        ("unlabelled", len(labels), "to be pseudo-labelled"),
        ("paired", int(paired.sum()), "in a candidate pair above the threshold"),
        ("pseudo-labelled", labelled, "in a cluster of two or more images"),
        ("discarded", len(labels) - labelled, "left without a pseudo-label"),
    ]


def _find_cut(work: Work) -> float | None:
    cut = work.input_facts("propagate").get("threshold")
    return float(cut) if isinstance(cut, int | float) else None


def _draw_figures(
    work: Work, labels: Any, clusters: Any, pairs: PairTable, table: Any
) -> dict[str, Any]:
    """The figures of the page by name; those without data are missing."""
    from cdp.propagation.scored_pairs import mark_inside
    from pipelines.pages import figures

    label, cut = labels.pseudo_label.to_numpy(), _find_cut(work)
    inside = mark_inside(label, pairs.source, pairs.target)
    drawn: dict[str, Any] = {}
    for column, name in (("probability", "probability"), ("base_similarity", "base similarity")):
        score = table[column]
        drawn[column] = figures.draw_scores(
            score[inside], score[~inside], name=name, cut=cut if column == "probability" else None
        )
    if len(clusters):
        drawn["sizes"] = figures.draw_sizes(clusters["size"].to_numpy())
    drawn |= _draw_quality(work, labels)
    calibration = work.read("mediate.calibration").to_pandas()
    if len(calibration):
        drawn["reliability"] = figures.draw_reliability(calibration)
    curve = _sweep_thresholds(work, labels, pairs, table["probability"])
    calibrated = work.input_facts("mediate")["method"] != "vote"
    if len(curve.columns) > 1:
        drawn["thresholds"] = figures.draw_thresholds(curve, cut, odds=calibrated)
    for stage, name in (("train", "the committee"), ("retrain", "the recognizers")):
        if stage in work.upstream:
            history = work.read(f"{stage}.history").to_pandas()
            if len(history):
                drawn[stage] = figures.draw_training(history, name)
    return drawn


def _draw_quality(work: Work, labels: Any) -> dict[str, Any]:
    """Histograms of the quality of the unlabelled faces, by the name of the measure."""
    from pipelines.pages.figures import draw_measure

    measured = work.read("ingest.qualities").to_pandas().set_index("sample_id")
    measured = measured.reindex(labels.sample_id)
    columns = (
        ("quality", labels.quality, "quality", 1.0),
        ("side_px", measured.side_px, "side, px", None),
        ("sharpness", measured.sharpness, "sharpness: variance of the Laplacian at 112 px", None),
        ("yaw", measured.yaw, "yaw, degrees", None),
        ("norm", labels.norm, "norm of the embedding in the base view", None),
    )
    return {
        f"faces_{name}": draw_measure(values.to_numpy(float), title, most)
        for name, values, title, most in columns
        if values.notna().any()
    }


def _draw_recognition(work: Work, metrics: Any) -> dict[str, Any]:
    """Error versus reject, and where the recognizers look; empty without held-out images."""
    from pipelines.pages.looking import draw_looking
    from pipelines.pages.rejection import draw_rejection

    curves = draw_rejection(metrics, [s for s in SUBJECTS if s in set(metrics.subject)])
    drawn: dict[str, Any] = {} if curves is None else {"rejection": curves}
    if work.dataset.kind == "features" or "retrain" not in work.upstream:
        return drawn
    samples = work.read("ingest.samples").to_pandas()
    held_out = samples[samples.split == "evaluation"].path.to_numpy(str)
    folder = work.locate("retrain.history").parent
    subjects = work.input_facts("retrain")["subjects"]
    models = {subject: folder / f"{subject}.safetensors" for subject in subjects[-2:]}
    if len(held_out):
        chosen = np.random.default_rng(work.seed).permutation(len(held_out))[:LOOKED_AT]
        faces = work.dataset.read_faces(held_out[chosen].tolist())
        drawn["looking"] = draw_looking(models, reduce_to(faces, work.config.retrain.input_px))
    return drawn


def _sweep_thresholds(work: Work, labels: Any, pairs: PairTable, probability: np.ndarray) -> Any:
    """Precision and recall at other thresholds: estimated, and by the ground truth if known.

    Estimated as propagate does, and withheld where propagate withholds; constraints of the review
    are left aside.
    """
    import pandas as pd

    from cdp.mediator.pair_voter import choose_first_level
    from cdp.metrics.clustering import score_pairwise
    from cdp.propagation.clustering import sweep_thresholds
    from cdp.propagation.quality import estimate_cuts

    settings = work.config.propagate
    representative = find_rows(labels)
    scored, propagated = work.input_facts("mediate"), work.input_facts("propagate")
    voted = scored["method"] == "vote"
    recall_only = propagated["estimated_precision"] is not None
    known = bool(work.input_facts("ingest")["truth_known"])
    if known:
        truth = work.read("ingest.truth").to_pandas()
        identity = labels.merge(truth, on="sample_id", validate="one_to_one").identity
        truth_label = identity.factorize()[0].astype(np.int64)
    cosine = float(scored.get("cosine", 0))
    levels = [choose_first_level(cosine, level) if voted else level for level in THRESHOLDS]
    cuts = sweep_thresholds(
        pairs,
        probability,
        len(labels),
        levels,
        split=settings.split,
        max_size=settings.max_size,
        step=settings.step,
        calibrated=not voted,
    )
    rows = []
    missed = read_missed(scored)
    estimates = estimate_cuts(cuts, pairs, probability, representative, missed=missed)
    for threshold, label in zip(THRESHOLDS, cuts, strict=True):
        row: dict[str, float | None] = {"threshold": threshold}
        if not voted:  # votes are no probabilities: nothing can be estimated from them
            found = next(estimates).withhold(*propagated["withheld"], recall_only=recall_only)
            row |= {"estimated_precision": found.precision, "estimated_recall": found.recall}
        if known:
            row["true_precision"], row["true_recall"], _ = score_pairwise(truth_label, label)
        rows.append(row)
    return pd.DataFrame(rows).dropna(axis=1, how="all").astype(float)


def _list_recognizers(metrics: Any) -> list[dict[str, Any]]:
    """One row a protocol and metric: each subject's value and interval, and the gap closed."""
    chosen = metrics[metrics.subject != "pseudo_labels"]
    rows = []
    for (protocol, metric), group in chosen.groupby(["protocol", "metric"], sort=False):
        if metric in ("accuracy_std", "accuracy_standard_error"):
            continue
        found = group.set_index("subject")
        row: dict[str, Any] = {"protocol": protocol, "metric": metric, "subjects": {}, "gap": None}
        row["headline"] = metric in HEADLINES
        for subject, values in found.iterrows():
            if subject == "gap_closed":
                row["gap"] = float(values.value)
                continue
            low, high = (float(values.get(end, np.nan)) for end in ("low", "high"))
            row["subjects"][subject] = (float(values.value), low, high)
            row["count"] = int(values["count"])
        rows.append(row)
    return rows


def _make_sheets(
    work: Work,
    labels: Any,
    clusters: Any,
    pairs: PairTable,
    probability: np.ndarray,
    vectors: np.ndarray,
    mapped: np.ndarray,
) -> Any:
    from pipelines.pages.face_sheets import make_sheets

    thumbnails: dict[int, bytes] = {}
    if "thumbnails" in work.upstream and work.dataset.kind != "features":
        table = work.read("thumbnails.thumbnails")
        thumbnails = dict(
            zip(table["sample_id"].to_pylist(), table["image"].to_pylist(), strict=True)
        )
    return make_sheets(
        labels, clusters, pairs, probability, vectors, thumbnails, mapped=mapped, seed=work.seed
    )


STAGE = Stage(
    name="report",
    version=12,
    inputs=(
        "detect.faces",
        "ingest.samples",
        "ingest.rejected",
        "ingest.truth",
        "ingest.qualities",
        "train.history",
        "embed.embeddings",
        "knn.neighbours",
        "knn.label_issues",
        "mediate.pairs",
        "mediate.calibration",
        "propagate.labels",
        "propagate.clusters",
        "retrain.history",
        "evaluate.metrics",
        "thumbnails.thumbnails",
    ),
    outputs={"summary": SUMMARY},
    reads=("name", "committee", "embed", "propagate", "retrain"),
    run=run,
)
