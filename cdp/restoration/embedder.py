"""An embedder that sees restored faces: one more view of the same pictures."""

from __future__ import annotations

import numpy as np

from cdp.embedding import Embedder
from cdp.images.degradation import reduce_faces
from cdp.images.preprocessing import Preprocessing
from cdp.restoration.network import Restorer, restore_faces


class RestoringEmbedder:
    """Restores faces before another embedder sees them.

    embedder : Embedder
        An ONNX model or a backbone.
    restorer : Restorer
    small_px : int or None
        Faces above this side are reduced to it first; None restores them as they are.
    """

    def __init__(self, embedder: Embedder, restorer: Restorer, small_px: int | None = None) -> None:
        self.embedder, self.restorer, self.small_px = embedder, restorer, small_px
        self.embedding_dim = embedder.embedding_dim

    def embed(
        self, images: np.ndarray, *, batch_size: int = 256, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embed restored faces; parameters and result as `BackboneEmbedder.embed`."""
        return self.embedder.embed(self._restore(images), batch_size=batch_size, flip=flip)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        """Restored faces as the numbers that the embedder behind is shown."""
        return self.embedder.prepare(self._restore(images))

    @property
    def preprocessing(self) -> Preprocessing:
        """That of the embedder behind."""
        return self.embedder.preprocessing

    def _restore(self, images: np.ndarray) -> np.ndarray:
        side = images.shape[1]
        small = images if self.small_px is None else reduce_faces(images, min(self.small_px, side))
        return restore_faces(self.restorer, small)
