"""The mediator: an ensemble of MLPs that maps pair features to calibrated probabilities.

The contract:
- Enters: pair features (m, F) float32; for fitting, whether each pair is positive (shows one
  identity) and the identities of both ends. Leaves: a probability a pair, float32 in (0, 1).
- Validation is by identity. Identities are dealt into folds; a pair is held out from an MLP when
  *either* end belongs to that MLP's fold, so no MLP is validated on an identity it was trained on.
  A pair between two folds is held out from two MLPs with weight one half each, which keeps the
  positive rate of the held-out pairs equal to that of all pairs (holding out only pairs with both
  ends in the fold would keep a fifth of the positive and a twenty-fifth of the negative ones).
- With as many MLPs as folds, each labelled pair has a score from MLPs that never saw its
  identities; calibration and report rest on those scores alone.
- No identity contributes more than 10 % of the positive pairs (`MAX_IDENTITY_SHARE`): pairs of
  larger identities are down-weighted in training, calibration and report.
- A pair's score depends on its own features only: any partition into blocks, any number of
  threads gives the same bits. The same seed gives the same mediator.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numba import njit

from cdp.arrays.cosine import as_readonly
from cdp.arrays.threads import count_threads
from cdp.errors import DataError
from cdp.mediator.calibration import MediatorReport, fit_platt_scaling, make_report, sigmoid
from cdp.mediator.folds import (
    check_folds,
    deal_folds,
    hold_out,
    limit_identities,
    number_identities,
)
from cdp.mediator.mlp import ARRAY_NAMES, STANDARD_LIMIT, Rows, score_rows
from cdp.mediator.mlp_training import train_ensemble
from cdp.mediator.prior_shift import (
    PriorCorrection,
    correct_prior,
    keep_prior,
    leave_prior,
)
from cdp.mediator.settings import MediatorSettings
from cdp.mediator.shortage import ShortageError

_LEAST_DEVIATION = 1e-7
"""An input that varies less is constant, and is centred only."""


@dataclass(frozen=True)
class HeldOut:
    """The labelled pairs as seen by the MLPs that were not trained on their identities.

    probability : (m,) float32, calibrated, in the order of the pairs; NaN for a pair held out from
        no MLP (with fewer MLPs than folds).
    weight : (m,) float64 in (0, 1], the weight of each pair; `Mediator.training_rate` is the
        weighted share of positive pairs.
    """

    probability: np.ndarray
    weight: np.ndarray


class Mediator:
    """A fitted mediator: `Mediator.fit(...)`, then `score`. Immutable.

    settings : how it was made.
    report : its quality on held-out identities.
    training_rate : weighted share of positive pairs among the labelled pairs, for `correct_prior`.
    feature_count : number of input features.
    """

    def __init__(
        self, settings: MediatorSettings, arrays: dict[str, np.ndarray], report: MediatorReport
    ) -> None:
        self._settings = settings
        self._report = report
        self._arrays = arrays

    @property
    def settings(self) -> MediatorSettings:
        return self._settings

    @property
    def report(self) -> MediatorReport:
        return self._report

    @property
    def training_rate(self) -> float:
        return self.report.pair_rate

    @property
    def feature_count(self) -> int:
        return int(self._arrays["weight_0"].shape[1])

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        same: np.ndarray,
        source_identity: np.ndarray,
        target_identity: np.ndarray,
        *,
        weight: np.ndarray | None = None,
        settings: MediatorSettings | None = None,
        seed: int = 0,
        threads: int | None = None,
    ) -> tuple[Mediator, HeldOut]:
        """Train on labelled pairs.

        A CPU thread for each MLP, two where there are threads enough; its sums stay in one order.

        Parameters
        ----------
        features : (m, F) float32, one row a pair.
        same : (m,) bool, whether both ends are one identity.
        source_identity, target_identity : (m,) int64.
        weight : (m,) float > 0, how many pairs each stands for; None: one each.
        settings : defaults to ours.
        seed : decides folds, initial weights, order of the pairs and dropout.
        threads : number of MLPs trained at once; None: all cores. Never changes the result.

        Returns
        -------
        Mediator
        HeldOut
            The labelled pairs' probabilities from MLPs that never saw their identities.

        Raises
        ------
        DataError
            Shapes that disagree, a value that is not finite, `same` that contradicts the
            identities, only positive or only negative pairs, or too few identities for the folds.
        """
        settings = settings or MediatorSettings()
        features = _check_features(features, None)
        same, source_identity, target_identity = _check_labels(
            len(features), same, source_identity, target_identity
        )
        identities, source, target = number_identities(source_identity, target_identity)
        fold = deal_folds(identities, source[same], settings.folds, seed)
        source_fold, target_fold = fold[source], fold[target]
        held = hold_out(source_fold, target_fold, settings.ensemble_size)
        check_folds(held, same, len(np.unique(source[same])), settings)
        pair_weight = limit_identities(identities, source, target, same, weight)

        mean, inverse = _measure_inputs(features, settings.standardise)
        limit = STANDARD_LIMIT if settings.standardise else np.inf
        rows = Rows(features, same.astype(np.float32), mean, inverse, limit)
        workers = count_threads(threads)
        layers, history = train_ensemble(rows, held, pair_weight, settings, seed, workers)
        arrays = {"mean": mean, "inverse_deviation": inverse, **_stack_layers(layers)}

        logits = score_rows(features, arrays, settings.standardise, workers, held > 0)
        weight = held.sum(1)
        scored = weight > 0
        logit = (logits * held).sum(1)[scored] / weight[scored]
        owner = np.minimum(source_fold, target_fold)[scored]
        arrays["calibration"], crossed = _calibrate(
            logit, same[scored], (weight * pair_weight)[scored], owner, settings, workers
        )
        rate = float(np.average(same, weights=pair_weight))
        report = make_report(crossed, same[scored], (weight * pair_weight)[scored], rate, history)
        scale, shift = arrays["calibration"]
        probability = np.full(len(features), np.nan, np.float32)
        probability[scored] = sigmoid(scale * logit + shift)
        held_out = HeldOut(probability, pair_weight.astype(np.float64))
        return cls(settings, arrays, report), held_out

    def score(self, features: np.ndarray, *, threads: int = 1) -> np.ndarray:
        """The probability that each pair shows one identity, at the positive rate of training.

        Parameters
        ----------
        features : (m, F) float32, of the kind the mediator was fitted on.
        threads : blocks of rows scored at once; the result does not depend on it.

        Returns
        -------
        (m,) float32 in (0, 1). An empty block gives an empty array.

        Raises
        ------
        DataError
            A wrong number of features, or a value that is not finite.
        """
        features = _check_features(features, self.feature_count)
        logit = score_rows(features, self._arrays, self.settings.standardise, threads)
        scale, shift = self._arrays["calibration"]
        return sigmoid(scale * (logit.sum(1) / logit.shape[1]) + shift).astype(np.float32)

    def correct(self, probability: np.ndarray) -> PriorCorrection:
        """Rescale scores of an unlabelled set to its positive rate (`correct_prior`), if the
        settings ask for it and the scores allow it (`keep_prior`)."""
        if self.settings.correct_prior:
            found = correct_prior(probability, self.training_rate)
            if keep_prior(probability, found, self.report.reliability):
                return leave_prior(probability)
            return found
        return PriorCorrection(probability, self.training_rate)

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone (settings and report as JSON bytes)."""
        text = json.dumps(
            {"settings": asdict(self.settings), "report": self.report.to_json()}, sort_keys=True
        )
        return {**self._arrays, "json": np.frombuffer(text.encode(), np.uint8).copy()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Mediator:
        """The inverse of `state`.

        Raises
        ------
        DataError
            Something is missing: the arrays are not a mediator's.
        """
        missing = {"json", *ARRAY_NAMES} - set(state)
        if missing:
            raise DataError(
                f"expected a mediator's state, but it lacks {', '.join(sorted(missing))}; "
                "fit the mediator again"
            )
        plain = json.loads(bytes(np.asarray(state["json"])).decode())
        hidden = plain["settings"]["hidden"]
        plain["settings"]["hidden"] = None if hidden is None else tuple(hidden)
        report = MediatorReport.from_json(plain["report"])
        arrays = {name: np.asarray(state[name]) for name in ARRAY_NAMES}
        return cls(MediatorSettings(**plain["settings"]), arrays, report)


def _check_features(features: np.ndarray, expected: int | None) -> np.ndarray:
    features = np.ascontiguousarray(features, np.float32)
    if features.ndim != 2 or (expected is not None and features.shape[1] != expected):
        want = "(pairs, features)" if expected is None else f"(pairs, {expected})"
        raise DataError(
            f"mediator: expected pair features of shape {want}, got {features.shape}; was the "
            "committee, its size or the feature variant changed since the mediator was fitted?"
        )
    if not np.isfinite(features).all():
        row, column = np.argwhere(~np.isfinite(features))[0]
        raise DataError(
            f"mediator: pair feature {column} of row {row} is {features[row, column]}; every "
            "feature must be finite: look for NaN in the embeddings"
        )
    return features


def _check_labels(
    count: int, same: np.ndarray, source_identity: np.ndarray, target_identity: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    same = np.asarray(same, bool)
    source_identity, target_identity = np.asarray(source_identity), np.asarray(target_identity)
    for name, array in (
        ("same", same),
        ("source_identity", source_identity),
        ("target_identity", target_identity),
    ):
        if array.shape != (count,):
            raise DataError(
                f"mediator: expected {name} of shape ({count},), one a pair, got {array.shape}"
            )
    if not np.array_equal(same, source_identity == target_identity):
        raise DataError("mediator: `same` contradicts the identities of the pairs")
    if not same.any():
        raise ShortageError(
            f"mediator: no positive pair among the {count} labelled pairs, so there is nothing to "
            "learn from; label identities with at least two images, or raise k"
        )
    if same.all():
        raise ShortageError(
            f"mediator: all {count} labelled pairs are positive, and negative ones are needed too; "
            "label more identities, or raise k"
        )
    return same, source_identity, target_identity


def _measure_inputs(features: np.ndarray, standardise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse deviation of each input, (F,) float32; 0 and 1 without standardising."""
    width = features.shape[1]
    if not standardise:
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    mean, deviation = _measure_columns(as_readonly(features))
    inverse = 1 / np.where(deviation > _LEAST_DEVIATION, deviation, 1)
    return mean.astype(np.float32), inverse.astype(np.float32)


@njit(cache=True)
def _measure_columns(rows: Any) -> Any:
    """Mean and standard deviation of each column, (F,) float64 each."""
    mean, square = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
    for row in rows:
        for i in range(len(mean)):
            mean[i] += row[i]
    mean /= len(rows)
    for row in rows:
        for i in range(len(mean)):
            square[i] += (row[i] - mean[i]) ** 2
    return mean, np.sqrt(square / len(rows))


def _stack_layers(layers: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """The parameters by name, each stacked over the MLPs."""
    arrays = {
        name: np.stack([layer[index] for layer in layers])
        for index, name in enumerate(("weight_0", "bias_0", "weight_1", "bias_1"))
    }
    # of the two-way softmax only the difference of its outputs matters
    arrays["weight_2"] = np.stack([layer[4][:, 1] - layer[4][:, 0] for layer in layers])
    arrays["bias_2"] = np.array([layer[5][1] - layer[5][0] for layer in layers], np.float32)
    return arrays


def _calibrate(
    logit: np.ndarray,
    same: np.ndarray,
    weight: np.ndarray,
    owner: np.ndarray,
    settings: MediatorSettings,
    workers: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Platt scaling of all held-out pairs, and their cross-fitted probabilities for the report.

    owner : (m,) int64, the fold each pair is counted to. Its probability comes from a scaling
        fitted on the other folds.
    """
    crossed = sigmoid(logit)
    if not settings.calibrate:
        return np.array([1.0, 0.0]), crossed

    def fit(member: int) -> np.ndarray | None:
        rest = owner != member
        if rest.all() or not same[rest].any() or same[rest].all():
            return None
        return fit_platt_scaling(logit[rest], same[rest], weight[rest])

    with ThreadPoolExecutor(workers) as pool:
        found = pool.submit(fit_platt_scaling, logit, same, weight)
        for member, own in enumerate(pool.map(fit, range(settings.ensemble_size))):
            if own is not None:
                here = owner == member
                crossed[here] = sigmoid(own[0] * logit[here] + own[1])
    return found.result(), crossed
