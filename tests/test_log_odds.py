"""Log-odds: the definition, the limit, and the way back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cdp.arrays.log_odds import convert_threshold, to_log_odds, to_probability


def test_they_are_the_definition_within_the_limit():
    probability = np.linspace(0, 1, 2001)
    with np.errstate(divide="ignore"):
        expected = np.log(probability / (1 - probability))
    for limit in (3.0, 12.0, 15.0):
        found = to_log_odds(probability, limit)
        np.testing.assert_allclose(found, np.clip(expected, -limit, limit), atol=1e-12)
        assert (found.min(), found.max()) == (-limit, limit)


def test_a_margin_keeps_certainty_finite():
    low, high = to_log_odds(np.array([0.0, 1.0]), margin=1e-6)
    assert (low, high) == pytest.approx((math.log(1e-6), -math.log(1e-6)), abs=1e-5)
    assert np.isfinite(to_log_odds(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(dtype):
    probability = np.random.default_rng(0).random(1000).astype(dtype)
    log_odds = to_log_odds(probability)
    assert log_odds.dtype == np.float64
    np.testing.assert_allclose(to_probability(log_odds), probability, rtol=1e-12)
    assert to_probability(np.array([-1e9, 1e9]), 15.0) == pytest.approx(
        [1 / (1 + math.exp(15)), 1 / (1 + math.exp(-15))], rel=1e-12
    )


def test_a_threshold_agrees_with_the_arrays():
    for threshold in (1e-9, 0.2, 0.5, 0.999):
        assert convert_threshold(threshold) == pytest.approx(to_log_odds(np.array(threshold)))
