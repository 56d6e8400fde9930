"""One chain: the estimator on the views of a finished run gives the labels of the run."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import TINY_CONFIG
from known_clusters import KNOWN_K, SIZES

from cdp import ConsensusClusterer
from pipelines.run import main
from pipelines.tables import read_vectors

pytestmark = [pytest.mark.nmslib, pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
SEED = TINY_CONFIG["seed"]


def read_views(run, split):
    """The views of one split, base first, and its sample ids."""
    members = [TINY_CONFIG["committee"]["base"], *TINY_CONFIG["committee"]["members"]]
    tables = [run / f"embed/embeddings/{split}/{each['name']}.parquet" for each in members]
    ids = pd.read_parquet(tables[0], columns=["sample_id"]).sample_id
    return [read_vectors(table, "embedding") for table in tables], ids


def read_labels(run, ids):
    labels = pd.read_parquet(run / "propagate/labels.parquet").set_index("sample_id")
    return labels.pseudo_label[ids].to_numpy()


def test_a_trained_run(finished_run):
    views, ids = read_views(finished_run, "unlabelled")
    labelled_views, labelled = read_views(finished_run, "labelled")
    samples = pd.read_parquet(finished_run / "ingest/samples.parquet").set_index("sample_id")
    clusterer = ConsensusClusterer(k=TINY_CONFIG["knn"]["k"], random_state=SEED)
    found = clusterer.fit_predict(
        views, labelled_views=labelled_views, labelled_ids=samples.identity[labelled]
    )
    np.testing.assert_array_equal(found, read_labels(finished_run, ids))
    pairs = pd.concat(
        pd.read_parquet(part)
        for part in sorted((finished_run / "mediate/pairs").rglob("*.parquet"))
    )
    np.testing.assert_array_equal(clusterer.pair_scores_, pairs.probability)


@pytest.fixture(scope="module")
def voted_run(known, known_run, tmp_path_factory):
    """The run with known clusters again from mediate on, by votes."""
    runs = tmp_path_factory.mktemp("voted")
    passing = shutil.ignore_patterns("logs", ".*draft*")
    shutil.copytree(known_run.parent, runs / "runs", symlinks=True, ignore=passing)
    options = [*known, "--runs-dir", str(runs / "runs")]
    assert main([*options, "--until", "propagate", "mediate.method=vote"]) == 0
    return runs / "runs" / "known"


def test_a_voting_run(voted_run):
    views, ids = read_views(voted_run, "unlabelled")
    found = ConsensusClusterer(k=KNOWN_K, random_state=SEED).fit_predict(views)
    expected = read_labels(voted_run, ids)
    np.testing.assert_array_equal(found, expected)
    assert expected.max() + 1 >= len(SIZES)
