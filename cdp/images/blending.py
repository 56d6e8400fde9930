"""Two faces into one that is nobody's: more faces to ask a teacher about.

The contract:
- Faces aligned to the same template go in, one face of the same frame comes out: one half of them
  laid over the other (a morph), or the upper part of one above the lower part of the other, with a
  soft seam. Each of the two may be mirrored first.
- A blend is a function of its two faces and its seed; the batch plays no part.
- A blend has no identity and no label. What it is good for is another model's opinion of it.
"""

from __future__ import annotations

import numpy as np

from cdp.errors import DataError

_SEAM_SHARE = 0.35
"""Of the blends are joined along a seam; the others are morphs."""


def blend_faces(first: np.ndarray, second: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Blend faces, pair by pair.

    Parameters
    ----------
    first, second : (n, s, s, 3) uint8, RGB
    seeds : (n,) int64, 0 or above

    Returns
    -------
    blends : (n, s, s, 3) uint8
        A morph takes 0.3 to 0.7 of the first; a seam lies at 0.4 to 0.7 of the side from the top,
        between the eyes and the mouth of the standard template.

    Raises
    ------
    DataError
        Arrays that do not match.

    Notes
    -----
    Ours, after mixup (Zhang et al. 2018) and the patient teacher of Beyer et al. 2022, who is asked
    about the mixed image itself. The embedding of a morph is not the mean of the two embeddings: on
    LFW their cosine is .59.
    """
    if first.shape != second.shape or len(seeds) != len(first) or first.dtype != np.uint8:
        raise DataError(
            f"two arrays of faces (n, s, s, 3) uint8 and n seeds expected, got {first.shape} "
            f"{first.dtype}, {second.shape} and {len(seeds)}"
        )
    blends = np.empty_like(first)
    height = (np.arange(first.shape[1], dtype=np.float32)[:, None, None] + 0.5) / first.shape[1]
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(int(seed))
        mirror_first, mirror_second, kind, place = rng.random(4)
        upper = first[row, :, ::-1] if mirror_first < 0.5 else first[row]
        lower = second[row, :, ::-1] if mirror_second < 0.5 else second[row]
        if kind < _SEAM_SHARE:
            share = 1 / (1 + np.exp((height - (0.4 + 0.3 * place)) / 0.027))
        else:
            share = np.float32(0.3 + 0.4 * place)
        blends[row] = np.rint(share * upper + (1 - share) * lower)
    return blends
