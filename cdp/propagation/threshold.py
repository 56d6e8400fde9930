"""The threshold to cut at: chosen on held-out identities, or for a target precision.

The contract:
- Enters: clusterings of held-out identities at several thresholds, or of an unlabelled set with its
  calibrated probabilities. Leaves: one threshold.
- Higher thresholds are stricter: more precision, less recall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cdp.errors import ConfigError
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.average_linkage import Agglomeration
from cdp.propagation.quality import estimate_cuts
from cdp.types import PairTable

THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
"""Thresholds tried on the held-out identities."""
PRECISION_THRESHOLDS = (*THRESHOLDS, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Thresholds at which the precision on held-out identities is measured, for a target precision."""
TARGET_THRESHOLDS = (
    0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999,
)  # fmt: skip
"""Thresholds tried for a target precision."""
NEUTRAL_THRESHOLD = 0.5
"""Where a pair is as likely positive as negative; used unless another is clearly better."""
_GAIN = 0.015
"""Gain in BCubed F on held-out identities for which a threshold is preferred to one half. Smaller
gains did not carry over to new identities (LFW at 24 and 16 px), those of .02 to .05 did (at
12 px). Pairwise F is not used: one merge with an identity of 500 images decides it."""
_SLACK = 0.005
"""Loss in BCubed F that a stricter threshold may have. Labelled identities have two images or more,
so that wrong merges with the many identities of one image count too little on them."""


def measure_precision_curve(steps: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """The `precision_curve` of a second stage: (t, 2) float64, thresholds and precision.

    steps : clusterings of held-out identities, and the identity of each row.
    """
    precision = np.zeros(len(PRECISION_THRESHOLDS))
    for merged, identity in steps:
        precision += [score_pairwise(identity, merged.cut(cut))[0] for cut in PRECISION_THRESHOLDS]
    return np.column_stack([PRECISION_THRESHOLDS, np.maximum.accumulate(precision / len(steps))])


def choose_threshold(f: np.ndarray) -> float:
    """The strictest of the good `THRESHOLDS` if the best gains more than `_GAIN`, else one half.

    f : (thresholds,) BCubed F on held-out identities; each value is averaged with its neighbours
        before the comparison. Good is what comes within `_SLACK` of the best.
    """
    padded = np.pad(f, 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    if smooth.max() <= smooth[THRESHOLDS.index(NEUTRAL_THRESHOLD)] + _GAIN:
        return NEUTRAL_THRESHOLD
    return THRESHOLDS[int(np.flatnonzero(smooth >= smooth.max() - _SLACK).max())]


def choose_cut(
    cut: Callable[[float], np.ndarray],
    pairs: PairTable,
    probability: np.ndarray,
    *,
    target_precision: float,
    loosest: float = NEUTRAL_THRESHOLD,
    precision_curve: np.ndarray | None = None,
    representative: np.ndarray | None = None,
) -> float:
    """The loosest threshold whose pairwise precision, held-out and estimated, reaches a target.

    Parameters
    ----------
    cut : threshold -> labels, such as `Agglomeration.cut` of an agglomeration at `loosest`.
    target_precision : in (0, 1). A higher one costs recall.
    loosest : the lowest threshold tried, the one that balances precision and recall.
    precision_curve : (t, 2), rising thresholds and the precision on held-out identities there, from
        the second stage; None or no row: the estimate alone decides. If no threshold reaches the
        target on held-out identities, the strictest of them is the lowest tried.
    representative : as for `estimate_quality`.

    Returns
    -------
    float
        `loosest`, one of `TARGET_THRESHOLDS`, or one of `precision_curve`; the strictest if none
        reaches the target.

    Raises
    ------
    ConfigError
        A target outside (0, 1).
    """
    if not 0 < target_precision < 1:
        raise ConfigError(
            f"target_precision: expected a number between 0 and 1, got {target_precision}"
        )
    if precision_curve is not None and len(precision_curve):
        enough = precision_curve[precision_curve[:, 1] >= target_precision, 0]
        loosest = max(loosest, float(enough.min() if len(enough) else precision_curve[-1, 0]))
    levels = [loosest, *(level for level in TARGET_THRESHOLDS if level > loosest)]
    found_at = estimate_cuts(map(cut, levels), pairs, probability, representative)
    for threshold, found in zip(levels, found_at, strict=True):
        if found.precision is None or found.precision >= target_precision:  # None: no pair left
            return threshold
    return max(TARGET_THRESHOLDS[-1], loosest)
