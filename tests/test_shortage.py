"""Few labelled people: a vote and a warning instead of a mediator, with the right counts."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.errors import CdpWarning, DataError
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.settings import MediatorSettings
from cdp.mediator.shortage import (
    LEAST_IMAGES,
    LEAST_PEOPLE,
    ShortageError,
    describe_few_images,
    describe_few_people,
    describe_imbalance,
    describe_reach,
    describe_shortage,
)
from cdp.metrics.clustering import score_pairwise

pytestmark = [pytest.mark.torch]


def draw(people, each, seed):
    generator = np.random.default_rng(seed)
    identity = np.repeat(np.arange(people), each)
    centre = generator.normal(size=(max(people, 1), 48))
    return centre[identity] + 0.4 * generator.normal(size=(len(identity), 48)), identity


@pytest.mark.parametrize(
    ("people", "each", "said"),
    [
        (0, 1, "0 labelled people, 0 of them with two images or more, cannot train"),
        (1, 3, "1 labelled person, 1 of them with two images or more, cannot train"),
        (2, 3, "2 labelled people, 2 of them with two images or more, cannot train"),
        (5, 1, "5 labelled people, 0 of them with two images or more, cannot train"),
        (20, 1, "20 labelled people, 0 of them with two images or more, cannot train"),
        (20, 2, "20 labelled people with 2.0 images each cannot train"),
        (20, 3, "people of the unlabelled images have about 3.. times as many images"),
    ],
)
def test_the_estimator_votes_and_says_so(people, each, said):
    rows, identity = draw(30, 10, 0)
    labelled, names = draw(people, each, 1)
    voting = ConsensusClusterer(k=15, backend="exact", self_training=False)
    with pytest.warns(CdpWarning, match=said) as caught:
        clusterer = voting.fit(
            [rows, rows[:, :32]], labelled_views=[labelled, labelled[:, :32]], labelled_ids=names
        )
    assert len(caught) == 1
    assert "The committee voted instead; no quality" in str(caught[0].message)
    assert clusterer.mediator_ is clusterer.quality_ is None
    assert clusterer.cosine_ > 0
    assert score_pairwise(identity, clusterer.labels_)[2] > 0.99
    voted = voting.fit_predict([rows, rows[:, :32]])
    np.testing.assert_array_equal(clusterer.labels_, voted)


def test_a_threshold_for_probabilities_is_not_used_on_votes():
    rows, identity = draw(30, 10, 0)
    labelled, names = draw(2, 3, 1)
    voting = ConsensusClusterer(k=15, backend="exact", threshold=0.96, self_training=False)
    with pytest.warns(CdpWarning, match="voted instead"):
        clusterer = voting.fit(rows, labelled_views=labelled, labelled_ids=names)
    assert score_pairwise(identity, clusterer.labels_)[2] > 0.99


def test_enough_is_enough():
    assert describe_shortage(np.repeat(np.arange(LEAST_PEOPLE), int(LEAST_IMAGES))) == ""
    alone = np.arange(100, 300)  # people of one image neither help nor harm
    assert describe_shortage(np.append(np.repeat(np.arange(LEAST_PEOPLE), 3), alone)) == ""
    assert describe_shortage(np.array(["a"] * 4 + ["b"] * 4)).startswith("2 labelled people")


def test_few_labelled_images_are_too_few_for_many_unlabelled_ones():
    identity = np.append(np.repeat(np.arange(20), 6), np.arange(100, 900))  # 120 of 20 people
    assert describe_imbalance(identity, 2400) == ""
    assert "120 labelled images of people with several" in describe_imbalance(identity, 2401)
    assert describe_imbalance(np.repeat(np.arange(50), 6), 1_000_000) == ""


def test_the_scorer_refuses_with_its_own_error():
    with pytest.raises(ShortageError, match="let the committee vote") as caught:
        PairScorer.fit([], [], np.array([0, 0, 1]), settings=MediatorSettings())
    assert isinstance(caught.value, DataError)


def test_estimates_need_people_and_images_like_the_clusters():
    assert "12 labelled people" in describe_few_people(np.repeat(np.arange(12), 5))
    assert describe_few_people(np.repeat(np.arange(24), 5)) == ""
    assert "with 3.0 images each" in describe_few_images(np.repeat(np.arange(24), 3))
    assert describe_few_images(np.append(np.repeat(np.arange(24), 4), np.arange(90, 99))) == ""
    assert describe_reach(8, 40) == ""
    assert "no labelled person more than 8" in describe_reach(8, 161)
