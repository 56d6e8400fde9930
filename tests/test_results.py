"""A run as DataFrames, as a person at a prompt uses it."""

import networkx
import numpy as np
import pandas as pd
import pytest

import cdp
from cdp.errors import DataError, StageError
from pipelines.results import compare_labels

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]


@pytest.fixture(scope="module")
def run(known_run):
    return cdp.open_run(known_run)


def test_tables_are_what_the_stages_published(run, known_run):
    for name, path in (
        ("samples", "ingest/samples"),
        ("labels", "propagate/labels"),
        ("clusters", "propagate/clusters"),
        ("pairs", "mediate/pairs"),
        ("metrics", "evaluate/metrics"),
    ):
        pd.testing.assert_frame_equal(
            getattr(run, name), pd.read_parquet(known_run / f"{path}.parquet")
        )
    assert run.labels is run.labels
    assert list(run.corrections.columns)[:4] == ["number", "at", "who", "action"]


def test_nothing_is_read_before_it_is_asked_for(known_run, monkeypatch):
    from pipelines.store import Published

    monkeypatch.setattr(Published, "read", None)
    assert "known" in repr(cdp.open_run(known_run))


def test_a_cluster_shows_images_pairs_and_graph(run):
    label = int(run.clusters["size"].idxmax())
    cluster = run.cluster(label)
    members = set(run.labels.sample_id[run.labels.pseudo_label == label])
    assert set(cluster.images.sample_id) == members
    assert cluster.images.sample_id[0] == run.clusters.medoid_sample_id[label]
    assert cluster.images.distance.is_monotonic_increasing
    inside = run.pairs[run.pairs.source.isin(members) & run.pairs.target.isin(members)]
    assert len(cluster.pairs) == len(inside)
    assert set(cluster.graph.nodes) == members
    assert cluster.graph.number_of_edges() == len(inside)
    weakest = [score for _, _, score in cluster.graph.graph["bridges"]]
    assert weakest == sorted(weakest)
    assert {(min(e), max(e)) for e in networkx.bridges(cluster.graph)} == {
        (a, b) for a, b, _ in cluster.graph.graph["bridges"]
    }
    assert cluster._repr_html_().count("<img") == len(members)


@pytest.mark.parametrize("label", [-1, 10_000, "17", None, 1.5])
def test_a_cluster_that_is_not_there_is_said(run, label):
    with pytest.raises(DataError, match="pseudo-labels go from 0 to"):
        run.cluster(label)


def test_mistakes_in_the_path_are_answered(tmp_path, known_run):
    with pytest.raises(DataError, match=r"no run at .*knwon.* There is .*/known"):
        cdp.open_run(known_run.parent / "knwon")
    (tmp_path / "half" / "ingest").mkdir(parents=True)
    with pytest.raises(StageError, match="has published no propagate"):
        _ = cdp.open_run(tmp_path / "half").labels


def frame(labels):
    return pd.DataFrame(
        {"key": np.arange(len(labels)), "path": [f"{i}.jpg" for i in range(len(labels))],
         "pseudo_label": labels}
    )  # fmt: skip


def test_compare_lists_merges_splits_and_moves():
    here = frame([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, -1])
    there = frame([0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, -1, 3])
    found = compare_labels(here, there)
    assert found.merged.to_dict("records") == [
        {"cluster_there": 0, "clusters_here": [0, 1], "images": [3, 3]}
    ]
    assert found.split.to_dict("records") == [
        {"cluster_here": 2, "clusters_there": [1, 2], "images": [2, 2]}
    ]
    assert found.moved.path.tolist() == ["8.jpg", "9.jpg", "11.jpg", "12.jpg"]
    assert found.moved.cluster_there.tolist() == [2, 2, -1, 3]
    assert found.moved.others_there.tolist() == [1, 1, 3, -1]
    assert found.same == 0


def test_a_run_compared_with_itself_has_not_changed(run, known_run):
    found = run.compare(known_run)
    assert found.same == len(run.clusters)
    assert not len(found.merged) + len(found.split) + len(found.moved)
    assert "0 merged" in repr(found)
