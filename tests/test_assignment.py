"""assignment: new images join the clusters they belong to, and no other."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.assignment import ClusterCentres
from cdp.errors import DataError

pytestmark = [pytest.mark.torch]


def draw(people, images, seed, dims=(24, 16)):
    """Views of some people, always the same ones, and who each row shows."""
    identity = np.repeat(np.arange(people), images)
    rng = np.random.default_rng(seed)
    views = []
    for dim in dims:
        centre = np.random.default_rng(dim).normal(size=(people, dim))[identity]
        views.append((centre + 0.3 * rng.normal(size=centre.shape)).astype(np.float32))
    return views, identity


def test_new_images_join_their_people_and_others_none():
    views, identity = draw(30, 6, 0)
    known = np.where(identity < 20, identity, -1)  # the last ten were left without a label
    centres = ClusterCentres.fit(views, known)
    new, who = draw(30, 4, 1)
    found = centres.assign(new)
    assert (found[who < 20] == who[who < 20]).mean() > 0.97
    assert (found[who >= 20] == -1).mean() > 0.97
    assert centres.assign([view[:0] for view in new]).shape == (0,)


def test_centres_and_similarity_are_those_of_their_definition():
    views, identity = draw(5, 4, 0)
    centres = ClusterCentres.fit(views, identity)
    for view, centre in zip(views, centres.centres, strict=True):
        unit = view / np.linalg.norm(view, axis=1, keepdims=True)
        for person in range(5):
            mean = unit[identity == person].mean(axis=0)
            np.testing.assert_allclose(centre[person], mean / np.linalg.norm(mean), atol=1e-5)
    # No own image lies below the threshold that separates them all.
    unit = [view / np.linalg.norm(view, axis=1, keepdims=True) for view in views]
    own, other = [], []
    for row, person in enumerate(identity):
        similar = np.zeros(5)
        for view in unit:
            for each in range(5):
                chosen = (identity == each) & (np.arange(20) != row)
                mean = view[chosen].sum(axis=0)
                similar[each] += view[row] @ mean / np.linalg.norm(mean) / 2
        own.append(similar[person])
        other.append(np.delete(similar, person).max())
    if min(own) > max(other):
        assert max(other) - 1e-6 <= centres.threshold < min(own) + 1e-6


def test_without_clusters_nobody_is_assigned():
    views, identity = draw(4, 3, 0)
    centres = ClusterCentres.fit(views, np.full(len(identity), -1))
    assert (centres.assign(views) == -1).all()


def test_other_views_are_refused():
    views, identity = draw(4, 3, 0)
    centres = ClusterCentres.fit(views, identity)
    with pytest.raises(DataError, match="2 views expected, as at fit; got 1"):
        centres.assign(views[:1])
    with pytest.raises(DataError, match="view 0: 24 numbers a row expected, as at fit; got 16"):
        centres.assign(views[::-1])


def test_the_estimator_predicts():
    views, _ = draw(20, 8, 0)
    new, who = draw(20, 3, 1)
    clusterer = ConsensusClusterer(k=8, backend="exact", min_similarity=0.6)
    with pytest.raises(ValueError, match="not fitted"):
        clusterer.predict(new)
    labels = clusterer.fit_predict(views)
    assert clusterer.n_clusters_ == 20
    expected = labels[::8][who]
    assert (clusterer.predict(new) == expected).mean() > 0.97
    single = ConsensusClusterer(k=8, backend="exact", min_similarity=0.6).fit(views[0])
    assert (single.predict(new[0]) >= 0).mean() > 0.9
