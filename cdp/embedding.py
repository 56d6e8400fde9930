"""Embedders: backbones of ours and ONNX models behind one method, from images to unit vectors.

The contract:
- `embed(images)` takes uint8 (n, s, s, 3) RGB of any side and returns unit float32 vectors and the
  norms they had before: (n, d), (n,). The norm is a quality for a backbone, and 1 for most ONNX
  models, which normalise by themselves.
- A vector depends on its own image alone (up to the last bits, where a batch is smaller), so that
  parts can be embedded anywhere in any order.
- NaN, infinity or a zero vector is a `DataError` that names the row, never a row of the output.
- An ONNX model is data from anywhere: bounded as `cdp.onnx_session` says, with sides and
  vectors of at most `LONGEST`. Its running time is not bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch

from cdp.errors import DataError
from cdp.images.degradation import DEGRADATIONS, degrade, reduce_faces
from cdp.models import Backbone
from cdp.onnx_session import open_session
from cdp.training.plan import resolve_device

LONGEST = 8192
"""Coordinates of a vector, and images of a fixed batch, at most; sides are an eighth of it."""


class Embedder(Protocol):
    """The one method of all embedders."""

    embedding_dim: int

    def embed(
        self, images: np.ndarray, *, batch_size: int = 256, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n, s, s, 3) uint8 to (n, d) float32 of unit length and (n,) float32 norms."""
        ...


class BackboneEmbedder:
    """A backbone of ours as an embedder.

    backbone : Backbone
        Put in `eval` mode and moved to the device.
    input_px : int or None
        Side to which faces are brought (area averages down, linear up); None is the backbone's.
    device : str
        "auto", "cpu", "cuda", ...
    """

    def __init__(
        self, backbone: Backbone, input_px: int | None = None, device: str = "auto"
    ) -> None:
        self.device = resolve_device(device)
        self.backbone = backbone.to(self.device).eval()
        self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.input_px = input_px if input_px is not None else backbone.spec.input_px
        self.embedding_dim = backbone.spec.embedding_dim

    def embed(
        self, images: np.ndarray, *, batch_size: int = 256, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images.

        Parameters
        ----------
        images : (n, s, s, 3) uint8, RGB
            Aligned faces; a memory map will do.
        batch_size : int
            Images at a time.
        flip : bool
            Add each face's mirror image before normalising: better, at twice the cost.

        Returns
        -------
        vectors : (n, d) float32, unit length
        norm : (n,) float32
            Length before normalising (with `flip`: of the mean of both).
        """
        _check_images(images)
        raw = np.empty((len(images), self.embedding_dim), dtype=np.float32)
        for rows in _parts(len(images), batch_size):
            part = torch.from_numpy(np.array(images[rows])).to(self.device)
            seeds = torch.zeros(len(part), dtype=torch.int64, device=self.device)
            faces = degrade(part, seeds, DEGRADATIONS["none"], self.input_px)
            with torch.inference_mode():
                embedding = self.backbone(faces)
                if flip:
                    embedding = (embedding + self.backbone(faces.flip(3))) / 2
            raw[rows] = embedding.float().cpu().numpy()
        return _normalise(raw, f"backbone {self.backbone.spec.name}")


class OnnxEmbedder:
    """An ONNX face model as an embedder.

    model : bytes
        The file: one input (batch, 3, p, p) float32, RGB in 0..255; one output (batch, d).
    reduce_px : int or None
        Reduce faces to this side first and enlarge them again to the model's, so that a strong
        model gets no more detail than a low-resolution one; None keeps the full resolution.
    threads : int
        Of onnxruntime, per call.
    name : str
        Used in messages.

    Raises
    ------
    DataError
        No ONNX model, or one with other inputs and outputs.
    """

    def __init__(
        self,
        model: bytes,
        reduce_px: int | None = None,
        *,
        threads: int = 1,
        name: str = "ONNX model",
    ) -> None:
        self.model, self.reduce_px, self.threads, self.name = model, reduce_px, threads, name
        self._session = open_session(model, threads, name)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if (
            len(shape) != 4
            or shape[1] != 3
            or not isinstance(shape[2], int)
            or shape[2] != shape[3]
            or not 1 <= shape[2] <= LONGEST // 8
            or inputs[0].type != "tensor(float)"
        ):
            found = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise DataError(
                f"{name}: one input (n, 3, p, p) tensor(float) with a fixed p expected, "
                f"found: {found}"
            )
        if len(outputs) != 1 or len(outputs[0].shape) != 2:
            found = "; ".join(f"{o.name} {o.type} {o.shape}" for o in outputs)
            raise DataError(f"{name}: one output (n, d) expected, found: {found}")
        self.input_px = int(shape[2])
        self._input = inputs[0].name
        fixed = shape[0] if isinstance(shape[0], int) else None
        if fixed is not None and not 1 <= fixed <= LONGEST:
            raise DataError(f"{name}: a batch of 1 to {LONGEST} images expected, found {fixed}")
        self._batch_limit = fixed
        declared = outputs[0].shape[1]
        self.embedding_dim = declared if isinstance(declared, int) else 0
        if not isinstance(declared, int):
            blank = np.zeros((fixed or 1, 3, self.input_px, self.input_px), dtype=np.float32)
            self.embedding_dim = int(self._run(blank).shape[1])
        if not 1 <= self.embedding_dim <= LONGEST:
            raise DataError(
                f"{name}: vectors of 1 to {LONGEST} numbers expected, found {self.embedding_dim}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the model's bytes: a session cannot."""
        return _rebuild, (self.model, self.reduce_px, self.threads, self.name)

    def embed(
        self, images: np.ndarray, *, batch_size: int = 64, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images; parameters and result as `BackboneEmbedder.embed`."""
        _check_images(images)
        if self._batch_limit is not None:
            batch_size = self._batch_limit
        raw = np.empty((len(images), self.embedding_dim), dtype=np.float32)
        for rows in _parts(len(images), batch_size):
            faces = self._prepare(np.array(images[rows]))
            vectors = self._run(faces)
            if flip:
                mirrored = np.ascontiguousarray(faces[:, :, :, ::-1])
                vectors = (vectors + self._run(mirrored)) / 2
            raw[rows] = vectors
        return _normalise(raw, self.name)

    def _prepare(self, images: np.ndarray) -> np.ndarray:
        """(b, s, s, 3) uint8 to (b, 3, p, p) float32 in 0..255."""
        if self.reduce_px is not None and images.shape[1] > self.reduce_px:
            images = reduce_faces(images, self.reduce_px)
        if images.shape[1] == self.input_px:
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        unit = degrade(
            torch.from_numpy(images),
            torch.zeros(len(images), dtype=torch.int64),
            DEGRADATIONS["none"],
            self.input_px,
        )
        return ((unit + 1) * 127.5).contiguous(memory_format=torch.contiguous_format).numpy()

    def _run(self, faces: np.ndarray) -> np.ndarray:
        """The model on (b, 3, p, p); a model of fixed batch size gets its last batch filled up."""
        count = len(faces)
        if self._batch_limit is not None and count < self._batch_limit:
            filling = np.zeros((self._batch_limit - count, *faces.shape[1:]), dtype=faces.dtype)
            faces = np.concatenate([faces, filling])
        try:
            output = np.asarray(self._session.run(None, {self._input: faces})[0])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            reason = str(error).splitlines()[0][:200]
            raise DataError(
                f"{self.name}: the model fails on {len(faces)} images of {self.input_px} px; "
                f"onnxruntime says: {reason}"
            ) from error
        wide = self.embedding_dim or (output.shape[1] if output.ndim == 2 else 0)
        if output.shape != (len(faces), wide) or output.dtype != np.float32:
            raise DataError(
                f"{self.name}: an output ({len(faces)}, {wide or 'd'}) float32 expected, the model "
                f"gave {output.shape} {output.dtype}"
            )
        return output[:count]


def _rebuild(model: bytes, reduce_px: int | None, threads: int, name: str) -> OnnxEmbedder:
    return OnnxEmbedder(model, reduce_px, threads=threads, name=name)


def _parts(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise DataError(f"images (n, s, s, 3) uint8 expected, got {images.shape} {images.dtype}")


def _normalise(raw: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors and norms; refuses rows that have no direction."""
    norm = np.sqrt(np.einsum("nd,nd->n", raw, raw, dtype=np.float64))
    broken = np.flatnonzero(~np.isfinite(norm) | (norm == 0))
    if len(broken):
        raise DataError(
            f"{name}: embedding of image {broken[0]} is NaN, infinite or zero "
            f"({len(broken)} of {len(raw)} images); the weights are broken or the input is not a "
            "face in 0..255 RGB"
        )
    return (raw / norm[:, None]).astype(np.float32), norm.astype(np.float32)
