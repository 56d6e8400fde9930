"""Trained models on disk: each is trained once and found again by its key.

The contract:
- A model lies under a key of all that determines it (architecture, settings, seed, the pixels and
  labels it is trained on, the version of the training code), so a member added to the committee or
  a changed threshold trains nothing again that exists.
- A checkpoint is written after every epoch; a training that was killed goes on from the last one
  and ends with the same weights.
- Weights are safetensors; the file's header holds the architecture.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.config import TrainingSettings
from pipelines.data.dataset import Dataset
from pipelines.files import digest_json, drop_drafts, open_atomically, reserve_array, write_text
from pipelines.members import reduce_to
from pipelines.stage import Work
from pipelines.tables import write_table
from pipelines.training.curves import write_curves
from pipelines.training.request import TrainingRequest, train_requested
from pipelines.training.sets import LabelledSet, TrainingJob
from pipelines.training.team import share_training

if TYPE_CHECKING:
    from cdp.recognizer.fit import FaceSet

log = logging.getLogger("cdp")

TRAINING_VERSION = 3
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
    key = _digest_job(work, job)
    directory = store.model_directory(key)

    def report_waiting(holder: str) -> None:
        log.info("          waiting for %s, which is training the same model", holder)

    with store.lock(f"model/{key[:20]}", wait=True, waiting=report_waiting):
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


def _digest_job(work: Work, job: TrainingJob) -> str:
    """The key of a model: all that determines its weights."""
    teacher = job.teacher
    return digest_json(
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
            "teacher": teacher and [teacher.digest, teacher.distil_weight, teacher.class_weight],
            **({"pretrained": job.pretrained.describe()} if job.pretrained else {}),
        }
    )


def copy_model(work: Work, directory: Path, name: str) -> Path:
    """Link a model into the stage's folder under `name`, or copy it where links are impossible."""
    target = work.directory / f"{name}.safetensors"
    with open_atomically(target) as draft:
        try:
            os.link(directory / "weights.safetensors", draft)
        except OSError:
            shutil.copyfile(directory / "weights.safetensors", draft)
    return target


def copy_curves(work: Work, directory: Path, name: str) -> None:
    """Copy a model's curves to where `tensorboard --logdir runs/<run>` lists them by name."""
    target = work.directory / CURVES / name
    shutil.rmtree(target, ignore_errors=True)
    if (directory / CURVES).is_dir():
        shutil.copytree(directory / CURVES, target)


def read_history(directory: Path, name: str) -> pa.Table:
    """The training history of one model, with `name` in the column `model`."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "history.parquet", schema=HISTORY)
    return table.set_column(0, "model", pa.array([name] * len(table), pa.string()))


def _train(work: Work, job: TrainingJob, draft: Path) -> None:
    from safetensors.torch import save_file

    from cdp.training.plan import HISTORY as COLUMNS

    checkpoint = draft / CHECKPOINT

    def keep(state: dict[str, Any]) -> None:
        with open_atomically(checkpoint) as path:
            save_file(state, path)
        history = [dict(zip(COLUMNS, row, strict=True)) for row in state["history"].tolist()]
        write_curves(draft / CURVES, history)

    teacher = job.teacher
    request = TrainingRequest(
        name=f"{work.stage.name} {job.name}",
        backbone=job.backbone,
        width=job.width,
        settings=job.settings.model_dump(include=set(TrainingSettings.model_fields)),
        seed=job.seed,
        pseudo_share=job.pseudo_share,
        distil_weight=0.0 if teacher is None else teacher.distil_weight,
        class_weight=1.0 if teacher is None else teacher.class_weight,
        checkpoint=str(checkpoint.resolve()) if checkpoint.exists() else None,
        pretrained=None if job.pretrained is None else job.pretrained.pack(),
    )
    face_sets = _load_face_sets(work, job)
    share_training(work.scratch, request, face_sets)
    model, history = train_requested(request, face_sets, work.runtime.device, keep)
    with open_atomically(draft / "weights.safetensors") as path:
        model.save(path)
    columns = {name: [row[name] for row in history] for name in HISTORY.names if name != "model"}
    write_table(draft / "history.parquet", {"model": [job.name] * len(history), **columns}, HISTORY)
    write_text(draft / WHOLE, "")


def _load_face_sets(work: Work, job: TrainingJob) -> dict[str, FaceSet]:
    """The face sets of a job by their role in `train_recognizer`; absent sets are missing."""
    from cdp.recognizer.fit import FaceSet

    found = {}
    teacher = job.teacher
    for role, each, vectors in (
        ("labelled", job.labelled, None if teacher is None else teacher.labelled),
        ("pseudo", job.pseudo, None if teacher is None else teacher.pseudo),
    ):
        if each is not None:
            found[role] = FaceSet(
                load_faces(work, each, job.settings.input_px),
                each.label,
                each.weight,
                each.soft,
                each.masked_negatives,
                vectors,
            )
    if teacher is not None and teacher.extra is not None:
        faces, vectors = teacher.extra
        found["extra"] = FaceSet(faces, teacher=vectors)
    return found


def load_faces(work: Work, each: LabelledSet, input_px: int) -> np.ndarray:
    """The faces of a set, mapped from a scratch file that the workers fill; read once a stage.

    They are stored at twice the network's side, which is all that a degradation reads.
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
