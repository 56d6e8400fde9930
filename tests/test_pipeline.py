"""The pipeline as a person uses it: commands, tables, reruns, faults, mistakes."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY_CONFIG, digest_run
from known_clusters import SIZES
from PIL import Image

from pipelines.export.__main__ import main as export_results
from pipelines.results import open_run
from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

ROOT = Path(__file__).parents[1]
TABLES = {
    "ingest/qualities": "sample_id side_px sharpness quality",
    "ingest/samples": "sample_id dataset path split identity width height sha256",
    "ingest/rejected": "dataset path reason",
    "train/history": "model epoch step loss learning_rate accuracy seconds",
    "retrain/history": "model epoch step loss learning_rate accuracy seconds",
    "retrain/matches": "pseudo_label identity similarity threshold",
    "embed/embeddings/labelled/base": "sample_id embedding norm",
    "embed/embeddings/unlabelled/other": "sample_id embedding norm",
    "knn/neighbours/unlabelled/base": "sample_id neighbour similarity",
    "mediate/pairs": "source target vote listings base_similarity probability",
    "propagate/labels": "sample_id path pseudo_label cluster_size confidence cut_threshold",
    "propagate/clusters": "pseudo_label size mean_probability expected_precision weakest_edge "
    "medoid_sample_id",
    "evaluate/metrics": "subject protocol metric value count low high",
    "thumbnails/thumbnails": "sample_id image",
    "thumbnails/labelled": "sample_id image",
    "report/summary": "section name value",
}


def run(config, runs, *arguments):
    return main(["--config", str(config), "--runs-dir", str(runs), *arguments])


@pytest.fixture(scope="module")
def whole(finished_run):
    """Where the finished run of the tiny configuration lies, made by one worker."""
    return finished_run.parent


@pytest.mark.parametrize("table", TABLES)
def test_every_table_opens_with_pandas(finished_run, known_run, table):
    """Tables of clusters have rows for certain where the clusters are known."""
    run = finished_run if table == "train/history" else known_run
    frame = pd.read_parquet(run / f"{table}.parquet")
    assert set(TABLES[table].split()) <= set(frame.columns)
    assert len(frame) or table in ("ingest/rejected", "retrain/matches")


@pytest.mark.parametrize("run", ["finished_run", "known_run"])
def test_the_tables_agree_with_each_other(request, run):
    def read(name):
        return pd.read_parquet(request.getfixturevalue(run) / f"{name}.parquet")

    samples, pairs, labels = read("ingest/samples"), read("mediate/pairs"), read("propagate/labels")
    clusters = read("propagate/clusters")
    unlabelled = samples[samples.split == "unlabelled"]
    assert unlabelled.identity.isna().all()
    assert list(labels.sample_id) == list(unlabelled.sample_id)
    assert list(labels.path) == list(unlabelled.path)
    assert (pairs.source < pairs.target).all()
    assert pairs.source.isin(labels.sample_id).all()
    assert pairs.target.isin(labels.sample_id).all()
    assert pairs.probability.between(0, 1).all()
    assert pairs.vote.between(0, 1).all()
    size = labels[labels.pseudo_label >= 0].groupby("pseudo_label").size()
    assert list(clusters.pseudo_label) == list(range(len(clusters)))
    assert list(clusters["size"]) == list(size)
    medoid = labels.set_index("sample_id").pseudo_label[clusters.medoid_sample_id]
    assert list(medoid) == list(clusters.pseudo_label)


def test_the_clusters_of_the_known_run_are_its_identities(known_run):
    labels = pd.read_parquet(known_run / "propagate" / "labels.parquet")
    person = labels.path.str.split("/").str[1]
    certain = (
        labels[person.str.startswith("u")].groupby(person).pseudo_label.agg(["nunique", "max"])
    )
    assert (certain["nunique"] == 1).all()
    clusters = certain["max"][: len(SIZES)]
    assert (clusters >= 0).all()
    assert (certain["max"][len(SIZES) :] == -1).all()
    size = labels.groupby("pseudo_label").size()
    assert list(size[clusters]) == list(SIZES)


def test_a_second_run_does_nothing_and_says_so(whole, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")}
    assert run(tiny, whole) == 0
    printed = capsys.readouterr().out
    assert "nothing to do, everything is up to date" in printed
    assert "pairwise F" in printed
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.parquet")} == before


def test_dry_run_changes_nothing_and_says_why(whole, tiny, capsys):
    before = sorted(whole.rglob("*"))
    assert run(tiny, whole, "--dry-run", "propagate.max_size=7") == 0
    printed = capsys.readouterr().out
    assert "mediate   skip  up to date" in printed
    assert "propagate run   propagate.max_size None -> 7" in printed
    assert "retrain   run   propagate changed" in printed
    assert sorted(whole.rglob("*")) == before


def test_one_stage_reruns_from_what_is_published(whole, tiny, capsys, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs, symlinks=True)
    before = digest_run(runs / "tiny")
    assert run(tiny, runs, "--stage", "propagate") == 0
    assert "propagate run   asked for" in capsys.readouterr().out
    assert digest_run(runs / "tiny") == before


def test_two_workers_within_a_memory_limit_give_what_one_gives(whole, tiny, tmp_path):
    assert run(tiny, tmp_path, "--workers", "2", "--memory-limit", "6GiB") == 0
    assert digest_run(tmp_path / "tiny") == digest_run(whole / "tiny")


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_another_process_with_any_number_of_workers_gives_the_same(whole, tiny, tmp_path, workers):
    command = [sys.executable, "-m", "pipelines.run", "--config", tiny, "--runs-dir", tmp_path,
               "--workers", workers]  # fmt: skip
    seeded = {**os.environ, "PYTHONHASHSEED": str(workers)}
    subprocess.run([str(part) for part in command], cwd=ROOT, env=seeded, check=True)
    assert digest_run(tmp_path / "tiny") == digest_run(whole / "tiny")


def test_a_manifest_records_what_its_figures_depend_on(whole):
    for place in (whole / "tiny").glob("*/manifest.json"):
        environment = json.loads(place.read_text())["environment"]
        assert environment["packages"]["torch"] == metadata.version("torch")
        assert environment["python"] == platform.python_version()
        assert environment["device_used"] == "cpu" or environment["device_name"]
        assert environment["threads"]["training"] >= environment["threads"]["part"] == 1
        assert environment["instructions"]
        assert environment["seed"] == TINY_CONFIG["seed"]


# ---------------------------------------------------------------------------------- the product


def test_every_protocol_has_its_figures_and_intervals(known_run):
    metrics = pd.read_parquet(known_run / "evaluate" / "metrics.parquet")
    recognizers = metrics[metrics.subject == "labelled_pseudo"].set_index("metric")
    names = {name.rpartition(" 16px")[0] for name in recognizers.protocol}
    assert names == {
        "verification",
        "identification",
        "identification with distractors",
        "open set",
        "rejecting",
        "sets",
    }
    assert {
        "accuracy",
        "tar@far=0.1",
        "tar@far=0.01",
        "rank-1",
        "rank-20",
        "tpir20@fpir=0.1",
    } <= set(recognizers.index)
    # 12 people of 4 images: neither 1e-4 of the impostors nor 1 % of the distractors is one.
    assert not {"tar@far=0.0001", "tpir20@fpir=0.01"} & set(recognizers.index)
    sure = recognizers.drop(index=["accuracy_std", "accuracy_standard_error"])
    assert (sure.low <= sure.high).all()
    assert sure.value.between(sure.low - 0.05, sure.high + 0.05).all()
    gap = metrics[metrics.subject == "gap_closed"]
    # A threshold is neither better nor worse, so that no gap of it is closed.
    assert len(gap) == (~sure.index.str.startswith("threshold@")).sum()


def test_sets_are_weighed_by_quality_on_request(own_known_run, known, monkeypatch):
    import cdp.aggregation

    weights = []
    pool = cdp.aggregation.pool_vectors

    def pool_and_note(vectors, group, weight):
        weights.append(weight)
        return pool(vectors, group, weight)

    monkeypatch.setattr(cdp.aggregation, "pool_vectors", pool_and_note)
    path = own_known_run / "evaluate" / "metrics.parquet"
    before = pd.read_parquet(path)
    options = ["--runs-dir", str(own_known_run.parent), "--stage", "evaluate"]
    assert main([*known, *options, "evaluate.set_weights=quality"]) == 0
    after = pd.read_parquet(path)
    assert weights
    assert all(((weight > 0) & (weight <= 1)).all() for weight in weights)
    assert len(np.unique(np.concatenate(weights))) > 10
    added = set(after.protocol) - set(before.protocol)
    assert {name.rpartition(" 16px")[0] for name in added} == {"rejecting by quality"}
    same = after[~after.protocol.isin(added) & ~after.protocol.str.startswith("sets")]
    kept = before[~before.protocol.str.startswith("sets")]
    assert same.reset_index(drop=True).equals(kept.reset_index(drop=True))


def test_curves_lie_beside_the_history(whole):
    for stage, models in (("train", ("base", "other")), ("retrain", ("labelled_only",))):
        for model in models:
            assert list((whole / "tiny" / stage / "curves" / model).glob("events*"))


def test_a_teacher_is_followed_and_asked_once(own_known_run, known):
    runs = own_known_run.parent
    options = [
        *known,
        "--runs-dir",
        str(runs),
        "--stage",
        "retrain",
        "retrain.teacher=base",
        "retrain.blends=30",
        "retrain.adapt=moments",
        "retrain.student={epochs: 3, width: 0.75}",
        "retrain.leftovers=alone",
        "retrain.same_person=merge",
        "retrain.sampling=identity",
        "retrain.images_per_identity=2",
        "retrain.auxiliary={range: {weight: 0.001}}",
    ]
    assert main(options) == 0
    history = pd.read_parquet(own_known_run / "retrain" / "history.parquet")
    assert history.groupby("model").epoch.max().to_dict() == {
        "labelled_only": 2, "labelled_pseudo": 2, "distilled": 3}  # fmt: skip
    import torch

    import cdp

    before, after = (
        cdp.Recognizer.load(own_known_run / "retrain" / f"{subject}.safetensors", device="cpu")
        for subject in ("distilled", "adapted")
    )
    for key, value in before.backbone.state_dict().items():
        changed = not torch.equal(value, after.backbone.state_dict()[key])
        assert changed == ("running" in key or "tracked" in key), key
    matches = pd.read_parquet(own_known_run / "retrain" / "matches.parquet")
    assert (matches.similarity > matches.threshold).all()
    vectors = {p: p.stat().st_mtime_ns for p in (runs / ".store" / "model").rglob("vectors.npy")}
    assert sorted(path.parent.joinpath("faces.npy").exists() for path in vectors) == [False, True]
    changed = ["retrain.distil_weight=0.5", "retrain.leftovers=drop", "retrain.min_cluster_size=3"]
    assert main([*options, *changed]) == 0
    again = {p: p.stat().st_mtime_ns for p in (runs / ".store" / "model").rglob("vectors.npy")}
    assert again == vectors


def export(*arguments):
    return export_results([str(argument) for argument in arguments])


def check_alignment(code, out):
    """The card's code embeds a turned face of a photo as the library does."""
    import cdp

    smooth = np.random.default_rng(1).integers(0, 256, (12, 16, 3)).astype(np.uint8)
    photo = np.asarray(Image.fromarray(smooth).resize((320, 240), Image.Resampling.BICUBIC))
    points = np.array([[120.5, 95], [171, 109.2], [140, 131.7], [113, 152], [155.3, 163.1]])
    Image.fromarray(photo).save(out / "photo.png")
    np.savetxt(out / "landmarks.txt", points)
    code = code.replace("photo.jpg", "photo.png") + '\nnp.save("vector.npy", vector)'
    subprocess.run([sys.executable, "-c", code], cwd=out, check=True)
    face = cdp.align_face(photo, points)[None]
    expected = cdp.Recognizer.load(out / "recognizer.safetensors").embed(face)
    np.testing.assert_allclose(np.load(out / "vector.npy"), expected, atol=2e-2)
    assert float((np.load(out / "vector.npy") * expected).sum()) > 0.999
    for name in ("photo.png", "landmarks.txt", "vector.npy"):
        (out / name).unlink()


def test_a_recognizer_is_exported_with_its_card(known_run, tmp_path, capsys):
    import cdp
    from cdp.embedding import OnnxEmbedder

    out = tmp_path / "product"
    options = ["recognizer", "--run", known_run, "--out", out]
    assert export(*options) == 0
    assert "labelled_pseudo, 16 px to 16 numbers" in capsys.readouterr().out
    faces = np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3)).astype(np.uint8)
    ours = cdp.Recognizer.load(out / "recognizer.safetensors").embed(faces)
    theirs, _ = OnnxEmbedder((out / "recognizer.onnx").read_bytes()).embed(faces)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    card = (out / "README.md").read_text(encoding="utf-8")
    for expected in ("(n, 3, 16, 16) float32", "known", "open set 16px", "epochs", "landmarks"):
        assert expected in card
    code = card.partition("```python\n")[2].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code + "\nprint(vectors.shape)"], cwd=out, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.strip() == "(1, 16)", done.stderr
    check_alignment(card.split("```python\n")[2].partition("```")[0], out)
    assert export(*options) == 2
    assert "exists already" in capsys.readouterr().err
    assert export("recognizer", "--run", known_run, "--subject", "best") == 2
    assert "no recognizer 'best'; it has: labelled_only" in capsys.readouterr().err
    assert export("recognizer", "--run", tmp_path / "nothing") == 2
    assert "has not published retrain" in capsys.readouterr().err


def test_a_page_of_degradations_is_drawn(tiny, tmp_path, capsys):
    page = tmp_path / "page.png"
    options = ["degradations", "--data", tiny.parents[1] / "data.yaml", "--out"]
    assert export(*options, page, "--count", 3, "--preset", "surveillance", "adaface") == 0
    assert "3 faces, none, surveillance, adaface" in capsys.readouterr().out
    with Image.open(page) as picture:
        assert picture.size == (150 + 3 * 100, 3 * 100 + 4)
    assert export(*options, page) == 2
    assert "exists already" in capsys.readouterr().err
    assert export(*options, tmp_path / "b.png", "--preset", "fog") == 2
    assert "unknown degradation 'fog'" in capsys.readouterr().err
    assert export(*options, tmp_path / "c.png", "--px", 1) == 2
    assert "--px of 4" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["propagate.maxsize=3"], "propagate.maxsize: no such setting"),
        (["knn.k=many"], "knn.k: "),
        (["data=nowhere.yaml"], "no file nowhere.yaml in any of these folders: "),
        (["--stage", "knn", "--until", "knn"], "--until goes with --stage all only"),
        (["--workers", "0"], "--workers: expected 1 or more, got 0"),
        (["--memory-limit", "lots"], "--memory-limit: a size such as 8GiB expected, got 'lots'"),
        (["--workers", "4", "--memory-limit", "4GiB"], "4 worker(s) need at least 5120 MiB"),
        (["committee.base={name: base, backbone: transformer}"], "transformer"),
        (["train.degradation=fog"], "unknown degradation 'fog'"),
        (["train.head=focal"], "unknown head 'focal'"),
        (["train.auxiliary={focal: {}}"], "unknown auxiliary loss 'focal'"),
        (["train.auxiliary={center: {pull: 1.0}}"], "no parameter pull; it has: rate"),
        (["retrain.head=focal"], "retrain: unknown head 'focal'"),
        (["retrain.teacher=other", "retrain.student={backbone: vast}"], "retrain.student: unknown"),
        (["evaluate.degradations=[fog]"], "unknown degradation 'fog'"),
        (["committee.base={name: base, onnx: a.onnx}"], "synthetic data set has no files"),
    ],
)
def test_a_mistake_is_one_message_and_exit_2(tiny, tmp_path, capsys, arguments, expected):
    assert run(tiny, tmp_path, *arguments) == 2
    printed = capsys.readouterr().err
    assert expected in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("tiny/ingest"))


def test_fewer_images_than_neighbours_is_said_before_searching(whole, tiny, tmp_path, capsys):
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs, symlinks=True)
    before = digest_run(runs / "tiny")
    assert run(tiny, runs, "knn.k=640") == 2
    printed = capsys.readouterr().err
    assert re.search(
        r"the unlabelled split has \d+ images .*knn\.k=640 needs at least 641", printed
    )
    assert "full log: " in printed
    assert "to resume once that is fixed: python -m pipelines.run" in printed
    assert digest_run(runs / "tiny") == before


def test_a_scheduler_that_does_not_answer_is_named(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path, "--scheduler", "tcp://127.0.0.1:9") == 1
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in capsys.readouterr().err


def test_an_unwritable_runs_dir_is_named(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run(tiny, tmp_path / "file") == 1
    assert "--runs-dir" in capsys.readouterr().err


# --------------------------------------------------------------------------------- image folders


@pytest.fixture
def folder_run(tmp_path):
    """Synthetic faces saved as files, with some files a camera roll would also hold."""
    from cdp.synthetic.identities import SyntheticFaces

    faces = SyntheticFaces(
        labelled_identities=14, unlabelled_identities=14, evaluation_identities=4, images_min=4,
        images_max=5, evaluation_images=4, size_px=48,
    )  # fmt: skip
    root = tmp_path / "data"
    for row in range(len(faces.identity)):
        path = root / str(faces.split[row]) / faces.name(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(faces.draw(np.array([row]))[0]).save(path)
    pile = root / "unlabelled"
    first = sorted(pile.rglob("*.png"))[0]
    (pile / "empty.jpg").write_bytes(b"")
    (pile / "cut.png").write_bytes(first.read_bytes()[:200])
    (pile / "text.jpg").write_text("no image")
    (pile / "zz copy.png").write_bytes(first.read_bytes())
    (pile / "folder.jpg").mkdir()
    (pile / "😀 <b>.png").write_bytes(sorted(pile.rglob("*.png"))[-1].read_bytes() + b"x")
    Image.new("RGB", (3, 3)).save(pile / "tiny.png")
    manifest = {
        "name": "mine", "kind": "images", "size_px": 48,
        "labelled": {"root": "labelled"},
        "unlabelled": {"root": "unlabelled", "layout": "pile"},
        "evaluation": {"root": "evaluation"},
    }  # fmt: skip
    (tmp_path / "configs").mkdir()
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(manifest))
    (tmp_path / "configs" / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))

    def go(*arguments):
        return run(tmp_path / "configs" / "tiny.yaml", tmp_path / "runs", "--data-root", str(root),
                   *arguments)  # fmt: skip

    go.root, go.run = root, tmp_path / "runs" / "tiny"
    return go


def test_bad_files_cost_only_themselves(folder_run):
    assert folder_run() == 0
    rejected = pd.read_parquet(folder_run.run / "ingest" / "rejected.parquet")
    names = {
        Path(path).name: reason for path, reason in zip(rejected.path, rejected.reason, strict=True)
    }
    assert set(names) == {"empty.jpg", "cut.png", "text.jpg", "tiny.png"}
    assert all(names.values())
    samples = pd.read_parquet(folder_run.run / "ingest" / "samples.parquet")
    assert "unlabelled/😀 <b>.png" in set(samples.path)
    twin = samples.set_index("path").copy_of.dropna().astype(int)
    assert [Path(path).name for path in twin.index] == ["zz copy.png"]
    labels = pd.read_parquet(folder_run.run / "propagate" / "labels.parquet").set_index("path")
    copy, original = labels.loc[twin.index[0]], labels[labels.sample_id == twin.iloc[0]].iloc[0]
    assert copy.representative == original.representative
    assert copy.pseudo_label == original.pseudo_label >= 0
    metrics = pd.read_parquet(folder_run.run / "evaluate" / "metrics.parquet")
    # The truth of a pile is unknown, so no figure may rest on it.
    assert {"labelled_only"} <= set(metrics.subject) <= {"labelled_only", "labelled_pseudo"}


def test_a_changed_image_reruns_and_a_moved_root_does_not(folder_run, tmp_path, capsys):
    assert folder_run("--until", "ingest") == 0
    moved = tmp_path / "moved"
    folder_run.root.rename(moved)
    assert folder_run("--until", "ingest", "--data-root", str(moved)) == 0
    assert "ingest    skip  up to date" in capsys.readouterr().out
    image = next(moved.joinpath("labelled").rglob("*.png"))
    image.write_bytes(image.read_bytes() + b"\0")
    assert folder_run("--until", "ingest", "--data-root", str(moved)) == 0
    assert "ingest    run   the data set changed" in capsys.readouterr().out


def test_without_labels_the_committee_votes(folder_run):
    checkpoint = folder_run.root / "model.safetensors"
    from cdp.models import build_backbone, save_model

    save_model(checkpoint, build_backbone("plain", input_px=16, embedding_dim=16, width=0.5))
    manifest = folder_run.run.parents[1] / "data.yaml"
    manifest.write_text(
        yaml.safe_dump(
            {
                "name": "mine", "kind": "images", "size_px": 48,
                "unlabelled": {"root": "unlabelled", "layout": "pile"},
            }
        )
    )  # fmt: skip
    member = "{name: base, checkpoint: model.safetensors}"
    override = [f"committee.base={member}", "committee.members=[]"]
    assert folder_run(*override) == 2
    voting = ["mediate.method=vote", "mediate.vote.min_votes=0", "--until", "propagate"]
    assert folder_run(*override, *voting) == 0
    labels = pd.read_parquet(folder_run.run / "propagate" / "labels.parquet")
    assert len(labels)


def test_too_few_people_are_counted_with_those_the_committee_is_trained_on(finished_run):
    (said,) = open_run(finished_run).manifest("mediate")["facts"]["doubts"]
    assert "8 labelled people with several images cannot measure" in said
    assert said.endswith("(train.mediator_share keeps 8 of the 16 labelled people for it)")
