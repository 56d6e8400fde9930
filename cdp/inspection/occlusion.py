"""Occlusion maps: what it costs the match when a patch hides each part of a face.

Source: Zeiler and Fergus 2014, on the cosine of a face to itself. It needs no gradient, so it works
for every embedder, ONNX models included.
"""

from __future__ import annotations

import numpy as np

from cdp.embedding import Embedder
from cdp.errors import ConfigError

GREY = 128


def map_occlusion(
    embedder: Embedder,
    images: np.ndarray,
    *,
    cells: int = 8,
    patch: float = 0.25,
    flip: bool = False,
) -> np.ndarray:
    """Loss of cosine for each place of a grey patch.

    Parameters
    ----------
    embedder : Embedder
    images : (n, s, s, 3) uint8, RGB
    cells : int
        Places of the patch a side.
    patch : float
        Its side as a share of the face's, in 0..1.
    flip : bool
        Of the vector of a face and its mirror image, as `Recognizer.embed` and the exported ONNX
        models of ours give it: the patch covers the mirrored place too.

    Returns
    -------
    loss : (n, cells, cells) float32
        1 - cosine of the covered face to the face itself: 0 where the cover changes nothing.

    Raises
    ------
    ConfigError
        Fewer than 1 cell, or a patch of another size.
    """
    if cells < 1 or not 0 < patch <= 1:
        raise ConfigError(f"1 cell or more and a patch of 0..1 expected, got {cells} and {patch}")
    side = images.shape[1]
    whole = embedder.embed(images, flip=flip)[0]
    loss = np.empty((len(images), cells, cells), np.float32)
    for row in range(cells):
        for column in range(cells):
            covered = images.copy()
            down, across = (find_span(cell, cells, patch, side) for cell in (row, column))
            covered[:, down, across] = GREY
            seen = embedder.embed(covered, flip=flip)[0]
            loss[:, row, column] = 1 - np.einsum("nd,nd->n", whole, seen)
    return np.maximum(loss, 0)


def find_span(cell: int, cells: int, patch: float, side: int) -> slice:
    """The pixels of a patch centred on a cell, cut off at the border; at least one."""
    centre, half = (cell + 0.5) / cells * side, patch * side / 2
    start = min(max(0, round(centre - half)), side - 1)
    return slice(start, max(start + 1, round(centre + half)))
