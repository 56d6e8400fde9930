"""A small unlabelled set: a list of k neighbours holds much of it, and people stay apart."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.mediator.small_set import SHARE, TIMES, SmallSet
from cdp.mediator.training_set import TrainingSet
from cdp.metrics.clustering import score_pairwise

pytestmark = pytest.mark.torch

PEOPLE, IMAGES = 60, 8


@pytest.fixture(scope="module")
def draw():
    """A function (sizes of people) -> three views and the truth; and 60 labelled people."""
    random = np.random.default_rng(0)
    models = [random.normal(size=(48, d)) for d in (96, 64, 80)]

    def make(size):
        identity = np.repeat(np.arange(len(size)), size)
        face = random.normal(size=(len(size), 48))[identity]
        face = face + 0.5 * random.normal(size=face.shape)
        noisy = [face + 0.3 * random.normal(size=face.shape) for _ in models]
        return [n @ m for n, m in zip(noisy, models, strict=True)], identity

    return make, make([IMAGES] * PEOPLE)


def fit(views, labelled, **settings):
    known, identity = labelled
    clusterer = ConsensusClusterer(backend="exact", threads=1, **settings)
    return clusterer.fit(views, labelled_views=known, labelled_ids=identity)


@pytest.mark.parametrize("count", [5, 15, 30, 60])
@pytest.mark.filterwarnings("ignore:no cluster was found")
def test_people_of_one_image_stay_apart(draw, count):
    make, labelled = draw
    views, _ = make([1] * count)
    found = fit(views, labelled)
    assert (found.labels_ >= 0).sum() <= count * 0.1
    assert found.quality_.f is None or found.n_clusters_


@pytest.mark.parametrize("size", [[6], [5, 4, 3], [1] * 30 + [5] * 4])
def test_few_people_are_found(draw, size):
    make, labelled = draw
    views, truth = make(size)
    found = fit(views, labelled)
    f = score_pairwise(truth, found.labels_)[2]
    assert f > 0.85
    if found.quality_.f is not None:
        assert abs(found.quality_.f - f) < 0.15


def test_a_list_of_more_neighbours_than_rows_changes_nothing_much(draw):
    make, labelled = draw
    views, truth = make([6, 6, 5, 1, 1])
    for k in (5, 20, 40):
        assert score_pairwise(truth, fit(views, labelled, k=k).labels_)[2] > 0.85


def test_the_set_is_searched_among_labelled_rows_and_not_those_adopted(draw):
    make, (known, identity) = draw
    views, _ = make([3, 2])
    adopted = np.arange(len(identity)) < 10
    found = SmallSet.of(views, 5, TrainingSet(known, identity, adopted).labelled_views, 20)
    assert [len(view) for view in found.views] == [5 + len(identity) - 10] * 3
    most = int(max(TIMES * 20, SHARE * (len(identity) - 10)))
    assert (
        SmallSet.of(views, most, TrainingSet(known, identity, adopted).labelled_views, 20) is None
    )
