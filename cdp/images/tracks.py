"""Tracks of faces in a clip: boxes of successive frames linked while it is sure which is which.

The contract:
- Enters: the frame and the box of each face of one clip. Leaves: a track number a face.
- A track has one face a frame at most. It goes on only where its last box and a new one overlap
  clearly, and clearly more than either overlaps any other; else a new track begins, so that faces
  that cross are never exchanged.
- The result does not depend on the order of the faces of a frame.

Source: ours, after the assignment by overlap of SORT (Bewley et al. 2016), without motion model.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

LEAST_OVERLAP = 0.3
"""Intersection over union of two boxes of one track."""
CLEARLY = 0.5
"""The second largest overlap of either box is at most this share of the one that is taken."""
LONGEST_GAP = 2
"""Frames looked at without the face, after which its track has ended."""


def link_boxes(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The tracks of the faces of one clip.

    Parameters
    ----------
    frame : (n,) int64, number of the frame of each face.
    box : (n, 4) float, left, top, right, bottom in pixels.

    Returns
    -------
    (n,) int64, 0 and up in the order in which tracks begin (within a frame from left to right).
    """
    track = np.full(len(frame), -1, np.int64)
    order = np.lexsort((box[:, 1], box[:, 0], frame)) if len(frame) else np.empty(0, np.int64)
    looked = np.unique(frame)
    last: dict[int, tuple[int, int]] = {}  # track -> (row of its last face, place in `looked`)
    begun = 0
    for place, number in enumerate(looked):
        rows = order[frame[order] == number]
        last = {name: seen for name, seen in last.items() if place - seen[1] <= LONGEST_GAP + 1}
        names = list(last)
        overlap = measure_overlap(box[[last[name][0] for name in names]], box[rows])
        for one, other in zip(*linear_sum_assignment(-overlap), strict=True):
            if _is_sure(overlap, one, other):
                track[rows[other]] = names[one]
        for row in rows:
            if track[row] < 0:
                track[row] = begun
                begun += 1
            last[int(track[row])] = (int(row), place)
    return track


def measure_overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(m, 4) and (n, 4) boxes -> (m, n) intersection over union."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    area = [np.clip(box[:, 2:] - box[:, :2], 0, None).prod(-1) for box in (one, other)]
    whole = area[0][:, None] + area[1] - shared
    return np.asarray(shared / np.maximum(whole, 1e-9))


def _is_sure(overlap: np.ndarray, one: int, other: int) -> bool:
    taken = overlap[one, other]
    rest = np.concatenate([np.delete(overlap[one], other), np.delete(overlap[:, other], one)])
    return bool(taken >= LEAST_OVERLAP and rest.max(initial=0) <= CLEARLY * taken)
