"""Gates and staff: people enrolled from their photos, real small probes of them and others."""

import numpy as np
import onnx
import pandas as pd
import pytest
import yaml
from conftest import TINY_CONFIG
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import cdp
from cdp.errors import ConfigError, DataError
from cdp.synthetic import SyntheticFaces
from pipelines.data.dataset import Dataset
from pipelines.headlines import describe_loss, recommend_subjects
from pipelines.real_probes import name_bucket
from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]
STAFF = range(10)


def save_embedder(path):
    """Pooled pixels times a matrix: a ready model that needs no training."""
    weight = np.random.default_rng(0).normal(size=(432, 64)).astype(np.float32) / 20
    constants = [numpy_helper.from_array(np.float32(127.5), "s"),
                 numpy_helper.from_array(np.float32(60), "d"),
                 numpy_helper.from_array(weight, "w")]  # fmt: skip
    nodes = [helper.make_node("Sub", ["image", "s"], ["a"]),
             helper.make_node("Div", ["a", "d"], ["b"]), helper.make_node("Tanh", ["b"], ["c"]),
             helper.make_node("AveragePool", ["c"], ["e"], kernel_shape=[4, 4], strides=[4, 4]),
             helper.make_node("Flatten", ["e"], ["f"]),
             helper.make_node("MatMul", ["f", "w"], ["v"])]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 48, 48])],
        [helper.make_tensor_value_info("v", TensorProto.FLOAT, ["n", 64])], constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
              path)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Staff, cameras and a gate as files, and a finished run."""
    place = tmp_path_factory.mktemp("gate")
    faces = SyntheticFaces(
        size_px=48, labelled_identities=14, unlabelled_identities=10, evaluation_identities=0,
        images_min=8, images_max=8,
    )  # fmt: skip

    def save(row, path, side=48):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(faces.draw(np.array([row]))[0])
        image.resize((side, side), Image.Resampling.BOX).save(path)

    for person in sorted(set(faces.identity.tolist())):
        rows = np.flatnonzero(faces.identity == person).tolist()
        if faces.split[rows[0]] == "unlabelled":
            for row in rows:
                save(row, place / "data" / "cams" / f"{row}.png")
            continue
        name = f"p{person:02d}"
        for number, row in enumerate(rows):
            if person in STAFF and number < 5:
                save(row, place / "data" / "staff" / name / f"{number}.png")
            elif number < 5:
                save(row, place / "data" / "others" / name / f"{number}.png")
            else:
                save(
                    row, place / "data" / "gate" / name / f"{number}.png", (10, 14, 30)[number - 5]
                )
    save_embedder(place / "data" / "ready.onnx")
    manifest = {"name": "gate", "kind": "images", "size_px": 48, "labelled": {"root": "staff"},
                "unlabelled": {"root": "cams"},
                "evaluation": {"gallery": "staff", "probes": "gate"}}  # fmt: skip
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    members = [{"name": "ready", "onnx": "ready.onnx"}]
    committee = {"base": TINY_CONFIG["committee"]["base"], "members": members}
    config = {**TINY_CONFIG, "name": "gate", "committee": committee,
              "evaluate": {"fpir": [0.25], "fpir_rank": 1, "draws": 20}}  # fmt: skip
    (place / "gate.yaml").write_text(yaml.safe_dump(config))
    assert main(["--config", str(place / "gate.yaml"), "--data-root", str(place / "data"),
                 "--runs-dir", str(place / "runs"), "--workers", "1"]) == 0  # fmt: skip
    return place


def test_probes_of_staff_are_judged_by_their_photos_at_each_size(place):
    metrics = cdp.open_run(place / "runs" / "gate").metrics
    assert {"labelled_only", "labelled_pseudo", "ready"} <= set(metrics.subject)
    found = metrics[metrics.subject == "ready"].set_index(["protocol", "metric"])
    buckets = ["all", "8..12px", "12..16px", "24..32px"]
    assert set(found.index.get_level_values(0)) == {f"probes {name}" for name in buckets}
    assert found["count"]["probes all", "rank-1"] == 3 * len(STAFF)
    assert found["count"]["probes 12..16px", "rank-1"] == len(STAFF)
    # The figures again, from the model's own vectors.
    dataset = Dataset.open(place / "data.yaml", place / "data")
    samples = cdp.open_run(place / "runs" / "gate").samples
    from cdp.embedding import OnnxEmbedder
    from cdp.images.preprocessing import CANDIDATES

    shown = cdp.open_run(place / "runs" / "gate").manifest("embed")["facts"]["shown"]["ready"]
    (way,) = [way for way in CANDIDATES if way.describe() == shown]
    model = OnnxEmbedder((place / "data" / "ready.onnx").read_bytes(), preprocessing=way)
    gallery = samples[samples.path.str.startswith("staff/")]
    probes = samples[samples.path.str.startswith("gate/")]
    one = model.embed(dataset.read_faces(gallery.path.tolist()), flip=True)[0]
    two = model.embed(dataset.read_faces(probes.path.tolist()), flip=True)[0]
    cosine = two @ one.T
    named = gallery.identity.to_numpy()[cosine.argmax(axis=1)]
    mated = probes.identity.isin(set(gallery.identity)).to_numpy()
    right = (named == probes.identity)[mated].mean()
    assert found.value["probes all", "rank-1"] == pytest.approx(right)
    threshold = found.value["probes all", "threshold@fpir=0.25"]
    assert (cosine[~mated].max(axis=1) > threshold).mean() <= 0.25
    assert (cosine[~mated].max(axis=1) >= threshold).mean() > 0.25
    passed = (named == probes.identity) & (cosine.max(axis=1) > threshold)
    assert found.value["probes all", "tpir1@fpir=0.25"] == pytest.approx(passed[mated].mean())

    # Claims: each probe against each enrolled person, by that person's nearest photo.
    people = np.unique(gallery.identity)
    nearest = np.stack([cosine[:, gallery.identity == name].max(axis=1) for name in people], axis=1)
    own = probes.identity.to_numpy()[:, None] == people
    threshold = found.value["probes all", "threshold@far=0.1"]
    assert np.isclose(nearest, threshold, atol=1e-6).any()
    assert (nearest[~own] > threshold + 1e-6).mean() <= 0.1
    assert (nearest[~own] > threshold - 1e-6).mean() > 0.1
    accepted = (nearest[own] > threshold + 1e-6).mean()
    assert found.value["probes all", "tar@far=0.1"] == pytest.approx(accepted)
    row = found.loc[("probes all", "threshold@far=0.1")]
    assert row.low <= threshold <= row.high


def test_the_export_has_the_thresholds_of_the_probes(place, tmp_path):
    from pipelines.export.__main__ import main as export

    run, out = place / "runs" / "gate", tmp_path / "out"
    given = ["recognizer", "--run", str(run), "--subject", "labelled_only", "--out", str(out)]
    assert export(given) == 0
    metrics = cdp.open_run(run).metrics
    chosen = metrics[(metrics.subject == "labelled_only")
                     & metrics.metric.str.startswith("threshold@")]  # fmt: skip
    assert {"threshold@far=0.1", "threshold@far=0.01", "threshold@fpir=0.25"} <= set(chosen.metric)
    notes = {prop.key: prop.value for prop in onnx.load(out / "recognizer.onnx").metadata_props}
    card = (out / "README.md").read_text()
    assert "`cdp.Gallery(threshold=...)` takes either" in card
    for row in chosen.itertuples():
        assert notes[f"cdp.{row.metric} {row.protocol}"] == f"{row.value:.4f}"
        assert f"| {row.protocol} | {row.metric} | {row.value:.3f} | " in card
    assert "nan" not in card


@pytest.mark.long
def test_ready_embedders_are_judged_on_drawn_probes_too(place):
    manifest = yaml.safe_load((place / "data.yaml").read_text())
    manifest["evaluation"] = {"root": "others"}
    (place / "others.yaml").write_text(yaml.safe_dump(manifest))
    given = ["--config", str(place / "gate.yaml"), "--data-root", str(place / "data"),
             "--runs-dir", str(place / "runs"), "--workers", "1", "name=others",
             "data=others.yaml", "evaluate.probe_px=[16]", "evaluate.degradations=[none]",
             "evaluate.folds=2", "evaluate.pairs_per_fold=10", "--until", "evaluate"]  # fmt: skip
    assert main(given) == 0
    metrics = cdp.open_run(place / "runs" / "others").metrics
    ready = metrics[metrics.subject == "ready"].set_index(["protocol", "metric"]).value
    assert ready["identification 16px", "rank-1"] > 0.4
    assert -1 <= ready["verification 16px", "threshold@far=0.1"] <= 1
    assert not any("threshold@" in metric for metric in
                   metrics[metrics.subject == "gap_closed"].metric)  # fmt: skip
    (line,) = recommend_subjects(metrics)
    assert line.startswith("identification 16px: ")
    assert "ready" in line
    assert main([*given, "evaluate.embedders=false"]) == 0
    again = cdp.open_run(place / "runs" / "others").metrics
    assert "ready" not in set(again.subject)
    assert recommend_subjects(again) == []


def test_the_summary_says_which_to_use_at_which_size(place):
    summary = (place / "runs" / "gate" / "report" / "summary.txt").read_text()
    assert summary.count("Use       at probes") == 4
    assert "probes 8..12px: " in summary


@pytest.mark.parametrize(
    ("side", "name"),
    [(4, "below 8px"), (8, "8..12px"), (11, "8..12px"), (12, "12..16px"), (63, "48..64px"),
     (64, "64px and more"), (500, "64px and more")],
)  # fmt: skip
def test_buckets(side, name):
    assert name_bucket(side) == name


def test_mistakes_of_the_manifest_are_named(tmp_path):
    for folder in ("staff/ann", "gate/ann", "cams"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.png").write_bytes(folder.encode())

    def write(evaluation):
        described = {"name": "m", "kind": "images", "labelled": {"root": "staff"},
                     "unlabelled": {"root": "cams"}, "evaluation": evaluation}  # fmt: skip
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(described))
        return Dataset.open(tmp_path / "m.yaml", tmp_path)

    with pytest.raises(DataError, match=r"evaluation: \{gallery: <labelled folder>, probes"):
        write({"root": "gate"}).list_entries()
    assert len(write({"gallery": "staff", "probes": "gate"}).list_entries()) == 3
    with pytest.raises(ConfigError, match="both of them"):
        write({"probes": "gate"})
    with pytest.raises(ConfigError, match="root, or gallery and probes"):
        write({"gallery": "staff"})
    with pytest.raises(DataError, match="'photos', which is not a directory"):
        write({"gallery": "photos", "probes": "gate"})


def test_losses_and_recommendations_follow_from_the_figures():
    rows = [("labelled_only", "probes all", "rank-1", 0.6, 50),
            ("labelled_pseudo", "probes all", "rank-1", 0.5, 50),
            ("ready", "probes all", "rank-1", 0.9, 50)]  # fmt: skip
    metrics = pd.DataFrame(rows, columns=["subject", "protocol", "metric", "value", "count"])
    assert recommend_subjects(metrics) == [
        "probes all: ready, rank-1 0.90 of 50 probes (labelled_only 0.60, labelled_pseudo 0.50)"
    ]
    gap = pd.DataFrame([("gap_closed", "probes all", "rank-1", 1.2, 50)], columns=metrics.columns)
    assert recommend_subjects(pd.concat([metrics, gap])) == recommend_subjects(metrics)
    drawn = pd.concat([metrics[metrics.subject != "ready"], gap])
    drawn["protocol"] = "identification 24px"
    assert recommend_subjects(drawn) == []
    assert "worse than labelled_only in 1 of 1 headline" in describe_loss(
        metrics, "labelled_pseudo"
    )
    assert describe_loss(metrics, "labelled_only") == ""
    metrics.loc[1, "value"] = 0.7
    assert describe_loss(metrics, "labelled_pseudo") == ""
