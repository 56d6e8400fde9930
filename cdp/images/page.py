"""Rows of pictures on one page, each with its name.

The contract:
- Input is uint8 (n, p, p, 3) RGB a row, output one uint8 (h, w, 3) RGB picture.
- Pixels are magnified by whole numbers, without smoothing: a page shows a network's pixels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from cdp.errors import DataError

_LABEL_PX, _GAP_PX, _INK, _PAPER = 150, 4, (40, 40, 40), 250


def compose_page(rows: Mapping[str, np.ndarray], *, cell_px: int = 96) -> np.ndarray:
    """Lay rows of square pictures below each other, their names at the left.

    Parameters
    ----------
    rows : mapping of name to (n, p, p, 3) uint8
        n and p may differ from row to row.
    cell_px : int
        Side a picture is magnified to, as far as a whole number brings it.

    Raises
    ------
    DataError
        No row, or one that holds no such pictures.
    """
    for name, pictures in rows.items():
        if pictures.ndim != 4 or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
            raise DataError(
                f"row {name!r}: pictures (n, p, p, 3) uint8 expected, got {pictures.shape} "
                f"{pictures.dtype}"
            )
    if not rows:
        raise DataError("a page needs a row of pictures, got none")
    most = max(len(pictures) for pictures in rows.values())
    step = cell_px + _GAP_PX
    page = np.full((len(rows) * step + _GAP_PX, _LABEL_PX + most * step, 3), _PAPER, np.uint8)
    for line, pictures in enumerate(rows.values()):
        times = max(1, cell_px // pictures.shape[1])
        for column, picture in enumerate(pictures):
            large = picture.repeat(times, 0).repeat(times, 1)[:cell_px, :cell_px]
            top, left = _GAP_PX + line * step, _LABEL_PX + column * step
            page[top : top + len(large), left : left + large.shape[1]] = large
    picture = Image.fromarray(page)
    pen = ImageDraw.Draw(picture)
    for line, name in enumerate(rows):
        pen.text((8, _GAP_PX + line * step + cell_px // 2 - 6), name, fill=_INK)
    return np.asarray(picture)
