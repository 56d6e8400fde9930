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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from pipelines.config import MemberSettings, TrainingSettings
from pipelines.dataset import Dataset
from pipelines.stage import Work
from pipelines.store import (
    digest_json,
    drop_drafts,
    open_atomically,
    reserve_array,
    write_table,
    write_text,
)

if TYPE_CHECKING:
    from cdp.branch import SoftTargets, SparedClasses

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


@dataclass(frozen=True)
class LabelledSet:
    """Samples with classes: what one head is trained on.

    paths, sha256 : (n,) what to read, and its content.
    label : (n,) int64, 0 .. classes - 1; -1 for an image that only a teacher has something to say
        of.
    weight : (n,) float32 per image, or None for all equal.
    soft : SoftTargets or None, the weighted classes of some rows.
    spared : SparedClasses or None, the classes some rows may belong to beside their own.
    """

    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    label: np.ndarray
    weight: np.ndarray | None = None
    soft: SoftTargets | None = None
    spared: SparedClasses | None = None

    def digest(self) -> str:
        """Over content, labels and weights, in order."""
        total = hashlib.sha256("\n".join(self.sha256).encode())
        total.update(np.ascontiguousarray(self.label, np.int64).tobytes())
        if self.weight is not None:
            total.update(np.ascontiguousarray(self.weight, np.float32).tobytes())
        if self.soft is not None:
            for values in (self.soft.row, self.soft.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
            total.update(np.ascontiguousarray(self.soft.weight, np.float64).tobytes())
        if self.spared is not None:
            total.update(b"spared")
            for values in (self.spared.row, self.spared.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingJob:
    """One model to be had: an architecture, and what its one or two heads are trained on.

    pseudo_share : as `train_recognizer`'s share.
    teacher : key and vectors (n, t) of the labelled and (u, t) of the pseudo-labelled images, and
        the weight of following them; None without a teacher.
    """

    name: str
    backbone: str
    width: float
    settings: TrainingSettings
    labelled: LabelledSet | None
    pseudo: LabelledSet | None
    seed: int
    pseudo_share: float | None = None
    teacher: TeacherVectors | None = None


@dataclass(frozen=True)
class TeacherVectors:
    """What a teacher says of the images of a job; `digest` stands for all of it in the key.

    weight, class_weight : of the distance to them, and of the classes beside it.
    more : faces (m, s, s, 3) uint8 that only the teacher knows, and its vectors of them, or None.
    """

    digest: str
    labelled: np.ndarray | None
    pseudo: np.ndarray | None
    weight: float
    class_weight: float
    more: tuple[np.ndarray, np.ndarray] | None = None


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


def find_origin(work: Work, member: MemberSettings) -> Path | None:
    """The file a member is read from; None for ready features."""
    if member.backbone is not None:
        return work.locate("train.history").parent / f"{member.name}.safetensors"
    if member.features is not None:
        return None
    if member.recognizer is not None:
        return work.locate_recognizer(member.recognizer)
    return work.dataset.locate(str(member.onnx or member.checkpoint))


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

    from cdp.training import HISTORY as COLUMNS
    from pipelines.curves import write_curves
    from pipelines.team import share_training

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


@dataclass(frozen=True)
class TrainingRequest:
    """All of a training but its arrays, in plain JSON values.

    settings : the fields of `TrainingSettings`.
    checkpoint : path of the state to go on from, or None.
    """

    name: str
    backbone: str
    width: float
    settings: dict[str, Any]
    seed: int
    pseudo_share: float | None
    distil_weight: float
    class_weight: float
    checkpoint: str | None


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
        if job.pseudo.spared is not None:
            spared = job.pseudo.spared
            arrays |= {"spared_row": spared.row, "spared_label": spared.label}
    if job.teacher is not None:
        arrays |= {"teacher": job.teacher.labelled, "pseudo_teacher": job.teacher.pseudo}
        if job.teacher.more is not None:
            arrays |= dict(zip(("more_images", "more_teacher"), job.teacher.more, strict=True))
    return {name: values for name, values in arrays.items() if values is not None}


def train_arrays(
    request: TrainingRequest,
    arrays: Mapping[str, np.ndarray],
    device: str,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train what was requested on these arrays; result as `train_recognizer`."""
    from safetensors.torch import load_file

    from cdp.branch import SoftTargets, SparedClasses
    from cdp.images.degradation import get_degradation
    from cdp.recognizer import train_recognizer
    from cdp.training import TrainingPlan

    settings = TrainingSettings.model_validate(request.settings)
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
        distil_weight=request.distil_weight,
        class_weight=request.class_weight,
        degradation=get_degradation(settings.degradation),
        seed=request.seed,
    )
    soft = None
    if "soft_row" in arrays:
        soft = SoftTargets(arrays["soft_row"], arrays["soft_label"], arrays["soft_weight"])
    spared = None
    if "spared_row" in arrays:
        spared = SparedClasses(arrays["spared_row"], arrays["spared_label"])
    return train_recognizer(
        arrays.get("images"),
        arrays.get("label"),
        arrays.get("pseudo_images"),
        arrays.get("pseudo_label"),
        confidence=arrays.get("confidence"),
        soft=soft,
        spared=spared,
        teacher=arrays.get("teacher"),
        pseudo_teacher=arrays.get("pseudo_teacher"),
        more_images=arrays.get("more_images"),
        more_teacher=arrays.get("more_teacher"),
        share=request.pseudo_share,
        plan=plan,
        min_size=1,
        sampling=settings.sampling,
        images_per_identity=settings.images_per_identity,
        backbone=request.backbone,
        width=request.width,
        input_px=settings.input_px,
        embedding_dim=settings.embedding_dim,
        head=settings.head,
        head_params=settings.head_options,
        auxiliaries=settings.auxiliary,
        sampled_classes=settings.sampled_classes,
        device=device,
        resume=None if request.checkpoint is None else load_file(request.checkpoint),
        on_epoch=on_epoch,
        description=request.name,
    )


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


def reduce_to(faces: np.ndarray, size_px: int | None) -> np.ndarray:
    """Faces as a camera further away would see them; those already that small stay."""
    from cdp.images.degradation import reduce_faces

    return faces if size_px is None or faces.shape[1] <= size_px else reduce_faces(faces, size_px)


@lru_cache(maxsize=16)
def open_embedder(path: Path, changed_ns: int, device: str) -> Any:
    """The embedder in a file, ONNX or ours; kept open by the worker until the file changes."""
    from cdp.embedding import MODEL_BYTES, BackboneEmbedder, OnnxEmbedder
    from cdp.models import load_model

    size = path.stat().st_size
    if size > MODEL_BYTES:
        raise DataError(f"{path}: {size} bytes, a model of at most {MODEL_BYTES} expected")
    if path.suffix == ".onnx":
        return OnnxEmbedder(path.read_bytes(), name=path.name)
    return BackboneEmbedder(load_model(path)[0], device=device)
