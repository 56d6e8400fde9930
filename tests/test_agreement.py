"""A model whose rows are in another order, or noise, is named; no quality is stated where it
agrees with the others in one set alone."""

import numpy as np
import pytest

from cdp import ConsensusClusterer
from cdp.committee.agreement import LEAST_ROWS, describe_disagreement, measure_agreement
from cdp.errors import CdpWarning
from cdp.knn.graph import build_knn_graphs

pytestmark = pytest.mark.torch


def draw(people, seed):
    """Three views of five images of each person, and the truth."""
    random = np.random.default_rng(seed)
    models = [np.random.default_rng(d).normal(size=(48, d)) for d in (96, 64, 80)]
    identity = random.permutation(np.repeat(np.arange(people), 5))
    face = random.normal(size=(people, 48))[identity]
    face = face + 0.5 * random.normal(size=face.shape)
    noisy = [face + 0.3 * random.normal(size=face.shape) for _ in models]
    return [(n @ m).astype(np.float32) for n, m in zip(noisy, models, strict=True)], identity


def shift(views, number):
    return [np.roll(view, number == each, axis=0) for each, view in enumerate(views)]


def fit(views, labelled, identity):
    clusterer = ConsensusClusterer(backend="exact", threads=1)
    return clusterer.fit(views, labelled_views=labelled, labelled_ids=identity)


@pytest.mark.parametrize("number", [0, 2])
def test_only_a_shifted_view_shares_no_neighbours(number):
    views, _ = draw(60, 0)
    agreement = measure_agreement(build_knn_graphs(shift(views, number), 20, backend="exact"))
    assert (np.flatnonzero(agreement < 0.02) == [number]).all()
    assert (np.delete(agreement, number) > 0.2).all()


def test_nothing_is_said_of_one_model_few_rows_or_like_models():
    views, _ = draw(60, 0)
    whole = build_knn_graphs(views, 20, backend="exact")
    few = [view[: LEAST_ROWS - 1] for view in shift(views, 1)]
    for graphs in (whole, whole[:1], build_knn_graphs(few, 20, backend="exact")):
        assert describe_disagreement(measure_agreement(graphs), "abc"[: len(graphs)], "rows") == ""


def test_a_shifted_view_of_the_unlabelled_rows_is_named_and_no_quality_is_stated():
    views, _ = draw(100, 1)
    labelled, identity = draw(80, 2)
    with pytest.warns(CdpWarning) as said:
        found = fit(shift(views, 2), labelled, identity)
    assert any("unlabelled rows the nearest neighbours of view 2 are no" in str(w.message)
               for w in said)  # fmt: skip
    assert found.quality_ is None or found.quality_.f is None


def test_a_shifted_view_of_the_labelled_rows_is_named_and_no_quality_is_stated():
    views, _ = draw(100, 1)
    labelled, identity = draw(80, 2)
    with pytest.warns(CdpWarning) as said:
        found = fit(views, shift(labelled, 1), identity)
    assert any("labelled rows the nearest neighbours of view 1" in str(w.message) for w in said)
    assert found.quality_ is None or found.quality_.f is None
