"""A bounded sample of labelled pairs to train on, with weights that stand for all of them.

Most candidate pairs are negative and easy; beyond some ten thousand an MLP gains nothing from them.
So positive pairs are kept up to half of the budget, negative ones fill the rest, and of either kind
a pair is drawn with a chance that grows with its difficulty. Each is weighted by the inverse of its
chance, so that weighted means over the sample estimate those over all pairs without bias.

Source: ours; the weights are those of Horvitz & Thompson (1952).
"""

from __future__ import annotations

import numpy as np

_POSITIVE_SHARE = 0.5
"""Largest share of the sample that is positive."""
_FLOOR = 0.1
"""Difficulty of the easiest pair: none stands for more than eleven times as many as the hardest."""


def sample_pairs(
    same: np.ndarray,
    weight: np.ndarray,
    budget: int | None,
    seed: int,
    difficulty: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw about `budget` pairs, positive and negative ones apart.

    Parameters
    ----------
    same : (m,) bool, whether each pair is positive.
    weight : (m,) float > 0, how much each pair counts; its chance is proportional to it.
    budget : pairs to draw; None: all.
    difficulty : (m,) float in [0, 1], the error of a first model; the chance is proportional to
        this plus `_FLOOR` too. None: all alike.

    Returns
    -------
    chosen : (b,) int64, ascending; all pairs where they are no more than the budget.
    weight : (b,) float32, the weight of each divided by its chance, of mean 1.
    """
    count = len(same)
    chance = np.ones(count)
    if budget is not None and count > budget:
        wanted = weight if difficulty is None else weight * (difficulty + _FLOOR)
        positive = min(int(_POSITIVE_SHARE * budget), int(same.sum()))
        for rows, quota in ((same, positive), (~same, budget - positive)):
            chance[rows] = _share_out(wanted[rows], quota)
    chosen = np.flatnonzero(np.random.default_rng([seed, 0x70616972]).random(count) < chance)
    counted = weight[chosen] / chance[chosen]
    return chosen, (counted / counted.mean()).astype(np.float32)


def _share_out(weight: np.ndarray, quota: int) -> np.ndarray:
    """Chances proportional to the weights, at most 1 each, that add up to the quota."""
    if len(weight) <= quota:
        return np.ones(len(weight))
    chance = weight * (quota / weight.sum(dtype=np.float64))
    for _ in range(20):
        full = chance >= 1
        if not (chance > 1).any():
            break
        chance[full] = 1
        rest = weight[~full].sum(dtype=np.float64)
        chance[~full] = weight[~full] * ((quota - full.sum()) / rest)
    return np.minimum(chance, 1)
