"""Self-training: where no label can train a mediator, the clusters of the votes do."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.arrays.cosine import make_unit
from cdp.committee.pairs import make_pairs
from cdp.errors import CdpWarning, DataError
from cdp.knn import build_knn_graphs
from cdp.knn.joint import join_graphs
from cdp.mediator import JointSet, MediatorSettings, PairVoter
from cdp.mediator.self_training import DEGRADED, SELF_TRAINED, fit_on_votes
from cdp.mediator.set_gap import (
    describe_difference,
    describe_gap,
    find_unlike,
    measure_separation,
)
from cdp.mediator.shortage import ShortageError
from cdp.mediator.training_set import TrainingSet
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.clustering import cluster_pairs

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
    first = build_knn_graphs(pile[0][:1], 15, backend="exact")[0]
    text = describe_difference(labelled, names, pile[0], first)
    assert ("is recognised as labelled in" in text) == bool(quality)


def test_who_is_shown_does_not_separate_the_sets(pile):
    """Few people who look unlike all others are no other camera; a shift of their images is."""
    graph = build_knn_graphs(pile[0][:1], 15, backend="exact")[0]
    random = np.random.default_rng(8)
    way = random.normal(size=pile[0][0].shape[1])
    for people in (10, 40):
        (view, *_), names = draw(people, 6, 0.3, 9)
        unit = make_unit(view)[0]
        moved = make_unit(unit + 0.5 * way / np.linalg.norm(way))[0]
        alike = measure_separation([unit], names, pile[0][:1], graph)
        apart = measure_separation([moved], names, pile[0][:1], graph)
        assert alike < 0.6
        assert apart > 0.75
    assert measure_separation([unit[:3]], np.arange(3), pile[0][:1], graph) == 0


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


def test_labels_unlike_in_part_are_left_out_in_part(pile):
    """Half of each person's images come from another camera."""
    views, identity = pile
    alike, names = draw(60, 16, 0.75, 2)
    sharp = draw(60, 16, 0.3, 2, quality=0.7)[0]
    other = np.arange(len(names)) % 2 == 0
    labelled = [np.where(other[:, None], *each) for each in zip(sharp, alike, strict=True)]
    graph = build_knn_graphs(views[:1], 15, backend="exact")[0]
    unlike = find_unlike(labelled, names, views, graph)
    assert unlike[other].mean() > 0.6
    assert unlike[~other].mean() < 0.2
    assert not find_unlike(alike, names, views, graph).any()
    assert not find_unlike(sharp, names, views, graph).any(), "a whole set is refused elsewhere"
    fitted = ConsensusClusterer(k=15, backend="exact").fit(
        views, labelled_views=labelled, labelled_ids=names
    )
    assert score_pairwise(identity, fitted.labels_)[2] > 0.9
    assert fitted.quality_.precision is None
    assert f"{unlike.sum()} of {len(names)} labelled images differ" in fitted.quality_.reasons[0]


def fit_copies(pile, copies, **settings):
    """Sharp labelled rows, and copies of them as `copies` are."""
    labelled, names = draw(40, 6, 0.3, 2, quality=1.0)
    clusterer = ConsensusClusterer(k=15, backend="exact", **settings)
    return clusterer.fit(
        pile[0],
        labelled_views=labelled,
        labelled_ids=names,
        degraded_views=copies,
        degraded_of=np.arange(len(names)),
    )


def test_copies_like_the_unlabelled_rows_are_trained_on_in_place_of_labels(pile):
    copies, names = draw(40, 6, 0.75, 2)
    found = fit_copies(pile, copies, near_equal=False)
    alike = ConsensusClusterer(k=15, backend="exact", near_equal=False, label_check=False).fit(
        pile[0], labelled_views=copies, labelled_ids=names
    )
    assert score_pairwise(pile[1], found.labels_)[2] > 0.9
    assert found.scorer_.threshold == alike.scorer_.threshold
    np.testing.assert_array_equal(found.pair_scores_, alike.pair_scores_)
    assert found.quality_.reasons == (DEGRADED,)
    assert found.quality_.precision is None
    assert alike.quality_.precision is not None


def test_copies_unlike_the_unlabelled_rows_are_trained_on_beside_clusters(pile):
    copies, _ = draw(40, 6, 0.6, 2, quality=0.8)
    with pytest.warns(CdpWarning, match="even degraded until they look like") as caught:
        found = fit_copies(pile, copies)
    assert "its clusters and on degraded copies of the labelled images" in str(caught[0].message)
    assert found.quality_.reasons == (SELF_TRAINED,)
    assert score_pairwise(pile[1], found.labels_)[2] > 0.9
    with pytest.warns(CdpWarning, match="differ from the unlabelled ones"):
        alone = ConsensusClusterer(k=15, backend="exact").fit(
            pile[0], labelled_views=copies, labelled_ids=np.repeat(np.arange(40), 6)
        )
    assert not np.array_equal(found.pair_scores_, alone.pair_scores_)


def test_a_person_in_clusters_and_copies_is_one():
    """Copies of people whom the unlabelled set shows too cost nothing."""
    views, identity = draw(60, 15, 0.75, 0)
    shown = np.arange(len(identity)) % 15 < 9
    pile = [view[shown] for view in views]
    copied = [view[~shown] for view in views]
    copies = TrainingSet(copied, identity[~shown], np.zeros((~shown).sum(), bool), are_copies=True)
    graphs = build_knn_graphs(pile, 15, backend="exact")
    scorer = fit_on_votes(
        pile,
        graphs,
        PairVoter(),
        settings=MediatorSettings.named("extended"),
        copies=copies,
    )
    pairs = make_pairs(graphs, candidates=scorer.candidates)
    scored = scorer.score(pile, graphs, pairs)
    found = cluster_pairs(pairs, scored.probability, shown.sum(), threshold=scorer.threshold)
    assert score_pairwise(identity[shown], found.label)[2] > 0.95


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"degraded_of": None}, "degraded_views and degraded_of belong together"),
        ({"degraded_of": [0, 1]}, "degraded_of must be 3 integers"),
        ({"degraded_of": [0, 1, 9]}, "rows of labelled_views, 0 to 3, got 0 to 9"),
        ({"labelled_views": None, "labelled_ids": None}, "copies of labelled_views"),
        ({"degraded_views": [np.ones((3, 4))]}, "degraded_views must come from the same models"),
    ],
)
def test_copies_that_do_not_fit_are_named(wrong, message):
    random = np.random.default_rng(0)
    views = [random.normal(size=(30, 5)) for _ in range(2)]
    given = {
        "labelled_views": [view[:4] for view in views],
        "labelled_ids": [0, 0, 1, 1],
        "degraded_views": [view[4:7] for view in views],
        "degraded_of": [0, 1, 2],
    }
    with pytest.raises(DataError, match=message):
        ConsensusClusterer(k=5, backend="exact").fit(views, **{**given, **wrong})
