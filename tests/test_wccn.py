"""WCCN: better cosines, fitted without the identities they are measured on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from cdp.committee.wccn import FOLDS, Wccn, fit_wccn, measure_cosines
from cdp.errors import DataError
from cdp.types import PairTable


def draw_blurred(identities, images, *, seed, noise=4.0):
    """Two views in which five directions, the same for all, hold more noise than identity."""
    random = np.random.default_rng(seed)
    blur = np.random.default_rng(0).normal(size=(2, 5, 24))
    identity = np.repeat(np.arange(identities), images)
    views = []
    for view in range(2):
        who = random.normal(size=(identities, 24))[identity]
        how = noise * random.normal(size=(len(identity), 5)) @ blur[view] / np.sqrt(5)
        views.append((who + how + 0.3 * random.normal(size=who.shape)).astype(np.float32))
    return views, identity


def list_all_pairs(count):
    return PairTable(*np.triu_indices(count, 1))


def cosine(rows, pairs):
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows[pairs.source] * rows[pairs.target]).sum(1)


def test_whitening_suppresses_the_noise_all_identities_share():
    labelled, identity = draw_blurred(60, 5, seed=1, noise=1.0)
    views, truth = draw_blurred(30, 4, seed=2, noise=1.0)
    pairs = list_all_pairs(len(truth))
    same = truth[pairs.source] == truth[pairs.target]
    found, _ = fit_wccn(labelled, identity)
    whitened = measure_cosines(found.whiten(found.project(views)), pairs)
    before = max(average_precision_score(same, cosine(view, pairs)) for view in views)
    after = average_precision_score(same, whitened)
    assert before < 0.5 < 0.9 < after


def test_the_coordinates_and_cosines_are_those_of_plain_numpy():
    views, identity = draw_blurred(20, 4, seed=3)
    found, _ = fit_wccn(views, identity, seed=5)
    unit = [view / np.linalg.norm(view, axis=1, keepdims=True) for view in views]
    side = np.concatenate([each - each.mean(0) for each in unit], axis=1)
    coordinates = found.project(views)
    # 48 dimensions in all: the axes only turn them
    np.testing.assert_allclose(coordinates @ coordinates.T, side @ side.T, atol=1e-4)
    rest = side - np.stack([side[identity == each].mean(0) for each in identity])
    within = rest.T @ rest / (len(rest) - 20)
    within = 0.5 * within + 0.5 * np.trace(within) / 48 * np.eye(48)
    white = side @ np.linalg.cholesky(np.linalg.inv(within))
    pairs = list_all_pairs(len(identity))
    whitened = measure_cosines(found.whiten(coordinates), pairs)
    np.testing.assert_allclose(whitened, cosine(white, pairs), atol=1e-3)


def test_an_identity_is_measured_by_a_fit_without_its_fold():
    views, identity = draw_blurred(20, 4, seed=4)
    found, fold = fit_wccn(views, identity, seed=1)
    assert len(found.whitening) == FOLDS + 1
    for each in range(20):
        assert len(set(fold[identity == each])) == 1
    moved = fold == 2
    again = [view.copy() for view in views]
    random = np.random.default_rng(9)
    for view in again:  # other images of the same identities, the rest unchanged
        view[moved] = random.permutation(view[moved])
    other, _ = fit_wccn(again, identity, around=views, seed=1)
    first, _ = fit_wccn(views, identity, around=views, seed=1)
    np.testing.assert_allclose(other.whitening[2], first.whitening[2], atol=1e-5)
    assert np.abs(other.whitening[-1] - first.whitening[-1]).max() > 1e-3


def test_a_pair_of_two_folds_gets_the_mean_without_either():
    views, identity = draw_blurred(10, 3, seed=6)
    found, fold = fit_wccn(views, identity)
    coordinates = found.project(views)
    marked = np.where(identity < 8, fold, -1)  # the last two identities count as unlabelled
    pairs = list_all_pairs(len(identity))
    seen = np.stack(
        [measure_cosines(found.whiten(coordinates, n), pairs) for n in range(FOLDS + 1)]
    )
    expected = []
    for at, (one, other) in enumerate(zip(pairs.source, pairs.target, strict=True)):
        ends = [f for f in (marked[one], marked[other]) if f >= 0] or [FOLDS]
        expected.append(np.mean([seen[f, at] for f in ends]))
    np.testing.assert_allclose(found.measure(coordinates, pairs, marked), expected, atol=1e-6)


def test_the_bits_do_not_depend_on_threads_and_survive_storage():
    views, identity = draw_blurred(300, 20, seed=7)
    one, fold = fit_wccn(views, identity, threads=1)
    two, _ = fit_wccn(views, identity, threads=2)
    restored = Wccn.from_state(two.state())
    for name, array in one.state().items():
        np.testing.assert_array_equal(array, restored.state()[name])
    pairs = PairTable(np.arange(999), np.arange(1, 1000))
    once = one.measure(one.project(views, threads=1), pairs, fold, threads=1)
    twice = restored.measure(restored.project(views, threads=2), pairs, fold, threads=2)
    np.testing.assert_array_equal(once, twice)
    with pytest.raises(DataError, match="lacks axes_0, offset, whitening"):
        Wccn.from_state({})


@pytest.mark.parametrize(
    ("views", "identity"),
    [
        ([np.ones((6, 3), np.float32)], [0, 0, 1, 1, 2, 2]),  # all the same
        ([np.eye(4, dtype=np.float32)], [0, 1, 2, 3]),  # no identity twice
        ([np.eye(4, dtype=np.float16)[:, ::-1], np.ones((4, 1))], [5, 5, 5, 5]),  # one identity
        ([np.ones((1, 2))], [0]),
    ],
)
def test_degenerate_sets_give_finite_cosines(views, identity):
    found, fold = fit_wccn(views, np.array(identity))
    coordinates = found.project(views)
    pairs = list_all_pairs(len(identity))
    for cosines in (
        found.measure(coordinates, pairs, fold),
        measure_cosines(found.whiten(coordinates), pairs),
    ):
        assert np.isfinite(cosines).all()
        assert (np.abs(cosines) <= 1).all()


def test_views_of_other_models_are_refused():
    views, identity = draw_blurred(6, 3, seed=8)
    found, _ = fit_wccn(views, identity)
    with pytest.raises(DataError, match="expected 2 views, got 1"):
        found.project(views[:1])
    with pytest.raises(DataError, match=r"view 1 must have shape \(18, 24\), got \(18, 20\)"):
        found.project([views[0], views[1][:, :20]])
    with pytest.raises(DataError, match="same rows"):
        fit_wccn([views[0], views[1][:5]], identity)
