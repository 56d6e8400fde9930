"""ConsensusClusterer: scikit-learn's conventions, labels and votes, degenerate input."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_clusterer
from sklearn.metrics import v_measure_score
from sklearn.utils.estimator_checks import check_estimator

from cdp import ConsensusClusterer, propagate_labels
from cdp.errors import CdpWarning, ConfigError, DataError
from cdp.inputs import number_identities
from cdp.mediator.settings import MediatorSettings
from cdp.metrics.clustering import score_pairwise
from cdp.propagation.average_linkage import agglomerate
from tests.benchmarks.embeddings import draw_views

pytestmark = [pytest.mark.torch, pytest.mark.trains]

DIMENSIONS = (24, 16, 32)


@pytest.fixture(scope="module")
def faces():
    views, identity = draw_views(1400, DIMENSIONS, seed=4, noise=0.5)
    labelled = identity % 2 == 0
    return (
        [view[~labelled] for view in views],
        identity[~labelled],
        [view[labelled] for view in views],
        identity[labelled],
    )


def count_pairs(label):
    sizes = np.unique(label, return_counts=True)[1]
    return float((sizes * (sizes - 1) // 2).sum())


def score_pairs(label, identity):
    """Pairwise precision and recall; a row without label is a cluster of one."""
    alone = np.where(label < 0, label.max() + 1 + np.arange(len(label)), label)
    both = count_pairs(alone * (identity.max() + 1) + identity)
    return both / max(count_pairs(alone), 1), both / count_pairs(identity)


@pytest.mark.parametrize("backend", ["exact", "nmslib", "faiss"])
def test_votes_without_labels(faces, backend):
    views, identity, _, _ = faces
    clusterer = ConsensusClusterer(k=10, backend=backend, min_similarity=0.7, max_size=100)
    assert clusterer.fit(views) is clusterer
    precision, recall = score_pairs(clusterer.labels_, identity)
    assert precision > 0.9
    assert recall > 0.5
    assert clusterer.mediator_ is None
    check_attributes(clusterer, len(identity))


FEW_EPOCHS = MediatorSettings(epochs=15, ensemble_size=2, folds=2)


@pytest.mark.parametrize("variant", ["extended", "paper", "released"])
@pytest.mark.parametrize("candidates", ["base", "all"])
def test_mediates_with_labels(faces, variant, candidates):
    views, identity, labelled_views, labelled_ids = faces
    clusterer = ConsensusClusterer(
        k=10,
        backend="exact",
        variant=variant,
        candidates=candidates,
        split="raise_threshold",
        threshold=0.96,
        max_size=100,
        second_stage=False,
        mediator_settings=FEW_EPOCHS,
    )
    labels = clusterer.fit_predict(views, labelled_views=labelled_views, labelled_ids=labelled_ids)
    precision, recall = score_pairs(labels, identity)
    assert precision > 0.9
    assert recall > 0.5
    assert clusterer.mediator_.settings.variant == variant
    assert clusterer.second_stage_ is None
    check_attributes(clusterer, len(identity))


def test_chooses_everything_itself_and_beats_one_rising_threshold(faces):
    views, identity, labelled_views, labelled_ids = faces
    labelled = {"labelled_views": labelled_views, "labelled_ids": labelled_ids}
    clusterer = ConsensusClusterer(k=10, backend="exact", mediator_settings=FEW_EPOCHS)
    clusterer.fit(views, **labelled)
    assert clusterer.threshold_ == clusterer.second_stage_.threshold
    check_attributes(clusterer, len(identity))
    f = score_pairwise(identity, clusterer.labels_)[2]
    rising = clusterer.set_params(split="raise_threshold", second_stage=False, threshold=0.96)
    assert f > score_pairwise(identity, rising.fit_predict(views, **labelled))[2]
    assert f > 0.9
    lone = MediatorSettings(epochs=1, ensemble_size=1, folds=2)
    with pytest.raises(ConfigError, match="an ensemble_size equal to folds, got 1 and 2"):
        ConsensusClusterer(backend="exact", mediator_settings=lone).fit(views, **labelled)


def check_attributes(clusterer, count):
    labels = clusterer.labels_
    assert labels.shape == clusterer.probabilities_.shape == (count,)
    assert clusterer.cut_thresholds_.shape == (count,)
    assert clusterer.n_clusters_ == labels.max() + 1
    assert set(labels.tolist()) - {-1} == set(range(clusterer.n_clusters_))
    assert ((clusterer.probabilities_ > 0) == (labels >= 0)).all()
    assert clusterer.probabilities_.max() <= 1
    assert len(clusterer.pairs_) == len(clusterer.pair_scores_)
    scored = (clusterer.pairs_, clusterer.pair_scores_, count)
    limits = {"threshold": clusterer.threshold_, "max_size": clusterer.max_size}
    if clusterer.mediator_ is not None and clusterer.split == "consensus":
        again = agglomerate(*scored, **limits)
    else:
        again = propagate_labels(*scored, **limits, step=clusterer.step)
    np.testing.assert_array_equal(again.label, labels)
    scorer = clusterer.scorer_
    assert scorer.calibrated == (clusterer.mediator_ is not None)
    assert clusterer.mediator_ is getattr(scorer, "mediator", None)


@pytest.mark.nmslib
def test_same_bits_whatever_the_threads_and_the_storage(faces, tmp_path):
    views, _, labelled_views, labelled_ids = faces
    options = {"k": 8, "mediator_settings": MediatorSettings(epochs=2, ensemble_size=2, folds=2)}
    labelled = {"labelled_views": labelled_views, "labelled_ids": labelled_ids}
    first = ConsensusClusterer(threads=1, **options).fit(views, **labelled)
    paths = [tmp_path / f"{number}.npy" for number in range(len(views))]
    for path, view in zip(paths, views, strict=True):
        np.save(path, view)
    loaders = [lambda path=path: np.load(path, mmap_mode="r") for path in paths]
    second = ConsensusClusterer(threads=3, **options).fit(loaders, **labelled)
    np.testing.assert_array_equal(first.pair_scores_, second.pair_scores_)
    np.testing.assert_array_equal(first.labels_, second.labels_)


def test_scikit_learn_conventions():
    clusterer = ConsensusClusterer(k=7, threshold=0.9, min_votes=2)
    assert is_clusterer(clusterer)
    copy = clone(clusterer)
    assert copy.get_params() == clusterer.get_params()
    assert copy.set_params(k=9).k == 9
    assert clusterer.k == 7
    assert "k=7" in repr(clusterer)
    with pytest.raises(ValueError, match="Invalid parameter"):
        clusterer.set_params(neighbours=3)


ZERO_ROW = (
    "its random integers hold a row of zeros, and a zero vector has no cosine: as scikit-learn's "
    "own AgglomerativeClustering(metric='cosine') does, the estimator raises a ValueError"
)


@pytest.mark.filterwarnings("ignore::cdp.errors.CdpWarning")
def test_scikit_learn_checks_pass():
    results = check_estimator(
        ConsensusClusterer(),
        expected_failed_checks={"check_estimators_dtypes": ZERO_ROW},
        on_skip=None,
    )
    status = {result["check_name"]: result["status"] for result in results}
    assert status.pop("check_estimators_dtypes") == "xfail"
    assert set(status.values()) <= {"passed", "skipped"}
    assert len(status) > 30
    numbers = np.random.default_rng(0).integers(1, 9, (20, 5))
    for dtype in (np.int32, np.int64, np.float32, np.float64):  # the check without a zero row
        assert ConsensusClusterer().fit(numbers.astype(dtype)).labels_.shape == (20,)


def test_one_array_is_one_view(faces):
    views, identity, _, _ = faces
    base = views[0].astype(np.float16)
    single = ConsensusClusterer(k=10, backend="exact", min_similarity=0.7).fit(base)
    listed = ConsensusClusterer(k=10, backend="exact", min_similarity=0.7).fit([base])
    np.testing.assert_array_equal(single.labels_, listed.labels_)
    rows = ConsensusClusterer(k=10, backend="exact", min_similarity=0.7).fit(base.tolist())
    np.testing.assert_array_equal(single.labels_, rows.labels_)
    kept = single.labels_ >= 0
    assert v_measure_score(identity[kept], single.labels_[kept]) > 0.9


def test_data_frames_and_tensors_are_views(faces):
    views = [view[:200] for view in faces[0]]
    exact = ConsensusClusterer(k=10, backend="exact", min_similarity=0.7)
    expected = exact.fit_predict(views)
    assert exact.n_features_in_ == views[0].shape[1]
    frames = [pd.DataFrame(view) for view in views]
    np.testing.assert_array_equal(exact.fit_predict(frames), expected)
    tensors = [torch.from_numpy(view).requires_grad_() for view in views]
    np.testing.assert_array_equal(exact.fit_predict(tensors), expected)
    alone = exact.fit_predict(views[0])
    named = frames[0].add_prefix("axis_")
    np.testing.assert_array_equal(exact.fit_predict(named), alone)
    assert exact.feature_names_in_.tolist() == named.columns.tolist()
    np.testing.assert_array_equal(exact.fit_predict(tensors[0]), alone)
    assert not hasattr(exact, "feature_names_in_")
    np.testing.assert_array_equal(exact.fit_predict(pd.Series(list(views[0]))), alone)
    by_model = {f"model_{number}": view for number, view in enumerate(views)}
    np.testing.assert_array_equal(exact.fit_predict(by_model), expected)


@pytest.mark.parametrize(
    ("parameter", "value", "message"),
    [
        ("threshold", None, "threshold must be 'auto' or a number, got None"),
        ("threshold", float("nan"), "threshold must be 'auto' or a number, got nan"),
        ("threshold", True, "threshold must be 'auto' or a number, got True"),
        ("k", 8.0, "k must be a whole number of neighbours, got 8.0"),
        ("k", True, "k must be a whole number of neighbours, got True"),
        ("min_similarity", 5, r"min_similarity must be 'auto' or a number in \[-1, 1\], got 5"),
        ("min_similarity", float("nan"), r"a number in \[-1, 1\], got nan"),
        ("min_similarity", "high", r"a number in \[-1, 1\], got 'high'"),
        ("min_votes", "1", "min_votes must be a whole number of committee members, got '1'"),
        ("max_size", True, "max_size must be None or a whole number, got True"),
        ("threads", "2", "threads must be None or a whole number, got '2'"),
        ("step", "a", "step must be a number, got 'a'"),
        ("random_state", "3", "random_state must be a whole number, .* got '3'"),
        ("random_state", 1.5, "random_state must be a whole number, .* got 1.5"),
        ("random_state", -1, "random_state must be 0 or more, got -1"),
    ],
)
def test_parameters_of_the_wrong_type_are_named(parameter, value, message):
    with pytest.raises(ConfigError, match=message):
        ConsensusClusterer(**{parameter: value}).fit(np.eye(3))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (np.full((300, 200), 1j), "got complex128 of shape (300, 200): Complex data not supported"),
        (np.zeros((9, 2, 2)), "got float64 of shape (9, 2, 2): Found array with dim 3"),
        ([[1.0, 2.0], [3.0]], "got a list of rows that differ in length"),
    ],
)
def test_what_is_no_view_is_described_and_not_printed(view, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        ConsensusClusterer().fit([view])
    assert len(str(caught.value)) < 300


def test_identities_may_be_strings(faces):
    views, _, labelled_views, labelled_ids = faces
    exact = ConsensusClusterer(
        k=8,
        backend="exact",
        mediator_settings=MediatorSettings(epochs=2, ensemble_size=2, folds=2),
    )
    expected = exact.fit_predict(views, labelled_views=labelled_views, labelled_ids=labelled_ids)
    names = np.array([f"person {each:04d}" for each in labelled_ids])
    for ids in (names, names.tolist(), pd.Series(names, dtype=object)):
        found = exact.fit_predict(views, labelled_views=labelled_views, labelled_ids=ids)
        np.testing.assert_array_equal(found, expected)


def test_identities_as_tables_have_them():
    expected = np.array([7, 7, 12, 3])
    for ids in (expected.astype(float), [7.0, 7.0, 12.0, 3.0], expected.astype(object),
                pd.Series(expected, dtype="Int64")):  # fmt: skip
        names, number = number_identities(ids, 4)
        assert names.tolist() == [3, 7, 12]
        assert names.dtype == np.int64
        assert number.tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([7.0, float("nan"), 12.0, float("nan")], "row 1 is nan, no identity (2 such rows). Leave"),
        (["ann", "bob", float("nan"), "eve"], "row 2 is nan, no identity (1 such rows)"),
        (np.array([None, "bob", "ann", "eve"], object), "row 0 is None, no identity"),
        (pd.Series([1, 2, None, 3], dtype="Int64"), "row 2 is "),
        (pd.Series(["ann", None, "bob", "eve"], dtype="string"), "row 1 is <NA>, no identity"),
        ([1, 2.5, 3, 4], "row 1 is 2.5"),
        ([1, 2, 3, 1e17], "row 3 is 1e+17"),
        ([1, "ann", 3, 4], "row 1 is 'ann', and others are numbers"),
        ([1, True, 3, 4], "row 1 is True"),
        ([1, 2, 3], "got shape (3,)"),
    ],
)
def test_a_row_without_identity_is_named(ids, message):
    with pytest.raises(DataError, match=re.escape(message)):
        number_identities(ids, 4)


def test_random_state_may_be_a_generator_or_none(faces):
    views = faces[0]
    for state in (None, np.random.RandomState(1), np.int64(3)):
        clusterer = ConsensusClusterer(k=5, backend="exact", min_similarity=0.5, random_state=state)
        clusterer.fit([view[:60] for view in views])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("backend", ["exact", "nmslib", "faiss"])
def test_hardly_any_points(faces, count, backend):
    views, _, labelled_views, labelled_ids = faces
    few = [np.repeat(view[:1], count, axis=0) for view in views]
    expected = [0, 0] if count == 2 else [-1] * count
    assert ConsensusClusterer(backend=backend).fit_predict(few).tolist() == expected
    mediated = ConsensusClusterer(
        backend=backend, mediator_settings=MediatorSettings(epochs=1, ensemble_size=2, folds=2)
    ).fit(few, labelled_views=labelled_views, labelled_ids=labelled_ids)
    assert mediated.labels_.shape == (count,)


@pytest.mark.parametrize("labelled", [False, True])
def test_no_row_is_refused_as_scikit_learn_does(faces, labelled):
    views, _, labelled_views, labelled_ids = faces
    given = {"labelled_views": labelled_views, "labelled_ids": labelled_ids} if labelled else {}
    exact = ConsensusClusterer(
        k=5,
        backend="exact",
        mediator_settings=MediatorSettings(epochs=1, ensemble_size=2, folds=2),
    )
    for none in (views[0][:0], [view[:0] for view in views]):
        with pytest.raises(ValueError, match=r"0 sample\(s\)"):
            exact.fit(none)
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        exact.fit([lambda view=view: view[:0] for view in views], **given)


@pytest.mark.filterwarnings("ignore:40 rows have one and the same vector")
def test_all_duplicates_and_k_of_n_and_more(faces):
    same = np.ones((40, 5), np.float32)
    with pytest.warns(CdpWarning, match="one cluster holds 40 of 40 images"):
        clusterer = ConsensusClusterer(k=50, backend="exact").fit([same, same])
    assert clusterer.labels_.tolist() == [0] * 40
    # One component of pairs that all score 1: no threshold can split it, so no row is labelled.
    with pytest.warns(CdpWarning, match="no cluster was found"):
        assert ConsensusClusterer(k=50, backend="exact", max_size=30).fit(same).n_clusters_ == 0


def test_nothing_above_the_threshold():
    generator = np.random.default_rng(0)
    clusterer = ConsensusClusterer(k=4, backend="exact", min_similarity=0.99)
    with pytest.warns(CdpWarning, match="no cluster was found"):
        clusterer.fit(generator.normal(size=(50, 64)))
    assert clusterer.labels_.tolist() == [-1] * 50
    assert clusterer.n_clusters_ == 0
    assert clusterer.probabilities_.tolist() == [0] * 50


def test_wrong_input_is_refused(faces):
    views, _, labelled_views, labelled_ids = faces
    exact = ConsensusClusterer(k=5, backend="exact")
    wrong = [
        (DataError, "same rows", {"views": [views[0], views[1][:-1]]}),
        (DataError, "same rows", {"views": [views[0], lambda: views[1][:-1]]}),
        (DataError, "at least one", {"views": []}),
        (DataError, "minimum of 1 is required", {"views": np.ones((0, 3))}),
        (DataError, "list of such", {"views": [views[0], np.ones(3)]}),
        (DataError, "belong together", {"views": views, "labelled_ids": labelled_ids}),
        (
            DataError,
            "2 views for 3",
            {
                "views": views,
                "labelled_views": labelled_views[:2],
                "labelled_ids": labelled_ids,
            },
        ),
        (
            DataError,
            "not of one model",
            {
                "views": views,
                "labelled_views": labelled_views[::-1],
                "labelled_ids": labelled_ids,
            },
        ),
        (
            DataError,
            "one a labelled row",
            {
                "views": views,
                "labelled_views": labelled_views,
                "labelled_ids": labelled_ids[:-1],
            },
        ),
    ]
    for error, message, given in wrong:
        with pytest.raises(error, match=message):
            exact.fit(**given)
    loaders = [lambda view=view: view for view in labelled_views[::-1]]
    with pytest.raises(DataError, match="not of one model"):
        exact.fit(views, labelled_views=loaders, labelled_ids=labelled_ids)
    broken = views[0].copy()
    broken[7] = 0
    with pytest.raises(DataError, match="vector 7 is all zeros"):
        exact.fit([broken, views[1]])
    for parameters in (
        {"variant": "other"},
        {"backend": "other"},
        {"min_votes": 9},
        {"min_votes": -1},
        {"candidates": "some"},
        {"split": "by hand"},
        {"threshold": "high"},
        {"max_size": 0},
        {"backend_settings": {"speed": 3}},
    ):
        with pytest.raises(ConfigError):
            clone(exact).set_params(**parameters).fit(views)
