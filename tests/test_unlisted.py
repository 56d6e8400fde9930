"""Unlisted pairs: their share by images of a person, and its mean over clusters of other sizes."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.propagation.unlisted import average_unlisted, fit_unlisted

pytestmark = pytest.mark.torch


def draw_shares(people=400, seed=0):
    """People of 2 to 100 images, of whose pairs a share of .4 / images is unlisted, with noise."""
    random = np.random.default_rng(seed)
    size = np.exp(random.uniform(np.log(2), np.log(100), people)).astype(np.int64)
    return size, np.clip(0.4 / size + random.normal(0, 0.02, people), 0, 1)


def test_the_share_is_that_of_people_of_as_many_images():
    size, share = draw_shares()
    curve = fit_unlisted(size, share)
    assert (np.diff(curve[:, 0]) > 0).all()
    assert (np.diff(curve[:, 1]) <= 0).all()
    for images in (3, 10, 40):
        assert average_unlisted(curve, np.full(5, images)) == pytest.approx(0.4 / images, abs=0.03)


def test_the_mean_is_over_pairs():
    """One large cluster has nearly all pairs, and their share counts."""
    curve = fit_unlisted(*draw_shares())
    large, small = average_unlisted(curve, np.array([80])), average_unlisted(curve, np.array([2]))
    mixed = average_unlisted(curve, np.array([80, *[2] * 10]))
    assert large < mixed < large + 0.01 < small


def test_beyond_the_largest_held_out_person_the_share_falls_with_the_images():
    curve = fit_unlisted(*draw_shares())
    largest = curve[-1, 0]
    assert average_unlisted(curve, np.array([largest])) == curve[-1, 1]
    assert average_unlisted(curve, np.array([4 * largest])) == pytest.approx(curve[-1, 1] / 4)


def test_without_people_or_clusters_nothing_is_unlisted():
    nobody = fit_unlisted(np.empty(0, np.int64), np.empty(0))
    assert nobody.shape == (0, 2)
    assert average_unlisted(nobody, np.array([3])) == 0
    assert average_unlisted(None, np.array([3])) == 0
    assert average_unlisted(fit_unlisted(*draw_shares()), np.ones(4)) == 0
