"""Twins: a training image once more, covered or with its cells shuffled, by its seed.

The contract:
- Images are (b, 3, s, s) float in [-1, 1], as a backbone reads them; a twin has the same shape.
- A twin depends on its own image and seed alone (`cdp.images.degradation.draw_uniform`).
- Cells are those of an n x n grid from the top left, each s // n pixels wide; what is left over at
  the right and the bottom stays in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdp.images.degradation import draw_uniform

_COVER, _SHUFFLE = 1, 2
"""Streams of random numbers."""


def cover_faces(images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Cover a rectangle of each image with one colour.

    Parameters
    ----------
    images : (b, 3, s, s) float
    seeds : (b,) int64

    Returns
    -------
    covered : (b, 3, s, s) float
        The rectangle's sides are .3 to .6 of the image's, its place is uniform.
    cover : (b, s, s) bool
        True inside the rectangle.
    """
    draw = draw_uniform(seeds, 7, stream=_COVER)
    side_px = images.shape[-1]
    centre = (torch.arange(side_px, device=images.device) + 0.5) / side_px
    inside = []
    for axis in (0, 1):
        length = 0.3 + 0.3 * draw[:, axis]
        start = draw[:, 2 + axis] * (1 - length)
        inside.append((centre >= start[:, None]) & (centre < (start + length)[:, None]))
    cover = inside[0][:, :, None] & inside[1][:, None, :]
    colour = (2 * draw[:, 4:] - 1).to(images.dtype)[:, :, None, None]
    return torch.where(cover[:, None], colour, images), cover


def shuffle_cells(
    images: Tensor, seeds: Tensor, cells: int, reach: int = 1
) -> tuple[Tensor, Tensor]:
    """Shuffle the cells of each image within a neighbourhood.

    Source: Chen et al. 2019 (Destruction and Construction Learning), section 3.1: the columns of
    each row of cells change places, then the rows of each column, each by less than 2 x `reach`.

    Parameters
    ----------
    images : (b, 3, s, s) float
    seeds : (b,) int64
    cells : int
        Cells a side.
    reach : int
        0 leaves the images as they are.

    Returns
    -------
    shuffled : (b, 3, s, s) float
    origin : (b, cells * cells) int64
        For each cell of the result, row by row, the cell of the image that is shown there.
    """
    count = len(images)
    draw = draw_uniform(seeds, 2 * cells * cells, stream=_SHUFFLE).reshape(count, 2, cells, cells)
    place = torch.arange(cells, device=images.device)
    moved = place + (2 * draw - 1) * reach
    column = moved[:, 0].argsort(dim=2, stable=True)
    row = moved[:, 1].argsort(dim=2, stable=True).transpose(1, 2)
    origin = place[None, :, None] * cells + column
    origin = origin.gather(1, row).reshape(count, cells * cells)
    width = images.shape[-1] // cells
    inner = cells * width
    grid = images[..., :inner, :inner].unflatten(3, (cells, width)).unflatten(2, (cells, width))
    flat = grid.permute(0, 2, 4, 1, 3, 5).reshape(count, cells * cells, -1)
    flat = flat.gather(1, origin[:, :, None].expand_as(flat))
    grid = flat.reshape(count, cells, cells, images.shape[1], width, width)
    shuffled = images.clone()
    shuffled[..., :inner, :inner] = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return shuffled, origin
