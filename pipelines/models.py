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
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import TrainingSettings
from pipelines.dataset import Dataset
from pipelines.stage import Work
from pipelines.store import digest_json, open_atomically, write_table, write_text

log = logging.getLogger("cdp")

TRAINING_VERSION = 1
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
CHECKPOINT, WHOLE = "checkpoint.safetensors", "whole"


@dataclass(frozen=True)
class LabelledSet:
    """Samples with classes: what one head is trained on.

    paths, sha256 : (n,) what to read, and its content.
    label : (n,) int64, 0 .. classes - 1.
    weight : (n,) float32 per image, or None for all equal.
    """

    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    label: np.ndarray
    weight: np.ndarray | None = None

    def digest(self) -> str:
        """Over content, labels and weights, in order."""
        total = hashlib.sha256("\n".join(self.sha256).encode())
        total.update(np.ascontiguousarray(self.label, np.int64).tobytes())
        if self.weight is not None:
            total.update(np.ascontiguousarray(self.weight, np.float32).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingJob:
    """One model to be had: an architecture, and what its one or two heads are trained on."""

    name: str
    backbone: str
    width: float
    settings: TrainingSettings
    labelled: LabelledSet | None
    pseudo: LabelledSet | None
    seed: int


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


def read_history(directory: Path, name: str) -> pa.Table:
    """The training history of one model, under the name its stage gives it."""
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "history.parquet", schema=HISTORY)
    return table.set_column(0, "model", pa.array([name] * len(table), pa.string()))


def _train(work: Work, job: TrainingJob, draft: Path) -> None:
    from safetensors.torch import load_file, save_file

    from cdp.images.degradation import get_degradation
    from cdp.recognizer import train_recognizer
    from cdp.training import TrainingPlan

    settings, labelled, pseudo = job.settings, job.labelled, job.pseudo
    plan = TrainingPlan(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_epochs=settings.warmup_epochs,
        margin_warmup_epochs=settings.margin_warmup_epochs,
        gradient_clip=settings.gradient_clip,
        ema_decay=settings.ema_decay,
        degradation=get_degradation(settings.degradation),
        seed=job.seed,
    )
    checkpoint = draft / CHECKPOINT

    def keep(state: dict[str, Any]) -> None:
        with open_atomically(checkpoint) as path:
            save_file(state, path)

    model, history = train_recognizer(
        None if labelled is None else _load_faces(work, labelled),
        None if labelled is None else labelled.label,
        None if pseudo is None else _load_faces(work, pseudo),
        None if pseudo is None else pseudo.label,
        confidence=None if pseudo is None else pseudo.weight,
        plan=plan,
        min_size=1,
        backbone=job.backbone,
        width=job.width,
        input_px=settings.input_px,
        embedding_dim=settings.embedding_dim,
        head=settings.head,
        head_params=settings.head_options,
        device=work.runtime.device,
        resume=load_file(checkpoint) if checkpoint.exists() else None,
        on_epoch=keep,
        description=f"{work.stage.name} {job.name}",
    )
    with open_atomically(draft / "weights.safetensors") as path:
        model.save(path)
    columns = {name: [row[name] for row in history] for name in HISTORY.names if name != "model"}
    write_table(draft / "history.parquet", {"model": [job.name] * len(history), **columns}, HISTORY)
    write_text(draft / WHOLE, "")


def _load_faces(work: Work, each: LabelledSet) -> np.ndarray:
    """The faces of a set, mapped from a scratch file that the workers fill; read once a stage."""
    name = hashlib.sha256("\n".join(each.sha256).encode()).hexdigest()[:20]
    path = work.scratch / f"faces-{name}.npy"
    if not path.exists():
        size_px = work.dataset.manifest.size_px
        draft = path.with_suffix(".draft")
        shape = (len(each.paths), size_px, size_px, 3)
        np.lib.format.open_memmap(draft, "w+", np.uint8, shape).flush()
        parts = [
            (work.dataset, draft, row, each.paths[row : row + PART_SIZE])
            for row in range(0, len(each.paths), PART_SIZE)
        ]
        for _ in work.engine.map(read_faces_part, parts, label=f"{work.stage.name} reads faces"):
            pass
        draft.rename(path)
    return np.load(path, mmap_mode="r")


def read_faces_part(dataset: Dataset, target: Path, row: int, paths: tuple[str, ...]) -> None:
    """Read some faces into their place in a mapped file."""
    faces = np.load(target, mmap_mode="r+")
    faces[row : row + len(paths)] = dataset.read_faces(paths)
    faces.flush()


def reduce_to(faces: np.ndarray, size_px: int | None) -> np.ndarray:
    """Faces as a camera further away would see them; those already that small stay."""
    from cdp.images.degradation import reduce_faces

    return faces if size_px is None or faces.shape[1] <= size_px else reduce_faces(faces, size_px)


@lru_cache(maxsize=16)
def open_embedder(path: Path, changed_ns: int, device: str) -> Any:
    """The embedder in a file, ONNX or ours; kept open by the worker until the file changes."""
    from cdp.embedding import BackboneEmbedder, OnnxEmbedder
    from cdp.models import load_model

    if path.suffix == ".onnx":
        return OnnxEmbedder(path.read_bytes(), name=path.name)
    return BackboneEmbedder(load_model(path)[0], device=device)
