"""Calibration of the mediator: Platt scaling, and its quality on held-out identities.

The contract:
- Enters: logits or probabilities of labelled pairs, whether each is positive, and their weights.
- Every figure is weighted; ties share one point of the curves behind AUC and average precision.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.log_odds import to_probability
from cdp.mediator.prior_shift import LOGIT_LIMIT
from cdp.metrics.calibration import ReliabilityCurve, measure_reliability

_NEWTON_STEPS = 50
_LEAST_SCALE = 1e-3
"""The fitted scale stays positive, so that calibration never reverses the order of pairs."""


@dataclass(frozen=True)
class MediatorReport:
    """Quality of a fitted mediator on pairs of identities its MLPs were not trained on.

    pairs : number of held-out pairs. pair_rate : weighted share of positive pairs among all
        labelled pairs.
    expected_calibration_error : of the calibrated probabilities; the calibration of each fold is
        fitted on the other folds.
    auc, average_precision, log_loss : of the held-out probabilities.
    reliability : see `ReliabilityCurve`.
    history : a row per validation: member, epoch, training_loss, validation_loss.
    """

    pairs: int
    pair_rate: float
    expected_calibration_error: float
    auc: float
    average_precision: float
    log_loss: float
    reliability: ReliabilityCurve
    history: tuple[dict[str, float], ...] = field(repr=False, default=())

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; NaN as None."""
        plain = asdict(self)
        plain["reliability"] = {
            name: [None if math.isnan(v) else float(v) for v in values]
            for name, values in plain["reliability"].items()
        }
        plain["history"] = list(self.history)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> MediatorReport:
        curve = {
            name: np.array([math.nan if v is None else v for v in values], np.float64)
            for name, values in plain["reliability"].items()
        }
        rest = {name: value for name, value in plain.items() if name != "reliability"}
        rest["history"] = tuple(rest["history"])
        return cls(reliability=ReliabilityCurve(**curve), **rest)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """The logistic function, of logits clipped to +- `LOGIT_LIMIT`."""
    return to_probability(logit, LOGIT_LIMIT)


def fit_platt_scaling(logit: np.ndarray, same: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Scale and shift that minimise the log loss (Platt 1999), by Newton's method, float64.

    A weak prior (the weight of one pair) at scale 1 and shift 0 keeps separable data finite.
    """
    logit, truth = np.asarray(logit, np.float64), np.asarray(same, np.float64)
    weight = np.asarray(weight / weight.mean(), np.float64)
    value = np.array([1.0, 0.0])
    current, gradient, hessian = _expand_loss(logit, truth, weight, *value)
    for _ in range(_NEWTON_STEPS):
        move = np.linalg.solve(hessian, gradient)
        size = 1.0
        found = _expand_loss(logit, truth, weight, *(value - move))
        while found[0] > current and size > 1e-6:
            size /= 2
            found = _expand_loss(logit, truth, weight, *(value - size * move))
        value = value - size * move
        previous = current
        current, gradient, hessian = found
        if previous - current < 1e-10 * max(1.0, abs(current)):
            break
    return np.array([max(value[0], _LEAST_SCALE), value[1]])


@njit(cache=True, nogil=True)
def _expand_loss(logit, truth, weight, scale, shift):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Log loss of the scaled and shifted logits with its prior, its gradient and its Hessian."""
    loss = 0.5 * ((scale - 1) ** 2 + shift**2)
    first, second = scale - 1, shift
    outer, mixed, inner = 1.0, 0.0, 1.0
    for i in range(len(logit)):
        z = scale * logit[i] + shift
        small = np.exp(-abs(z))
        loss += weight[i] * (max(z, 0.0) - z * truth[i] + np.log1p(small))
        probability = (1.0 if z >= 0 else small) / (1 + small)
        error = weight[i] * (probability - truth[i])
        curve = weight[i] * small / (1 + small) ** 2
        first += error * logit[i]
        second += error
        outer += curve * logit[i] ** 2
        mixed += curve * logit[i]
        inner += curve
    return loss, np.array([first, second]), np.array([[outer, mixed], [mixed, inner]])


def make_report(
    probability: np.ndarray,
    same: np.ndarray,
    weight: np.ndarray,
    pair_rate: float,
    history: list[dict[str, float]],
) -> MediatorReport:
    reliability = measure_reliability(probability, same, weight=weight)
    order = np.argsort(-probability)
    # ties share one point of the curve, so that their order does not matter
    last = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))
    hits = np.cumsum((same * weight)[order])[last]
    misses = np.cumsum((~same * weight)[order])[last]
    hit_step, miss_step = np.diff(hits, prepend=0), np.diff(misses, prepend=0)
    auc = np.sum(miss_step * (hits - hit_step / 2)) / (hits[-1] * misses[-1])
    average_precision = np.sum(hit_step * hits / (hits + misses)) / hits[-1]
    likelihood = np.where(same, probability, 1 - probability)
    return MediatorReport(
        pairs=len(same),
        pair_rate=pair_rate,
        expected_calibration_error=reliability.expected_calibration_error,
        auc=float(auc),
        average_precision=float(average_precision),
        log_loss=float(np.average(-np.log(likelihood), weights=weight)),
        reliability=reliability,
        history=tuple(history),
    )
