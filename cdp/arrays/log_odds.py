"""Log-odds: probability <-> log(p / (1 - p)), within a limit.

The contract:
- Log-odds of independent evidence add up, so sums and means over pairs are taken in them.
- A probability of 0 or 1 has infinite log-odds and would outweigh all others: a limit bounds it.
- All arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np

from cdp.arrays.scratch import BLOCK, allocate

MARGIN = 1e-12
"""Probabilities count as at least this and at most 1 - this, so that the logarithms are finite."""


def to_log_odds(
    probability: np.ndarray, limit: float = math.inf, *, margin: float = MARGIN
) -> np.ndarray:
    """Log-odds of probabilities, of the same shape, float64 in [-limit, limit].

    probability : float in [0, 1], first clipped to [margin, 1 - margin].
    """
    value = np.clip(np.asarray(probability, np.float64), margin, 1 - margin)
    return np.clip(np.log(value) - np.log1p(-value), -limit, limit)


def fill_log_odds(
    probability: np.ndarray, limit: float = math.inf, *, margin: float = MARGIN
) -> np.ndarray:
    """`to_log_odds` of (m,) probabilities in blocks, the result on disk where it is large."""
    out = allocate(probability.shape, np.float64)
    for start in range(0, len(out), BLOCK):
        part = slice(start, start + BLOCK)
        out[part] = to_log_odds(probability[part], limit, margin=margin)
    return out


def to_probability(log_odds: np.ndarray, limit: float = math.inf) -> np.ndarray:
    """The logistic function of log-odds clipped to [-limit, limit], float64 in [0, 1]."""
    return np.asarray(1 / (1 + np.exp(-np.clip(log_odds, -limit, limit))))


def convert_threshold(probability: float) -> float:
    """Log-odds of one probability in (0, 1), without a limit."""
    return math.log(probability) - math.log1p(-probability)
