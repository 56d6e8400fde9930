"""One stage is run: results upstream that are out of date are named, and used all the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import TINY_CONFIG
from PIL import Image

from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SEED = TINY_CONFIG["seed"]


@pytest.fixture
def warn(finished_run, tiny, capsys):
    """Options and settings laid over the finished run -> the warnings of results out of date."""

    def ask(*arguments, config=tiny, runs=finished_run.parent):
        capsys.readouterr()
        options = ["--config", str(config), "--runs-dir", str(runs), "--workers", "1"]
        assert main([*options, *arguments]) == 0
        printed = capsys.readouterr().out.splitlines()
        return [line for line in printed if "warning: results that it reads" in line]

    return ask


@pytest.mark.parametrize(
    ("stage", "setting", "expected"),
    [
        ("mediate", "knn.k=6", "knn (knn.k 5 -> 6). They"),
        ("propagate", "knn.k=6", "knn (knn.k 5 -> 6); and, made from these, mediate. They"),
        ("knn", "embed.flip=true", "embed (embed.flip False -> True). They"),
        ("train", "seed=1000", f"ingest (seed {SEED} -> 1000). They"),
        ("knn", "seed=1000", f"ingest, train, embed (seed {SEED} -> 1000). They"),
    ],
)
def test_a_changed_setting_of_a_stage_upstream_is_named(warn, stage, setting, expected):
    (warning,) = warn("--stage", stage, "--dry-run", setting)
    assert f"{stage:9} warning: results that it reads are out of date" in warning
    assert f"(published -> now): {expected} are used as they were published" in warning
    assert warning.endswith(f"{setting} --stage all --until {stage}")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--stage", "mediate"),
        ("--stage", "mediate", "mediate.dropout=0.1"),
        ("--stage", "mediate", "propagate.threshold=0.9", "retrain.epochs=3"),
        ("--stage", "ingest", "ingest.min_px=9"),
        ("--stage", "report", "--workers", "3", "--device", "cuda"),
        ("knn.k=6",),
        ("--until", "mediate", "knn.k=6"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_without_a_change_upstream_there_is_no_warning(warn, arguments):
    assert warn("--dry-run", *arguments) == []


def test_the_run_goes_on_from_what_is_published_until_it_is_brought_up_to_date(own_run, warn):
    runs, graphs = own_run.parent, (own_run / "knn").resolve()
    (warning,) = warn("--stage", "mediate", "knn.k=6", runs=runs)
    assert "knn (knn.k 5 -> 6)" in warning
    assert (own_run / "knn").resolve() == graphs
    assert warn("--until", "mediate", "knn.k=6", runs=runs) == []
    assert warn("--stage", "mediate", "--dry-run", "knn.k=6", runs=runs) == []


def test_a_stage_made_anew_alone_leaves_what_was_made_from_it_out_of_date(own_run, warn):
    runs = own_run.parent
    assert warn("--stage", "knn", "knn.k=6", runs=runs) == []
    (warning,) = warn("--stage", "propagate", "--dry-run", "knn.k=6", runs=runs)
    assert "(published -> now): mediate (knn changed). They" in warning


def test_without_a_model_file_the_other_stages_are_compared(own_known_run, known, capsys):
    options = [*known, "--runs-dir", str(own_known_run.parent), "--stage", "propagate", "--dry-run"]
    root = Path(known[known.index("--data-root") + 1])
    shutil.move(root / "other.onnx", root / "elsewhere")
    try:
        assert main([*options, "knn.k=6"]) == 0
    finally:
        shutil.move(root / "elsewhere", root / "other.onnx")
    printed = capsys.readouterr().out
    assert "not known whether embed is up to date: the committee names 'other.onnx'" in printed
    assert "knn (knn.k 8 -> 6); and, made from these, mediate. They" in printed


def test_a_changed_list_of_images_is_named(tmp_path, warn):
    random = np.random.default_rng(0)
    root, config = tmp_path / "data", tmp_path / "configs" / "tiny.yaml"
    for folder in ("staff/ann", "staff/ben", "pile"):
        (root / folder).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (48, 48, 3), np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{number}.png")
    (root / "pile.csv").write_text("path\n0.png\n1.png\n2.png\n")
    data = {
        "name": "mine", "kind": "images", "size_px": 48, "labelled": {"root": "staff"},
        "unlabelled": {"root": "pile", "list": "pile.csv"},
    }  # fmt: skip
    config.parent.mkdir()
    config.write_text(yaml.safe_dump(TINY_CONFIG))
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))

    def ask(*arguments):
        runs = tmp_path / "runs"
        return warn("--data-root", str(root), *arguments, config=config, runs=runs)

    assert ask("--until", "ingest") == []
    assert ask("--stage", "train", "--dry-run") == []
    (root / "pile.csv").write_text("path\n0.png\n1.png\n3.png\n")
    (warning,) = ask("--stage", "train", "--dry-run")
    assert "ingest (the data set changed, in its manifest or its files). They" in warning
