"""Degraded copies of sharp faces that look, as pictures, like those of another set.

    copies = match_pile(faces, measure_appearance(pile), seeds)

Each copy is paired with one picture drawn from the pile. The face is degraded in `TRIES` ways, from
hardly at all to what a distant camera leaves of it, and the way is kept whose result looks most
like that picture (`cdp.images.appearance`). So the copies have the pile's own distribution of size,
sharpness, noise, light and cover, jointly, without a fit and without a label.

The contract:
- Enters: faces, the measures of pictures of the pile, and a seed a face. Leaves: faces of the side
  at which the pile was measured.
- A copy depends on its own face and seed and on the measures alone, never on the batch around it.

Source: ours.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cdp.errors import DataError
from cdp.images.appearance import APPEARANCE, measure_appearance
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade_pixels

TRIES = 10
"""Ways in which each face is degraded, of which one is kept."""
_LEVELS = ((0.06, 0.1), (0.09, 0.15), (0.13, 0.2), (0.18, 0.3), (0.28, 0.5), (0.45, 1.0))
"""Sides of the small grid, as shares of the copy's; each is tried once, then the best again."""
_BLOCK = 64


def list_ways() -> tuple[Degradation, ...]:
    """The degradations that are tried: `surveillance` at each of the levels of resolution."""
    surveillance = DEGRADATIONS["surveillance"]
    return tuple(
        replace(surveillance, low_res_rate=1.0, low_res_px=None, low_res_ratio=level)
        for level in _LEVELS
    )


def match_pile(
    faces: np.ndarray,
    appearance: np.ndarray,
    seeds: np.ndarray,
    *,
    size_px: int | None = None,
    tries: int = TRIES,
) -> np.ndarray:
    """Degrade each face until it looks, as a picture, like one drawn from the pile.

    Parameters
    ----------
    faces : (n, s, s, 3) uint8, RGB
    appearance : (p, 14) float32, p >= 1
        Of pictures of the pile, from `measure_appearance`.
    seeds : (n,) int64, >= 0
        One a copy: other seeds give other copies.
    size_px : side of the copies, that of the pile's pictures as they were measured; None: s.
    tries : ways in which each face is degraded.

    Returns
    -------
    copies : (n, size_px, size_px, 3) uint8

    Raises
    ------
    DataError
        No picture of the pile, or other shapes.
    """
    appearance = np.asarray(appearance, np.float32)
    if appearance.ndim != 2 or appearance.shape[1] != len(APPEARANCE) or not len(appearance):
        raise DataError(
            f"the pile's appearance (p, {len(APPEARANCE)}) with p >= 1 expected, "
            f"got {appearance.shape}"
        )
    seeds = np.asarray(seeds, np.int64)
    if seeds.shape != (len(faces),):
        raise DataError(f"one seed a face expected, got {seeds.shape} for {len(faces)} faces")
    spread = _measure_spread(appearance)
    side = size_px or faces.shape[1]
    copies = np.empty((len(faces), side, side, 3), np.uint8)
    for start in range(0, len(faces), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(faces)))
        wanted = appearance[[draw_picture(int(seed), len(appearance)) for seed in seeds[rows]]]
        copies[rows] = _match_block(
            np.asarray(faces[rows]), wanted / spread, seeds[rows], spread, side, tries
        )
    return copies


def draw_picture(seed: int, count: int) -> int:
    """The picture of the pile that a copy is paired with."""
    return int(np.random.default_rng([seed, 0x70696C65]).integers(count))


def _measure_spread(appearance: np.ndarray) -> np.ndarray:
    """The unit of each measure: half the range of the middle 68 % of the pile, or a least one."""
    low, high = np.quantile(appearance, (0.16, 0.84), axis=0)
    least = np.where([name.startswith(("detail", "noise")) for name in APPEARANCE], 0.2, 0.03)
    return np.maximum((high - low) / 2, least).astype(np.float32)


def _match_block(
    faces: np.ndarray,
    wanted: np.ndarray,
    seeds: np.ndarray,
    spread: np.ndarray,
    side: int,
    tries: int,
) -> np.ndarray:
    ways = list_ways()
    best = np.full(len(faces), np.inf, np.float32)
    kept = np.empty((len(faces), side, side, 3), np.uint8)
    level = np.zeros(len(faces), np.int64)
    for number in range(tries):
        # first each level once, then again the level that came nearest
        turn = np.full(len(faces), number) if number < len(ways) else level.copy()
        for tried_level in np.unique(turn):
            rows = np.flatnonzero(turn == tried_level)
            tried = degrade_pixels(
                faces[rows], seeds[rows] * tries + number, ways[tried_level], side
            )
            away = ((measure_appearance(tried) / spread - wanted[rows]) ** 2).sum(1)
            nearer = away < best[rows]
            found = rows[nearer]
            kept[found], best[found], level[found] = tried[nearer], away[nearer], tried_level
    return kept
