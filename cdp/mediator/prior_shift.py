"""Prior-shift correction: estimate the positive rate of an unlabelled set and rescale to it.

The contract:
- Enters: probabilities calibrated on the labelled set. Leaves: probabilities at the positive rate
  of the unlabelled set, estimated by EM (Saerens 2002) without ground truth.
- EM assumes that positive pairs are distributed alike in both sets. They are not where a few large
  identities own most of them: their pairs are easy, and in a set with more such identities the rate
  that explains the easy pairs is too high for the others. `correct_evenly` down-weights a pair by
  the expected number of positives at its two images, so that large identities do not dominate the
  estimated prior.
- Where the scores are no mixture of the labelled positive and negative ones, and the rate that
  explains them best lies far from their mean, the assumption has failed: the probabilities stay as
  they are (`keep_prior`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from numba import njit
from scipy.optimize import brentq

from cdp.arrays.scratch import BLOCK, allocate
from cdp.arrays.threads import list_blocks
from cdp.errors import DataError
from cdp.metrics.calibration import ReliabilityCurve
from cdp.types import PairTable

LOGIT_LIMIT = 15.0
"""Largest log-odds: 1 - 3e-7 as a probability, beyond which float32 rounds to 1."""
_EVENNESS = 0.2
"""Exponent of the weights: 0 weights each pair alike, 1/2 each image alike."""
_STEPS = 3
"""Alternations of weights and probabilities; they hardly change after the second."""
_FINEST = 4 * np.finfo(float).eps
"""Relative tolerance of the rate: as fine as float64 resolves it."""
CONTRADICTED = (
    "the scores of the unlabelled pairs are no mixture of those of the held-out labelled pairs: "
    "the labelled images differ from the unlabelled ones, and probabilities may not hold there"
)
"""Why no quality is estimated where a correction was refused."""
_NO_WEIGHT = np.empty(0)
_MOST_FACTOR = 2.0
_MOST_MISFIT = 0.05
"""A correction is refused where the rate changes by more than the factor, and the scores differ
from the best mixture by more than this share of their mean. On LFW at 24 px the rate changed by
1 %; at 16 px of surveillance it fell to a twentieth, with a misfit of .29, and F to .00, where the
uncorrected probabilities gave .26."""


@dataclass(frozen=True)
class PriorCorrection:
    """Probabilities of a set, rescaled to its positive rate.

    probability : (m,) float32. rate : the estimated share of positive pairs.
    refused : whether they are left as they were, because the scores contradict the correction.
    """

    probability: np.ndarray
    rate: float
    refused: bool = False


def correct_prior(
    probability: np.ndarray, training_rate: float, *, pair_weight: np.ndarray | None = None
) -> PriorCorrection:
    """Estimate the positive rate of an unlabelled set and rescale its probabilities to it.

    Maximum likelihood over the unlabelled scores, as by EM (Saerens, Latinne & Decaestecker 2002):
    positive pairs are assumed to be distributed alike in both sets, negative pairs too. The
    likelihood is concave in the one unknown rate, so its maximum is the root of the derivative
    (Brent 1973), which needs no starting point.

    Parameters
    ----------
    probability : (m,) float in [0, 1], calibrated for `training_rate`.
    training_rate : positive rate of the labelled pairs, in (0, 1).
    pair_weight : (m,) float >= 0; None: 1 each. With weights both rates are weighted shares.

    Returns
    -------
    PriorCorrection
        An empty input comes back empty with the rate unchanged.

    Raises
    ------
    DataError
        A probability outside [0, 1] or NaN, or a training rate outside (0, 1).
    """
    if not 0 < training_rate < 1:
        raise DataError(
            f"correct_prior: training_rate must lie between 0 and 1, got {training_rate}; "
            "the labelled pairs need positive and negative ones"
        )
    value = np.asarray(probability)
    if value.dtype not in (np.float32, np.float64):
        value = value.astype(np.float64)
    if value.size == 0:
        return PriorCorrection(value.astype(np.float32), float(training_rate))
    if not (value.min() >= 0 and value.max() <= 1):
        raise DataError(
            "correct_prior: expected probabilities in [0, 1], got "
            f"[{value.min()}, {value.max()}] (NaN counts as outside)"
        )
    weight = _NO_WEIGHT if pair_weight is None else np.asarray(pair_weight, np.float64)
    rate = _find_rate(partial(_differentiate, value, weight, training_rate), len(value))
    return PriorCorrection(_rescale(value, training_rate, rate), rate)


def _find_rate(derivative: Callable[[float], float], pairs: int) -> float:
    """The rate at which the falling derivative is zero, within (0, 1)."""
    derivative = cache(derivative)  # the search asks for both ends again
    # a rate of exactly 0 or 1 could not be revised by any later evidence
    low, high = 0.5 / (pairs + 1), 1 - 0.5 / (pairs + 1)
    if derivative(low) <= 0:
        return low
    if derivative(high) >= 0:
        return high
    return float(brentq(derivative, low, high, xtol=_FINEST * low, rtol=_FINEST))


def _rescale(value: np.ndarray, training_rate: float, rate: float) -> np.ndarray:
    """The probabilities at another positive rate, (m,) float32."""
    limit = 1 / (1 + math.exp(LOGIT_LIMIT))
    out = allocate(value.shape)
    for start in range(0, len(value), BLOCK):
        part = value[start : start + BLOCK].astype(np.float64)
        true_part = rate / training_rate * part
        corrected = true_part / (true_part + (1 - rate) / (1 - training_rate) * (1 - part))
        out[start : start + BLOCK] = np.clip(corrected, limit, 1 - limit)
    return out


def keep_prior(
    probability: np.ndarray, corrected: PriorCorrection, held_out: ReliabilityCurve
) -> bool:
    """Whether to leave probabilities as they are, because the correction's assumption has failed.

    Source: ours. The misfit is the Wasserstein distance between the scores and the mixture, at the
    corrected rate, of the scores of held-out positive and negative pairs.

    Parameters
    ----------
    probability : (m,) float in [0, 1], before the correction.
    corrected : from `correct_prior`.
    held_out : the reliability of the same scores on held-out labelled pairs.
    """
    mean = float(np.mean(probability, dtype=np.float64)) if len(probability) else 0.0
    if not mean or 1 / _MOST_FACTOR <= corrected.rate / mean <= _MOST_FACTOR:
        return False
    weight, rate = np.nan_to_num(held_out.weight), np.nan_to_num(held_out.observed_rate)
    bins = len(weight)
    found = np.zeros(bins, np.int64)
    for part in list_blocks(0, len(probability), BLOCK):
        place = (np.asarray(probability[part], np.float64) * bins).astype(np.int64)
        found += np.bincount(np.minimum(place, bins - 1), minlength=bins)
    positive, negative = weight * rate, weight * (1 - rate)
    mixture = corrected.rate * positive / positive.sum()
    mixture += (1 - corrected.rate) * negative / negative.sum()
    misfit = np.abs(np.cumsum(found / len(probability) - mixture)).sum() / bins
    return bool(misfit > _MOST_MISFIT * mean)


def correct_evenly(
    probability: np.ndarray,
    training_rate: float,
    even_rate: float,
    pairs: PairTable,
    count: int,
    held_out: ReliabilityCurve | None = None,
) -> PriorCorrection:
    """`correct_prior` with pairs weighted by `weigh_images`.

    Parameters
    ----------
    probability, training_rate : as for `correct_prior`.
    even_rate : mean probability of the labelled pairs, weighted by `weigh_images`; a set with the
        same distribution then stays unchanged.
    pairs : all candidate pairs of the set. count : number of its images.
    held_out : reliability of the scores on held-out pairs, for `keep_prior`; None: always correct.

    Returns
    -------
    PriorCorrection
        Its rate is the plain mean of the probabilities.

    Notes
    -----
    Ours. On LFW at 24 px, whose unlabelled set has one identity with 500 images and 4,069 with one,
    a probability of .60 meant .22 to .40 in pairs of the base graph before; BCubed F rose by .3 to
    .7 points (three draws). Weighting each image alike gains as much again there, but overestimates
    probabilities where views are poor.
    """
    found = correct_prior(probability, training_rate)
    if held_out is not None and keep_prior(probability, found, held_out):
        return leave_prior(probability)
    for _ in range(_STEPS if len(pairs) else 0):
        pair_weight = weigh_images(pairs, found.probability, count)
        found = correct_prior(probability, even_rate, pair_weight=pair_weight)
    mean = float(found.probability.mean(dtype=np.float64)) if len(pairs) else found.rate
    return PriorCorrection(found.probability, mean)


def leave_prior(probability: np.ndarray) -> PriorCorrection:
    """The probabilities as they are, with their mean as the rate."""
    limit = 1 / (1 + math.exp(LOGIT_LIMIT))
    kept = np.clip(probability, limit, 1 - limit).astype(np.float32)
    return PriorCorrection(kept, float(kept.mean(dtype=np.float64)), refused=True)


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _differentiate(value, weight, training_rate, rate):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The derivative of the log-likelihood by the rate; an empty `weight` counts each pair once."""
    true_scale, false_scale = 1 / training_rate, 1 / (1 - training_rate)
    total = 0.0
    for i in range(len(value)):
        false_ratio = (1 - value[i]) * false_scale
        step = value[i] * true_scale - false_ratio
        part = step / (false_ratio + rate * step)
        total += part * weight[i] if len(weight) else part
    return total


def weigh_images(pairs: PairTable, probability: np.ndarray, count: int) -> np.ndarray:
    """Weights of pairs that fall with the expected number of positive pairs at their two images.

    Parameters
    ----------
    pairs : all candidate pairs of `count` images.
    probability : (m,) float in [0, 1], or bool: whether each pair is positive.

    Returns
    -------
    (m,) float64 in (0, 1]
        ((1 + a) (1 + b)) ** -.2, where a and b positive pairs are expected at the two images.
    """
    value = np.asarray(probability)
    partners = _add_up(pairs.source, value, count) + _add_up(pairs.target, value, count)
    image_weight = (1 + partners) ** -_EVENNESS
    pair_weight = allocate((len(pairs),), np.float64)
    _multiply_ends(image_weight, pairs.source, pairs.target, pair_weight)
    return pair_weight


@njit(cache=True, nogil=True)
def _add_up(end, value, count):  # type: ignore[no-untyped-def]  # pragma: no cover
    """The sum of the values of each row's pairs, (count,) float64."""
    total = np.zeros(count)
    for e in range(len(end)):
        total[end[e]] += value[e]
    return total


@njit(cache=True, nogil=True)
def _multiply_ends(image_weight, source, target, out):  # type: ignore[no-untyped-def]  # pragma: no cover
    for e in range(len(source)):
        out[e] = image_weight[source[e]] * image_weight[target[e]]
