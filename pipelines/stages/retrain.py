"""retrain: labelled + pseudo-labelled faces -> the low-resolution recognizer.

The contract:
- Two subjects with the same settings and seed: `labelled_only`, the baseline, and
  `labelled_pseudo`, the product: one trunk, one head for each of the two disjoint sets of
  identities, losses weighted by each set's share of images. With a teacher there is a third,
  `distilled`: the product, and every image, labelled or not, is trained to follow the teacher's
  vectors, `blends` of two or three images included. `student` holds its other settings.
- With `adapt` there is one more, `adapted`: the last of these, fitted to the unlabelled images, of
  which neither labels nor pseudo-labels are read for it.
- An identity may be split over two clusters. Where two images of different classes match with more
  than `mask_negatives_above`, each masks the other's class.
- Images without a pseudo-label, and those of clusters smaller than `min_cluster_size`, are left out
  of the heads, or with `leftovers: alone` each becomes a class.
- With `same_person: merge` the images of a cluster that matches a labelled identity join that
  identity; the table `matches` lists these clusters.
- Images that a reviewer named (`name`), and the rest of their clusters, are labelled ones here.
- Truth about unlabelled images is never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdp.errors import DataError
from cdp.types import UNLABELLED
from pipelines.decisions import APPLIED_BY
from pipelines.files import open_atomically
from pipelines.stage import Stage, Work
from pipelines.training.sets import (
    LabelledSet,
    TeacherVectors,
    TrainingJob,
    describe_job,
    name_clusters,
    select_clusters,
    select_labelled,
)
from pipelines.training.teacher import embed_blends, embed_images, find_teacher
from pipelines.training.trained import (
    HISTORY,
    copy_curves,
    copy_model,
    load_faces,
    read_history,
    train_once,
)

MATCHES = pa.schema(
    [
        ("pseudo_label", pa.int64()),
        ("identity", pa.string()),
        ("similarity", pa.float32()),
        ("threshold", pa.float32()),
    ]
)

ONE_PERSON = (
    "one labelled person is no training set (at least 2 are needed): the recognizer was trained on "
    "pseudo-labels alone"
)


def run(work: Work) -> Mapping[str, Any]:
    samples = work.read("ingest.samples").to_pandas()
    labels = work.read("propagate.labels").to_pandas()
    given = samples.split == "labelled"
    if work.decisions:
        samples = name_clusters(samples, labels.set_index("sample_id").pseudo_label, work.decisions)
    named = (samples.split == "labelled") & ~given & samples.copy_of.isna()
    samples = samples[(samples.split != "evaluation") & samples.copy_of.isna()]
    settings = work.config.retrain
    unlabelled = samples[samples.split == "unlabelled"]
    unlabelled = unlabelled.merge(labels.drop(columns="path"), on="sample_id")
    people = samples[samples.split == "labelled"].identity.nunique()
    labelled = select_labelled(work, samples=samples) if people >= 2 else None
    jobs = {}
    if labelled is not None:
        jobs["labelled_only"] = describe_job(work, "labelled_only", labelled, None)
    if labelled is not None and settings.same_person == "merge":
        labelled, unlabelled = _merge_identities(work, samples, labelled, unlabelled)
    else:
        work.write("matches", MATCHES.empty_table())
    pseudo = select_clusters(
        unlabelled,
        "pseudo_label",
        settings.min_cluster_size,
        weigh=settings.weigh_by_confidence,
        soft=_read_soft(work) if settings.targets == "soft" else None,
        alone=settings.leftovers == "alone",
        pairs=_read_pairs(work),
    )
    if pseudo is not None:
        jobs["labelled_pseudo"] = describe_job(work, "labelled_pseudo", labelled, pseudo)
    if settings.teacher is not None:
        jobs["distilled"] = _describe_distilled(work, samples, labelled, unlabelled, pseudo)
    if not jobs:
        raise DataError(
            "there is neither a labelled image nor a pseudo-label to train on. Lower "
            "propagate.threshold or retrain.min_cluster_size"
        )
    histories = []
    for subject, job in jobs.items():
        directory = train_once(work, job)
        copy_model(work, directory, subject)
        copy_curves(work, directory, subject)
        histories.append(read_history(directory, subject))
    work.write("history", pa.concat_tables(histories))
    subjects = list(jobs)
    if settings.adapt is not None:
        subjects.append(_adapt(work, subjects[-1], jobs[subjects[-1]], labelled, unlabelled))
    size = np.bincount(pseudo.label) if pseudo else np.empty(0, np.int64)
    leftovers = int((size == 1).sum()) if settings.leftovers == "alone" else 0
    return {
        "subjects": subjects,
        "labelled": len(labelled.paths) if labelled else 0,
        "pseudo_labelled": int(size.sum()) - leftovers,
        "pseudo_identities": len(size) - leftovers,
        "leftovers": leftovers,
        **({"named": int(named.sum())} if named.any() else {}),
        **({"warnings": [ONE_PERSON]} if people == 1 else {}),
    }


def _read_pairs(work: Work) -> Any:
    """Pairs that mask each other's class, (source, target); None where nothing is masked."""
    threshold = work.config.retrain.mask_negatives_above
    if threshold == 1:
        return None
    pairs = work.read("mediate.pairs", columns=["source", "target", "probability"])
    return pairs.filter(pc.field("probability") > threshold).to_pandas()


def _read_soft(work: Work) -> Any:
    """The soft pseudo-labels: sample_id, pseudo_label, weight."""
    if not work.locate("propagate.soft_labels").exists():
        raise DataError(
            "retrain.targets=soft needs the table propagate/soft_labels, which this run has not "
            "published. Run --stage propagate again, or set retrain.targets=hard"
        )
    return work.read("propagate.soft_labels").to_pandas()


def _merge_identities(
    work: Work, samples: Any, labelled: LabelledSet, unlabelled: Any
) -> tuple[LabelledSet, Any]:
    """Move the images of clusters that match a labelled identity to it, and publish the matches."""
    from cdp.recognizer.identity_matching import match_identities

    settings = work.config.retrain
    matcher = find_teacher(work, settings.teacher or work.config.committee.base.name,
                           settings.teacher_px)  # fmt: skip
    unlabelled_set = LabelledSet(
        tuple(unlabelled.path), tuple(unlabelled.sha256), unlabelled.pseudo_label.to_numpy()
    )
    names = samples[samples.split == "labelled"].identity.factorize(sort=True)[1]
    vectors = embed_images(work, matcher, samples)
    match = match_identities(
        vectors.take(labelled.sha256),
        labelled.label,
        vectors.take(unlabelled_set.sha256),
        unlabelled_set.label,
        far=settings.merge_far,
        unseen=_find_unseen(work, labelled, names),
    )
    merged = np.flatnonzero(match.identity != UNLABELLED)
    work.write(
        "matches",
        {
            "pseudo_label": merged,
            "identity": [names[identity] for identity in match.identity[merged]],
            "similarity": match.similarity[merged],
            "threshold": np.full(len(merged), match.threshold),
        },
    )
    label = unlabelled_set.label
    moved = (label != UNLABELLED) & np.isin(label, merged)
    grown = LabelledSet(
        labelled.paths + tuple(unlabelled.path[moved]),
        labelled.sha256 + tuple(unlabelled.sha256[moved]),
        np.concatenate([labelled.label, match.identity[label[moved]]]),
    )
    return grown, unlabelled[~moved]


def _find_unseen(work: Work, labelled: LabelledSet, names: Any) -> np.ndarray | None:
    """Images of the identities no member was trained on; None when there are none."""
    if "train" not in work.upstream:
        return None
    people = work.read("train.people").to_pandas()
    kept = set(people[people.role == "mediator"].identity)
    unseen = np.array([name in kept for name in names])[labelled.label]
    return unseen if unseen.any() else None


def _describe_distilled(
    work: Work,
    samples: Any,
    labelled: LabelledSet | None,
    unlabelled: Any,
    pseudo: LabelledSet | None,
) -> TrainingJob:
    """The job of the subject `distilled`: pseudo-labels where known, teacher vectors everywhere."""
    settings = work.config.retrain.describe_student()
    teacher = find_teacher(work, str(settings.teacher), settings.teacher_px)
    with_class = set(pseudo.sha256) if pseudo else set()
    rest = unlabelled[~unlabelled.sha256.isin(with_class)]
    unlabelled_set = LabelledSet(
        (pseudo.paths if pseudo else ()) + tuple(rest.path),
        (pseudo.sha256 if pseudo else ()) + tuple(rest.sha256),
        np.concatenate(
            [pseudo.label if pseudo else np.empty(0, np.int64), np.full(len(rest), UNLABELLED)]
        ),
        None
        if pseudo is None or pseudo.weight is None
        else np.concatenate([pseudo.weight, np.ones(len(rest), np.float32)]),
        None if pseudo is None else pseudo.soft,
        None if pseudo is None else pseudo.masked_negatives,
    )
    found = embed_images(work, teacher, samples)
    blends = None
    if settings.blends:
        blends = embed_blends(work, teacher, samples, settings.blends, 2 * settings.input_px)
    vectors = TeacherVectors(
        f"{teacher.digest} {teacher.size_px} {settings.blends}",
        None if labelled is None else found.take(labelled.sha256),
        found.take(unlabelled_set.sha256),
        settings.distil_weight,
        settings.class_weight,
        blends,
    )
    return describe_job(work, "distilled", labelled, unlabelled_set, vectors, settings)


def _adapt(
    work: Work, subject: str, job: TrainingJob, labelled: LabelledSet | None, unlabelled: Any
) -> str:
    """Fit a trained recognizer to the unlabelled images, and write it as `adapted`."""
    from cdp.adaptation import AdaptationPlan, adapt_encoder, adapt_moments
    from cdp.images.degradation import get_degradation
    from cdp.recognizer.recognizer import Recognizer

    recognizer = Recognizer.load(work.directory / f"{subject}.safetensors", device="cpu")
    rows = LabelledSet(
        tuple(unlabelled.path), tuple(unlabelled.sha256), np.zeros(len(unlabelled), np.int64)
    )
    faces = load_faces(work, rows, job.settings.input_px)
    if work.config.retrain.adapt == "moments":
        adapt_moments(recognizer.backbone, faces, device=work.runtime.device)
    else:
        sharp = faces if labelled is None else load_faces(work, labelled, job.settings.input_px)
        plan = AdaptationPlan(degradation=get_degradation(job.settings.degradation), seed=work.seed)
        device = work.runtime.device
        backbone, _ = adapt_encoder(recognizer.backbone, sharp, faces, plan, device=device)
        recognizer = Recognizer(backbone, recognizer.meta, device="cpu")
    with open_atomically(work.directory / "adapted.safetensors") as path:
        recognizer.save(path)
    return "adapted"


STAGE = Stage(
    name="retrain",
    version=9,
    inputs=(
        "ingest.samples",
        "train.history",
        "train.people",
        "propagate.labels",
        "propagate.soft_labels",
        "mediate.pairs",
    ),
    outputs={"history": HISTORY, "matches": MATCHES},
    reads=("committee", "retrain"),
    run=run,
    needs_images=True,
    corrected=APPLIED_BY["retrain"],
)
