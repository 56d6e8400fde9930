"""Sizes of people: labels of small people train no mediator for a set of large ones."""

import numpy as np
import pandas as pd
import pytest

from cdp import ConsensusClusterer
from cdp.errors import CdpWarning
from cdp.knn.graph import build_knn_graph
from cdp.mediator.person_sizes import LARGEST_GAP, describe_size_gap, measure_size_gap
from cdp.metrics.clustering import score_pairwise
from tests.benchmarks.bench_pseudo_labels import read_release

pytestmark = pytest.mark.torch

K = 10


def draw(sizes, seed, spread=0.3):
    """Unit rows of people of these sizes, and the person of each."""
    random = np.random.default_rng(seed)
    identity = np.repeat(np.arange(len(sizes)), sizes)
    rows = random.normal(size=(len(sizes), 48))[identity]
    rows += spread * random.normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), identity


def measure(labelled, unlabelled, k=K, **settings):
    rows = draw(unlabelled, 1, **settings)[0]
    graph = build_knn_graph(rows, k, backend="exact")
    return measure_size_gap(*draw(labelled, 2, **settings), rows, graph)


@pytest.mark.parametrize("size", [2, 3, 6, 30])
def test_sets_of_one_size_have_no_gap(size):
    assert abs(measure([size] * 60, [size] * 90 + [1] * 200)) < 0.15


@pytest.mark.parametrize(("few", "many"), [(2, 6), (3, 8), (4, 10)])
def test_the_gap_follows_the_ratio_of_sizes(few, many):
    wanted = np.log((many - 1) / (few - 1))
    assert wanted - 0.5 < measure([few] * 60, [many] * 60) < wanted + 0.1
    assert -wanted - 0.1 < measure([many] * 60, [few] * 60) < 0.5 - wanted


def test_larger_people_than_lists_name_are_all_alike():
    assert abs(measure([40] * 30, [150] * 10)) < 0.1


def test_one_large_person_of_either_set_does_not_stand_for_all():
    without = measure([3] * 60, [8] * 60)
    assert without > LARGEST_GAP + 0.3
    assert abs(measure([3] * 60 + [90], [8] * 60) - without) < 0.4
    assert abs(measure([3] * 60, [8] * 60 + [400]) - without) < 0.3
    assert measure([8] * 60, [8] * 100 + [800]) < 0.3


def test_what_cannot_be_measured_is_no_gap():
    assert measure([1] * 60, [8] * 60) == 0  # no two labelled images of one person
    assert measure([4] * 60, [1] * 300) == 0  # no unlabelled images of one person
    assert measure([4] * 60, [4] * 200, spread=6.0) == 0  # people are not apart


def test_neighbours_that_other_people_reach_by_chance_do_not_count():
    near, far = (measure([4] * 60, [4] * people, spread=0.75) for people in (60, 600))
    assert abs(near) < 0.2
    assert abs(far) < 0.35


def test_the_reason_says_how_much_larger_and_what_would_help():
    rows = draw([8] * 60, 1)[0]
    graph = build_knn_graph(rows, K, backend="exact")
    assert describe_size_gap(*draw([7] * 60, 2), rows, graph) == ""
    reason = describe_size_gap(*draw([3] * 60, 2), rows, graph)
    assert "about 2." in reason
    assert "a few frequent people" in reason


def test_labels_of_small_people_are_not_trained_on():
    known, names = draw([3] * 150, 3, 0.5)
    rows, truth = draw([60] * 12 + [1] * 200, 4, 0.5)
    model = np.random.default_rng(5).normal(size=(48, 32))
    views = [[each, (each @ model).astype(np.float32)] for each in (rows, known)]
    clusterer = ConsensusClusterer(k=K, backend="exact", threads=1)
    with pytest.warns(CdpWarning, match="times as many images as the labelled ones"):
        clusterer.fit(views[0], labelled_views=views[1], labelled_ids=names)
    assert score_pairwise(truth, clusterer.labels_)[2] > 0.95
    assert clusterer.quality_.f is None


@pytest.mark.slow
def test_large_people_are_found_though_the_labelled_ones_are_small(data_root):
    """Real faces, at most twelve images of each labelled person: F by these labels was .25."""
    views, identity, labelled = read_release(data_root / "lfw_features")
    known = np.flatnonzero(labelled)
    shuffled = known[np.random.default_rng(5).permutation(len(known))]
    rank = pd.Series(identity[shuffled]).groupby(identity[shuffled]).cumcount().to_numpy()
    known, rest = shuffled[rank < 12], np.flatnonzero(~labelled)
    clusterer = ConsensusClusterer(backend="exact", random_state=0)
    with pytest.warns(CdpWarning, match="times as many images as the labelled ones"):
        clusterer.fit(
            [view[rest] for view in views],
            labelled_views=[view[known] for view in views],
            labelled_ids=identity[known],
        )
    assert score_pairwise(identity[rest], clusterer.labels_)[2] > 0.9
    assert clusterer.quality_.f is None
