"""Committee members on disk: the file of each member, and its embedder, opened once a process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import DataError
from pipelines.config import MemberSettings
from pipelines.data.dataset import Dataset
from pipelines.stage import Work


def find_origin(work: Work, member: MemberSettings) -> Path | None:
    """The file a member is read from; None for ready features."""
    if member.backbone is not None:
        return work.locate("train.history").parent / f"{member.name}.safetensors"
    if member.features is not None:
        return None
    if member.recognizer is not None:
        return work.locate_recognizer(member.recognizer)
    return work.dataset.locate(str(member.onnx or member.checkpoint))


def reduce_to(faces: np.ndarray, size_px: int | None) -> np.ndarray:
    """Faces reduced to a side as a camera further away would take them; smaller ones are kept."""
    from cdp.images.degradation import reduce_faces

    return faces if size_px is None or faces.shape[1] <= size_px else reduce_faces(faces, size_px)


def open_embedder(path: Path, device: str) -> Any:
    """The embedder in a file, ONNX or ours; kept open by the worker until the file changes.

    Raises
    ------
    DataError
        The file is larger than `MODEL_BYTES`, or holds no model.
    """
    return _open_embedder(path, path.stat().st_mtime_ns, device)


def open_view(dataset: Dataset, member: MemberSettings, origin: Path, device: str) -> Any:
    """A member's embedder as the stage `embed` uses it: behind its restorer, where it has one."""
    embedder = open_embedder(origin, device)
    if member.restore is None:
        return embedder
    from cdp.restoration import RestoringEmbedder

    path = dataset.locate(member.restore)
    return RestoringEmbedder(embedder, _open_restorer(path, path.stat().st_mtime_ns))


@lru_cache(maxsize=4)
def _open_restorer(path: Path, _changed_ns: int) -> Any:
    from cdp.restoration import load_restorer

    return load_restorer(path)


@lru_cache(maxsize=16)
def _open_embedder(path: Path, _changed_ns: int, device: str) -> Any:
    from cdp.embedding import MODEL_BYTES, BackboneEmbedder, OnnxEmbedder
    from cdp.models import load_model

    size = path.stat().st_size
    if size > MODEL_BYTES:
        raise DataError(f"{path}: {size} bytes, a model of at most {MODEL_BYTES} expected")
    if path.suffix == ".onnx":
        return OnnxEmbedder(path.read_bytes(), name=path.name)
    return BackboneEmbedder(load_model(path)[0], device=device)
