"""Constraints of tracks: a track is one person, and the faces of one frame are different people.

The contract:
- Enters: the track and the frame of each row, and the views. Leaves: constraints as a reviewer's.
- A track is believed from one face to the next only where their mean cosine over the views exceeds
  that of nearly all pairs of different people: those of one frame, or, where these are few, random
  pairs. Elsewhere it is cut: the tracker may have gone over to another face.
- What a reviewer has decided on a row outranks its track.

Source: ours; must-links and cannot-links of tracks as in Wu et al. 2013 (constrained clustering of
faces in video).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.arrays.cosine import make_unit
from cdp.review.constraints import Constraints
from cdp.types import View, load_view

SAMPLE = 8192
"""Random pairs."""
ENOUGH = 10
"""Pairs of one frame that are enough to know what different people reach."""
DIFFERENT = 0.99
"""Quantile of their cosines that a link must exceed."""
DEVIATIONS = 3.0
"""Deviations above the median of random pairs instead, by the lower half of them: some of the upper
half are of one person."""


def constrain_tracks(
    track: np.ndarray, frame: np.ndarray, views: Sequence[View], *, seed: int = 0
) -> Constraints:
    """Must-links inside tracks and cannot-links between the faces of a frame.

    Parameters
    ----------
    track : (n,) int64, -1 for a row without one.
    frame : (n,) int64, a number for each frame of each clip, rising with time; -1 for none.
    views : one (n, d_v) array a model, or a function that loads it.
    seed : of the random pairs.
    """
    count = len(track)
    rows = np.flatnonzero(track >= 0)
    order = rows[np.lexsort((frame[rows], track[rows]))]
    before, after = order[:-1], order[1:]
    inside = track[before] == track[after]
    before, after = before[inside], after[inside]
    apart = _list_apart(frame)
    random = np.random.default_rng([seed, 0x747261636B]).integers(0, max(count, 1), (2, SAMPLE))
    random = random[:, random[0] != random[1]] if count else random[:, :0]
    least = _find_least(views, apart, random)
    holds = _measure_mean(views, before, after) > least
    segment = _number_segments(order, track, after[~holds])
    groups = [group for group in _group_rows(order, segment) if len(group) > 1]
    own = np.arange(count)
    for group in groups:
        own[group] = group[0]
    low, high = np.sort(own[apart], axis=0)
    keys = np.unique((low * count + high)[low < high])
    pairs = [(np.array([key // count]), np.array([key % count])) for key in keys.tolist()]
    return Constraints(count, tuple(groups), tuple(pairs))


def give_way(tracks: Constraints, decided: Constraints) -> Constraints:
    """Both constraints; those of tracks without the rows that a reviewer has decided on."""
    taken = np.zeros(tracks.count, bool)
    for group in (*decided.same, *(side for pair in decided.apart for side in pair)):
        taken[group] = True
    if decided.rejected is not None:
        taken[decided.rejected] = True
    same = [group[~taken[group]] for group in tracks.same]
    apart = [pair for pair in tracks.apart if not (taken[pair[0]].any() or taken[pair[1]].any())]
    return Constraints(
        tracks.count,
        (*decided.same, *(group for group in same if len(group) > 1)),
        (*decided.apart, *apart),
        decided.rejected,
    )


def _list_apart(frame: np.ndarray) -> np.ndarray:
    """(2, p) rows of one frame, each pair once."""
    rows = np.flatnonzero(frame >= 0)
    rows = rows[np.argsort(frame[rows], kind="stable")]
    found = [np.empty((2, 0), np.int64)]
    step = 1
    while step < len(rows):
        together = frame[rows[:-step]] == frame[rows[step:]]
        if not together.any():
            break
        found.append(np.stack([rows[:-step][together], rows[step:][together]]))
        step += 1
    return np.concatenate(found, axis=1)


def _measure_mean(views: Sequence[View], one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(p,) mean cosine of pairs of rows over the views."""
    total = np.zeros(len(one))
    for view in views:
        loaded = load_view(view)
        left, right = (make_unit(np.ascontiguousarray(loaded[rows]))[0] for rows in (one, other))
        total += np.einsum("nd,nd->n", left, right, dtype=np.float64) / len(views)
    return total


def _find_least(views: Sequence[View], apart: np.ndarray, random: np.ndarray) -> float:
    """The cosine that a link must exceed."""
    if apart.shape[1] >= ENOUGH:
        return float(np.quantile(_measure_mean(views, *apart), DIFFERENT))
    if not random.shape[1]:
        return -1.0
    low, middle = np.quantile(_measure_mean(views, *random), (0.16, 0.5))
    return float(middle + DEVIATIONS * (middle - low))


def _number_segments(order: np.ndarray, track: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """(len(order),) a number for each believed part of a track."""
    begins = np.isin(order, starts)
    begins[1:] |= track[order[1:]] != track[order[:-1]]
    return np.cumsum(begins)


def _group_rows(order: np.ndarray, segment: np.ndarray) -> list[np.ndarray]:
    return [np.sort(part) for part in np.split(order, np.flatnonzero(np.diff(segment)) + 1)]
