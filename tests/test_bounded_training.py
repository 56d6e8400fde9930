"""Training holds what it chose of the labelled rows, however many there are."""

import tracemalloc
from functools import partial

import numpy as np
import pytest

from cdp import clusterer
from cdp.arrays.cosine import make_unit, take_unit
from cdp.clusterer import ConsensusClusterer
from cdp.errors import DataError
from cdp.mediator import believed_rows, ensemble, labelled_rows, training_set
from cdp.mediator.curriculum import choose_labelled
from cdp.mediator.pair_scorer import PairScorer
from cdp.mediator.settings import MediatorSettings
from tests.benchmarks.embeddings import draw_views

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

LIMIT, BUDGET = 300, 2000


@pytest.mark.parametrize("count", [900, 4000])
def test_a_fit_holds_only_the_chosen_rows_and_pairs(count, monkeypatch):
    views, identity = draw_views(count + 400, (16, 12), seed=3, noise=0.4)
    held, trained = [], []
    whole, train = PairScorer.fit, ensemble.train_ensemble

    def fit(views, graphs, identity, **options):
        held.append(sum(view.nbytes for view in views) + sum(g.neighbour.nbytes for g in graphs))
        assert len(options["joint"].identity) <= LIMIT + 400
        return whole(views, graphs, identity, **options)

    def count_rows(rows, held_out, weight, settings, *rest):
        trained.append(len(weight))
        return train(rows, held_out, weight, settings, *rest)

    for module in (training_set, labelled_rows):
        monkeypatch.setattr(module, "choose_labelled", partial(choose_labelled, limit=LIMIT))
    monkeypatch.setattr(believed_rows, "LABELLED_ROWS", LIMIT)
    monkeypatch.setattr(clusterer.PairScorer, "fit", fit)
    monkeypatch.setattr(ensemble, "train_ensemble", count_rows)
    model = ConsensusClusterer(
        k=10,
        mediator_settings=MediatorSettings(epochs=1, pair_budget=BUDGET),
        random_state=0,
    )
    model.fit(
        [view[count:] for view in views],
        labelled_views=[view[:count] for view in views],
        labelled_ids=identity[:count],
    )
    assert held == [LIMIT * (16 + 12) * 4 + 2 * LIMIT * 10 * 8]
    # at most the lists of the chosen rows, those of the joint set, and three samples
    most = 2 * LIMIT * 10 + 2 * (LIMIT + 400) * 10 + 3 * BUDGET
    assert trained[0] <= most


def test_taking_rows_copies_only_them():
    random = np.random.default_rng(0)
    vectors = random.normal(size=(40_000, 128)).astype(np.float32)
    rows = np.array([3, 17, 39_999])
    take_unit(vectors, rows)  # compiled
    tracemalloc.start()
    taken = take_unit(vectors, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < vectors.nbytes / 8
    np.testing.assert_array_equal(taken, make_unit(vectors)[0][rows])


def test_a_bad_row_is_named_though_it_is_not_taken():
    vectors = np.ones((5, 3), np.float32)
    vectors[4] = 0
    with pytest.raises(DataError, match="vector 4 is all zeros"):
        take_unit(vectors, np.array([0, 1]))
