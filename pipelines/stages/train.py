"""train: labelled samples -> the committee members that have a backbone.

The contract:
- Members that are ONNX files or checkpoints are left as they are. Each trained member lies beside
  the history as `<member>.safetensors`.
- Member i is seeded by the run's seed plus i, so equal architectures still differ.
- A model separates identities it was trained on better than new ones. So the committee is not
  trained on `mediator_share` of the labelled identities, which the mediator is fitted on: the table
  `people` gives the role of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.stage import Stage, Work
from pipelines.training.sets import TrainingJob, draw_for_mediator, select_labelled
from pipelines.training.trained import HISTORY, copy_curves, copy_model, read_history, train_once

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
    """Draw the labelled identities no member is trained on, and publish the role of each."""
    samples = work.read("ingest.samples", columns=["split", "identity"]).to_pandas()
    names = np.sort(samples[samples.split == "labelled"].identity.unique())
    share = work.config.train.mediator_share if trains else 1.0
    kept = draw_for_mediator(names, share, work.seed)
    roles = ["mediator" if name in kept else "committee" for name in names]
    work.write("people", {"identity": names, "role": roles})
    return kept


STAGE = Stage(
    name="train",
    version=2,
    inputs=("ingest.samples",),
    outputs={"history": HISTORY, "people": PEOPLE},
    reads=("committee", "train"),
    run=run,
    needs_images=True,
)
