"""How much more likely two sets of images are one person's than two people's, from their cosines.

The contract:
- A set is one image, the images of one label, or a cluster. In each view it is represented by its
  centre, the direction of the sum of its unit vectors, and by its number of images.
- The logarithm of the likelihood ratio is linear in the cosines of the centres and in the noise of
  the centres (the sum of one over each size), with one product of both. It is fitted by logistic
  regression with both classes weighted alike, so that no prior is contained in it.

Source: ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RIDGE = 1e-3
_NEWTON_STEPS = 50
_LONGEST_STEP = 5.0


@dataclass(frozen=True)
class SetLikelihood:
    """A fitted comparison of two sets of images.

    centre, spread : (views,) float64, mean and deviation of the cosines of two people's sets.
    coefficient : (views + 3,) float64: of each standardised cosine, of the noise, of the noise
        times the mean standardised cosine, and the constant.
    least_noise : the least noise it was fitted on; less counts as that.
    """

    centre: np.ndarray
    spread: np.ndarray
    coefficient: np.ndarray
    least_noise: float

    @classmethod
    def fit(
        cls,
        cosine: np.ndarray,
        noise: np.ndarray,
        same: np.ndarray,
        weight: np.ndarray,
        start: SetLikelihood | None = None,
    ) -> SetLikelihood:
        """Fit it on pairs of sets.

        Parameters
        ----------
        cosine : (m, views) float, cosines of the two centres.
        noise : (m,) float, one over the size of either set, added.
        same : (m,) bool, whether both sets are one person's.
        weight : (m,) float >= 0; scaled so that either class weighs one half.
        start : an earlier fit on nearly the same pairs, from which Newton's method sets out.
        """
        if start is None:
            others = np.asarray(cosine[~same], np.float64)
            centre, spread = others.mean(0), np.maximum(others.std(0), 1e-6)
        else:
            centre, spread = start.centre, start.spread
        standard = (cosine - centre) / spread
        inputs = np.column_stack([standard, noise, noise * standard.mean(1), np.ones(len(noise))])
        balance = weight / np.where(same, weight[same].sum(), weight[~same].sum())
        first = None if start is None else start.coefficient
        found = fit_logistic(inputs, same, balance / 2, first)
        return cls(centre, spread, found, float(noise.min()))

    def combine(self, cosines: Sequence[np.ndarray], noise: np.ndarray | float) -> np.ndarray:
        """Logarithms of the likelihood ratios, float32 of the shape of the cosines.

        cosines : one array of any shape a view. noise : of that shape, or one that spreads to it.
        """
        *slopes, level, product, constant = self.coefficient.astype(np.float32)
        mean = np.zeros_like(cosines[0], np.float32)
        found = np.zeros_like(mean)
        for cosine, slope, centre, spread in zip(
            cosines, slopes, self.centre, self.spread, strict=True
        ):
            standard = (cosine - np.float32(centre)) * np.float32(1 / spread)
            mean += standard / np.float32(len(cosines))
            found += slope * standard
        noise = np.maximum(np.asarray(noise, np.float32), np.float32(self.least_noise))
        found += noise * (level + product * mean) + constant
        return found


def fit_logistic(
    inputs: np.ndarray, same: np.ndarray, weight: np.ndarray, start: np.ndarray | None = None
) -> np.ndarray:
    """Weighted logistic regression by Newton's method; the constant, last, is not held small."""
    ridge = np.full(inputs.shape[1], _RIDGE)
    ridge[-1] = 0
    found = np.zeros(inputs.shape[1]) if start is None else start.copy()
    for _ in range(_NEWTON_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(inputs @ found, -40, 40)))
        slope = inputs.T @ (weight * (same - probability)) - ridge * found
        bend = weight * np.maximum(probability * (1 - probability), 1e-9)
        curve = (inputs * bend[:, None]).T @ inputs + np.diag(ridge + 1e-9)
        step = np.linalg.solve(curve, slope)
        found += step * min(1.0, _LONGEST_STEP / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-5:
            break
    return found
