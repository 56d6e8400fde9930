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
from cdp.images.preprocessing import Preprocessing
from cdp.models import Backbone
from cdp.onnx_session import open_session
from cdp.training.plan import resolve_device

LONGEST = 8192
"""Coordinates of a vector, and images of a fixed batch, at most; sides are an eighth of it."""
_TYPES: dict[str, type[np.number]] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}  # fmt: skip
"""What a model's input may be; as uint8 it is shown the pixels as they are."""
_USUAL_PX = 112
"""Side on which the length of the vectors is tried where a model leaves both free."""


class Embedder(Protocol):
    """The one method of all embedders."""

    embedding_dim: int

    def embed(
        self, images: np.ndarray, *, batch_size: int = 256, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n, s, s, 3) uint8 to (n, d) float32 of unit length and (n,) float32 norms."""
        ...

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """(n, s, s, 3) uint8 to the numbers that the model is shown, (n, 3, p, p) float32."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """Range and order of the numbers of `prepare`; its `undo` makes pixels of them again."""
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

    preprocessing = Preprocessing(127.5, 127.5)

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
            faces = self._scale(np.array(images[rows]))
            with torch.inference_mode():
                embedding = self.backbone(faces)
                if flip:
                    embedding = (embedding + self.backbone(faces.flip(3))) / 2
            raw[rows] = embedding.float().cpu().numpy()
        return _normalise(raw, f"backbone {self.backbone.spec.name}")

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """(n, s, s, 3) uint8 RGB to the numbers the backbone is shown, (n, 3, p, p) in -1..1."""
        return np.ascontiguousarray(self._scale(np.array(images)).float().cpu().numpy())

    def _scale(self, images: np.ndarray) -> torch.Tensor:
        part = torch.from_numpy(images).to(self.device)
        seeds = torch.zeros(len(part), dtype=torch.int64, device=self.device)
        return degrade(part, seeds, DEGRADATIONS["none"], self.input_px)


_PLAIN = Preprocessing()


class OnnxEmbedder:
    """An ONNX face model as an embedder.

    model : bytes
        The file: one input (batch, 3, p, p) or (batch, p, p, 3), of floats or uint8; an output
        (batch, d), also with sides of 1 behind it. Batch and sides may be free. A model that fails
        on several images at once, though it leaves the batch free, is shown one at a time.
    reduce_px : int or None
        Reduce faces to this side first and enlarge them again to the model's, so that a strong
        model gets no more detail than a low-resolution one; None keeps the full resolution.
    preprocessing : Preprocessing
        Range and order of the pixels, layout, output and side; by default RGB in 0..255.
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
        preprocessing: Preprocessing = _PLAIN,
        threads: int = 1,
        name: str = "ONNX model",
    ) -> None:
        self.model, self.reduce_px, self.threads, self.name = model, reduce_px, threads, name
        self.preprocessing = preprocessing
        self._session = open_session(model, threads, name)
        self._read_input()
        self._read_output()

    def _read_input(self) -> None:
        """The name, type, layout and side of the one input; DataError for another one."""
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape) if len(inputs) == 1 else []
        found = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        last = len(shape) == 4 and shape[3] == 3 and shape[1] != 3
        self.layout = self.preprocessing.layout or ("nhwc" if last else "nchw")
        if len(shape) == 4 and self.layout == "nhwc":
            shape = [shape[0], shape[3], shape[1], shape[2]]
        if len(shape) != 4 or (shape[1] not in (3, None) and not isinstance(shape[1], str)):
            raise DataError(
                f"{self.name}: one input (n, 3, p, p) or (n, p, p, 3) expected, found: {found}"
            )
        if inputs[0].type not in _TYPES:
            raise DataError(f"{self.name}: an input of floats or uint8 expected, found: {found}")
        if inputs[0].type == "tensor(uint8)" and not self.preprocessing.keeps_range:
            raise DataError(
                f"{self.name}: its input is uint8, pixels in 0..255, and cannot be shown "
                f"{self.preprocessing.describe()}. Leave mean and scale out, or say `preset: plain`"
            )
        self._input, self._dtype = inputs[0].name, _TYPES[inputs[0].type]
        self.input_px = self._find_side(shape[2:], found)
        fixed = shape[0] if isinstance(shape[0], int) else None
        if fixed is not None and not 1 <= fixed <= LONGEST:
            raise DataError(
                f"{self.name}: a batch of 1 to {LONGEST} images expected, found {fixed}"
            )
        self._batch_limit = fixed

    def _find_side(self, sides: list[Any], found: str) -> int | None:
        """The side of the faces; None where the model and the preprocessing leave it free."""
        fixed = {side for side in sides if isinstance(side, int)}
        asked = self.preprocessing.input_px
        if asked is not None:
            if fixed - {asked}:
                raise DataError(f"{self.name}: input_px {asked} does not fit the input {found}")
            return asked
        if len(fixed) > 1 or any(not 1 <= side <= LONGEST // 8 for side in fixed):
            raise DataError(
                f"{self.name}: one input (n, 3, p, p) of a side p from 1 to {LONGEST // 8} "
                f"expected, found: {found}"
            )
        return int(fixed.pop()) if fixed else None

    def _read_output(self) -> None:
        """The name and length of the output that is the embedding; DataError without one."""
        outputs = self._session.get_outputs()
        found = "; ".join(f"{o.name} {o.type} {o.shape}" for o in outputs)
        asked = self.preprocessing.output
        fitting = [o for o in outputs if _is_vector(o.shape) or (len(outputs) == 1 and not o.shape)]
        if asked is not None:
            fitting = [o for o in outputs if o.name == asked]
        if len(fitting) != 1:
            named = f" named {asked!r}" if asked else ""
            hint = "; name it (`output`)" if len(fitting) > 1 else ""
            raise DataError(f"{self.name}: one output (n, d){named} expected, found: {found}{hint}")
        self._output = fitting[0].name
        declared = fitting[0].shape[1] if fitting[0].shape else None
        self.embedding_dim = declared if isinstance(declared, int) else 0
        if not self.embedding_dim:
            side = self.input_px or _USUAL_PX
            blank = np.zeros((self._batch_limit or 1, 3, side, side), dtype=np.float32)
            self.embedding_dim = int(self._run(blank).shape[1])
        if not 1 <= self.embedding_dim <= LONGEST:
            raise DataError(
                f"{self.name}: vectors of 1 to {LONGEST} numbers expected, found "
                f"{self.embedding_dim}"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process as the model's bytes: a session cannot."""
        return _rebuild, (
            self.model, self.reduce_px, self.preprocessing, self.threads, self.name
        )  # fmt: skip

    def embed(
        self, images: np.ndarray, *, batch_size: int = 64, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed images; parameters and result as `BackboneEmbedder.embed`."""
        _check_images(images)
        if self._batch_limit is not None:
            batch_size = self._batch_limit
        raw = np.empty((len(images), self.embedding_dim), dtype=np.float32)
        for rows in _parts(len(images), batch_size):
            faces = self.prepare(np.array(images[rows]))
            vectors = self._run(faces)
            if flip:
                mirrored = np.ascontiguousarray(faces[:, :, :, ::-1])
                vectors = (vectors + self._run(mirrored)) / 2
            raw[rows] = vectors
        return _normalise(raw, self.name)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """(b, s, s, 3) uint8 RGB to the numbers the model is shown, (b, 3, p, p) float32."""
        if self.reduce_px is not None and images.shape[1] > self.reduce_px:
            images = reduce_faces(images, self.reduce_px)
        if images.shape[1] == (self.input_px or images.shape[1]):
            faces = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
            return self.preprocessing.prepare(faces)
        unit = degrade(
            torch.from_numpy(images),
            torch.zeros(len(images), dtype=torch.int64),
            DEGRADATIONS["none"],
            int(self.input_px or images.shape[1]),
        )
        pixels = ((unit + 1) * 127.5).contiguous(memory_format=torch.contiguous_format)
        return self.preprocessing.prepare(pixels.numpy())

    def _run(self, faces: np.ndarray) -> np.ndarray:
        """The model on (b, 3, p, p), on each alone where it fails on several at once."""
        if self._batch_limit is not None or len(faces) == 1:
            return self._run_batch(faces)
        try:
            return self._run_batch(faces)
        except DataError as failure:
            vectors = self._run_one_by_one(faces)
            if vectors is None:
                raise failure from failure.__cause__
        self._batch_limit = 1
        return vectors

    def _run_one_by_one(self, faces: np.ndarray) -> np.ndarray | None:
        """The model on each face alone; None where it fails on one too."""
        try:
            return np.concatenate([self._run_batch(faces[i : i + 1]) for i in range(len(faces))])
        except DataError:
            return None

    def _run_batch(self, faces: np.ndarray) -> np.ndarray:
        """One run; a model of fixed batch size gets its last batch filled up."""
        count = len(faces)
        if self._batch_limit is not None and count < self._batch_limit:
            filling = np.zeros((self._batch_limit - count, *faces.shape[1:]), dtype=faces.dtype)
            faces = np.concatenate([faces, filling])
        shown = faces if self.layout == "nchw" else faces.transpose(0, 2, 3, 1)
        if self._dtype is np.uint8:
            shown = np.clip(np.rint(shown), 0, 255)
        shown = np.ascontiguousarray(shown, dtype=self._dtype)
        try:
            output = np.asarray(self._session.run([self._output], {self._input: shown})[0])
        except Exception as error:  # onnxruntime's own exceptions share no public base
            reason = str(error).splitlines()[0][:200]
            hint = "; the model leaves the side free, name it (`input_px`)"
            raise DataError(
                f"{self.name}: the model fails on {len(faces)} image"
                f"{'s' * (len(faces) > 1)} of {faces.shape[2]} px"
                f"{'' if self.input_px else hint}; onnxruntime says: {reason}"
            ) from error
        if output.ndim > 2 and _is_vector(list(output.shape)):
            output = output.reshape(output.shape[:2])
        wide = self.embedding_dim or (output.shape[1] if output.ndim == 2 else 0)
        if output.shape != (len(faces), wide) or output.dtype.kind != "f":
            raise DataError(
                f"{self.name}: an output ({len(faces)}, {wide or 'd'}) float32 expected, the model "
                f"gave {output.shape} {output.dtype}"
            )
        output = output.astype(np.float32, copy=False)
        return output[:count]


def _rebuild(
    model: bytes, reduce_px: int | None, preprocessing: Preprocessing, threads: int, name: str
) -> OnnxEmbedder:
    return OnnxEmbedder(model, reduce_px, preprocessing=preprocessing, threads=threads, name=name)


def _is_vector(shape: list[Any]) -> bool:
    """Whether a declared shape is (n, d) with d above 1, sides of 1 behind it left aside."""
    return len(shape) >= 2 and shape[1] != 1 and all(side == 1 for side in shape[2:])


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
            f"({len(broken)} of {len(raw)} images); the weights are broken, the input is not a "
            "face, or the model expects other pixels (RGB in 0..255 unless a preset is named)"
        )
    return (raw / norm[:, None]).astype(np.float32), norm.astype(np.float32)
