"""Unlisted pairs: positive pairs that no k-NN graph proposes, by the number of a person's images.

The contract:
- Enters: of held-out people the number of images, and which share of their pairs lies in two
  clusters without any candidate pair between them. Leaves: that share as a function of the number,
  which never rises with it, and its mean over the pairs of clusters of any sizes.
- The more images a person has, the likelier one of them is listed with each other cluster of them.
  So the mean over labelled people does not hold for a set whose people are larger. Beyond the
  largest held-out person the share falls as the inverse of the number of images; measured, it fell
  faster.

Source: ours; the fit is isotonic regression (Barlow et al. 1972). On LFW at 16 px .16 of the pairs
of people with two images were unlisted, .04 of those with 10 to 19, and .002 from 50 on.
"""

from __future__ import annotations

import numpy as np


def fit_unlisted(size: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The share of unlisted pairs by a person's number of images.

    Parameters
    ----------
    size : (p,) integers >= 2, images of each person. share : (p,) float in [0, 1].

    Returns
    -------
    (s, 2) float64, rising numbers of images and the share of each, which never rises; no row
    without people.
    """
    from sklearn.isotonic import IsotonicRegression

    if not len(size):
        return np.empty((0, 2))
    pairs = size * (size - 1) / 2
    fitted = IsotonicRegression(increasing=False).fit(size, share, sample_weight=pairs)
    return np.column_stack([fitted.X_thresholds_, fitted.y_thresholds_]).astype(np.float64)


def average_unlisted(curve: np.ndarray | None, size: np.ndarray) -> float:
    """The share of unlisted pairs among people of the sizes of some clusters.

    Parameters
    ----------
    curve : (s, 2) float64, of `fit_unlisted`; None or empty: nothing is unlisted.
    size : (c,) numbers, images of each cluster.
    """
    pairs = size * (size - 1) / 2
    if curve is None or not len(curve) or not pairs.sum():
        return 0.0
    share = np.interp(size, curve[:, 0], curve[:, 1])
    beyond = np.minimum(curve[-1, 0] / np.maximum(size, 1), 1)
    return float(np.average(share * beyond, weights=pairs))
