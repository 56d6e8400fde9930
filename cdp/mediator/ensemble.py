"""The mediator: what the committee knows about a pair becomes the probability of one identity.

The contract:
- Enters: pair features (m, F) float32 from the committee; for fitting, whether each pair shows one
  person and the identity of both ends. Leaves: a probability a pair, float32 in (0, 1).
- Validation is by identity. Identities are dealt into folds; a pair is held out from an MLP when
  *either* end belongs to that MLP's fold, so no MLP is judged on a face it was trained on. A pair
  between two folds is held out from two MLPs and counts one half for each, which keeps the share
  of true pairs among the held-out ones equal to the share among all (holding out only the pairs
  with both ends in the fold would keep a fifth of the true pairs and a twenty-fifth of the false).
- With as many MLPs as folds, each pair has a score from MLPs that never saw either person; the
  calibration and every figure of the report rest on those scores alone.
- Nobody speaks for everybody: in training, calibration and report a person with many pairs is
  heard with `MAX_IDENTITY_SHARE` of the true ones at most.
- A pair's score depends on its own features only: any partition into blocks, any number of
  threads gives the same bits. The same seed gives the same mediator.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict

import numpy as np
import torch

from cdp.arrays.threads import count_threads, limit_blas
from cdp.committee.wccn import Wccn
from cdp.errors import DataError
from cdp.mediator.calibration import MediatorReport, fit_platt_scaling, make_report, sigmoid
from cdp.mediator.mlp import ARRAY_NAMES, STANDARD_LIMIT, Perceptron, Rows, score_rows
from cdp.mediator.prior_shift import PriorCorrection, correct_prior
from cdp.mediator.settings import MediatorSettings

MAX_IDENTITY_SHARE = 0.1
"""Of the true pairs that are heard, one person's at most. On LFW at 16 px, seed 1, one labelled
person owns 64 % of them; with this limit the calibration error of strangers fell from .036 to .009.
"""


CHECK_STEPS = 1000
"""Training steps between two looks at the validation loss when an epoch is longer."""


class Mediator:
    """A fitted mediator: `Mediator.fit(...)`, then `score`.

    settings : how it was made. report : what held-out identities say about it.
    training_rate : share of true pairs among the labelled pairs, for `correct_prior`.
    held_out : (m,) float32, straight after `fit` only (None when restored): the calibrated
        probability of each labelled pair from the MLPs that saw neither person, in the order of the
        pairs; NaN for a pair held out from no MLP (with fewer members than folds).
    pair_weight : (m,) float64, likewise: the weight of each labelled pair; `training_rate` is the
        weighted mean.
    wccn : where the last input comes from, when it is one; it travels with the weights.
    """

    def __init__(
        self,
        settings: MediatorSettings,
        arrays: dict[str, np.ndarray],
        report: MediatorReport,
        held_out: np.ndarray | None = None,
        pair_weight: np.ndarray | None = None,
    ) -> None:
        self.held_out = held_out
        self.weight = pair_weight
        self.wccn: Wccn | None = None
        self.settings = settings
        self.report = report
        self._arrays = arrays

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
    ) -> Mediator:
        """Train on labelled pairs.

        A CPU thread for each MLP, two where there are threads enough; its sums stay in one order.

        Parameters
        ----------
        features : (m, F) float32, one row a pair.
        same : (m,) bool, whether both ends are one identity.
        source_identity, target_identity : (m,) int64.
        settings : defaults to ours.
        seed : decides folds, initial weights, order of the pairs and dropout.
        threads : so many MLPs are trained at once; None: all cores. Never changes the result.

        Raises
        ------
        DataError
            Shapes that disagree, a value that is not finite, `same` that contradicts the
            identities, only true or only false pairs, or too few identities for the folds.
        """
        settings = settings or MediatorSettings()
        features = _check_features(features, None)
        same, source_identity, target_identity = _check_labels(
            len(features), same, source_identity, target_identity
        )
        people, source, target = _number_people(source_identity, target_identity)
        fold = _deal_folds(people, source[same], settings.folds, seed)
        pair_weight = _limit_people(people, source, target, same)
        taught = np.random.default_rng([seed, 0x766F6963]).random(len(same)) < pair_weight
        source_fold, target_fold = fold[source], fold[target]

        count, width = features.shape
        mean, inverse = np.zeros(width, np.float32), np.ones(width, np.float32)
        if settings.standardise:
            mean = features.mean(0, dtype=np.float64).astype(np.float32)
            deviation = features.std(0, dtype=np.float64)
            inverse = (1 / np.where(deviation > 1e-7, deviation, 1)).astype(np.float32)

        def hold_out(member: int) -> np.ndarray:
            held = (source_fold == member).astype(np.float32)
            return (held + (target_fold == member)) / 2

        for member in range(settings.members):
            held = hold_out(member) > 0
            for kind, rows in (("training", ~held), ("held-out", held)):
                if not rows.any() or same[rows].all() or not same[rows].any():
                    raise DataError(
                        f"mediator: fold {member + 1} of {settings.folds} leaves {rows.sum()} "
                        f"{kind} pairs, {int(same[rows].sum())} of them true; both true and "
                        f"false ones are needed. There are {people} labelled "
                        f"identities and {int(same.sum())} true pairs: label more people, "
                        "or lower mediator.folds and mediator.members"
                    )
        workers = count_threads(threads)
        limit = STANDARD_LIMIT if settings.standardise else np.inf
        read = Rows(features, same.astype(np.float32), mean, inverse, limit)
        with limit_blas(), ThreadPoolExecutor(workers) as pool, ExitStack() as helpers:

            def train(member: int) -> tuple[list[np.ndarray], list[dict[str, float]]]:
                helper = None
                if workers >= 2 * settings.members:
                    helper = helpers.enter_context(ThreadPoolExecutor(1))
                held = hold_out(member)
                chosen = np.flatnonzero((held == 0) & taught)
                return _train_member(
                    read, chosen, held * pair_weight, settings, seed, member, helper
                )

            trained = list(pool.map(train, range(settings.members)))
        layers = [layer for layer, _ in trained]
        history = [row for _, rows in trained for row in rows]

        arrays = {"mean": mean, "inverse_deviation": inverse}
        for name, index in (("weight_0", 0), ("bias_0", 1), ("weight_1", 2), ("bias_1", 3)):
            arrays[name] = np.stack([layer[index] for layer in layers])
        # of the two-way softmax only the difference of its outputs matters
        arrays["weight_2"] = np.stack([layer[4][:, 1] - layer[4][:, 0] for layer in layers])
        arrays["bias_2"] = np.array([layer[5][1] - layer[5][0] for layer in layers], np.float32)

        heard = np.stack([hold_out(member) for member in range(settings.members)], 1)
        logits = score_rows(features, arrays, settings.standardise, workers, heard > 0)
        weight = heard.sum(1)
        judged = weight > 0
        held_logit = (logits * heard).sum(1)[judged] / weight[judged]
        held_same, held_weight = same[judged], (weight * pair_weight)[judged]

        arrays["calibration"] = np.array([1.0, 0.0])
        held_probability = sigmoid(held_logit)
        if settings.calibrate:
            arrays["calibration"] = fit_platt_scaling(held_logit, held_same, held_weight)
            owner = np.minimum(source_fold, target_fold)[judged]
            for member in range(settings.members):
                here = owner == member
                rest = (held_logit[~here], held_same[~here], held_weight[~here])
                if here.any() and rest[1].any() and not rest[1].all():
                    scale, shift = fit_platt_scaling(*rest)
                    held_probability[here] = sigmoid(scale * held_logit[here] + shift)
        rate = float(np.average(same, weights=pair_weight))
        report = make_report(held_probability, held_same, held_weight, rate, history)
        scale, shift = arrays["calibration"]
        held_out = np.full(count, np.nan, np.float32)
        held_out[judged] = sigmoid(scale * held_logit + shift)
        return cls(settings, arrays, report, held_out, pair_weight)

    def score(self, features: np.ndarray, *, threads: int = 1) -> np.ndarray:
        """The probability that each pair shows one identity, at the labelled pairs' rate.

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
        """Its scores of an unlabelled set after `correct_prior`; as they are where its settings say
        so."""
        if self.settings.correct_prior:
            return correct_prior(probability, self.training_rate)
        return PriorCorrection(probability, self.training_rate)

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone (settings and report as JSON bytes)."""
        text = json.dumps(
            {"settings": asdict(self.settings), "report": self.report.to_json()}, sort_keys=True
        )
        own = {} if self.wccn is None else self.wccn.state()
        return {**self._arrays, **own, "json": np.frombuffer(text.encode(), np.uint8).copy()}

    @classmethod
    def from_state(cls, state: dict[str, np.ndarray]) -> Mediator:
        """The inverse of `state`.

        Raises
        ------
        DataError
            Something is missing: the arrays are not a mediator's.
        """
        arrays = {name: np.asarray(value) for name, value in state.items() if name != "json"}
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
        own = {name: each for name, each in arrays.items() if name.startswith("wccn_")}
        weights = {name: each for name, each in arrays.items() if name not in own}
        mediator = cls(MediatorSettings(**plain["settings"]), weights, report)
        mediator.wccn = Wccn.from_state(own)
        return mediator


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
            "learn from; label people with at least two images, or raise k"
        )
    if same.all():
        raise DataError(
            f"mediator: all {count} labelled pairs are positive, so there is nothing to tell "
            "apart; label more people, or raise k"
        )
    return same, source_identity, target_identity


def _number_people(source: np.ndarray, target: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Count the people; the pairs' ends as their places among the sorted identities."""
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
    """A fold for each identity; every fold gets its share of the pair-rich people.

    positive : (p,) int64, the identity of each true pair. One person with 500 images can own most
    of the true pairs, so people are sorted by them and dealt in rounds, shuffled within a round.
    """
    random = np.random.default_rng([seed, 0x666F6C64])
    rich = np.bincount(positive, minlength=count)
    order = np.lexsort((random.random(count), -rich))
    fold = np.empty(count, np.int64)
    for start in range(0, count, folds):
        part = order[start : start + folds]
        fold[part] = random.permutation(folds)[: len(part)]
    return fold


def _limit_people(
    people: int, source: np.ndarray, target: np.ndarray, same: np.ndarray
) -> np.ndarray:
    """How much each pair counts, (m,) float32 in (0, 1]: as the less heard of its two people."""
    owned = np.bincount(source[same], minlength=people)
    # Few people cannot each stay below the share; where all own alike nobody is limited.
    share = max(MAX_IDENTITY_SHARE, 2 / max(int(np.count_nonzero(owned)), 1))
    most = float(owned.max())
    for _ in range(50):
        most = min(most, max(share * float(np.minimum(owned, most).sum()), 1.0))
    pair_weight = np.minimum(most / np.maximum(owned, 1), 1).astype(np.float32)
    return np.minimum(pair_weight[source], pair_weight[target])


def _train_member(
    rows: Rows,
    chosen: np.ndarray,
    held: np.ndarray,
    settings: MediatorSettings,
    seed: int,
    member: int,
    helper: ThreadPoolExecutor | None,
) -> tuple[list[np.ndarray], list[dict[str, float]]]:
    """One MLP's weights and biases, layer after layer, and a row for each check.

    chosen : rows that are trained on. held : (m,) float32, the weight of each pair in validation.
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
            odds = network.weigh(rows, held_rows).astype(np.float64)
            each = np.logaddexp(0, odds) - odds * held_truth
            validation = float(np.average(each, weights=held_weight))
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
