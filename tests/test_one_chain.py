"""One chain: the estimator on the views of a finished run gives the labels of the run."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_CONFIG
from known_clusters import KNOWN_K, SIZES

from cdp import ConsensusClusterer, open_run
from cdp.errors import CdpWarning
from pipelines.missed_pairs import read_missed
from pipelines.run import main
from pipelines.tables import read_vectors

pytestmark = [pytest.mark.nmslib, pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
SEED = TINY_CONFIG["seed"]
K = TINY_CONFIG["knn"]["k"]


def read_views(run, split):
    """The views of one split, base first, and its sample ids."""
    members = [TINY_CONFIG["committee"]["base"], *TINY_CONFIG["committee"]["members"]]
    tables = [run / f"embed/embeddings/{split}/{each['name']}.parquet" for each in members]
    ids = pd.read_parquet(tables[0], columns=["sample_id"]).sample_id
    return [read_vectors(table, "embedding") for table in tables], ids


def read_labels(run, ids):
    labels = pd.read_parquet(run / "propagate/labels.parquet").set_index("sample_id")
    return labels.pseudo_label[ids].to_numpy()


def read_scores(run):
    """The probability of every pair, in the order of the table."""
    return pd.read_parquet(run / "mediate/pairs.parquet").probability.to_numpy()


def read_labelled(run):
    """What `fit` takes of the labelled split; identities are strings."""
    views, ids = read_views(run, "labelled")
    samples = pd.read_parquet(run / "ingest/samples.parquet").set_index("sample_id")
    return {"labelled_views": views, "labelled_ids": samples.identity[ids]}


def rerun(tiny, finished, place, *overrides):
    """A copy of the finished run, gone through again up to propagate."""
    passing = shutil.ignore_patterns("logs", ".*draft*")
    shutil.copytree(finished.parent, place / "runs", symlinks=True, ignore=passing)
    options = ["--config", str(tiny), "--runs-dir", str(place / "runs"), "--workers", "1"]
    assert main([*options, "--until", "propagate", *overrides]) == 0
    return place / "runs" / finished.name


def test_a_trained_run(finished_run):
    views, ids = read_views(finished_run, "unlabelled")
    clusterer = ConsensusClusterer(k=K, random_state=SEED)
    found = clusterer.fit_predict(views, **read_labelled(finished_run))
    np.testing.assert_array_equal(found, read_labels(finished_run, ids))
    np.testing.assert_array_equal(clusterer.pair_scores_, read_scores(finished_run))
    run, quality, missed = open_run(finished_run), clusterer.quality_, clusterer.scorer_.missed
    np.testing.assert_array_equal(run.labels.confidence, quality.confidence)
    np.testing.assert_array_equal(run.clusters.expected_precision, quality.expected_precision)
    withheld = run.manifest("propagate")["facts"]["withheld"]
    assert [each.split(" (train.mediator_share")[0] for each in withheld] == list(quality.reasons)
    stored = read_missed(run.manifest("mediate")["facts"])
    np.testing.assert_array_equal(stored.unlisted, missed.unlisted)
    assert stored.log_odds == missed.log_odds


@pytest.mark.parametrize("split", ["consensus", "raise_threshold"])
def test_a_trained_run_at_a_threshold_that_some_pairs_exceed(tiny, finished_run, tmp_path, split):
    """Whatever the training gave, there are clusters to compare."""
    threshold = round(float(np.quantile(read_scores(finished_run), 0.9)), 6)
    settings = [f"propagate.threshold={threshold}", f"propagate.split={split}"]
    run = rerun(tiny, finished_run, tmp_path, *settings, "propagate.max_size=12")
    views, ids = read_views(run, "unlabelled")
    clusterer = ConsensusClusterer(
        k=K, random_state=SEED, threshold=threshold, split=split, max_size=12
    )
    found = clusterer.fit_predict(views, **read_labelled(run))
    assert clusterer.n_clusters_ > 0
    np.testing.assert_array_equal(found, read_labels(run, ids))


def test_more_votes_than_members_are_a_bad_config(tiny, finished_run, tmp_path, capsys):
    with pytest.raises(AssertionError):
        rerun(tiny, finished_run, tmp_path, "mediate.method=vote", "mediate.vote.min_votes=5")
    assert "mediate.vote.min_votes: expected 0 to 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def voted_run(known, known_run, tmp_path_factory):
    """The run with known clusters again from mediate on, by votes."""
    runs = tmp_path_factory.mktemp("voted")
    passing = shutil.ignore_patterns("logs", ".*draft*")
    shutil.copytree(known_run.parent, runs / "runs", symlinks=True, ignore=passing)
    options = [*known, "--runs-dir", str(runs / "runs")]
    assert main([*options, "--until", "propagate", "mediate.method=vote"]) == 0
    return runs / "runs" / "known"


def test_a_self_trained_run(known, known_run, tmp_path, monkeypatch, capsys):
    """Labelled images that differ from the unlabelled ones are not trained on, by either way."""
    monkeypatch.setattr("cdp.mediator.set_gap.MOST_SEPARATE", 0.0)
    passing = shutil.ignore_patterns("logs", ".*draft*")
    shutil.copytree(known_run.parent, tmp_path / "runs", symlinks=True, ignore=passing)
    options = [*known, "--runs-dir", str(tmp_path / "runs")]
    for stage in ("mediate", "propagate"):
        assert main([*options, "--stage", stage, "--force"]) == 0
    printed = capsys.readouterr().out
    assert "Label 24 people or more of the unlabelled images" in printed
    target = ["--stage", "propagate", "propagate.target_precision=0.9"]
    assert main([*options, *target]) in (1, 2)
    assert "target_precision needs labelled images" in capsys.readouterr().err
    run = tmp_path / "runs" / "known"
    views, ids = read_views(run, "unlabelled")
    clusterer = ConsensusClusterer(k=KNOWN_K, random_state=SEED)
    with pytest.warns(CdpWarning, match="differ from the unlabelled ones"):
        clusterer.fit(views, **read_labelled(run))
    np.testing.assert_array_equal(clusterer.labels_, read_labels(run, ids))
    np.testing.assert_array_equal(clusterer.pair_scores_, read_scores(run))
    assert clusterer.quality_.precision is None


def test_a_voting_run(voted_run):
    views, ids = read_views(voted_run, "unlabelled")
    clusterer = ConsensusClusterer(k=KNOWN_K, random_state=SEED, self_training=False)
    found = clusterer.fit_predict(views)
    expected = read_labels(voted_run, ids)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(clusterer.pair_scores_, read_scores(voted_run))
    assert expected.max() + 1 >= len(SIZES) - 2
