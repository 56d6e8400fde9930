"""Quality of faces in a run: measured at ingest, poor ones set aside, the best one a medoid."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from test_photos import draw_photo

import cdp
from cdp.aggregation import pool_vectors
from cdp.errors import DataError
from cdp.images.quality import rate_crops
from cdp.models import build_backbone
from cdp.propagation.medoids import choose_medoids
from cdp.recognizer import Recognizer
from cdp.synthetic.identities import SyntheticFaces
from cdp.types import PairTable
from pipelines.data.qualities import MEASURES, measure_image
from pipelines.engine import Engine
from pipelines.run import main

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    return SyntheticFaces(
        size_px=112, labelled_identities=3, unlabelled_identities=2, evaluation_identities=2,
        images_min=2, images_max=2, evaluation_images=2,
    ).draw(np.arange(10))  # fmt: skip


def blur(face: np.ndarray, side: int) -> np.ndarray:
    small = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (112, 112)))


def test_quality_of_crops_falls_with_size_and_detail(faces: np.ndarray) -> None:
    quality = rate_crops(faces)
    assert ((quality > 0) & (quality <= 1)).all()
    blurred = rate_crops(np.stack([blur(face, 14) for face in faces]))
    assert (blurred < 0.7 * quality).all()
    small = np.stack([cv2.resize(face, (28, 28), interpolation=cv2.INTER_AREA) for face in faces])
    assert (rate_crops(small) < 0.51 * quality).all()
    assert rate_crops(np.full((1, 40, 40, 3), 7, np.uint8)).tolist() == [0]
    with pytest.raises(DataError, match="uint8 expected"):
        rate_crops(faces.astype(float))


def test_pose_of_an_aligned_face_is_found_on_request(faces: np.ndarray) -> None:
    known = dict(zip(MEASURES, measure_image(faces[2], pose=True), strict=True))
    assert known["score"] > 0.5
    assert abs(known["roll"]) < 20
    plain = dict(zip(MEASURES, measure_image(faces[2], pose=False), strict=True))
    assert np.isnan([plain["score"], plain["yaw"], plain["pitch"]]).all()
    assert plain["quality"] == pytest.approx(rate_crops(faces[2:3])[0])
    assert known["quality"] < plain["quality"]
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    nothing = dict(zip(MEASURES, measure_image(noise, pose=True), strict=True))
    assert nothing["quality"] < 0.1
    assert np.isnan(nothing["yaw"])


def chain(*weights: float) -> tuple[PairTable, np.ndarray]:
    """Rows 0, 1, 2, ... each paired with the next."""
    rows = np.arange(len(weights))
    return PairTable(rows, rows + 1), np.array(weights, np.float32)


def test_medoids_by_hand() -> None:
    # Sums 1, 1.9, 1.8, .9; then a cluster of two, and a row alone.
    pairs, probability = chain(1.0, 0.9, 0.9, 0.8, 1.0, 0.1)
    label = np.array([0, 0, 0, 0, 1, 1, -1])
    assert choose_medoids(pairs, probability, label).tolist() == [1, 4]
    # Row 2 is central too and of better quality; row 0 is best and far from central.
    quality = np.array([0.9, 0.3, 0.5, 0.1, 0.2, 0.3, 1.0])
    assert choose_medoids(pairs, probability, label, quality).tolist() == [2, 5]
    unknown = np.full(7, np.nan)
    assert choose_medoids(pairs, probability, label, unknown).tolist() == [1, 4]
    unknown[2] = 0.01
    assert choose_medoids(pairs, probability, label, unknown).tolist() == [2, 4]
    nobody = np.full(7, -1)
    assert choose_medoids(pairs, probability, nobody, quality).tolist() == []


def test_sets_are_weighed_by_quality(faces: np.ndarray) -> None:
    recognizer = Recognizer(build_backbone("plain", input_px=16, embedding_dim=8), device="cpu")
    images = np.stack([faces[0], blur(faces[1], 10), faces[4], faces[5]])
    vectors, group = recognizer.embed(images), np.array([0, 0, 1, 1])
    expected = pool_vectors(vectors, group, rate_crops(images) ** 2)
    found = recognizer.embed_set(images, group, weigh="quality")
    np.testing.assert_allclose(found, expected, atol=1e-6)
    alone = recognizer.embed_set(images, group, weigh=np.array([1.0, 0, 0, 2]))
    np.testing.assert_allclose(alone, vectors[[0, 3]], atol=1e-6)


@pytest.fixture
def place(tmp_path: Path, faces: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root of ready crops, one blurred, one small; parts are computed in this process."""

    def compute(engine, function, parts, *, label):
        return iter([function(*part) for part in parts])

    monkeypatch.setattr(Engine, "map", compute)
    (tmp_path / "pile").mkdir()
    small = cv2.resize(faces[4], (20, 20), interpolation=cv2.INTER_AREA)
    named = {"sharp": faces[2], "blurred": blur(faces[3], 8), "small": small, "other": faces[5]}
    for name, pixels in named.items():
        Image.fromarray(pixels).save(tmp_path / "pile" / f"{name}.png")
    write(tmp_path, {"unlabelled": {"root": "pile"}})
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(
            {"data": "data.yaml", "committee": {"base": {"name": "b", "backbone": "plain"}}}
        )
    )
    return tmp_path


def write(place: Path, settings: dict) -> None:
    manifest = {"name": "crops", "kind": "images", **settings}
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))


def ingest(place: Path, *options: str) -> tuple[pd.DataFrame, pd.Series]:
    """The qualities by name of the image, and the reasons of the rejected ones by path."""
    code = main(["--config", str(place / "run.yaml"), "--data-root", str(place), "--workers", "1",
                 "--runs-dir", str(place / "runs"), "--until", "ingest", *options])  # fmt: skip
    assert code == 0
    run = cdp.open_run(place / "runs" / "run")
    found = run.read("ingest", "qualities").merge(run.read("ingest", "samples"), on="sample_id")
    assert len(found) == len(run.read("ingest", "samples"))
    rejected = run.read("ingest", "rejected").set_index("path").reason
    return found.set_index(found.path.str.split("/").str[-1]), rejected


def test_faces_that_came_aligned_are_rated_and_poor_ones_set_aside(place: Path) -> None:
    found, rejected = ingest(place)
    assert len(rejected) == 0
    assert found.side_px["small.png"] == 20
    assert found.sharpness["blurred.png"] < 0.2 * found.sharpness["sharp.png"]
    assert found.quality["sharp.png"] > 2 * found.quality["small.png"]
    assert found[["score", "yaw"]].isna().all(axis=None)
    least = float(found.quality[["blurred.png", "small.png"]].max()) + 0.01
    found, rejected = ingest(place, f"ingest.min_quality={least}", "ingest.pose=true")
    assert sorted(found.index) == ["other.png", "sharp.png"]
    assert rejected["pile/small.png"].startswith("poor: a face of quality 0.")
    assert found[["score", "yaw"]].notna().all(axis=None)


def test_faces_of_photos_keep_the_quality_that_they_were_found_with(place: Path) -> None:
    Image.fromarray(draw_photo()).save(place / "pile" / "photo.png")
    write(place, {"unlabelled": {"root": "pile"}, "align": {"faces": "all", "turns": False}})
    found, _ = ingest(place)
    faces = cdp.open_run(place / "runs" / "run").read("detect", "faces").set_index("path")
    assert {"photo.png#0", "photo.png#1"} <= set(found.index)
    wanted = faces.loc[found.path, list(MEASURES)].to_numpy()
    np.testing.assert_array_equal(found[list(MEASURES)].to_numpy(), wanted)
