"""Appearance of faces, the gap between two sets, and copies that look like the pile."""

from __future__ import annotations

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.images.appearance import APPEARANCE, measure_appearance
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade_pixels
from cdp.images.matching import match_pile
from cdp.images.sharpness_gap import SharpnessGap, find_poor, measure_sharpness_gap
from cdp.images.two_samples import compare_samples
from cdp.synthetic.identities import SyntheticFaces
from pipelines.copies import degrade_sharp

pytestmark = pytest.mark.torch

SEEDS = np.arange(40)
POOR = Degradation(low_res_rate=1.0, low_res_px=(10, 16), noise_rate=0.5, noise_sigma=(0.01, 0.03))


@pytest.fixture(scope="module")
def faces():
    drawn = SyntheticFaces(
        size_px=56,
        seed=0,
        labelled_identities=4,
        unlabelled_identities=1,
        evaluation_identities=1,
        images_min=10,
        images_max=10,
        evaluation_images=1,
    )
    return drawn.draw(SEEDS)


def column(measured, name):
    return measured[:, APPEARANCE.index(name)]


def test_a_shift_is_in_pooled_deviations():
    one, other = np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]])
    (shift,) = compare_samples(["size"], one, other)
    assert (shift.measure, shift.labelled, shift.pile) == ("size", 1, 4)
    assert shift.shift == pytest.approx(-3)
    with pytest.raises(DataError, match=r"pile: \(rows, 1\) measures of one row or more"):
        compare_samples(["size"], one, np.empty((0, 1)))


def test_each_measure_follows_what_it_is_of(faces):
    plain = measure_appearance(faces)

    def changed(**damage):
        way = Degradation(**damage)
        return measure_appearance(degrade_pixels(faces, SEEDS, way, faces.shape[1])) - plain

    blurred = changed(blur_rate=1, blur_sigma=(0.04, 0.04))
    assert (column(blurred, "detail_2") < -1).all()
    assert (np.abs(column(blurred, "light")) < 0.02).all()
    assert (column(changed(noise_rate=1, noise_sigma=(0.06, 0.06)), "noise") > 0.5).mean() > 0.9
    bright = changed(photometric_rate=1, brightness=(0.4, 0.4), contrast=(1, 1), saturation=(1, 1))
    assert (column(bright, "light") < 0).all()
    masked = changed(mask_rate=1)
    assert (
        np.median(column(masked, "detail_bottom")) < -0.3 < np.median(column(masked, "detail_top"))
    )


def test_faces_alike_show_no_gap_and_poor_ones_a_wide_one(faces):
    measured = measure_appearance(faces)
    alike = measure_sharpness_gap(measured[::2], measured[1::2])
    assert not alike.is_wide
    assert alike.describe().startswith("labelled and unlabelled pictures are alike")
    poor = measure_appearance(degrade_pixels(faces, SEEDS, DEGRADATIONS["surveillance"], 12))
    gap = measure_sharpness_gap(measured, poor)
    assert gap.is_wide
    assert "sharper than the pile's" in gap.describe()
    turned = measure_sharpness_gap(poor, measured)
    assert turned.sharpness == pytest.approx(-gap.sharpness)
    assert not turned.is_wide
    assert "less sharp" in turned.describe()


def test_a_set_that_is_sharp_in_part_is_seen(faces):
    poor = degrade_pixels(faces, SEEDS, POOR, 56)
    pile = measure_appearance(poor)
    mixed = measure_appearance(np.concatenate([poor[:24], faces[24:]]))
    gap = measure_sharpness_gap(mixed, pile)
    assert gap.is_wide
    assert 0.2 < gap.sharper < 0.4
    alike = measure_sharpness_gap(pile[::2], pile[1::2])
    assert not alike.is_wide
    sharp = SharpnessGap(gap.shifts, 0.5, gap.sharper)
    assert sharp.describe().endswith(
        "of the labelled pictures are sharper than nine tenths of the pile's"
    )


def test_only_the_sharp_ones_are_degraded(faces):
    poor = degrade_pixels(faces[:20], SEEDS[:20], POOR, 56)
    pile = measure_appearance(poor)
    both = np.concatenate([poor, faces[20:]])
    copies = degrade_sharp(both, both, pile, SEEDS)
    same = (copies == both).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, find_poor(measure_appearance(both), pile))
    assert 4 <= same[:20].sum() <= 16
    assert not same[20:].any()


def test_copies_have_the_appearance_of_the_pile(faces):
    poor = degrade_pixels(faces[:20], SEEDS[:20], DEGRADATIONS["surveillance"], 14)
    pile = measure_appearance(poor)
    copies = match_pile(faces[20:], pile, SEEDS[20:])
    assert copies.shape == faces[20:].shape
    sharp, now = measure_appearance(faces[20:]), measure_appearance(copies)
    for name in ("detail_1", "detail_2", "detail_4"):
        away = abs(column(now, name).mean() - column(pile, name).mean())
        assert away < 0.35 * abs(column(sharp, name).mean() - column(pile, name).mean())


def test_a_copy_depends_on_its_own_face_and_seed_alone(faces):
    pile = measure_appearance(degrade_pixels(faces, SEEDS, DEGRADATIONS["surveillance"], 14))
    together = match_pile(faces[:6], pile, SEEDS[:6], size_px=24)
    assert together.shape == (6, 24, 24, 3)
    alone = match_pile(faces[3:4], pile, SEEDS[3:4], size_px=24)
    assert np.abs(alone[0].astype(int) - together[3]).max() <= 1
    other = match_pile(faces[3:4], pile, SEEDS[3:4] + 100, size_px=24)
    assert np.abs(other.astype(int) - alone).max() > 10


def test_what_cannot_be_matched_is_named(faces):
    with pytest.raises(DataError, match="the pile's appearance"):
        match_pile(faces[:1], np.empty((0, len(APPEARANCE))), SEEDS[:1])
    with pytest.raises(DataError, match="one seed a face"):
        match_pile(faces[:2], measure_appearance(faces[:1]), SEEDS[:1])
    with pytest.raises(DataError, match="uint8 expected"):
        measure_appearance(faces.astype(np.float32))
