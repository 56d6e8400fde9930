"""Near-equal rows: found, represented, labelled alike; never two people in one group."""

import numpy as np
import pandas as pd
import pytest
import yaml

from cdp import ConsensusClusterer
from cdp.knn import build_knn_graph
from cdp.knn.near_equal import (
    EQUAL,
    WIDEST,
    NearEqual,
    choose_distinct,
    choose_radius,
    find_near_equal,
)
from cdp.metrics import score_pairwise
from cdp.propagation.quality import estimate_quality
from cdp.propagation.representatives import RowGroups, link_rows
from cdp.propagation.soft_labels import diffuse_labels, repeat_rows
from cdp.types import PairTable

pytestmark = pytest.mark.torch
WIDTHS = (64, 48)


def make_unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw_photos(person, seed=0, twins=0):
    """Different photos of people, two views; the first `twins` people have a twin each."""
    random = np.random.default_rng(seed)
    centre = random.normal(size=(person.max() + 1, 32))
    for one in range(twins):
        centre[2 * one + 1] = centre[2 * one] + 0.05 * random.normal(size=32)
    face = centre[person] + 0.6 * random.normal(size=(len(person), 32))
    return [
        make_unit(face @ random.normal(size=(32, width)) + random.normal(size=(len(face), width)))
        for width in WIDTHS
    ]


def repeat_frames(views, frames, cosine, seed=1):
    """Each row `frames` times, each at that cosine to it, views apart."""
    random = np.random.default_rng(seed)
    found = []
    for view in views:
        rows = np.repeat(view, frames, axis=0)
        noise = random.normal(size=rows.shape)
        noise -= (noise * rows).sum(1, keepdims=True) * rows
        found.append(cosine * rows + np.sqrt(1 - cosine**2) * make_unit(noise))
    return found


def find(views, k=20):
    return find_near_equal(views, build_knn_graph(views[0], k, backend="exact"))


@pytest.mark.parametrize("cosine", [0.9999, 0.995, 0.98])
@pytest.mark.parametrize("frames", [2, 8, 30])
def test_frames_of_a_photo_are_one_row(frames, cosine):
    views = draw_photos(np.repeat(np.arange(30), 4))
    near = find(repeat_frames(views, frames, cosine))
    photo = np.repeat(np.arange(120), frames)
    np.testing.assert_array_equal(photo[near.representative], photo)
    assert near.groups == 120
    assert near.collapsed == 120 * (frames - 1)
    assert 1 - cosine**2 < near.radius <= 1.5 * WIDEST + 1e-9
    np.testing.assert_array_equal(near.representative[near.representative], near.representative)


def test_photos_without_frames_stay_as_they_are():
    near = find(draw_photos(np.repeat(np.arange(60), 8)))
    assert near.collapsed == 0
    assert near.groups == 0


@pytest.mark.parametrize("frames", [1, 30])
def test_twins_are_never_joined(frames):
    """Twins: their photos are as near to each other as those of one person."""
    person = np.repeat(np.arange(20), 6)
    near = find(repeat_frames(draw_photos(person, twins=10), frames, 0.99))
    photo = np.repeat(np.arange(len(person)), frames)
    np.testing.assert_array_equal(photo[near.representative], photo)


def test_members_that_disagree_keep_rows_apart():
    """Look-alikes to one model: the same vector in the base view, not in the other."""
    views = repeat_frames(draw_photos(np.arange(40)), 6, 0.999)
    views[0][6:12] = views[0][:6]
    near = find(views)
    photo = np.repeat(np.arange(40), 6)
    np.testing.assert_array_equal(photo[near.representative], photo)


def test_a_row_is_near_to_its_representative():
    """A slow turn: each frame is near to the next, the ends are not near."""
    angle = np.linspace(0, np.pi / 2, 120)
    turn = np.zeros((120, 40))
    turn[:, 0], turn[:, 1] = np.cos(angle), np.sin(angle)
    rest = make_unit(np.random.default_rng(0).normal(size=(200, 40)))
    views = [np.concatenate([turn, rest])] * 2
    near = find(views)
    cosine = np.einsum("nd,nd->n", views[0], views[0][near.representative])
    assert near.collapsed > 60
    assert (1 - cosine <= 1.5 * WIDEST).all()
    assert len(np.unique(near.representative[:120])) > 1


def test_equal_rows_are_one_however_few():
    views = draw_photos(np.arange(60))
    for view in views:
        view[7] = view[3]
    near = find(views)
    assert near.collapsed == 1
    assert near.representative[7] == near.representative[3]


def test_too_few_rows_for_lists_stay():
    near = find(repeat_frames(draw_photos(np.arange(3)), 20, 0.999))
    assert near.collapsed == 0


def test_the_radius_needs_a_gap():
    random = np.random.default_rng(0)
    tail = 0.2 * random.uniform(size=4000) ** (1 / 3)
    assert choose_radius(tail) == EQUAL
    burst = random.uniform(0.008, 0.012, 500)
    assert 0.012 <= choose_radius(np.concatenate([tail, burst])) <= 0.02
    assert choose_radius(np.empty(0)) == EQUAL


def test_labelled_rows_to_learn_from():
    near = NearEqual(np.array([0, 0, 2, 2, 4, 5, 6, 7]), 0.01)
    identity = np.array([1, 1, 2, 3, 1, 2, 3, 2])
    np.testing.assert_array_equal(choose_distinct(near, identity), [0, 4, 5, 6, 7])
    tracks = NearEqual(np.array([0, 0, 2, 2]), 0.01)  # one track a person: nothing would be left
    np.testing.assert_array_equal(choose_distinct(tracks, np.array([1, 1, 2, 2])), [0, 1, 2, 3])


def test_clean_rows_give_the_same_bits():
    views = draw_photos(np.repeat(np.arange(25), 6))
    one, other = (
        ConsensusClusterer(k=8, backend="exact", near_equal=near).fit(views)
        for near in (True, False)
    )
    np.testing.assert_array_equal(one.labels_, other.labels_)
    np.testing.assert_array_equal(one.probabilities_, other.probabilities_)
    np.testing.assert_array_equal(one.pair_scores_, other.pair_scores_)
    np.testing.assert_array_equal(one.centres_.centres[0], other.centres_.centres[0])


def test_tracks_are_found_as_single_frames_are():
    """Voting; lists of 20 hold nothing but the frames of a track of 30."""
    person = np.repeat(np.arange(20), 4)
    photos = draw_photos(person)
    settings = {"backend": "exact", "min_similarity": 0.7}
    single = ConsensusClusterer(**settings).fit(photos)
    frames = repeat_frames(photos, 30, 0.995)
    tracks = ConsensusClusterer(**settings).fit(frames)
    truth = np.repeat(person, 30)
    wanted = score_pairwise(person, single.labels_)
    found = score_pairwise(truth, tracks.labels_)
    assert found[0] >= wanted[0] - 0.03
    assert found[1] >= wanted[1]
    without = ConsensusClusterer(**settings, near_equal=False).fit(frames)
    assert score_pairwise(truth, without.labels_)[1] < 0.5
    assert len(np.unique(tracks.representatives_)) == len(person)
    np.testing.assert_array_equal(tracks.labels_, tracks.labels_[tracks.representatives_])
    np.testing.assert_array_equal(tracks.predict(photos), tracks.labels_[::30])


def test_a_track_alone_is_a_cluster():
    views = repeat_frames(draw_photos(np.arange(40)), 5, 0.999)
    found = ConsensusClusterer(k=8, backend="exact", min_similarity=0.9).fit(views)
    np.testing.assert_array_equal(found.labels_, np.repeat(np.arange(40), 5))


@pytest.fixture
def linked():
    """Rows 0, 1, 2 are one; 3, 4 are one; 5 stands alone. 0-3 at .8, 3-5 at .1."""
    representative = np.array([0, 0, 0, 3, 3, 5])
    few = PairTable(np.array([0, 1]), np.array([1, 2]), np.array([2, 2], np.int32))
    pairs, score = link_rows(few, np.array([0.8, 0.1], np.float32), representative, listings=4)
    return representative, pairs, score


def test_links(linked):
    _, pairs, score = linked
    assert list(zip(pairs.source, pairs.target, strict=True)) == [
        (0, 1), (0, 2), (0, 3), (3, 4), (3, 5)]  # fmt: skip
    np.testing.assert_allclose(score, [1, 1, 0.8, 1, 0.1])
    np.testing.assert_array_equal(pairs.listings, [4, 4, 2, 4, 2])


def test_estimates_count_images_and_evidence_once(linked):
    representative, pairs, score = linked
    label = np.array([0, 0, 0, 0, 0, -1])
    found = estimate_quality(label, pairs, score, representative)
    assert found.precision == pytest.approx((3 + 1 + 6 * 0.8) / 10, abs=1e-6)
    np.testing.assert_allclose(found.confidence, [0.8] * 5 + [0], atol=1e-6)
    chance = 1 / (1 + 9 * 2**0.5)  # odds 1 : 9, and one of two expected pairs is listed
    assert found.recall == pytest.approx(8.8 / (8.8 + 5 * chance), abs=1e-6)


def test_a_reviewer_may_part_near_equal_rows(linked):
    representative, pairs, score = linked
    groups = RowGroups.of(representative, np.array([0, 0, 1, 0, 0, -1]))
    np.testing.assert_array_equal(groups.rows, [0, 2, 3, 5])
    np.testing.assert_array_equal(groups.size, [2, 1, 2, 1])
    few, value = groups.reduce_pairs(pairs, score)
    assert list(zip(few.source, few.target, strict=True)) == [(0, 1), (0, 2), (2, 3)]
    np.testing.assert_allclose(value, [1, 0.8, 0.1])


def test_pairs_of_rows_that_stand_for_themselves_are_not_copied(linked):
    _, pairs, score = linked
    groups = RowGroups.of(np.arange(6), np.array([0, 0, 1, 0, 0, -1]))
    few, value = groups.reduce_pairs(pairs, score)
    assert few is pairs
    assert value is score


def test_soft_labels_of_near_equal_rows_are_alike(linked):
    representative, pairs, score = linked
    label = np.array([0, 0, 0, 1, 1, -1])
    groups = RowGroups.of(representative, label)
    few, value = groups.reduce_pairs(pairs, score)
    soft = diffuse_labels(label[groups.rows], few, value, depth=1)
    every = repeat_rows(soft, groups.group)
    weight = np.zeros((6, 2))
    weight[every.row, every.label] = every.weight
    np.testing.assert_allclose(weight.sum(1), [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(weight[0], weight[2])
    assert 0 < weight[0, 1] < weight[0, 0]


@pytest.fixture(scope="module")
def tracked_run(tmp_path_factory):
    """A voting run on features: 15 people, 4 tracks of 12 frames each, 20 others."""
    from pipelines.run import main

    place = tmp_path_factory.mktemp("tracked")
    person = np.concatenate([np.repeat(np.arange(15), 4), np.arange(15, 35)])
    photos = draw_photos(person, seed=3)
    frames = [
        np.concatenate([repeat_frames([view[:60]], 12, 0.995)[0], view[60:]]) for view in photos
    ]
    truth = np.concatenate([np.repeat(person[:60], 12), person[60:]])
    for split, views, names in (("u", frames, truth), ("l", photos, person)):
        folder = place / "data" / split / "features"
        folder.mkdir(parents=True)
        for name, view in zip(("one", "two"), views, strict=True):
            view.astype(np.float32).tofile(folder / f"{name}.bin")
        lines = [f"p{each:02d}/{row}.jpg" for row, each in enumerate(names)]
        (folder.parent / "list.txt").write_text("\n".join(lines) + "\n")
        (folder.parent / "meta.txt").write_text("\n".join(map(str, names)) + "\n")
    manifest = {"name": "tracked", "kind": "features", "labelled": {"root": "l"},
                "unlabelled": {"root": "u"}}  # fmt: skip
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    committee = {"base": {"name": "one", "features": "one"},
                 "members": [{"name": "two", "features": "two"}]}  # fmt: skip
    config = {"data": "data.yaml", "committee": committee, "knn": {"k": 8},
              "mediate": {"method": "vote", "vote": {"min_similarity": 0.6}}}  # fmt: skip
    (place / "tracked.yaml").write_text(yaml.safe_dump(config))
    options = ["--config", str(place / "tracked.yaml"), "--data-root", str(place / "data"),
               "--runs-dir", str(place / "runs"), "--workers", "1"]  # fmt: skip
    assert main([*options, "--until", "propagate"]) == 0
    return place / "runs" / "tracked", frames, truth


def read(run, table):
    return pd.read_parquet(run / f"{table}.parquet")


@pytest.mark.slow
def test_tracks_through_the_pipeline(tracked_run):
    run, _frames, truth = tracked_run
    labels, clusters = read(run, "propagate/labels"), read(run, "propagate/clusters")
    near = read(run, "knn/near_equal")
    assert len(near) == 60 * 11
    assert (near.similarity > 0.97).all()
    assert len(read(run, "knn/neighbours/unlabelled/one")) == 80
    photo = np.concatenate([np.repeat(np.arange(60), 12), np.arange(60, 80)])
    row = np.searchsorted(labels.sample_id, labels.representative)
    np.testing.assert_array_equal(photo[row], photo)
    assert score_pairwise(truth, labels.pseudo_label.to_numpy())[1] > 0.9
    sizes = labels.pseudo_label[labels.pseudo_label >= 0].value_counts()
    np.testing.assert_array_equal(clusters["size"], sizes.sort_index())
    assert clusters.medoid_sample_id.isin(labels.representative).all()
    soft = read(run, "propagate/soft_labels")
    np.testing.assert_allclose(soft.groupby("sample_id").weight.sum(), 1, atol=1e-5)
    assert set(soft.sample_id) >= set(labels.sample_id[labels.pseudo_label >= 0])


@pytest.mark.slow
def test_the_estimator_agrees_with_the_pipeline(tracked_run):
    run, frames, _ = tracked_run
    found = ConsensusClusterer(k=8, min_similarity=0.6, backend="exact").fit(
        [frame.astype(np.float32) for frame in frames]
    )
    labels = read(run, "propagate/labels")
    np.testing.assert_array_equal(found.labels_, labels.pseudo_label)
    pairs = read(run, "mediate/pairs")
    np.testing.assert_array_equal(pairs.source - labels.sample_id.min(), found.pairs_.source)
    np.testing.assert_allclose(pairs.probability, found.pair_scores_, atol=1e-6)
