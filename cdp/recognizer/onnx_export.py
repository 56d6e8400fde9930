"""Export of a recognizer as an ONNX model, checked in onnxruntime.

The contract:
- The model has the inputs and outputs that `OnnxEmbedder` expects: `image` (n, 3, p, p) float32,
  RGB in 0..255, with p the recognizer's input side, to `embedding` (n, d) float32 of unit length.
  So it can be a committee member or a teacher too.
- The model contains every step of `Recognizer.embed` for faces of that side: scaling, the mirror
  image, the mean of both, the unit length.
- A model is returned only when onnxruntime computes the recognizer's vectors from it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from cdp.embedding import OnnxEmbedder
from cdp.errors import BackendError
from cdp.models import Backbone
from cdp.recognizer.recognizer import Recognizer

OPSET = 18
TOLERANCE = 1e-4
"""Largest difference of a coordinate of a unit vector that is taken for rounding."""


class _Deployed(nn.Module):
    """Pixels to unit vectors."""

    def __init__(self, backbone: Backbone, flip: bool) -> None:
        super().__init__()
        self.backbone, self.flip = backbone, flip

    def forward(self, image: Tensor) -> Tensor:
        face = image / 127.5 - 1
        embedding = self.backbone(face)
        if self.flip:
            embedding = (embedding + self.backbone(face.flip(3))) / 2
        return embedding / embedding.norm(dim=1, keepdim=True)


def export_onnx(
    recognizer: Recognizer, *, flip: bool = True, notes: Mapping[str, str] | None = None
) -> bytes:
    """Make an ONNX model of a recognizer, and compare the two in onnxruntime.

    Parameters
    ----------
    recognizer : Recognizer
    flip : bool
        As `Recognizer.embed`: better, at twice the cost.
    notes : mapping of str to str, or None
        Kept in the file's metadata.

    Returns
    -------
    model : bytes
        The content of an .onnx file. The batch size is free.

    Raises
    ------
    BackendError
        The exporter is not installed, or onnxruntime computes other vectors.
    """
    backbone = recognizer.backbone
    device = next(backbone.parameters()).device
    blank = torch.zeros(2, 3, recognizer.input_px, recognizer.input_px)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Deployed(backbone.cpu(), flip).eval(),
                (blank,),
                input_names=["image"],
                output_names=["embedding"],
                dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1)}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:
        raise BackendError(
            f"ONNX export needs the packages onnx and onnxscript ({error}); pip install 'cdp[onnx]'"
        ) from error
    finally:
        backbone.to(device)
    assert program is not None
    proto = program.model_proto
    for key, value in (notes or {}).items():
        proto.metadata_props.add(key=key, value=value)
    model: bytes = proto.SerializeToString()
    check_agreement(recognizer, model, flip=flip)
    return model


def check_agreement(recognizer: Recognizer, model: bytes, *, flip: bool = True) -> None:
    """`BackendError` when the vectors of an ONNX model and of the recognizer differ."""
    difference = measure_difference(recognizer, model, flip=flip)
    if not difference <= TOLERANCE:
        raise BackendError(
            f"the ONNX model and the recognizer differ by {difference:g} where rounding explains "
            f"{TOLERANCE:g}; nothing was exported. Try another version of onnxruntime"
        )


def measure_difference(
    recognizer: Recognizer, model: bytes, *, flip: bool = True, count: int = 33, seed: int = 0
) -> float:
    """Largest absolute difference between the two in any coordinate, over drawn images.

    The images are noise, flat, and smooth, of the recognizer's own side.
    """
    side = recognizer.input_px
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    ramp = np.linspace(0, 255, side)
    images[::3] = rng.integers(0, 256, (len(images[::3]), 1, 1, 3))
    images[1::3] = (ramp[:, None, None] * rng.random((len(images[1::3]), 1, 1, 3))).astype(np.uint8)
    ours = recognizer.embed(images, flip=flip)
    theirs = OnnxEmbedder(model).embed(images)[0]
    return float(np.abs(ours - theirs).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's log, which is of no use to the user of a recognizer."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
