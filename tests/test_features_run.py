"""Runs that bring their own features: made ones for the mistakes, real ones for the figures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import cdp
from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

ROOT = Path(__file__).parents[1]


@pytest.fixture
def features(tmp_path):
    """Three views of twelve labelled and fifteen unlabelled people, as files."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"

    def save(split, people, first):
        identity = np.repeat(np.arange(people), 6)
        folder = root / split / "features"
        folder.mkdir(parents=True)
        for view, dimension in (("one", 24), ("two", 16), ("three", 32)):
            centre = np.random.default_rng(first + dimension).normal(size=(people, dimension))
            noise = rng.normal(size=(len(identity), dimension)) * 0.5
            (centre[identity] + noise).astype(np.float32).tofile(folder / f"{view}.bin")
        names = [f"p{i:02d}/{row}.jpg" for row, i in enumerate(identity)]
        (root / split / "list.txt").write_text("\n".join(names) + "\n")
        (root / split / "meta.txt").write_text("\n".join(map(str, identity)) + "\n")

    save("l", 12, 0)
    save("u", 15, 1000)
    (tmp_path / "configs").mkdir()
    config = tmp_path / "configs" / "mine.yaml"
    manifest = {"name": "mine", "kind": "features", "labelled": {"root": "l"},
                "unlabelled": {"root": "u"}}  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    members = [{"name": view, "features": view} for view in ("two", "three")]
    committee = {"base": {"name": "one", "features": "one"}, "members": members}
    config.write_text(
        yaml.safe_dump({"data": "data.yaml", "committee": committee, "knn": {"k": 8}})
    )

    def go(*arguments):
        return main(["--config", str(config), "--runs-dir", str(tmp_path / "runs"),
                     "--data-root", str(root), *arguments])  # fmt: skip

    go.root, go.run = root, tmp_path / "runs" / "mine"
    return go


def test_features_run_from_knn_on(features, capsys):
    assert features() == 0
    printed = capsys.readouterr().out
    assert "train     omit  the data set brings its own features" in printed
    metrics = pd.read_parquet(features.run / "evaluate" / "metrics.parquet")
    value = metrics.set_index("metric").value
    assert value["pairwise_f"] > 0.95
    assert value["bcubed_f"] > 0.95
    labels = pd.read_parquet(features.run / "propagate" / "labels.parquet")
    assert list(labels.path[:2]) == ["p00/0.jpg", "p00/1.jpg"]


def test_without_truth_only_the_figures_that_need_it_are_missing(features, capsys):
    (features.root / "u" / "meta.txt").unlink()
    assert features() == 0
    assert "Truth" not in capsys.readouterr().out
    assert len(pd.read_parquet(features.run / "propagate" / "clusters.parquet")) > 5


def test_without_labels_it_votes(features):
    (features.root / "l" / "meta.txt").unlink()
    assert (
        features("mediate.method=vote", "mediate.vote.min_similarity=0.6", "--until", "propagate")
        == 0
    )
    pairs = pd.read_parquet(features.run / "mediate" / "pairs.parquet")
    kept = (pairs.base_similarity > np.float32(0.6)) & (pairs.vote >= 1)
    assert ((pairs.probability > 0) == kept).all()
    check_first_level(features.run, 0.6)
    assert features("mediate.method=vote", "propagate.max_size=5", "--until", "propagate") == 0
    check_first_level(features.run, read_facts(features.run, "mediate")["cosine"], max_size=5)


def read_facts(run, stage):
    return json.loads((run / stage / "manifest.json").read_text())["facts"]


def check_first_level(run, cosine, **limits):
    """The levels start at the cosine, and the labels are the estimator's."""
    assert read_facts(run, "propagate")["threshold"] == cosine > 0
    pairs = pd.read_parquet(run / "mediate" / "pairs.parquet")
    labels = pd.read_parquet(run / "propagate" / "labels.parquet")
    assert labels.cut_threshold.min() >= np.float32(cosine)
    ids = labels.sample_id.to_numpy()
    ends = [np.searchsorted(ids, pairs[end]) for end in ("source", "target")]
    score = pairs.probability.to_numpy()
    found = cdp.propagate_labels(
        np.stack(ends, 1), score, len(ids), threshold=cosine, **({"max_size": 300} | limits)
    )
    np.testing.assert_array_equal(labels.pseudo_label, found.label)


@pytest.mark.parametrize("method", ["paper", "released"])
def test_the_published_variants_are_a_config_line(features, method):
    assert features("--until", "propagate", f"mediate.method={method}", "mediate.candidates=base",
                    "propagate.split=raise_threshold", "propagate.threshold=0.5") == 0  # fmt: skip
    manifest = (features.run / "mediate" / "manifest.json").read_text()
    assert f'"method": "{method}"' in manifest


def spoil(features, split, view, row, value):
    path = features.root / split / "features" / f"{view}.bin"
    rows = len((features.root / split / "list.txt").read_text().splitlines())
    vectors = np.fromfile(path, np.float32).reshape(rows, -1)
    vectors[row] = value
    vectors.tofile(path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(np.nan, "is missing, or all NaN"), (np.inf, "holds NaN or infinity"), (0, "is all zeros")],
)
def test_a_bad_vector_costs_its_image_only(features, value, expected):
    spoil(features, "u", "two", 7, value)
    assert features("--until", "embed") == 0
    rejected = pd.read_parquet(features.run / "ingest" / "rejected.parquet")
    assert rejected.path.tolist() == ["p01/7.jpg"]
    assert rejected.reason.tolist() == [f"its vector in view two {expected}"]
    raw = np.fromfile(features.root / "u" / "features" / "one.bin", np.float32).reshape(90, 24)
    view = pd.read_parquet(features.run / "embed" / "embeddings" / "unlabelled" / "one.parquet")
    kept = np.delete(raw, 7, axis=0)
    expected_vectors = kept / np.linalg.norm(kept, axis=1)[:, None]
    np.testing.assert_allclose(np.stack(view.embedding), expected_vectors, atol=1e-6)


def test_no_positive_pair_is_said_plainly(features, capsys):
    count = len((features.root / "l" / "list.txt").read_text().splitlines())
    (features.root / "l" / "meta.txt").write_text("\n".join(map(str, range(count))) + "\n")
    assert features() == 0
    printed = capsys.readouterr()
    assert "The committee voted instead" in printed.out
    assert "Traceback" not in printed.err


@pytest.fixture(scope="module")
def lfw_run(data_root, tmp_path_factory):
    """LFW at 24 px by five real networks, at default settings."""
    runs = tmp_path_factory.mktemp("lfw")
    config = ROOT / "configs" / "lfw_features.yaml"
    arguments = ["--config", str(config), "--runs-dir", str(runs), "--data-root", str(data_root)]
    assert main([*arguments, "--until", "evaluate"]) == 0
    return runs / "lfw_features"


def test_real_faces_are_clustered_without_a_threshold(lfw_run):
    metrics = pd.read_parquet(lfw_run / "evaluate" / "metrics.parquet").set_index("metric")
    assert metrics.value.pairwise_f > 0.98
    assert metrics.value.bcubed_f > 0.94


def test_real_graphs_are_nearly_exact(lfw_run):
    manifest = yaml.safe_load((lfw_run / "knn" / "manifest.json").read_text())
    assert min(manifest["facts"]["recall"].values()) >= 0.99
