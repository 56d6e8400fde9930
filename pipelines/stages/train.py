"""train: labelled samples -> the base and the committee members that are trained here.

The contract:
- Members that are ONNX files or checkpoints are not touched. Each trained member lies beside the
  history as `<member>.safetensors`.
- Member i is seeded by the run's seed plus i, so equal architectures still differ.
- A model is surer of people it was trained on than of strangers. `mediator_share` of the labelled
  people are therefore kept from the committee: `people` says who is whose.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from pipelines.models import (
    HISTORY,
    LabelledSet,
    TrainingJob,
    copy_curves,
    copy_model,
    read_history,
    train_once,
)
from pipelines.stage import Stage, Work

PEOPLE = pa.schema([("identity", pa.string()), ("role", pa.string())])


def run(work: Work) -> Mapping[str, Any]:
    members = [
        (number, member)
        for number, member in enumerate(work.config.committee.all)
        if member.backbone is not None
    ]
    kept = _keep_for_mediator(work, bool(members))
    if not members:
        work.write("history", HISTORY.empty_table())
        return {"models": 0, "kept_for_mediator": len(kept)}
    labelled = select_labelled(work, without=kept)
    histories = []
    for number, member in members:
        job = TrainingJob(
            name=member.name,
            backbone=str(member.backbone),
            width=member.width,
            settings=work.config.train,
            labelled=labelled,
            pseudo=None,
            seed=work.seed + number,
        )
        directory = train_once(work, job)
        copy_model(work, directory, member.name)
        copy_curves(work, directory, member.name)
        histories.append(read_history(directory, member.name))
    history = pa.concat_tables(histories)
    work.write("history", history)
    last = {row["model"]: row["accuracy"] for row in history.to_pylist()}
    return {
        "models": len(members),
        "images": len(labelled.paths),
        "people": int(labelled.label.max()) + 1,
        "kept_for_mediator": len(kept),
        "accuracy": {name: round(value, 4) for name, value in last.items()},
    }


def _keep_for_mediator(work: Work, trains: bool) -> set[str]:
    """Draw the labelled people no member is trained on, and publish who is whose."""
    samples = work.read("ingest.samples", columns=["split", "identity"]).to_pandas()
    names = np.sort(samples[samples.split == "labelled"].identity.unique())
    share = work.config.train.mediator_share if trains else 1.0
    order = np.random.default_rng(work.seed).permutation(len(names))
    kept = set(names[order[: round(share * len(names))]])
    roles = ["mediator" if name in kept else "committee" for name in names]
    work.write("people", {"identity": names, "role": roles})
    return kept


def select_labelled(work: Work, without: Collection[str] = ()) -> LabelledSet:
    """The labelled samples but those of some people, people numbered in order of name."""
    samples = work.read("ingest.samples").to_pandas()
    labelled = samples[(samples.split == "labelled") & ~samples.identity.isin(list(without))]
    people = labelled.identity.nunique()
    if people < 2:
        raise DataError(
            f"training needs labelled images of at least 2 people, the data set has {people}. "
            "Add labelled images, or give the committee ONNX files or checkpoints only and vote: "
            "mediate.method=vote"
        )
    label = labelled.identity.factorize(sort=True)[0].astype(np.int64)
    return LabelledSet(tuple(labelled.path), tuple(labelled.sha256), label)


STAGE = Stage(
    name="train",
    version=2,
    inputs=("ingest.samples",),
    outputs={"history": HISTORY, "people": PEOPLE},
    reads=("committee", "train"),
    run=run,
    needs_images=True,
)
