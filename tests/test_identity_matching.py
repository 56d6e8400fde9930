"""identity matching: a cluster of a labelled identity is found, an unknown one is not."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.recognizer.identity_matching import match_identities

pytestmark = pytest.mark.torch


def draw_people(people: int, each: int, seed: int, centres: np.ndarray | None = None):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, 32)) if centres is None else centres
    label = np.repeat(np.arange(len(centres)), each)
    vectors = centres[label] + 0.4 * rng.normal(size=(len(label), 32))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), label


def test_a_labelled_identity_is_found_again() -> None:
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=(50, 32)), rng.normal(size=(60, 32))
    vectors, label = draw_people(50, 5, 1, known)
    pseudo, clusters = draw_people(70, 4, 2, np.concatenate([known[:10], unknown]))
    clusters[-2:] = -1
    match = match_identities(vectors, label * 3, pseudo, clusters)
    np.testing.assert_array_equal(match.identity[:10], np.arange(10) * 3)
    # Unknown identities match as rarely as the labelled ones match each other.
    assert (match.identity[10:] != -1).mean() < 0.1
    assert match.similarity[:10].min() > match.threshold
    np.testing.assert_array_equal(match.identity != -1, match.similarity > match.threshold)


def test_the_threshold_is_a_share_of_the_labelled_identities() -> None:
    vectors, label = draw_people(40, 3, 0)
    mean = np.stack([vectors[label == person].mean(0) for person in range(40)])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    nearest = np.sort((mean @ mean.T - 2 * np.eye(40)).max(1))
    for far, allowed in ((0.0, 0), (0.05, 2), (0.5, 20)):
        match = match_identities(vectors, label, vectors[:3], label[:3], far=far)
        assert match.threshold == pytest.approx(nearest[-1 - allowed], abs=1e-5)
    part = match_identities(vectors, label, vectors[:3], label[:3], far=0, unseen=label < 4)
    assert part.threshold == pytest.approx((mean[:4] @ mean.T - 2 * np.eye(40)[:4]).max(), abs=1e-5)


def test_odd_cases() -> None:
    vectors, label = draw_people(5, 3, 0)
    nothing = match_identities(vectors, label, vectors, np.full(15, -1))
    assert len(nothing.identity) == 0
    gap = match_identities(vectors, label, vectors[:1], np.array([2]))
    assert gap.identity[:2].tolist() == [-1, -1]
    assert gap.similarity[:2].tolist() == [-1, -1]
    with pytest.raises(DataError, match="two labelled identities"):
        match_identities(vectors, label * 0, vectors, label)
    with pytest.raises(DataError, match="one label a vector"):
        match_identities(vectors, label[1:], vectors, label)
    with pytest.raises(DataError, match="no identity is unseen"):
        match_identities(vectors, label, vectors, label, unseen=np.zeros(15, bool))
