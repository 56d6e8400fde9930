"""Calibration of probabilities: weighted reliability curve and expected calibration error.

The contract:
- Bins are of equal width over [0, 1]; a bin holds its lower edge, the last one both edges.
- Pairs may be weighted; the weight of a bin is the sum of its pairs' weights.
- An empty bin has NaN for its probability and rate and does not enter the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.metrics.verification import check_scores


@dataclass(frozen=True)
class ReliabilityCurve:
    """Observed rate of positive pairs by predicted probability.

    lower : (b,) float64, lower edge of each bin of equal width over [0, 1].
    mean_probability, observed_rate : (b,) float64; NaN for an empty bin.
    weight : (b,) float64, sum of the weights of the bin's pairs.
    """

    lower: np.ndarray
    mean_probability: np.ndarray
    observed_rate: np.ndarray
    weight: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean gap between probability and rate, weighted by pairs (Naeini et al. 2015)."""
        full = self.weight > 0
        gap = np.abs(self.mean_probability[full] - self.observed_rate[full])
        return float(np.average(gap, weights=self.weight[full]))


def measure_reliability(
    probability: np.ndarray, same: np.ndarray, *, weight: np.ndarray | None = None, bins: int = 15
) -> ReliabilityCurve:
    """Bin pairs by predicted probability and compare with the truth.

    Parameters
    ----------
    probability : (m,) float in [0, 1], predicted that a pair is of one identity.
    same : (m,) bool, whether it is.
    weight : (m,) float >= 0, or None for one each.
    bins : number of equal-width bins, >= 1.

    Raises
    ------
    DataError
        No pair, shapes that differ, a probability outside [0, 1] or NaN, bins < 1.

    Source: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.
    """
    value, same = check_scores(probability, same, "probability")
    if bins < 1:
        raise DataError(f"expected at least one bin, got {bins}")
    if value.min() < 0.0 or value.max() > 1.0:
        raise DataError(
            f"expected probabilities in [0, 1], got {value.min()} to {value.max()}; "
            "pass the mediator's output, not a similarity"
        )
    share = np.ones(len(value)) if weight is None else np.asarray(weight, np.float64)
    if share.shape != value.shape:
        raise DataError(f"expected one weight a pair, got {len(value)} pairs, {share.shape}")
    bin_of = np.minimum((value * bins).astype(np.int64), bins - 1)
    total = np.bincount(bin_of, share, bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityCurve(
            lower=np.arange(bins) / bins,
            mean_probability=np.bincount(bin_of, share * value, bins) / total,
            observed_rate=np.bincount(bin_of, share * same, bins) / total,
            weight=total,
        )
