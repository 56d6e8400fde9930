"""Calibration of probabilities: reliability by bins, and the expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.metrics.verification import check_scores

# --- probabilities ------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """A reliability curve over equal-width bins of [0, 1], and its summary.

    error : expected calibration error, the count-weighted mean of |share - probability|.
    edge : (bins + 1,) float64, the borders; a bin holds its lower border, the last one both.
    probability : (bins,) float64, mean predicted probability in the bin; nan when it is empty.
    share : (bins,) float64, share of pairs that are true in the bin; nan when it is empty.
    count : (bins,) int64, pairs in the bin.
    """

    error: float
    edge: np.ndarray
    probability: np.ndarray
    share: np.ndarray
    count: np.ndarray


def measure_calibration(probability: np.ndarray, same: np.ndarray, bins: int = 15) -> Calibration:
    """Compare predicted probabilities with what came true.

    Parameters
    ----------
    probability : (m,) float in [0, 1], predicted that a pair is of one identity.
    same : (m,) bool, whether it is.
    bins : number of equal-width bins, >= 1.

    Raises
    ------
    DataError : no pair, shapes that differ, a probability outside [0, 1] or NaN, bins < 1.

    Source: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.
    """
    probability, same = check_scores(probability, same, "probability")
    if bins < 1:
        raise DataError(f"expected at least one bin, got {bins}")
    if probability.min() < 0.0 or probability.max() > 1.0:
        raise DataError(
            f"expected probabilities in [0, 1], got {probability.min()} to {probability.max()}; "
            "pass the mediator's output, not a similarity"
        )
    edge = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edge, probability, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=probability, minlength=bins) / count
        share = np.bincount(place, weights=same, minlength=bins) / count
    filled = count > 0
    error = float(np.abs(mean - share)[filled] @ count[filled] / count.sum())
    return Calibration(error, edge, mean, share, count)
