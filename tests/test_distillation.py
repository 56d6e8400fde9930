"""distillation: the target keeps the teacher's cosines in the form a student's embedding has."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.training.distillation import fit_target

pytestmark = [pytest.mark.torch, pytest.mark.trains]


def draw_unit(count: int, dim: int, seed: int = 0, scale: np.ndarray | None = None) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, dim))
    vectors = vectors * (1.0 if scale is None else scale) + 0.3
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def centred_cosines(vectors: np.ndarray) -> np.ndarray:
    centred = vectors - vectors.mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    return centred @ centred.T


@pytest.mark.parametrize("teacher_dim", [8, 16])
def test_all_cosines_are_kept_where_there_is_room(teacher_dim: int) -> None:
    vectors = draw_unit(60, teacher_dim)
    target = fit_target(vectors, 16)
    assert target.shape == (60, 16)
    assert target.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(target, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(target @ target.T, centred_cosines(vectors), atol=1e-5)


def test_the_largest_directions_are_kept_and_the_variance_is_spread() -> None:
    vectors = draw_unit(500, 64, scale=np.r_[np.full(8, 3.0), np.full(56, 0.02)])
    target = fit_target(vectors, 8)
    assert np.abs(target @ target.T - centred_cosines(vectors)).mean() < 0.01
    uneven = fit_target(draw_unit(2000, 64, scale=np.linspace(0.1, 3, 64)), 64)
    variance = uneven.var(0)
    assert variance.max() / variance.min() < 4  # before the turn: 900


def test_seeds_and_odd_cases() -> None:
    vectors = draw_unit(20, 12)
    np.testing.assert_array_equal(fit_target(vectors, 8), fit_target(vectors, 8))
    assert not np.allclose(fit_target(vectors, 8), fit_target(vectors, 8, seed=1))
    alone = fit_target(vectors[:1], 8)
    np.testing.assert_allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
    with pytest.raises(DataError, match="finite teacher vectors"):
        fit_target(np.full((3, 4), np.nan), 8)
    with pytest.raises(DataError, match="finite teacher vectors"):
        fit_target(vectors[:0], 8)
