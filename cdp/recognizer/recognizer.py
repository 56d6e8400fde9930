"""The trained recognizer: it is loaded from one safetensors file, embeds faces and is saved.

The contract:
- A file holds a backbone and everything needed to use it; no code is run when it is loaded.
- An embedding is a unit vector of any aligned face, whatever its side.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cdp.aggregation import NeuralAggregator, fuse_parts, pool_vectors
from cdp.embedding import BackboneEmbedder
from cdp.errors import DataError
from cdp.images.quality import rate_crops
from cdp.models import Backbone, load_model, pack_model, save_model, unpack_model


class Recognizer:
    """A backbone that embeds faces as unit vectors, with notes on its training.

    backbone : Backbone
    meta : mapping of str to JSON values
        Notes for its users: how and on which data it was trained.
    device : str
        "auto", "cpu", "cuda", ...

    Examples
    --------
    >>> import numpy as np
    >>> from cdp.models import build_backbone
    >>> recognizer = Recognizer(build_backbone("plain", input_px=24), {"note": "untrained"})
    >>> faces = np.zeros((2, 40, 40, 3), dtype=np.uint8)
    >>> recognizer.embed(faces).shape
    (2, 128)
    """

    def __init__(
        self, backbone: Backbone, meta: Mapping[str, Any] | None = None, *, device: str = "auto"
    ) -> None:
        self.backbone = backbone
        self.meta = dict(meta or {})
        self.embedder = BackboneEmbedder(backbone, device=device)

    @property
    def input_px(self) -> int:
        """Side of the faces that the backbone reads, in pixels."""
        return self.backbone.spec.input_px

    @property
    def embedding_dim(self) -> int:
        return self.backbone.spec.embedding_dim

    def embed(self, images: np.ndarray, *, batch_size: int = 256, flip: bool = True) -> np.ndarray:
        """Embed aligned faces.

        Parameters
        ----------
        images : (n, s, s, 3) uint8, RGB
            Faces aligned as `cdp.images.align.align_face` does, at any side s; brought to
            `input_px` here.
        batch_size : int
        flip : bool
            Average with the mirror image.

        Returns
        -------
        vectors : (n, embedding_dim) float32, unit length
            The product of two is the cosine of their faces. `embedder.embed` gives the norms too.
        """
        return self.embedder.embed(images, batch_size=batch_size, flip=flip)[0]

    def embed_set(
        self,
        images: np.ndarray,
        group: np.ndarray | None = None,
        *,
        weigh: str | np.ndarray | NeuralAggregator = "norm",
        parts: int = 8,
        batch_size: int = 256,
        flip: bool = True,
    ) -> np.ndarray:
        """Embed several faces of one person, or of several people, as one vector a person.

        Parameters
        ----------
        images : (n, s, s, 3) uint8, RGB
            As `embed`; of a track of a camera, for instance.
        group : (n,) integer or None
            The person of each image; None: all are of one.
        weigh : str, (n,) float or NeuralAggregator
            "norm" weighs each image by its embedding's norm, which follows quality; "quality" by
            its size and sharpness, squared; "mean" all alike; "parts" each part by its length, for
            the head `subspheres`; numbers of 0 or above are weights; an aggregator as trained.
        parts : int
            Of "parts": as the head's.
        batch_size, flip
            As `embed`.

        Returns
        -------
        vectors : (people, embedding_dim) float32, unit length
            In ascending order of the numbers in `group`; without it (embedding_dim,).

        Raises
        ------
        DataError
            No images, another word for `weigh`, or pictures whose vectors cancel.
        """
        vectors, norm = self.embedder.embed(images, batch_size=batch_size, flip=flip)
        whose = np.zeros(len(vectors), np.int64) if group is None else np.asarray(group)
        if isinstance(weigh, NeuralAggregator):
            pooled = weigh.pool(vectors, whose)
        elif isinstance(weigh, np.ndarray):
            pooled = pool_vectors(vectors, whose, weigh)
        elif weigh == "quality":
            pooled = pool_vectors(vectors, whose, rate_crops(images) ** 2)
        elif weigh == "parts":
            pooled = fuse_parts(vectors * norm[:, None], whose, parts)
        elif weigh in ("mean", "norm"):
            pooled = pool_vectors(vectors, whose, None if weigh == "mean" else norm)
        else:
            raise DataError(
                f"weigh of mean, norm, quality, parts, weights or an aggregator expected, got "
                f"{weigh!r}"
            )
        return pooled[0] if group is None else pooled

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and string metadata: the content of a safetensors file."""
        return pack_model(self.backbone, self.meta)

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, device: str = "auto"
    ) -> Recognizer:
        """The recognizer of a `state`; `DataError` when it is none."""
        return cls(*unpack_model(tensors, metadata), device=device)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_model(path, self.backbone, self.meta)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Recognizer:
        """Read what `save` wrote; `DataError` when the file is missing or damaged."""
        return cls(*load_model(path), device=device)
