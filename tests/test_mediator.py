"""The mediator: calibrated, validated by identity, the same bits whatever the partition."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from cdp.errors import ConfigError, DataError
from cdp.mediator.ensemble import Mediator
from cdp.mediator.prior_shift import correct_prior
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.calibration import measure_reliability

pytestmark = [pytest.mark.torch, pytest.mark.trains]

WIDTH = 6
DIRECTION = np.array([1.5, -1.0, 0.5, 0.0, 0.7, -0.3])


def draw_pairs(count: int, rate: float, seed: int, identities: int = 300):
    """Pairs whose true probability is known: two normal classes apart by `DIRECTION`."""
    random = np.random.default_rng(seed)
    same = random.random(count) < rate
    features = random.normal(size=(count, WIDTH)) + np.where(same[:, None], 0.5, -0.5) * DIRECTION
    source = random.integers(0, identities, count)
    target = np.where(same, source, (source + random.integers(1, identities, count)) % identities)
    logit = features @ DIRECTION + np.log(rate / (1 - rate))
    known = 1 / (1 + np.exp(-logit))
    return features.astype(np.float32), same, source, target, known


@pytest.fixture(scope="module")
def labelled():
    return draw_pairs(12_000, 0.4, 0)


@pytest.fixture(scope="module")
def fitted(labelled):
    return Mediator.fit(*labelled[:4], seed=3)[0]


def test_probabilities_are_the_known_ones(fitted):
    features, same, _, _, known = draw_pairs(40_000, 0.4, 1)
    score = fitted.score(features)
    assert score.dtype == np.float32
    assert np.abs(score - known).mean() < 0.02
    assert measure_reliability(score, same).expected_calibration_error < 0.015
    assert fitted.report.expected_calibration_error < 0.02


def test_the_report_describes_held_out_identities(fitted, labelled):
    report = fitted.report
    assert report.pair_rate == pytest.approx(labelled[1].mean())
    assert report.pairs == len(labelled[1])
    # a pair between two folds has weight one half in each, so every pair has weight 1
    assert report.reliability.weight.sum() == pytest.approx(len(labelled[1]))
    score = fitted.score(labelled[0])
    assert report.auc == pytest.approx(roc_auc_score(labelled[1], score), abs=0.025)
    assert report.average_precision == pytest.approx(
        average_precision_score(labelled[1], score), abs=0.02
    )
    assert {row["member"] for row in report.history} == set(range(5))


def test_memorised_identities_do_not_improve_the_report():
    """A feature that names the identity must not leak into the held-out figures."""
    random = np.random.default_rng(0)
    identities, count = 60, 6000
    source = random.integers(0, identities, count)
    same = random.random(count) < 0.5
    # a pair is positive exactly when its source is one of half the identities: only memorised
    code = random.normal(size=(identities, 8))
    chosen = random.random(identities) < 0.5
    same = chosen[source]
    away = 1 + random.integers(0, identities - 1, count)
    target = np.where(same, source, (source + away) % identities)
    features = code[source].astype(np.float32)
    report = Mediator.fit(
        features, same, source, target, settings=MediatorSettings(folds=5, ensemble_size=5), seed=0
    )[0].report
    assert report.auc < 0.8


@given(st.lists(st.integers(0, 997), max_size=8), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_any_partition_gives_the_same_bits(fitted, labelled, cuts, threads):
    features = labelled[0][:997]
    whole = fitted.score(features)
    edges = [0, *sorted(cuts), 997]
    parts = [fitted.score(features[a:b]) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(fitted.score(features, threads=threads), whole)


def test_scores_follow_the_torch_formula(fitted, labelled):
    """An independent forward pass, straight from the definition."""
    state, features = fitted.state(), labelled[0][:200]
    x = torch.from_numpy(((features - state["mean"]) * state["inverse_deviation"]).clip(-8, 8))
    logits = []
    for m in range(5):
        h = torch.relu(
            x @ torch.from_numpy(state["weight_0"][m]) + torch.from_numpy(state["bias_0"][m])
        )
        h = torch.relu(
            h @ torch.from_numpy(state["weight_1"][m]) + torch.from_numpy(state["bias_1"][m])
        )
        logits.append(h @ torch.from_numpy(state["weight_2"][m]) + float(state["bias_2"][m]))
    scale, shift = state["calibration"]
    expected = torch.sigmoid(torch.stack(logits).mean(0) * scale + shift).numpy()
    np.testing.assert_allclose(fitted.score(features), expected, atol=1e-5)


def test_the_same_seed_gives_the_same_mediator(labelled):
    features, same, source, target, _ = (a[:3000] for a in labelled)
    before = torch.get_num_threads()
    states = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        states.append(Mediator.fit(features, same, source, target, seed=9)[0].state())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    other = Mediator.fit(features, same, source, target, seed=10)[0].state()
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name])
    assert not np.array_equal(states[0]["weight_0"], other["weight_0"])


def test_state_survives_a_safetensors_file(fitted, labelled, tmp_path):
    from safetensors.numpy import load_file, save_file

    save_file(fitted.state(), tmp_path / "mediator.safetensors")
    again = Mediator.from_state(load_file(tmp_path / "mediator.safetensors"))
    assert again.settings == fitted.settings
    assert again.report.to_json() == fitted.report.to_json()
    np.testing.assert_array_equal(again.score(labelled[0]), fitted.score(labelled[0]))
    with pytest.raises(DataError, match="weight_1"):
        Mediator.from_state({k: v for k, v in fitted.state().items() if k != "weight_1"})


@pytest.mark.parametrize(
    ("name", "hidden", "rate", "epochs"),
    [("paper", 50, 0.05, 4), ("released", 18, 0.001, 2)],
)
def test_the_published_mediators_are_one_setting(labelled, name, hidden, rate, epochs):
    chosen = MediatorSettings.named(name)
    assert (chosen.learning_rate, chosen.epochs, chosen.standardise) == (rate, epochs, False)
    mediator, _ = Mediator.fit(*labelled[:4], settings=chosen, seed=0)
    state = mediator.state()
    assert state["weight_0"].shape == (1, WIDTH, hidden)
    assert state["weight_1"].shape == (1, hidden, hidden)
    losses = [row["training_loss"] for row in mediator.report.history]
    assert len(losses) == epochs
    # Two epochs at .001 end near where the weights began, so the AUC of `released` is luck.
    assert losses[-1] < losses[0]
    assert name == "released" or mediator.report.auc > 0.8


def test_dropout_trains_and_is_off_when_scoring(labelled):
    chosen = MediatorSettings(dropout=0.3, ensemble_size=1)
    mediator, _ = Mediator.fit(*labelled[:4], settings=chosen, seed=0)
    np.testing.assert_array_equal(mediator.score(labelled[0]), mediator.score(labelled[0]))
    assert mediator.report.auc > 0.8


def test_held_out_scores_are_of_mlps_that_saw_neither_identity(labelled):
    """With fewer MLPs than folds some pairs are held out from none."""
    features, same, source, target, _ = (a[:3000] for a in labelled)
    chosen = MediatorSettings(ensemble_size=2, folds=4, epochs=2)
    mediator, held_out = Mediator.fit(features, same, source, target, settings=chosen, seed=1)
    assert held_out.probability.shape == held_out.weight.shape == (3000,)
    assert held_out.probability.dtype == np.float32
    assert held_out.weight.dtype == np.float64
    judged = np.isfinite(held_out.probability)
    assert 0 < judged.sum() == mediator.report.pairs < 3000
    assert mediator.training_rate == pytest.approx(np.average(same, weights=held_out.weight))
    with pytest.raises(dataclasses.FrozenInstanceError):
        held_out.weight = None
    with pytest.raises(AttributeError):
        mediator.settings = chosen


def test_a_constant_feature_is_harmless(labelled):
    features = np.concatenate([labelled[0][:4000], np.full((4000, 1), 7, np.float32)], 1)
    mediator, _ = Mediator.fit(features, *(a[:4000] for a in labelled[1:4]), seed=0)
    assert np.isfinite(mediator.score(features)).all()


def test_folds_share_out_the_identities_with_many_pairs():
    """Five identities own nearly all positive pairs; each fold must get one of them."""
    random = np.random.default_rng(0)
    source = np.concatenate([np.repeat(np.arange(5), 400), np.arange(5, 105)])
    same = np.ones(len(source), bool)
    false = random.integers(0, 105, (2000, 2))
    false = false[false[:, 0] != false[:, 1]]
    source, target = np.concatenate([source, false[:, 0]]), np.concatenate([source, false[:, 1]])
    same = source == target
    features = random.normal(size=(len(source), 3)).astype(np.float32) + same[:, None]
    report = Mediator.fit(features, same, source, target, seed=1)[0].report
    assert report.pairs == len(source)


def test_one_identity_with_most_pairs_does_not_dominate(labelled):
    """Identity 0 owns three of four positive pairs, and their features are uninformative."""
    features, same, source, target, _ = labelled
    random = np.random.default_rng(7)
    odd = random.normal(size=(3 * int(same.sum()), WIDTH))
    zero = np.zeros(len(odd), np.int64)
    mediator, _ = Mediator.fit(
        np.concatenate([features, odd.astype(np.float32)]),
        np.concatenate([same, zero == 0]),
        np.concatenate([source, zero]),
        np.concatenate([target, zero]),
        seed=3,
    )
    others, truth, *_ = draw_pairs(20_000, 0.4, 2)
    corrected = correct_prior(mediator.score(others), mediator.training_rate).probability
    # .60 without the limit
    assert measure_reliability(corrected, truth).expected_calibration_error < 0.05


def test_bad_input_is_one_clear_message(labelled, fitted):
    features, same, source, target, _ = (a[:500] for a in labelled)
    true, false = np.ones(500, bool), np.zeros(500, bool)
    with pytest.raises(DataError, match="no positive pair"):
        Mediator.fit(features, false, source, source + 1)
    with pytest.raises(DataError, match="are positive"):
        Mediator.fit(features, true, source, source)
    with pytest.raises(DataError, match="contradicts"):
        Mediator.fit(features, ~same, source, target)
    with pytest.raises(DataError, match="same of shape"):
        Mediator.fit(features, same[:-1], source, target)
    broken = features.copy()
    broken[3, 2] = np.nan
    with pytest.raises(DataError, match="feature 2 of row 3"):
        Mediator.fit(broken, same, source, target)
    with pytest.raises(DataError, match="feature 2 of row 3"):
        fitted.score(broken)
    with pytest.raises(DataError, match=r"\(pairs, 6\)"):
        fitted.score(features[:, :5])
    with pytest.raises(DataError, match="label more people"):
        Mediator.fit(features[:4], np.array([1, 1, 0, 0], bool), [0, 1, 0, 1], [0, 1, 1, 0])
    assert fitted.score(features[:0]).shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "ours"},
        {"hidden": (50,)},
        {"dropout": 1.0},
        {"ensemble_size": 6},
        {"optimizer": "lbfgs"},
        {"patience": 0},
    ],
)
def test_settings_are_checked(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(MediatorSettings(), **change)
