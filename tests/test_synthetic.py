"""Synthetic faces: identities and splits, what an image depends on, and what it must show."""

import hashlib
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from cdp.errors import ConfigError, DataError
from cdp.synthetic import SPLITS, SyntheticFaces, painter

SMALL = SyntheticFaces(
    seed=3,
    labelled_identities=12,
    unlabelled_identities=40,
    evaluation_identities=10,
    images_min=3,
    images_max=12,
    evaluation_images=4,
)


def test_the_same_settings_give_the_same_pictures():
    rows = np.arange(0, 240, 7)
    assert (SMALL.draw(rows) == replace(SMALL).draw(rows)).all()
    assert (SMALL.draw(rows) != replace(SMALL, seed=4).draw(rows)).any()


def test_a_picture_does_not_depend_on_its_batch():
    rows = np.arange(60)
    together = SMALL.draw(rows)
    for row in (0, 15, 16, 33, 59):
        assert (SMALL.draw(np.array([row]))[0] == together[row]).all()
    shuffled = np.random.default_rng(0).permutation(rows)
    assert (SMALL.draw(shuffled) == together[shuffled]).all()
    assert (SMALL.draw(np.array([5, 5, 5])) == together[5]).all()


def test_a_picture_does_not_depend_on_the_number_of_identities_after_it():
    more = replace(SMALL, unlabelled_identities=60, evaluation_identities=30)
    rows = np.flatnonzero(SMALL.split == "labelled")
    assert (more.draw(rows) == SMALL.draw(rows)).all()


def test_names_and_counts_are_what_they_were():
    """Settings must mean the same set tomorrow: a digest of all but the pixels."""
    lines = [f"{SMALL.name(row)} {SMALL.split[row]}" for row in range(len(SMALL))]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert len(SMALL) == len(set(lines))
    assert lines == sorted(lines, key=lambda line: line.split()[0])
    assert digest[:16] == "e411c59cc84b266a"
    traits = SMALL.traits(np.arange(62))
    assert traits.sum() == pytest.approx(-97.409105, abs=1e-6)


def test_pictures_are_what_they_were_but_for_rounding():
    """Mean colour over a grid of sixteen cells of one picture, as it was when it was tuned."""
    picture = SMALL.draw(np.array([0]))[0].astype(float)
    cells = picture.reshape(4, 12, 4, 12, 3).mean(axis=(1, 3, 4)).round().astype(int)
    expected = np.array(
        [[106, 105, 101, 128], [121, 146, 151, 136], [108, 146, 147, 122], [98, 110, 115, 120]]
    )
    assert np.abs(cells - expected).max() <= 1


def test_shape_type_and_name():
    image = SMALL.draw(np.arange(3))
    assert image.shape == (3, 48, 48, 3)
    assert image.dtype == np.uint8
    assert SMALL.draw(np.array([], dtype=np.int64)).shape == (0, 48, 48, 3)
    assert SMALL.name(0) == "id_000000/0000.png"
    for size_px in (16, 24, 33, 64):
        assert replace(SMALL, size_px=size_px).draw(np.arange(2)).shape == (2, size_px, size_px, 3)


def test_splits_share_no_identity_and_follow_one_another():
    members = {split: set(SMALL.identity[SMALL.split == split]) for split in SPLITS}
    assert [len(members[split]) for split in SPLITS] == [12, 40, 10]
    assert not members["labelled"] & members["unlabelled"]
    assert not members["unlabelled"] & members["evaluation"]
    assert not members["labelled"] & members["evaluation"]
    assert SMALL.identity.dtype == np.int64
    assert (np.diff(SMALL.identity) >= 0).all()


def test_image_counts_have_a_long_tail_within_their_limits():
    faces = SyntheticFaces(
        unlabelled_identities=3000, images_min=3, images_max=30, one_image_share=0.2
    )
    count = np.bincount(faces.identity)
    labelled = count[faces.identity_split == "labelled"]
    unlabelled = count[faces.identity_split == "unlabelled"]
    assert (count[faces.identity_split == "evaluation"] == faces.evaluation_images).all()
    assert labelled.min() >= 3
    assert labelled.max() <= 30
    assert np.mean(unlabelled == 1) == pytest.approx(0.2, abs=0.03)
    several = unlabelled[unlabelled > 1]
    assert several.mean() > 1.15 * np.median(several)
    assert several.max() > 25


def test_without_nuisance_an_identity_has_one_picture():
    calm = replace(SMALL, nuisance=0.0)
    rows = np.flatnonzero(calm.identity == calm.identity[0])
    image = calm.draw(rows).astype(int)
    worn = np.abs(image - image[0]).max()
    assert worn <= 1
    assert np.abs(calm.draw(np.array([0])).astype(int) - calm.draw([len(calm) - 1])).max() > 20


def test_nuisance_moves_pictures_and_more_of_it_moves_them_more():
    spread = []
    for nuisance in (0.2, 0.6, 1.0, 2.0):
        faces = replace(SMALL, nuisance=nuisance)
        rows = np.flatnonzero(faces.split == "evaluation")
        image = faces.draw(rows).astype(float).reshape(10, 4, -1)
        spread.append(image.std(axis=1).mean())
    assert spread == sorted(spread)
    assert spread[0] > 0


def test_identity_shows_in_clean_pictures():
    """Calm pictures at 24 pixels: nearly every image is nearest to one of its own identity."""
    calm = replace(SMALL, nuisance=0.1)
    rows = np.flatnonzero(calm.split == "evaluation")
    image = calm.draw(rows).astype(float)
    small = image.reshape(len(rows), 24, 2, 24, 2, 3).mean(axis=(2, 4)).reshape(len(rows), -1)
    distance = np.linalg.norm(small[:, None] - small[None], axis=2)
    same = calm.identity[rows][:, None] == calm.identity[rows]
    np.fill_diagonal(distance, np.inf)
    nearest = distance.argmin(axis=1)
    assert np.mean(same[np.arange(len(rows)), nearest]) > 0.9
    within = distance[same & np.isfinite(distance)].mean()
    assert within < 0.5 * distance[~same].mean()


def test_at_full_nuisance_pixels_alone_do_not_separate_identities():
    faces = replace(SMALL, evaluation_identities=120)
    rows = np.flatnonzero(faces.split == "evaluation")
    small = faces.draw(rows)[:, ::2, ::2].astype(float).reshape(len(rows), -1)
    square = (small**2).sum(axis=1)
    distance = square[:, None] + square - 2 * small @ small.T
    np.fill_diagonal(distance, np.inf)
    same = faces.identity[rows][:, None] == faces.identity[rows]
    assert np.mean(same[np.arange(len(rows)), distance.argmin(axis=1)]) < 0.8


def test_resemblance_makes_look_alikes():
    def nearest(resemblance):
        traits = replace(SMALL, resemblance=resemblance).traits(np.arange(62))
        distance = np.linalg.norm(traits[:, None] - traits[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        return distance.min(axis=1).mean()

    assert nearest(0.8) < nearest(0.4) < nearest(0.0)


def test_traits_are_standard():
    traits = replace(SMALL, resemblance=0.5).traits(np.arange(5000))
    assert np.abs(traits).max() <= 2.2
    assert np.abs(traits.mean(axis=0)).max() < 0.35
    assert traits.std(axis=0) == pytest.approx(np.full(traits.shape[1], 0.97), abs=0.2)


def test_pictures_use_the_range_and_stay_in_it():
    image = SMALL.draw(np.arange(100)).astype(float)
    assert 70 < image.mean() < 180
    assert image.std(axis=(1, 2, 3)).min() > 8
    assert np.mean((image == 0) | (image == 255)) < 0.2


def test_strong_nuisance_stays_a_picture():
    image = replace(SMALL, nuisance=4.0).draw(np.arange(40))
    assert image.dtype == np.uint8
    assert image.std() > 10


def test_no_feature_is_cut_by_the_rows_it_is_drawn_in(monkeypatch):
    """Drawing each feature over the whole picture gives the same picture."""
    for nuisance in (0.0, 1.0, 3.0):
        faces = SyntheticFaces(nuisance=nuisance)
        rows = np.arange(5, len(faces), 97)
        with monkeypatch.context() as patch:
            banded = faces.draw(rows).astype(int)
            patch.setattr(painter._Bands, "__call__", lambda self, *_: slice(0, self.size_px))
            assert np.abs(faces.draw(rows) - banded).max() <= 1


def test_contact_sheet_holds_the_pictures():
    sheet = SMALL.draw_contact_sheet(identities=3, columns=4)
    assert sheet.shape == (3 * 48, 4 * 48, 3)
    assert (sheet[:48, :48] < 255).any()


def test_settings_are_frozen_and_checked():
    with pytest.raises(FrozenInstanceError):
        SMALL.seed = 4  # type: ignore[misc]
    for wrong in (
        {"size_px": 8},
        {"labelled_identities": -1},
        {"images_min": 0},
        {"images_min": 9, "images_max": 3},
        {"nuisance": -0.1},
        {"one_image_share": 1.5},
        {"resemblance": 1.0},
        {"nuisance": float("nan")},
    ):
        with pytest.raises(ConfigError, match="expected"):
            SyntheticFaces(**wrong)


def test_rows_outside_the_set_are_refused():
    for rows in ([-1], [len(SMALL)]):
        with pytest.raises(DataError, match="rows"):
            SMALL.draw(np.array(rows))
