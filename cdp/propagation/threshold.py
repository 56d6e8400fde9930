"""Which threshold to cut at: chosen on held-out identities, or for a target precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from cdp.errors import ConfigError
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.average_linkage import Agglomeration
from cdp.propagation.quality import estimate_quality
from cdp.types import PairTable

THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8)
"""Cuts tried on the held-out people."""
PRECISION_THRESHOLDS = (*THRESHOLDS, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999)
"""Cuts whose precision on the held-out people is kept, for a target precision."""
TARGET_THRESHOLDS = (
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.85,
    0.9,
    0.93,
    0.95,
    0.97,
    0.98,
    0.99,
    0.995,
    0.998,
    0.999,
)
"""Thresholds tried for a target precision."""
_GAIN = 0.015
"""Of BCubed F: what a threshold must win on held-out people to be preferred to one half. Smaller
gains did not carry over to strangers (LFW at 24 and 16 px), those of .02 to .05 did (at 12 px).
Pairwise F is not asked: one merge with a person of 500 images decides it."""


def measure_precision_curve(steps: Sequence[tuple[Agglomeration, np.ndarray]]) -> np.ndarray:
    """The `precision_curve` of a second reading."""
    precision = np.zeros(len(PRECISION_THRESHOLDS))
    for merged, identity in steps:
        precision += [score_pairwise(identity, merged.cut(cut))[0] for cut in PRECISION_THRESHOLDS]
    return np.column_stack([PRECISION_THRESHOLDS, np.maximum.accumulate(precision / len(steps))])


def choose_threshold(f: np.ndarray) -> float:
    """One half, unless the best of `THRESHOLDS` wins `_GAIN` on it.

    f : (thresholds,) F of held-out people, compared once averaged with its neighbours.
    """
    padded = np.pad(f, 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    best = int(smooth.argmax())
    return THRESHOLDS[best] if smooth[best] > smooth[THRESHOLDS.index(0.5)] + _GAIN else 0.5


def choose_cut(
    cut: Callable[[float], np.ndarray],
    pairs: PairTable,
    probability: np.ndarray,
    *,
    target_precision: float,
    loosest: float = 0.5,
    precision_curve: np.ndarray | None = None,
) -> float:
    """The loosest threshold of which estimate and held-out people promise a pairwise precision.

    Parameters
    ----------
    cut : threshold -> labels, such as `Agglomeration.cut` of an agglomeration at `loosest`.
    target_precision : in (0, 1). Recall is what it costs.
    loosest : the threshold that serves precision and recall alike; no looser one is tried.
    precision_curve : (t, 2), rising thresholds and the precision of held-out people there, from
        the second stage; None or no row leaves the word to the estimate. Where none was pure
        enough the strictest is the loosest that is tried.

    Returns
    -------
    float
        `loosest`, one of `TARGET_THRESHOLDS`, or one of `precision_curve`; the strictest where
        none promises enough.

    Raises
    ------
    ConfigError
        A target outside (0, 1).
    """
    if not 0 < target_precision < 1:
        raise ConfigError(
            f"propagate.target_precision: expected a number between 0 and 1, got {target_precision}"
        )
    if precision_curve is not None and len(precision_curve):
        enough = precision_curve[precision_curve[:, 1] >= target_precision, 0]
        loosest = max(loosest, float(enough.min() if len(enough) else precision_curve[-1, 0]))
    for threshold in (loosest, *(level for level in TARGET_THRESHOLDS if level > loosest)):
        found = estimate_quality(cut(threshold), pairs, probability)
        if found.precision >= target_precision:
            return threshold
    return max(TARGET_THRESHOLDS[-1], loosest)
