"""Trained models on disk: each is trained once, whoever asks for it.

The contract:
- A model lies under a key of all that determines it (architecture, settings, seed, the pixels and
  labels it is trained on, the version of the training code), so a member added to the committee or
  a changed threshold trains nothing again that exists.
- A checkpoint follows every epoch; training that was killed goes on from the last one and ends
  with the same weights.
- Weights are safetensors; the architecture stands in the file's header.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import TrainingSettings
from pipelines.data.dataset import Dataset
from pipelines.files import digest_json, drop_drafts, open_atomically, reserve_array, write_text
from pipelines.members import reduce_to
from pipelines.stage import Work
from pipelines.tables import write_table
from pipelines.training.request import TrainingRequest, train_arrays
from pipelines.training.sets import LabelledSet, TrainingJob

log = logging.getLogger("cdp")

TRAINING_VERSION = 2
"""Raised when a change of the training code changes its weights."""

HISTORY = pa.schema(
    [
        ("model", pa.string()),
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("accuracy", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
PART_SIZE = 1000
CHECKPOINT, CURVES, WHOLE = "checkpoint.safetensors", "curves", "whole"


def train_once(work: Work, job: TrainingJob) -> Path:
    """Train the model, or find it trained; return its directory."""
    store = work.runtime.store
    key = digest_json(
        {
            "version": TRAINING_VERSION,
            "backbone": job.backbone,
            "width": job.width,
            "settings": {
                name: getattr(job.settings, name) for name in TrainingSettings.model_fields
            },
            "seed": job.seed,
            "source_px": work.dataset.manifest.size_px,
            "labelled": job.labelled and job.labelled.digest(),
            "pseudo": job.pseudo and job.pseudo.digest(),
            "pseudo_share": job.pseudo_share,
            "teacher": job.teacher
            and [job.teacher.digest, job.teacher.weight, job.teacher.class_weight],
        }
    )
    directory = store.model_directory(key)

    def tell(holder: str) -> None:
        log.info("          waiting for %s, which is training the same model", holder)

    with store.lock(f"model/{key[:20]}", wait=True, waiting=tell):
        if directory.is_dir() and work.fresh:
            shutil.rmtree(directory)
        if not directory.is_dir():
            draft = directory.with_name(directory.name + ".partial")
            if work.fresh:
                shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True, exist_ok=True)
            drop_drafts(draft)
            if not (draft / WHOLE).exists():
                _train(work, job, draft)
            draft.rename(directory)
            (directory / CHECKPOINT).unlink(missing_ok=True)
    return directory


def copy_model(work: Work, directory: Path, name: str) -> Path:
    """Give the stage its own name for a model; the bytes are shared where links are possible."""
    target = work.directory / f"{name}.safetensors"
    with open_atomically(target) as draft:
        try:
            os.link(directory / "weights.safetensors", draft)
        except OSError:
            shutil.copyfile(directory / "weights.safetensors", draft)
    return target


def copy_curves(work: Work, directory: Path, name: str) -> None:
    """Put a model's curves where `tensorboard --logdir runs/<run>` finds them under its name."""
    target = work.directory / CURVES / name
    shutil.rmtree(target, ignore_errors=True)
    if (directory / CURVES).is_dir():
        shutil.copytree(directory / CURVES, target)


def read_history(directory: Path, name: str) -> pa.Table:
    """The training history of one model, under the name its stage gives it."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "history.parquet", schema=HISTORY)
    return table.set_column(0, "model", pa.array([name] * len(table), pa.string()))


def _train(work: Work, job: TrainingJob, draft: Path) -> None:
    from safetensors.torch import save_file

    from cdp.training.plan import HISTORY as COLUMNS
    from pipelines.training.curves import write_curves
    from pipelines.training.team import share_training

    checkpoint = draft / CHECKPOINT

    def keep(state: dict[str, Any]) -> None:
        with open_atomically(checkpoint) as path:
            save_file(state, path)
        history = [dict(zip(COLUMNS, row, strict=True)) for row in state["history"].tolist()]
        write_curves(draft / CURVES, history)

    request = TrainingRequest(
        name=f"{work.stage.name} {job.name}",
        backbone=job.backbone,
        width=job.width,
        settings=job.settings.model_dump(include=set(TrainingSettings.model_fields)),
        seed=job.seed,
        pseudo_share=job.pseudo_share,
        distil_weight=0.0 if job.teacher is None else job.teacher.weight,
        class_weight=1.0 if job.teacher is None else job.teacher.class_weight,
        checkpoint=str(checkpoint.resolve()) if checkpoint.exists() else None,
    )
    arrays = _collect_arrays(work, job)
    share_training(work.scratch, request, arrays)
    model, history = train_arrays(request, arrays, work.runtime.device, keep)
    with open_atomically(draft / "weights.safetensors") as path:
        model.save(path)
    columns = {name: [row[name] for row in history] for name in HISTORY.names if name != "model"}
    write_table(draft / "history.parquet", {"model": [job.name] * len(history), **columns}, HISTORY)
    write_text(draft / WHOLE, "")


def _collect_arrays(work: Work, job: TrainingJob) -> dict[str, np.ndarray]:
    """What is trained on, by the names `train_arrays` knows; what there is none of is missing."""
    arrays: dict[str, np.ndarray | None] = {}
    for prefix, each in (("", job.labelled), ("pseudo_", job.pseudo)):
        if each is not None:
            arrays[f"{prefix}images"] = _load_faces(work, each, job.settings.input_px)
            arrays[f"{prefix}label"] = each.label
    if job.pseudo is not None:
        arrays["confidence"] = job.pseudo.weight
        if job.pseudo.soft is not None:
            soft = job.pseudo.soft
            arrays |= {"soft_row": soft.row, "soft_label": soft.label, "soft_weight": soft.weight}
        if job.pseudo.masked is not None:
            masked = job.pseudo.masked
            arrays |= {"masked_row": masked.row, "masked_label": masked.label}
    if job.teacher is not None:
        arrays |= {"teacher": job.teacher.labelled, "pseudo_teacher": job.teacher.pseudo}
        if job.teacher.more is not None:
            arrays |= dict(zip(("more_images", "more_teacher"), job.teacher.more, strict=True))
    return {name: values for name, values in arrays.items() if values is not None}


def _load_faces(work: Work, each: LabelledSet, input_px: int) -> np.ndarray:
    """The faces of a set, mapped from a scratch file that the workers fill; read once a stage.

    They are stored at twice the side the network sees: all that a degradation looks at.
    """
    size_px = min(work.dataset.manifest.size_px, 2 * input_px)
    name = hashlib.sha256("\n".join(each.sha256).encode()).hexdigest()[:20]
    path = work.scratch / f"faces-{name}-{size_px}.npy"
    if not path.exists():
        draft = path.with_suffix(".draft")
        shape = (len(each.paths), size_px, size_px, 3)
        reserve_array(draft, np.uint8, shape)
        parts = [
            (work.dataset, draft, row, each.paths[row : row + PART_SIZE])
            for row in range(0, len(each.paths), PART_SIZE)
        ]
        for _ in work.engine.map(read_faces_part, parts, label=f"{work.stage.name} reads faces"):
            pass
        draft.rename(path)
    return np.load(path, mmap_mode="r")


def read_faces_part(dataset: Dataset, target: Path, row: int, paths: tuple[str, ...]) -> None:
    """Read some faces into their place in a mapped file, reduced to its side."""
    faces = np.load(target, mmap_mode="r+")
    faces[row : row + len(paths)] = reduce_to(dataset.read_faces(paths), faces.shape[1])
    faces.flush()
