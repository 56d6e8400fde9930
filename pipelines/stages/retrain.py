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
from cdp.types import UNLABELLED
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
    sets: dict[str, tuple[LabelledSet, ...]] = {}
    has_labels = bool((samples.split == "labelled").any())
    labelled = (select_labelled(work),) if has_labels else ()
    if labelled:
        sets["labelled_only"] = labelled
    pseudo = select_clusters(
        samples.merge(labels.drop(columns="path"), on="sample_id"),
        "pseudo_label",
        settings.min_cluster_size,
        weigh=settings.weigh_by_confidence,
    )
    if pseudo is not None:
        sets["labelled_pseudo"] = (*labelled, pseudo)
    if not sets:
        raise DataError(
            "there is neither a labelled image nor a pseudo-label to train on. Lower "
            "propagate.threshold or retrain.min_cluster_size"
        )
    histories = []
    for subject, chosen in sets.items():
        directory = train_once(work, describe_job(work, subject, chosen))
        copy_model(work, directory, subject)
        histories.append(read_history(directory, subject))
    work.write("history", pa.concat_tables(histories))
    return {
        "subjects": list(sets),
        "labelled": len(labelled[0].paths) if labelled else 0,
        "pseudo_labelled": len(pseudo.paths) if pseudo else 0,
        "pseudo_identities": int(pseudo.label.max()) + 1 if pseudo else 0,
    }


def describe_job(work: Work, subject: str, sets: tuple[LabelledSet, ...]) -> TrainingJob:
    """The recognizer trained on these sets, with the settings every subject shares."""
    settings = work.config.retrain
    return TrainingJob(subject, settings.backbone, settings.width, settings, sets, work.seed)


def select_clusters(
    samples: Any, column: str, min_size: int, *, weigh: bool
) -> LabelledSet | None:
    """Samples of classes with at least `min_size` images, classes numbered anew; None if none."""
    label = samples[column]
    size = label.map(label.value_counts())
    chosen = samples[(size >= min_size) & (label != UNLABELLED)]
    if chosen[column].nunique() < 2:
        return None
    weight = None
    if weigh:
        weight = chosen.confidence.to_numpy(np.float32)
    renumbered = chosen[column].factorize(sort=True)[0].astype(np.int64)
    return LabelledSet(tuple(chosen.path), tuple(chosen.sha256), renumbered, weight)


STAGE = Stage(
    name="retrain",
    version=1,
    inputs=("ingest.samples", "propagate.labels"),
    outputs={"history": HISTORY},
    reads=("retrain",),
    run=run,
    needs_images=True,
)
