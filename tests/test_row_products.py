"""A row has the same product wherever it stands; the compiled product is that of numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.mediator import mlp
from cdp.mediator.row_products import multiply_rows, rounds_alike

pytestmark = pytest.mark.torch


def draw(rows, width, columns, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, width)).astype(np.float32)
    return x, random.normal(size=(width, columns)).astype(np.float32)


def multiply(x, weight):
    out = np.full((len(x), weight.shape[1]), np.nan, np.float32)
    multiply_rows(x, weight, out)
    return out


@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_products_are_those_of_numpy_and_do_not_depend_on_the_place(tiles, width, columns):
    x, weight = draw(2 * tiles, width, columns)
    found = multiply(x, weight)
    np.testing.assert_allclose(found, x.astype(float) @ weight.astype(float), rtol=0, atol=1e-4)
    order = np.random.default_rng(1).permutation(len(x))
    np.testing.assert_array_equal(multiply(x[order], weight), found[order])


def draw_mlps(width=13, members=3):
    random = np.random.default_rng(5)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    return {
        "mean": np.zeros(width, np.float32), "inverse_deviation": np.ones(width, np.float32),
        "calibration": np.array([1.0, 0.0]),
        "weight_0": normal(members, width, 50), "bias_0": normal(members, 50),
        "weight_1": normal(members, 50, 50), "bias_1": normal(members, 50),
        "weight_2": normal(members, 50), "bias_2": normal(members),
    }  # fmt: skip


@pytest.mark.parametrize("by_blas", [True, False])
def test_scores_do_not_depend_on_the_place_of_a_row(monkeypatch, by_blas):
    """With BLAS where it rounds all rows alike on this processor, and without it on any."""
    arrays, (features, _) = draw_mlps(), draw(1000, 13, 1)
    if by_blas and not (rounds_alike(mlp.CHUNK, 13, 50) and rounds_alike(mlp.CHUNK, 50, 50)):
        pytest.skip("BLAS rounds rows differently on this processor, so it is not used")
    monkeypatch.setattr(mlp, "rounds_alike", lambda *_: by_blas)
    whole = mlp.score_rows(features, arrays, clip=True)
    for threads in (2, 3):
        np.testing.assert_array_equal(mlp.score_rows(features, arrays, True, threads), whole)
    order = np.random.default_rng(1).permutation(len(features))
    np.testing.assert_array_equal(mlp.score_rows(features[order], arrays, True), whole[order])


def test_both_ways_give_the_same_scores_but_for_the_last_bits(monkeypatch):
    arrays, (features, _) = draw_mlps(), draw(500, 13, 1)
    found = []
    for by_blas in (True, False):
        monkeypatch.setattr(mlp, "rounds_alike", lambda *_, use=by_blas: use)
        found.append(mlp.score_rows(features, arrays, clip=True))
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-3)
