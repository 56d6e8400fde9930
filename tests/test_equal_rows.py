"""Many images with one and the same vector are mentioned, and no quality is stated."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.errors import CdpWarning
from cdp.knn.equal_rows import describe_equal_rows, find_equal_rows

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("count", "equal", "found"), [(500, 25, 25), (500, 19, 0), (4000, 39, 0),
                                                      (4000, 40, 40), (3000, 0, 0)])  # fmt: skip
def test_a_large_group_of_equal_rows_is_found(count, equal, found):
    random = np.random.default_rng(count + equal)
    view = random.normal(size=(count, 32)).astype(np.float32)
    rows = np.sort(random.permutation(count)[:equal])
    view[rows] = view[0] + 1
    assert len(find_equal_rows(view)) == found
    if found:
        np.testing.assert_array_equal(find_equal_rows(lambda: view), rows)
        said = describe_equal_rows([random.normal(size=(count, 8)), view], ["a", "b"], "images")
        assert said.startswith(f"{found} images have one and the same vector in b")
        assert f"row {rows[0]})" in said


@pytest.mark.parametrize("views_hit", [[0], [0, 1]])
def test_the_estimator_warns_and_states_no_quality(views_hit):
    random = np.random.default_rng(0)
    models = [random.normal(size=(48, d)) for d in (96, 64)]

    def draw(people):
        identity = random.permutation(np.repeat(np.arange(people), 6))
        face = random.normal(size=(people, 48))[identity]
        face = face + 0.5 * random.normal(size=face.shape)
        return [(face @ m).astype(np.float32) for m in models], identity

    (views, _), (labelled, identity) = draw(80), draw(60)
    rows = random.permutation(480)[:40]
    for number in views_hit:
        views[number][rows] = 1.0
    clusterer = ConsensusClusterer(backend="exact", threads=1)
    with pytest.warns(CdpWarning, match="40 rows have one and the same vector in view 0"):
        clusterer.fit(views, labelled_views=labelled, labelled_ids=identity)
    assert clusterer.quality_ is None or clusterer.quality_.f is None
