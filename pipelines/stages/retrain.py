"""retrain: labelled + pseudo-labelled faces -> the low-resolution recognizer.

The contract:
- Two subjects with the same settings and seed: `labelled_only`, the yardstick to beat, and
  `labelled_pseudo`, the product: one trunk, one head for each of the two disjoint sets of people,
  losses weighted by each set's share of images.
- Images without a pseudo-label, and clusters smaller than `min_cluster_size`, are left out.
- Truth about unlabelled images is never read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from pipelines.models import (
    HISTORY,
    LabelledSet,
    TrainingJob,
    copy_model,
    read_history,
    train_once,
)
from pipelines.stage import Stage, Work
from pipelines.stages.train import select_labelled


def run(work: Work) -> Mapping[str, Any]:
    samples = work.read("ingest.samples").to_pandas()
    labels = work.read("propagate.labels").to_pandas()
    settings = work.config.retrain
    labelled = select_labelled(work) if (samples.split == "labelled").any() else None
    pseudo = select_clusters(
        samples.merge(labels.drop(columns="path"), on="sample_id"),
        "pseudo_label",
        settings.min_cluster_size,
        weigh=settings.weigh_by_confidence,
    )
    jobs = {}
    if labelled is not None:
        jobs["labelled_only"] = describe_job(work, "labelled_only", labelled, None)
    if pseudo is not None:
        jobs["labelled_pseudo"] = describe_job(work, "labelled_pseudo", labelled, pseudo)
    if not jobs:
        raise DataError(
            "there is neither a labelled image nor a pseudo-label to train on. Lower "
            "propagate.threshold or retrain.min_cluster_size"
        )
    histories = []
    for subject, job in jobs.items():
        directory = train_once(work, job)
        copy_model(work, directory, subject)
        histories.append(read_history(directory, subject))
    work.write("history", pa.concat_tables(histories))
    return {
        "subjects": list(jobs),
        "labelled": len(labelled.paths) if labelled else 0,
        "pseudo_labelled": len(pseudo.paths) if pseudo else 0,
        "pseudo_identities": int(pseudo.label.max()) + 1 if pseudo else 0,
    }


def describe_job(
    work: Work, subject: str, labelled: LabelledSet | None, pseudo: LabelledSet | None
) -> TrainingJob:
    """The recognizer trained on these sets, with the settings every subject shares."""
    settings = work.config.retrain
    return TrainingJob(
        subject, settings.backbone, settings.width, settings, labelled, pseudo, work.seed
    )


def select_clusters(samples: Any, column: str, min_size: int, *, weigh: bool) -> LabelledSet | None:
    """Samples of classes with at least `min_size` images; None when there are fewer than two."""
    from cdp.recognizer import select_classes

    classes = samples[column].to_numpy()
    if classes.dtype.kind not in "iu":
        classes = samples[column].factorize(sort=True)[0]
    rows, label = select_classes(classes, min_size=min_size)
    if len(np.unique(label)) < 2:
        return None
    chosen = samples.iloc[rows]
    weight = chosen.confidence.to_numpy(np.float32) if weigh else None
    return LabelledSet(tuple(chosen.path), tuple(chosen.sha256), label, weight)


STAGE = Stage(
    name="retrain",
    version=1,
    inputs=("ingest.samples", "propagate.labels"),
    outputs={"history": HISTORY},
    reads=("retrain",),
    run=run,
    needs_images=True,
)
