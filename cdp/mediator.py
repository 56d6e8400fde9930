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
  heard with `MOST_SHARE` of the true ones at most.
- A pair's score depends on its own features only: any partition into blocks, any number of
  threads gives the same bits. The same seed gives the same mediator.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from cdp.cosine import count_threads, limit_blas
from cdp.discriminant import Discriminant
from cdp.errors import ConfigError, DataError
from cdp.perceptron import Perceptron, Rows, lock
from cdp.prior import LOGIT_LIMIT, PriorCorrection, correct_prior

VARIANTS = ("extended", "paper", "released", "context")
MOST_SHARE = 0.1
"""Of the true pairs that are heard, one person's at most. On LFW at 16 px, seed 1, one labelled
person owns 64 % of them; with this limit the calibration error of strangers fell from .036 to .009.
"""
STANDARD_LIMIT = 8.0
"""A standardised input further out than this is clipped: no labelled pair taught that region."""


@dataclass(frozen=True)
class MediatorSettings:
    """How a mediator is built and trained.

    The defaults are ours; `MediatorSettings.named` gives the paper's and the released code's.

    variant : which pair features it reads: "extended" (ours), "paper" (6N + 5), "released"
        (3N + 2), all from the committee, or "context" (`cdp.context`). It travels with the weights.
    hidden : widths of the two hidden layers; None for three times the number of inputs each.
    optimizer : "adam" or "sgd" (momentum .9).
    learning_rate, weight_decay, dropout : as usual; dropout acts on both hidden layers.
    epochs : passes over the training pairs; at most this many when `patience` is set.
    patience : stop after this many checks (one an epoch, or one in `CHECK_STEPS` steps, whichever
        comes first) without a lower validation loss, and keep the best weights; None trains for
        `epochs` and keeps the last.
    batch_size : pairs a step.
    standardise : subtract each input's mean and divide by its deviation over the labelled pairs.
    members : how many MLPs are averaged (their logits); MLP i holds out fold i.
    folds : into how many folds the identities are dealt; at least `members`.
    calibrate : scale and shift the logits to the held-out pairs (Platt 1999).
    correct_prior : whether scores on an unlabelled set should go through `correct_prior`.
    """

    variant: str = "extended"
    hidden: tuple[int, int] | None = (50, 50)
    optimizer: str = "adam"
    learning_rate: float = 0.002
    weight_decay: float = 1e-4
    dropout: float = 0.0
    epochs: int = 60
    patience: int | None = 8
    batch_size: int = 1024
    standardise: bool = True
    members: int = 5
    folds: int = 5
    calibrate: bool = True
    correct_prior: bool = True

    def __post_init__(self) -> None:
        def check(right: bool, name: str, expected: str) -> None:
            if not right:
                raise ConfigError(
                    f"mediator.{name}: expected {expected}, got {getattr(self, name)!r}; "
                    "change it in the configuration"
                )

        check(self.variant in VARIANTS, "variant", f"one of {', '.join(VARIANTS)}")
        check(
            self.hidden is None or (len(self.hidden) == 2 and min(self.hidden) > 0),
            "hidden",
            "two positive widths, or null for three times the inputs",
        )
        check(self.optimizer in ("adam", "sgd"), "optimizer", "adam or sgd")
        check(self.learning_rate > 0, "learning_rate", "a positive number")
        check(self.weight_decay >= 0, "weight_decay", "a number >= 0")
        check(0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        check(self.epochs > 0, "epochs", "a positive integer")
        check(self.patience is None or self.patience > 0, "patience", "a positive integer or null")
        check(self.batch_size > 0, "batch_size", "a positive integer")
        check(self.members > 0, "members", "a positive integer")
        check(self.folds >= max(2, self.members), "folds", "at least 2, and at least `members`")

    @classmethod
    def named(cls, variant: str) -> MediatorSettings:
        """The settings that go with a variant's name.

        "paper": Zhan et al. 2018, section 3.2 (2 x 50, rate .05, 4 epochs, raw inputs, one MLP).
        "released": the authors' code (2 x three times the inputs, rate .001, 2 epochs of 1024,
        momentum .9, decay 1e-4). "extended": ours, the defaults.
        The paper gives neither batch size nor optimizer; we take the released code's.
        """
        if variant == "extended":
            return cls()
        plain = cls(
            variant=variant,
            optimizer="sgd",
            patience=None,
            standardise=False,
            members=1,
            calibrate=False,
            correct_prior=False,
        )
        if variant == "released":
            return replace(plain, hidden=None, learning_rate=0.001, epochs=2)
        return replace(plain, learning_rate=0.05, epochs=4)


@dataclass(frozen=True)
class ReliabilityCurve:
    """How often pairs of a given probability are right.

    lower : (b,) float64, lower edge of each bin of equal width over [0, 1].
    mean_probability, observed_rate : (b,) float64; NaN for an empty bin.
    weight : (b,) float64, pairs in the bin (a pair held out from half its MLPs counts one half).
    """

    lower: np.ndarray
    mean_probability: np.ndarray
    observed_rate: np.ndarray
    weight: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """Mean gap between probability and rate, weighted by pairs (Naeini et al. 2015)."""
        full = self.weight > 0
        gap = np.abs(self.mean_probability[full] - self.observed_rate[full])
        return float(np.average(gap, weights=self.weight[full]))


def measure_reliability(
    probability: np.ndarray, same: np.ndarray, *, weight: np.ndarray | None = None, bins: int = 15
) -> ReliabilityCurve:
    """Bin pairs by probability and compare with the truth.

    Parameters
    ----------
    probability : (m,) float in [0, 1].
    same : (m,) bool, whether the pair shows one identity.
    weight : (m,) float >= 0, or None for one each.
    bins : bins of equal width.

    Raises
    ------
    DataError
        No pair, or lengths that differ.
    """
    if len(probability) == 0 or len(probability) != len(same):
        raise DataError(
            f"reliability needs as many truths as probabilities and at least one; got "
            f"{len(probability)} probabilities and {len(same)} truths"
        )
    value = np.asarray(probability, np.float64)
    share = np.ones(len(value)) if weight is None else np.asarray(weight, np.float64)
    bin_of = np.minimum((value * bins).astype(np.int64), bins - 1)
    total = np.bincount(bin_of, share, bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityCurve(
            lower=np.arange(bins) / bins,
            mean_probability=np.bincount(bin_of, share * value, bins) / total,
            observed_rate=np.bincount(bin_of, share * same, bins) / total,
            weight=total,
        )


@dataclass(frozen=True)
class MediatorReport:
    """What is known about a fitted mediator from identities its MLPs never saw.

    pairs : held-out pairs judged. pair_rate : share of true pairs among all labelled pairs,
        as they are heard.
    expected_calibration_error : of the calibrated probabilities; the calibration of each fold is
        fitted on the other folds, so that it is not judged on what it was fitted to.
    auc, average_precision, log_loss : of the held-out probabilities.
    reliability : see `ReliabilityCurve`.
    history : a row per check: member, epoch, training_loss, validation_loss.
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


CHECK_STEPS = 1000
"""Training steps between two looks at the validation loss when an epoch is longer."""


class Mediator:
    """A fitted mediator: `Mediator.fit(...)`, then `score`.

    settings : how it was made. report : what held-out identities say about it.
    training_rate : share of true pairs among the labelled pairs, for `correct_prior`.
    held_out : (m,) float32, straight after `fit` only (None when restored): the calibrated
        probability of each labelled pair from the MLPs that saw neither person, in the order of the
        pairs; NaN for a pair held out from no MLP (with fewer members than folds).
    voice : (m,) float64, likewise: how much each labelled pair is heard; `training_rate` is the
        mean so weighed.
    discriminant : where the last input comes from, when it is one (`cdp.teaching`); it travels with
        the weights.
    """

    def __init__(
        self,
        settings: MediatorSettings,
        arrays: dict[str, np.ndarray],
        report: MediatorReport,
        held_out: np.ndarray | None = None,
        voice: np.ndarray | None = None,
    ) -> None:
        self.held_out = held_out
        self.voice = voice
        self.discriminant: Discriminant | None = None
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
        voice = _limit_people(people, source, target, same)
        taught = np.random.default_rng([seed, 0x766F6963]).random(len(same)) < voice
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
                return _train_member(read, chosen, held * voice, settings, seed, member, helper)

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
        logits = _score_rows(features, arrays, settings.standardise, workers, heard > 0)
        weight = heard.sum(1)
        judged = weight > 0
        held_logit = (logits * heard).sum(1)[judged] / weight[judged]
        held_same, held_weight = same[judged], (weight * voice)[judged]

        arrays["calibration"] = np.array([1.0, 0.0])
        held_probability = _sigmoid(held_logit)
        if settings.calibrate:
            arrays["calibration"] = _fit_calibration(held_logit, held_same, held_weight)
            owner = np.minimum(source_fold, target_fold)[judged]
            for member in range(settings.members):
                here = owner == member
                rest = (held_logit[~here], held_same[~here], held_weight[~here])
                if here.any() and rest[1].any() and not rest[1].all():
                    scale, shift = _fit_calibration(*rest)
                    held_probability[here] = _sigmoid(scale * held_logit[here] + shift)
        rate = float(np.average(same, weights=voice))
        report = _judge(held_probability, held_same, held_weight, rate, history)
        scale, shift = arrays["calibration"]
        held_out = np.full(count, np.nan, np.float32)
        held_out[judged] = _sigmoid(scale * held_logit + shift)
        return cls(settings, arrays, report, held_out, voice)

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
        logit = _score_rows(features, self._arrays, self.settings.standardise, threads)
        scale, shift = self._arrays["calibration"]
        return _sigmoid(scale * (logit.sum(1) / logit.shape[1]) + shift).astype(np.float32)

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
        own = {} if self.discriminant is None else self.discriminant.state()
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
        missing = {"json", *_ARRAY_NAMES} - set(state)
        if missing:
            raise DataError(
                f"expected a mediator's state, but it lacks {', '.join(sorted(missing))}; "
                "fit the mediator again"
            )
        plain = json.loads(bytes(np.asarray(state["json"])).decode())
        hidden = plain["settings"]["hidden"]
        plain["settings"]["hidden"] = None if hidden is None else tuple(hidden)
        report = MediatorReport.from_json(plain["report"])
        own = {name: each for name, each in arrays.items() if name.startswith("discriminant_")}
        weights = {name: each for name, each in arrays.items() if name not in own}
        mediator = cls(MediatorSettings(**plain["settings"]), weights, report)
        mediator.discriminant = Discriminant.from_state(own)
        return mediator


_ARRAY_NAMES = (
    *("mean", "inverse_deviation", "calibration"),
    *("weight_0", "bias_0", "weight_1", "bias_1", "weight_2", "bias_2"),
)


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
    share = max(MOST_SHARE, 2 / max(int(np.count_nonzero(owned)), 1))
    most = float(owned.max())
    for _ in range(50):
        most = min(most, max(share * float(np.minimum(owned, most).sum()), 1.0))
    voice = np.minimum(most / np.maximum(owned, 1), 1).astype(np.float32)
    return np.minimum(voice[source], voice[target])


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


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(logit, -LOGIT_LIMIT, LOGIT_LIMIT)))


def _fit_calibration(logit: np.ndarray, same: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Scale and shift that minimise the log loss (Platt 1999), by Newton's method, float64.

    A weak pull (one pair's worth) towards scale 1 and shift 0 keeps separable data finite.
    """
    weight = weight / weight.mean()
    column = np.stack([logit, np.ones_like(logit)], 1)
    centre = np.array([1.0, 0.0])
    value = centre.copy()

    def loss(at: np.ndarray) -> float:
        z = column @ at
        data = np.sum(weight * (np.logaddexp(0, z) - same * z))
        return float(data + 0.5 * np.sum((at - centre) ** 2))

    current = loss(value)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(column @ value, -40, 40)))
        gradient = column.T @ (weight * (p - same)) + value - centre
        hessian = (column * (weight * p * (1 - p))[:, None]).T @ column + np.eye(2)
        move = np.linalg.solve(hessian, gradient)
        size = 1.0
        while loss(value - size * move) > current and size > 1e-6:
            size /= 2
        value = value - size * move
        previous, current = current, loss(value)
        if previous - current < 1e-10 * max(1.0, abs(current)):
            break
    return np.array([max(value[0], 1e-3), value[1]])


def _judge(
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
    right = np.where(same, probability, 1 - probability)
    return MediatorReport(
        pairs=len(same),
        pair_rate=pair_rate,
        expected_calibration_error=reliability.expected_calibration_error,
        auc=float(auc),
        average_precision=float(average_precision),
        log_loss=float(np.average(-np.log(right), weights=weight)),
        reliability=reliability,
        history=tuple(history),
    )


def _score_rows(
    features: np.ndarray,
    arrays: dict[str, np.ndarray],
    clip: bool,
    threads: int = 1,
    wanted: np.ndarray | None = None,
) -> np.ndarray:
    """Raw logits of each pair by each MLP, (m, members) float64; 0 where one is not wanted."""
    out = np.zeros((len(features), len(arrays["bias_2"])), np.float64)
    weights = [arrays[name] for name in _ARRAY_NAMES if name != "calibration"]
    limit = np.float32(STANDARD_LIMIT if clip else np.inf)
    features = lock(features)
    if wanted is None:
        wanted = np.ones(out.shape, bool)

    def run(rows: slice) -> None:
        _score_block(features[rows], wanted[rows], *weights, limit, out[rows])  # type: ignore[call-arg]

    if threads <= 1:
        run(slice(None))
        return out
    edges = np.linspace(0, len(features), threads + 1).astype(np.int64)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [slice(a, b) for a, b in pairwise(edges)]))
    return out


@numba.njit(nogil=True, cache=True)
def _score_block(  # type: ignore[no-untyped-def]  # pragma: no cover
    features, wanted, mean, inverse,
    weight_0, bias_0, weight_1, bias_1, weight_2, bias_2, limit, out,
):  # fmt: skip
    """Row by row, every sum in index order: BLAS would round by the shape of the block."""
    members, width, first = weight_0.shape
    second = weight_1.shape[2]
    x = np.empty(width, np.float32)
    a = np.empty(first, np.float32)
    b = np.empty(second, np.float32)
    for row in range(len(features)):
        for i in range(width):
            value = (features[row, i] - mean[i]) * inverse[i]
            x[i] = min(max(value, -limit), limit)
        for m in range(members):
            if not wanted[row, m]:
                continue
            for j in range(first):
                a[j] = bias_0[m, j]
            for i in range(width):
                value = x[i]
                for j in range(first):
                    a[j] += value * weight_0[m, i, j]
            for j in range(second):
                b[j] = bias_1[m, j]
            for i in range(first):
                value = a[i]
                if value > 0:
                    for j in range(second):
                        b[j] += value * weight_1[m, i, j]
            total = np.float64(bias_2[m])
            for j in range(second):
                if b[j] > 0:
                    total += np.float64(b[j]) * weight_2[m, j]
            out[row, m] = total
