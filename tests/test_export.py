"""Exports, read back as the programs they are for would."""

import csv
import json
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_hostile import NAMES

import cdp
from pipelines.decisions import CorrectionTable, find_keys
from pipelines.export.__main__ import main
from pipelines.export.labels import COLUMNS, defuse_formula, write_csv

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]


def export(run, to, out, *options):
    return main(["labels", "--run", str(run), "--to", to, "--out", str(out), *options])


@pytest.fixture
def labels(finished_run):
    """The run's labels, but for the clusters: three images each, and the last have none."""
    labels = pd.read_parquet(finished_run / "propagate" / "labels.parquet")
    labelled = np.arange(len(labels)) < len(labels) // 3 * 3 - 3
    labels["pseudo_label"] = np.where(labelled, np.arange(len(labels)) // 3, -1)
    labels["cluster_size"] = np.where(labelled, 3, 0)
    return labels


@pytest.fixture(autouse=True)
def known_labels(labels, monkeypatch):
    """What a training clusters is not known, so the run is given labels; and no other data root."""
    monkeypatch.setattr("pipelines.results.RunResults.labels", labels)
    monkeypatch.delenv("CDP_DATA_ROOT", raising=False)


def test_a_folder_a_cluster(finished_run, labels, tmp_path, capsys):
    assert export(finished_run, "folder", tmp_path / "out") == 0
    labelled = labels[labels.pseudo_label >= 0]
    assert f"{len(labelled):,} images" in capsys.readouterr().out
    found = Counter(int(path.parent.name.split("_")[1]) for path in tmp_path.glob("out/*/*.png"))
    assert found == Counter(labelled.pseudo_label)
    with Image.open(next(tmp_path.glob("out/*/*.png"))) as image:
        assert image.size == (48, 48)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_csv_has_every_image(finished_run, labels, tmp_path):
    assert export(finished_run, "csv", tmp_path / "labels.csv") == 0
    assert (tmp_path / "labels.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    read = pd.read_csv(tmp_path / "labels.csv")
    assert list(read) == [*COLUMNS]
    assert set(read.reviewed) == {"no"}
    assert read.sample_id.tolist() == labels.sample_id.tolist()
    assert read.pseudo_label.tolist() == labels.pseudo_label.tolist()
    assert np.allclose(read.confidence, labels.confidence, atol=1e-6)


def test_a_stage_made_from_another_result_than_the_present_one_is_named(own_run, tmp_path, capsys):
    assert export(own_run, "csv", tmp_path / "before.csv") == 0
    assert capsys.readouterr().err == ""
    manifest = own_run / "knn" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "fingerprint": "other"}))
    assert export(own_run, "csv", tmp_path / "after.csv") == 0
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1
    assert "propagate from another knn; mediate from another knn. They were exported" in warning
    assert "--stage all --until propagate" in warning


def test_decisions_that_the_labels_do_not_follow_are_named(own_run, labels, tmp_path, capsys):
    run = cdp.open_run(own_run)
    keys = find_keys(run.samples.set_index("sample_id").loc[labels.sample_id].reset_index())
    table = CorrectionTable(own_run)
    table.append("ada", "split", [keys[:1], keys[1:2]])
    assert export(own_run, "csv", tmp_path / "pending.csv") == 0
    warning = capsys.readouterr().err
    assert warning.count("warning: ") == 1
    assert "made or undone in a review since propagate ran" in warning
    assert "--stage all --until propagate" in warning
    table.append("ada", "undo", undoes=1)
    assert export(own_run, "csv", tmp_path / "undone.csv") == 0
    assert capsys.readouterr().err == ""
    table.append("ada", "exclude", [["a labelled image"]])
    assert export(own_run, "csv", tmp_path / "names.csv") == 0
    assert "in a review since ingest ran" in capsys.readouterr().err


def test_what_reviewers_said_is_exported_and_can_be_all(own_run, labels, tmp_path, capsys):
    run = cdp.open_run(own_run)
    keys = find_keys(run.samples.set_index("sample_id").loc[labels.sample_id].reset_index())
    table = CorrectionTable(own_run)
    table.append("ada", "accept", [keys[:3]])
    table.append("ada", "split", [keys[3:4], keys[4:6]])
    table.append("ada", "undo", undoes=2)
    table.append("ada", "reject", [keys[8:9]])
    assert export(own_run, "csv", tmp_path / "all.csv") == 0
    read = pd.read_csv(tmp_path / "all.csv", keep_default_na=False)
    assert read.decision.tolist()[:9] == ["accept 1"] * 3 + [""] * 5 + ["reject 4"]
    assert read.reviewed.tolist()[:5] == ["yes"] * 3 + ["no"] * 2
    assert export(own_run, "csv", tmp_path / "some.csv", "--reviewed-only") == 0
    some = pd.read_csv(tmp_path / "some.csv")
    assert some.sample_id.tolist() == labels.sample_id[[0, 1, 2, 8]].tolist()
    assert export(own_run, "csv", tmp_path / "x.csv", "--min-precision", "1.5") == 2
    assert "--min-precision: 0 to 1 expected" in capsys.readouterr().err


def test_only_clusters_of_that_precision_are_exported(own_run, labels, tmp_path, monkeypatch):
    precision = np.linspace(0, 1, labels.pseudo_label.max() + 1)
    clusters = pd.DataFrame({"pseudo_label": np.arange(len(precision)),
                             "expected_precision": precision, "medoid_sample_id": 7})  # fmt: skip
    monkeypatch.setattr("pipelines.results.RunResults.clusters", clusters)
    assert export(own_run, "csv", tmp_path / "x.csv", "--min-precision", "0.5") == 0
    read = pd.read_csv(tmp_path / "x.csv")
    assert set(read.pseudo_label) == set(np.flatnonzero(precision >= 0.5))
    assert set(read.medoid) == {7}


def test_label_studio_reads_tasks_and_choices(finished_run, labels, tmp_path):
    assert export(finished_run, "label-studio", tmp_path / "ls") == 0
    tasks = json.loads((tmp_path / "ls" / "tasks.json").read_text())
    config = ET.parse(tmp_path / "ls" / "label_config.xml").getroot()
    choices = config.find("Choices")
    known = {choice.get("value") for choice in choices}
    label_of = labels.set_index("sample_id").pseudo_label
    assert len(tasks) == (labels.pseudo_label >= 0).sum()
    for task in tasks:
        (prediction,) = task["predictions"]
        (result,) = prediction["result"]
        assert result["from_name"] == choices.get("name")
        assert result["to_name"] == choices.get("toName") == config.find("Image").get("name")
        (choice,) = result["value"]["choices"]
        assert choice in known
        assert choice == f"cluster {label_of[task['data']['sample_id']]}"
        image = task["data"]["image"].removeprefix("/data/local-files/?d=")
        assert (tmp_path / "ls" / image).is_file()


def test_fiftyone_finds_an_image_for_every_label(finished_run, labels, tmp_path):
    assert export(finished_run, "fiftyone", tmp_path / "fo") == 0
    value = json.loads((tmp_path / "fo" / "labels.json").read_text())
    images = {path.stem for path in (tmp_path / "fo" / "data").iterdir()}
    assert images == set(value["labels"])
    assert {each["label"] for each in value["labels"].values()} == set(value["classes"])
    assert len(images) == (labels.pseudo_label >= 0).sum()
    vectors = np.load(tmp_path / "fo" / "embeddings.npy")
    ids = np.array([int(name) for name in value["labels"]])
    np.testing.assert_array_equal(vectors, cdp.open_run(finished_run).view_of(ids))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--min-size", "999"), "no cluster of"),
        (("--out", "HERE"), "exists already"),
        (("--run", "nowhere"), "no run at nowhere"),
    ],
)
def test_mistakes_get_one_message_and_leave_nothing(
    finished_run, tmp_path, capsys, arguments, expected
):
    (tmp_path / "HERE").mkdir()
    given = [str(tmp_path / "HERE") if each == "HERE" else each for each in arguments]
    assert export(finished_run, "folder", tmp_path / "out", *given) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx", " =1", '=HYPERLINK("x")'])
def test_no_name_becomes_a_formula(name, tmp_path):
    row = {"sample_id": [1], "path": [name], "pseudo_label": [-1], "cluster_size": [0],
           "confidence": [0.0]}  # fmt: skip
    write_csv(None, pd.DataFrame(row), tmp_path / "x.csv", None)
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8-sig") as stream:
        (_, (_, shown, *_)) = csv.reader(stream)
    assert shown == "'" + name
    assert defuse_formula("a=b-c") == "a=b-c"
    assert defuse_formula("a;=b\t+c\r\n-d") == "a;'=b\t'+c\r'\n'-d"


def test_links_point_at_the_images_and_names_stay_inside(own_run, labels, tmp_path):
    """The same run as if its images were files with names nobody should trust."""
    root = tmp_path / "data"
    (root / "pile").mkdir(parents=True)
    names = [f"pile/{number} ..\\; rm -rf $(x) é.jpg" for number in range(len(labels))]
    for name in names:
        (root / name).write_bytes(b"image")
    labels["path"] = names
    record = json.loads((own_run / "run.json").read_text())
    record["data"] |= {"kind": "images", "unlabelled": {"root": "pile", "layout": "pile"}}
    (own_run / "run.json").write_text(json.dumps(record | {"data_root": str(root)}))
    assert export(own_run, "folder", tmp_path / "out", "--links") == 0
    links = list((tmp_path / "out").glob("*/*"))
    assert len(links) == (labels.pseudo_label >= 0).sum()
    for link in links:
        assert link.is_symlink()
        assert link.resolve().is_relative_to(root.resolve())
        assert set(link.name) <= set("0123456789abcdefghijklmnopqrstuvwxyz._-")
    labels["path"] = "../../etc/passwd"
    assert export(own_run, "folder", tmp_path / "again") == 2
    assert not Path(tmp_path / "again").exists()


def test_no_name_becomes_markup_or_a_path_in_exports(own_run, labels, tmp_path):
    """Folders, Label Studio and FiftyOne of a run whose images have these names."""
    root = tmp_path / "data"
    (root / "pile").mkdir(parents=True)
    names = [f"pile/{n} {NAMES[n % len(NAMES)].replace('/', '_')}" for n in range(len(labels))]
    names = [name.replace("\x00", "") for name in names]
    for name in names:
        (root / name).write_bytes(b"image")
    labels["path"] = names
    record = json.loads((own_run / "run.json").read_text())
    record["data"] |= {"kind": "images", "unlabelled": {"root": "pile", "layout": "pile"}}
    (own_run / "run.json").write_text(json.dumps(record | {"data_root": str(root)}))
    safe = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    for kind in ("folder", "label-studio", "fiftyone"):
        out = tmp_path / kind
        assert export(own_run, kind, out) == 0
        for path in out.rglob("*"):
            assert set(path.name) <= safe
            assert path.resolve().is_relative_to(out)
            if path.is_file() and path.suffix not in (".json", ".xml", ".npy"):
                assert path.name[0].isdigit()  # no name that a system keeps for itself
    assert "<script" not in (tmp_path / "label-studio" / "tasks.json").read_text()
    assert "<script" not in (tmp_path / "label-studio" / "label_config.xml").read_text()


def test_a_size_that_no_cluster_has_is_a_mistake_in_every_format(own_run, tmp_path, capsys):
    for kind in ("csv", "folder"):
        assert export(own_run, kind, tmp_path / kind, "--min-size", "9999") == 2
        assert "has 9999 images or more; lower --min-size" in capsys.readouterr().err
    assert not (tmp_path / "csv").exists()
