"""Faces as the models see them: a few images of each set after each member's own preprocessing.

The contract:
- Pictures are made of the numbers that a model is shown, with range and order of colours undone,
  and nothing else: what was cut off, reduced or restored before shows.
- `SHOWN` images a set, chosen by the seed. The first row has the images as the data set gives them.
- A member or an image that can no longer be read costs its row, never the page.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np

from cdp.errors import CdpError
from pipelines.pages.compared_sets import SETS

if TYPE_CHECKING:
    import pandas as pd

    from cdp.embedding import Embedder

SHOWN = 5
QUALITY = 90
"""Of the WebP encoder, 0 to 100."""


@dataclass(frozen=True)
class Strip:
    """Pictures of one set in a row: `data` is a WebP file in base64, `count` pictures wide."""

    title: str
    count: int
    data: str


@dataclass(frozen=True)
class Seen:
    """A row of the section: what one model is shown. Without strips, `text` says why."""

    name: str
    text: str
    strips: tuple[Strip, ...] = ()


def choose_images(samples: pd.DataFrame, seed: int) -> dict[str, list[str]]:
    """Name of a set -> paths of at most `SHOWN` of its images.

    samples : table `ingest/samples`.
    """
    random = np.random.default_rng(seed)
    found = {}
    for split, title in SETS.items():
        paths = samples.path[samples.split == split].to_numpy(object)
        if len(paths):
            found[title] = random.permutation(paths)[:SHOWN].tolist()
    return found


def show_inputs(
    images: dict[str, np.ndarray],
    reduce: Callable[[np.ndarray], np.ndarray],
    members: Sequence[tuple[str, str, Callable[[], Embedder]]],
) -> list[Seen]:
    """The rows of the section: the images themselves, then those of each member.

    images : name of a set -> (n, s, s, 3) uint8 RGB, as the data set gives them.
    reduce : what happens to them before any member sees them.
    members : name, where it is from, and a function that opens its embedder.
    """
    side = next(iter(images.values())).shape[1]
    given = Seen("images", f"as the data set gives them, {side} x {side} px", _cut(images))
    faces = {title: reduce(pictures) for title, pictures in images.items()}
    return [given, *(_show(name, origin, open_it, faces) for name, origin, open_it in members)]


def _show(
    name: str, origin: str, open_embedder: Callable[[], Embedder], faces: dict[str, np.ndarray]
) -> Seen:
    try:
        embedder = open_embedder()
        shown = {title: embedder.prepare(pictures) for title, pictures in faces.items()}
    except (CdpError, OSError) as error:
        return Seen(name, f"{origin}: cannot be shown, {error}")
    way = embedder.preprocessing
    numbers = np.concatenate([each.reshape(-1) for each in shown.values()])
    side = next(iter(shown.values())).shape[2]
    text = (
        f"{origin}: {way.describe()}, {side} x {side} px; here from {numbers.min():.3g} to "
        f"{numbers.max():.3g}, mean {numbers.mean():.3g}"
    )
    return Seen(name, text, _cut({title: way.undo(each) for title, each in shown.items()}))


def _cut(pictures: dict[str, np.ndarray]) -> tuple[Strip, ...]:
    return tuple(Strip(title, len(each), _encode(each)) for title, each in pictures.items())


def _encode(pictures: np.ndarray) -> str:
    """(n, p, p, 3) uint8 -> one WebP file, the pictures beside each other, in base64."""
    from PIL import Image

    stream = BytesIO()
    Image.fromarray(np.hstack(list(pictures))).save(stream, "WEBP", quality=QUALITY)
    return base64.b64encode(stream.getvalue()).decode()
