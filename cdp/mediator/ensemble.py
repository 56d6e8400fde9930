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
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import numpy as np
import torch

from cdp.arrays.threads import count_threads, limit_blas
from cdp.errors import DataError
from cdp.mediator.calibration import MediatorReport, fit_platt_scaling, make_report, sigmoid
from cdp.mediator.mlp import ARRAY_NAMES, STANDARD_LIMIT, Perceptron, Rows, score_rows
from cdp.mediator.prior_shift import PriorCorrection, correct_prior
from cdp.mediator.settings import MediatorSettings

MAX_IDENTITY_SHARE = 0.1
"""Largest share of the weighted positive pairs that one identity may have. On LFW at 16 px, seed 1,
one labelled identity owns 64 % of them; with this limit the calibration error on new identities
fell from .036 to .009."""
CHECK_STEPS = 1000
"""Training steps between two validations when an epoch is longer."""
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
        identities, source, target = _number_identities(source_identity, target_identity)
        fold = _deal_folds(identities, source[same], settings.folds, seed)
        source_fold, target_fold = fold[source], fold[target]
        held = _hold_out(source_fold, target_fold, settings.ensemble_size)
        _check_folds(held, same, identities, settings)
        pair_weight = _limit_identities(identities, source, target, same)

        mean, inverse = _measure_inputs(features, settings.standardise)
        limit = STANDARD_LIMIT if settings.standardise else np.inf
        rows = Rows(features, same.astype(np.float32), mean, inverse, limit)
        workers = count_threads(threads)
        layers, history = _train_ensemble(rows, held, pair_weight, settings, seed, workers)
        arrays = {"mean": mean, "inverse_deviation": inverse, **_stack_layers(layers)}

        logits = score_rows(features, arrays, settings.standardise, workers, held > 0)
        weight = held.sum(1)
        scored = weight > 0
        logit = (logits * held).sum(1)[scored] / weight[scored]
        owner = np.minimum(source_fold, target_fold)[scored]
        arrays["calibration"], crossed = _calibrate(
            logit, same[scored], (weight * pair_weight)[scored], owner, settings
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
        settings ask for it."""
        if self.settings.correct_prior:
            return correct_prior(probability, self.training_rate)
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
        raise DataError(
            f"mediator: no positive pair among the {count} labelled pairs, so there is nothing to "
            "learn from; label identities with at least two images, or raise k"
        )
    if same.all():
        raise DataError(
            f"mediator: all {count} labelled pairs are positive, and negative ones are needed too; "
            "label more identities, or raise k"
        )
    return same, source_identity, target_identity


def _number_identities(
    source: np.ndarray, target: np.ndarray
) -> tuple[int, np.ndarray, np.ndarray]:
    """Count the identities; the pairs' ends as places among the sorted identities."""
    low = min(int(source.min()), int(target.min()))
    span = max(int(source.max()), int(target.max())) - low + 1
    if span > 4 * len(source):
        identity, place = np.unique(np.concatenate([source, target]), return_inverse=True)
        return len(identity), place[: len(source)], place[len(source) :]
    known = np.zeros(span, bool)
    known[source - low] = True
    known[target - low] = True
    place = np.cumsum(known) - 1
    return int(known.sum()), place[source - low], place[target - low]


def _deal_folds(count: int, positive: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold for each identity, (count,) int64, with a similar number of positive pairs in each.

    positive : (p,) int64, the identity of each positive pair. One identity with 500 images can own
        most of them, so identities are sorted by their number of positive pairs and dealt in
        rounds, shuffled within a round.
    """
    random = np.random.default_rng([seed, 0x666F6C64])
    pair_count = np.bincount(positive, minlength=count)
    order = np.lexsort((random.random(count), -pair_count))
    fold = np.empty(count, np.int64)
    for start in range(0, count, folds):
        part = order[start : start + folds]
        fold[part] = random.permutation(folds)[: len(part)]
    return fold


def _hold_out(source_fold: np.ndarray, target_fold: np.ndarray, ensemble_size: int) -> np.ndarray:
    """(m, ensemble_size) float32, the weight of each pair in the validation of each MLP: 1 where
    both ends are in its fold, one half where one is."""
    columns = []
    for member in range(ensemble_size):
        held = (source_fold == member).astype(np.float32)
        columns.append((held + (target_fold == member)) / 2)
    return np.stack(columns, 1)


def _check_folds(
    held: np.ndarray, same: np.ndarray, identities: int, settings: MediatorSettings
) -> None:
    for member in range(settings.ensemble_size):
        out = held[:, member] > 0
        for kind, rows in (("training", ~out), ("held-out", out)):
            if not rows.any() or same[rows].all() or not same[rows].any():
                raise DataError(
                    f"mediator: fold {member + 1} of {settings.folds} leaves {rows.sum()} {kind} "
                    f"pairs, {int(same[rows].sum())} of them positive; both positive and negative "
                    f"ones are needed. There are {identities} labelled identities and "
                    f"{int(same.sum())} positive pairs: label more identities, or lower "
                    "mediator.folds and mediator.ensemble_size"
                )


def _limit_identities(
    identities: int, source: np.ndarray, target: np.ndarray, same: np.ndarray
) -> np.ndarray:
    """The weight of each pair, (m,) float32 in (0, 1]: the lower one of its two identities."""
    owned = np.bincount(source[same], minlength=identities)
    # A few identities cannot all stay below the share; equal ones must not be limited at all.
    share = max(MAX_IDENTITY_SHARE, 2 / max(int(np.count_nonzero(owned)), 1))
    most = float(owned.max())
    for _ in range(50):
        most = min(most, max(share * float(np.minimum(owned, most).sum()), 1.0))
    pair_weight = np.minimum(most / np.maximum(owned, 1), 1).astype(np.float32)
    return np.minimum(pair_weight[source], pair_weight[target])


def _measure_inputs(features: np.ndarray, standardise: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and inverse deviation of each input, (F,) float32; 0 and 1 without standardising."""
    width = features.shape[1]
    if not standardise:
        return np.zeros(width, np.float32), np.ones(width, np.float32)
    mean = features.mean(0, dtype=np.float64).astype(np.float32)
    deviation = features.std(0, dtype=np.float64)
    inverse = 1 / np.where(deviation > _LEAST_DEVIATION, deviation, 1)
    return mean, inverse.astype(np.float32)


def _train_ensemble(
    rows: Rows,
    held: np.ndarray,
    pair_weight: np.ndarray,
    settings: MediatorSettings,
    seed: int,
    workers: int,
) -> tuple[list[list[np.ndarray]], list[dict[str, float]]]:
    """Train every MLP; the layers of each, and a row for each validation.

    A pair is drawn into training with probability `pair_weight`.
    """
    drawn = np.random.default_rng([seed, 0x766F6963]).random(len(pair_weight)) < pair_weight
    with limit_blas(), ThreadPoolExecutor(workers) as pool, ExitStack() as helpers:

        def train(member: int) -> tuple[list[np.ndarray], list[dict[str, float]]]:
            helper = None
            if workers >= 2 * settings.ensemble_size:
                helper = helpers.enter_context(ThreadPoolExecutor(1))
            own = held[:, member]
            chosen = np.flatnonzero((own == 0) & drawn)
            return _train_member(rows, chosen, own * pair_weight, settings, seed, member, helper)

        trained = list(pool.map(train, range(settings.ensemble_size)))
    return [layers for layers, _ in trained], [row for _, history in trained for row in history]


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
) -> tuple[np.ndarray, np.ndarray]:
    """Platt scaling of all held-out pairs, and their cross-fitted probabilities for the report.

    owner : (m,) int64, the fold each pair is counted to. Its probability comes from a scaling
        fitted on the other folds.
    """
    crossed = sigmoid(logit)
    if not settings.calibrate:
        return np.array([1.0, 0.0]), crossed
    for member in range(settings.ensemble_size):
        here = owner == member
        rest = (logit[~here], same[~here], weight[~here])
        if here.any() and rest[1].any() and not rest[1].all():
            scale, shift = fit_platt_scaling(*rest)
            crossed[here] = sigmoid(scale * logit[here] + shift)
    return fit_platt_scaling(logit, same, weight), crossed


def _train_member(
    rows: Rows,
    chosen: np.ndarray,
    held: np.ndarray,
    settings: MediatorSettings,
    seed: int,
    member: int,
    helper: ThreadPoolExecutor | None,
) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """One MLP's weights and biases, layer after layer, and a row for each validation.

    chosen : rows to train on. held : (m,) float32, the weight of each pair in validation.
    """
    random = torch.Generator().manual_seed(seed * 1_000_003 + member)
    width = rows.features.shape[1]
    network = Perceptron(
        width,
        settings.hidden or (3 * width, 3 * width),
        random,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        helper=helper,
    )
    held_rows = np.flatnonzero(held > 0)
    held_truth, held_weight = rows.truth[held_rows], held[held_rows]
    history: list[dict[str, float]] = []
    best, best_loss, stale = network.value.copy(), math.inf, 0
    losses: list[float] = []
    step = 0
    for epoch in range(settings.epochs):
        order = chosen[torch.randperm(len(chosen), generator=random).numpy()]
        for start in range(0, len(order), settings.batch_size):
            stop = start + settings.batch_size
            losses.append(network.learn(rows, order[start:stop]))
            step += 1
            if stop < len(order) and step % CHECK_STEPS:
                continue
            logits = network.logits(rows, held_rows).astype(np.float64)
            cross_entropy = np.logaddexp(0, logits) - logits * held_truth
            validation = float(np.average(cross_entropy, weights=held_weight))
            history.append(
                {
                    "member": member,
                    "epoch": epoch,
                    "training_loss": float(np.mean(losses)),
                    "validation_loss": validation,
                }
            )
            losses.clear()
            if not math.isfinite(validation):
                raise DataError(
                    f"mediator: the loss became {validation} in epoch {epoch + 1}; lower "
                    f"mediator.learning_rate (now {settings.learning_rate}) or standardise"
                )
            if settings.patience is None or validation < best_loss:
                best[:] = network.value
                best_loss, stale = validation, 0
            else:
                stale += 1
            if settings.patience is not None and stale >= settings.patience:
                return network.export(best), history
    return network.export(best), history
