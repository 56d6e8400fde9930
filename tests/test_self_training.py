"""Self-training: where no label can train a mediator, the clusters of the votes do."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.arrays.cosine import make_unit
from cdp.errors import CdpWarning
from cdp.knn import build_knn_graphs
from cdp.knn.joint import join_graphs
from cdp.mediator import JointSet, MediatorSettings, PairVoter
from cdp.mediator.self_training import SELF_TRAINED, fit_on_votes
from cdp.mediator.set_gap import describe_gap
from cdp.mediator.shortage import ShortageError
from cdp.metrics.clustering import score_pairwise

pytestmark = [pytest.mark.torch]
DIMENSIONS = (64, 48, 40)


def draw(people, each, spread, seed, quality=0.0):
    """Faces of people in three views; `quality` is what all pictures of one camera share."""
    generator = np.random.default_rng(seed)
    shared = np.random.default_rng(99)
    models = [shared.normal(size=(48, d)) / 7 for d in DIMENSIONS]
    camera = quality * shared.normal(size=48)
    identity = np.repeat(np.arange(people), each)
    centre = generator.normal(size=(people, 48))[identity]
    blur = generator.uniform(0.3, 1.7, size=(len(identity), 1)) * spread
    face = centre + camera + blur * generator.normal(size=(len(identity), 48))
    views = [
        ((face + 0.3 * generator.normal(size=face.shape)) @ model).astype(np.float32)
        for model in models
    ]
    return views, identity


@pytest.fixture(scope="module")
def pile():
    return draw(60, 9, 0.75, 0)


def test_a_mediator_trained_on_votes_is_better_than_votes(pile):
    views, identity = pile
    voted = ConsensusClusterer(k=15, backend="exact", self_training=False).fit(views)
    trained = ConsensusClusterer(k=15, backend="exact").fit(views)
    before, now = (score_pairwise(identity, each.labels_)[2] for each in (voted, trained))
    assert now > before + 0.1
    assert now > 0.9
    assert voted.quality_ is None
    assert (trained.quality_.precision, trained.quality_.reasons) == (None, (SELF_TRAINED,))
    assert np.isnan(trained.quality_.expected_precision).all()
    inside = trained.labels_ >= 0
    cosine = make_unit(views[0])[0] @ make_unit(views[0])[0].T
    mean = trained.probabilities_[inside]
    assert mean.max() < cosine[~np.eye(len(cosine), dtype=bool)].max()
    assert 0 < mean.mean() < 0.9  # cosines, no probabilities: nobody was held out
    assert (trained.probabilities_[~inside] == 0).all()


def test_votes_are_final_where_somebody_chose_a_cosine(pile):
    clusterer = ConsensusClusterer(k=15, backend="exact", min_similarity=0.5).fit(pile[0])
    assert clusterer.mediator_ is None
    assert clusterer.cosine_ == 0.5


def test_few_clusters_are_too_few_to_train_on():
    views, _ = draw(4, 9, 0.3, 1)
    graphs = build_knn_graphs(views, 15, backend="exact")
    with pytest.raises(ShortageError, match="cannot train a mediator"):
        fit_on_votes(views, graphs, PairVoter(), settings=MediatorSettings())
    assert ConsensusClusterer(k=15, backend="exact").fit(views).mediator_ is None


@pytest.mark.parametrize("quality", [0.0, 1.0])
def test_a_gap_between_the_sets_is_seen(pile, quality):
    labelled, names = draw(40, 6, 0.3, 2, quality)
    text = describe_gap(join(labelled, names, pile[0]), len(pile[0][0]))
    assert ("times as frequent as by chance" in text) == bool(quality)


def join(labelled, names, unlabelled):
    sets = [[view / np.linalg.norm(view, axis=1, keepdims=True) for view in each]
            for each in (labelled, unlabelled)]  # fmt: skip
    graphs = [build_knn_graphs(each, 15, backend="exact") for each in sets]
    near, joint = join_graphs(sets[0], graphs[0], sets[1], graphs[1])
    both = [np.concatenate([one, other[near]]) for one, other in zip(*sets, strict=True)]
    return JointSet(both, joint, np.concatenate([names, np.full(len(near), -1)]))


def test_labels_unlike_the_unlabelled_rows_are_not_trained_on(pile):
    views, identity = pile
    labelled, names = draw(40, 6, 0.3, 2, quality=1.0)
    with pytest.warns(CdpWarning, match="differ from the unlabelled ones") as caught:
        clusterer = ConsensusClusterer(k=15, backend="exact").fit(
            views, labelled_views=labelled, labelled_ids=names
        )
    assert "a mediator was trained on its clusters; no quality" in str(caught[0].message)
    assert clusterer.quality_.precision is None
    assert score_pairwise(identity, clusterer.labels_)[2] > 0.9
    alone = ConsensusClusterer(k=15, backend="exact").fit_predict(views)
    np.testing.assert_array_equal(clusterer.labels_, alone)
