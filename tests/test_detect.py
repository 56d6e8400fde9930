"""The stage detect: from photos to samples, with faults, resumption and a choice of faces."""

from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from known_clusters import build_projection
from PIL import Image
from test_photos import draw_photo

import cdp
from cdp.errors import BackendError, StageError
from pipelines.check import check_inputs
from pipelines.config import read_config
from pipelines.data.crops import list_faces
from pipelines.data.dataset import Dataset
from pipelines.data.manifest import Entry
from pipelines.engine import Engine
from pipelines.files import FileDigests
from pipelines.run import main

pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are computed in this process; the engine has tests of its own."""

    def compute(engine, function, parts, *, label):
        return iter([function(*part) for part in parts])

    monkeypatch.setattr(Engine, "map", compute)


MANIFEST = {
    "name": "photos", "kind": "images", "size_px": 64,
    "labelled": {"root": "staff"}, "unlabelled": {"root": "cameras", "layout": "pile"},
    "align": {"faces": "all"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with photos, a manifest and a config."""
    place = tmp_path_factory.mktemp("detect")
    photo = draw_photo()
    for name, pixels in {
        "staff/ann/1.png": photo,
        "staff/bob/1.png": photo[:, 140:],
        "cameras/both.png": photo[:, ::-1],
        "cameras/again.png": photo[:, ::-1],
        "cameras/turned.png": np.rot90(photo[:, 139::-1]),
        "cameras/black.png": np.zeros((50, 50, 3), np.uint8),
        "cameras/large.png": np.zeros((1200, 1000, 3), np.uint8),
    }.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
    (place / "cameras" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 broken")
    write(place, MANIFEST)
    config = {
        "data": "data.yaml",
        "committee": {"base": {"name": "base", "backbone": "plain", "width": 0.5}},
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    return place


def write(place: Path, manifest: dict) -> None:
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))


def run(place: Path, *options: str) -> int:
    return main(
        ["--config", str(place / "tiny.yaml"), "--data-root", str(place), "--workers", "1",
         "--runs-dir", str(place / "runs"), *options]
    )  # fmt: skip


def test_photos_become_samples(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    align = {"faces": "all", "max_pixels": 1_000_000}
    write(place, {**MANIFEST, "align": align})
    assert run(place, "--until", "ingest") == 0
    results = cdp.open_run(place / "runs" / "tiny")
    samples = results.read("ingest", "samples")
    # Of a known person's photo the largest face; of the others all; one is a copy of another.
    assert samples.path.tolist() == [
        "staff/ann/1.png", "staff/bob/1.png",
        "cameras/again.png#0", "cameras/again.png#1", "cameras/both.png#0", "cameras/both.png#1",
        "cameras/turned.png#0",
    ]  # fmt: skip
    assert samples.identity.tolist()[:2] == ["ann", "bob"]
    assert samples.split.tolist() == ["labelled"] * 2 + ["unlabelled"] * 5
    rejected = results.read("ingest", "rejected").set_index("path").reason
    assert rejected["cameras/black.png"] == "no face found"
    copies = samples.set_index("path").copy_of.dropna()
    assert copies.to_dict() == {"cameras/both.png#0": 2, "cameras/both.png#1": 3}
    assert rejected["cameras/broken.jpg"].startswith("corrupt image")
    assert rejected["cameras/large.png"].startswith("too large: 1000 x 1200 px")
    faces = results.read("detect", "faces").set_index("path")
    assert set(faces.angle[["cameras/turned.png#0"]]) <= {90, 270}
    assert (samples.width == faces.side_px[samples.path].round().to_numpy()).all()
    dataset = results.open_dataset()
    page = (results.directory / "detect" / "faces.html").read_text(encoding="utf-8")
    assert page.count("<img ") >= 5
    assert "<script" not in page
    assert "too large: 1000 x 1200 px" not in page.partition('id="none"')[0]
    crops = dataset.read_faces(samples.path.tolist())
    assert crops.shape == (7, 64, 64, 3)
    # The same mirrored face, upright and turned.
    pairs = [np.abs(crops[6].astype(int) - crops[row]).mean() for row in (2, 3)]
    assert min(pairs) < 3
    poor = float(faces.quality[samples.path].min()) + 0.001
    assert run(place, "--until", "ingest", f"ingest.min_quality={poor}") == 0
    reasons = cdp.open_run(place / "runs" / "tiny").read("ingest", "rejected").reason
    assert reasons.str.startswith("poor: a face of quality ").sum() >= 1
    assert run(place, "--until", "ingest", "ingest.min_px=100") == 0
    small = cdp.open_run(place / "runs" / "tiny").read("ingest", "rejected").reason
    assert small.str.startswith("too small: a face of ").any()
    # What ingest rejects does not detect again.
    assert capsys.readouterr().out.count("detect    skip") == 2


def test_faces_given_in_a_list_are_used(place: Path) -> None:
    lines = ["path,left,top,right,bottom", "cameras/black.png,10,10,40,40"]
    (place / "given.csv").write_text("\n".join(lines))
    write(place, {**MANIFEST, "align": {"given": "given.csv"}})
    assert run(place, "--until", "ingest", "name=given") == 0
    samples = cdp.open_run(place / "runs" / "given").read("ingest", "samples")
    assert "cameras/black.png" in samples.path.tolist()
    (place / "given.csv").write_text("\n".join(lines[:1]))
    assert run(place, "--until", "ingest", "name=given") == 0  # the list counts in the fingerprint
    samples = cdp.open_run(place / "runs" / "given").read("ingest", "samples")
    assert "cameras/black.png" not in samples.path.tolist()


def test_damage_is_mended_and_finished_parts_are_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.stages import detect

    write(place, MANIFEST)
    monkeypatch.setattr(detect, "PART_SIZE", 4)
    assert run(place, "--until", "detect", "name=whole") == 0
    whole = place / "runs" / "whole" / "detect"
    before = pd.read_parquet(whole / "faces.parquet")
    crop = sorted((whole / "crops").glob("*.npy"))[-1]
    crop.write_bytes(crop.read_bytes()[:-1])
    # What an earlier attempt finished is taken as it is: here, one part with a row less.
    work = whole.resolve().with_name(whole.resolve().name.rpartition("-")[0] + ".partial")
    for folder in ("faces.parquet", "rejected.parquet"):
        (work / folder).mkdir(parents=True)
        part = f"{folder}/part-00000.parquet"
        pq.write_table(pq.read_table(whole / part)[:1], work / part)
    assert run(place, "--until", "detect", "name=whole") == 0
    after = pd.read_parquet(whole / "faces.parquet")
    second = before[before.part == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(after[after.part == 1].reset_index(drop=True), second)
    assert (after.part == 0).sum() == 1
    dataset = cdp.open_run(place / "runs" / "whole").open_dataset()
    kept = second[second.chosen].path.tolist()
    digests = [sha256(face.tobytes()).hexdigest() for face in dataset.read_faces(kept)]
    assert digests == second[second.chosen].sha256.tolist()


def test_without_align_there_is_no_stage(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place, {name: value for name, value in MANIFEST.items() if name != "align"})
    assert run(place, "--until", "ingest", "name=plain") == 0
    assert "detect  " not in capsys.readouterr().out
    assert run(place, "--stage", "detect", "name=plain") == 0
    assert "the data manifest does not say `align`" in capsys.readouterr().out


def test_images_that_are_not_aligned_are_warned_of(
    place: Path, capsys: pytest.CaptureFixture[str], data_root: Path
) -> None:
    photos = sorted((data_root / "photos/people").glob("*/*.jpg"))[:12]
    for photo in photos:
        for folder, source in (("raw", photo), ("ready", data_root / "lfw112" / photo.parent.name)):
            target = place / folder / photo.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((source / photo.name if folder == "ready" else source).read_bytes())
    manifest = {"name": "faces", "kind": "images", "unlabelled": {"root": "raw", "layout": "pile"}}
    write(place, manifest)
    assert run(place, "--until", "ingest", "name=raw") == 0
    out = capsys.readouterr().out
    assert "warning: unlabelled images seem not to be aligned faces: of 12 sampled, 0 are" in out
    assert "align: {}" in out
    write(place, {**manifest, "unlabelled": {"root": "ready", "layout": "pile"}})
    assert run(place, "--until", "ingest", "name=ready") == 0
    assert "warning" not in capsys.readouterr().out
    facts = cdp.open_run(place / "runs" / "ready").manifest("ingest")["facts"]
    assert facts["aligned"] == {"unlabelled": 1.0}


def test_images_without_a_face_are_in_the_verdict(
    place: Path, capsys: pytest.CaptureFixture[str], data_root: Path
) -> None:
    (place / "mixed").mkdir()
    faces = sorted((data_root / "lfw112").glob("A*/*_0001.jpg"))[:16]
    for face in faces:
        (place / "mixed" / face.name).write_bytes(face.read_bytes())
    for number in range(4):
        noise = np.random.default_rng(number).integers(0, 256, (112, 112, 3)).astype(np.uint8)
        Image.fromarray(noise).save(place / "mixed" / f"noise{number}.png")
    write(place, {"name": "mixed", "kind": "images", "unlabelled": {"root": "mixed"}})
    for _ in range(2):  # also where nothing is left to do
        assert run(place, "--until", "ingest", "name=mixed") == 0
        out = capsys.readouterr().out
        assert "Distrust  of 20 unlabelled images sampled, 4 show no face" in out
        assert "ingest.pose=true ingest.min_quality=0.1" in out
    settings = ("ingest.pose=true", "ingest.min_quality=0.1")
    assert run(place, "--until", "ingest", "name=mixed", *settings) == 0
    assert "show no face" not in capsys.readouterr().out
    found = cdp.open_run(place / "runs" / "mixed")
    assert [Path(path).name for path in found.samples.path] == [face.name for face in faces]


def test_without_the_detector_the_log_says_that_nothing_was_checked(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cdp.images import alignment_check

    def fail(images):
        raise BackendError("the detector is not installed")

    for number in range(10):
        (place / "many").mkdir(exist_ok=True)
        Image.fromarray(draw_photo()[:, : 120 + number]).save(place / "many" / f"{number}.png")
    monkeypatch.setattr(alignment_check, "measure_offsets", fail)
    manifest = {"name": "many", "kind": "images", "unlabelled": {"root": "many"}}
    write(place, manifest)
    assert run(place, "--until", "ingest", "name=many") == 0
    assert "was not checked, which needs the detector: pip install" in capsys.readouterr().out


def test_ready_models_and_photos_of_known_people_pass_the_check(
    place: Path, data_root: Path
) -> None:
    """The faces by which models are tried are not known before the stage detect."""
    people = [path.name for path in sorted((data_root / "photos/people").iterdir())]
    several = [
        name for name in people if len([*(data_root / "photos/people" / name).iterdir()]) > 1
    ]
    for name in several[:5]:
        for photo in sorted((data_root / "photos/people" / name).iterdir())[:2]:
            target = place / "known" / name / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(photo.read_bytes())
    manifest = {**MANIFEST, "labelled": {"root": "known"}, "align": {}}
    write(place, manifest)
    member = {"name": "m", "onnx": "m.onnx"}
    (place / "m.onnx").write_bytes(build_projection(64, 0))
    (place / "ready.yaml").write_text(
        yaml.safe_dump({"data": "data.yaml", "committee": {"base": member}})
    )
    config = read_config(place / "ready.yaml", [])
    found = check_inputs(config, Dataset.open(place / "data.yaml", place), counts=False)
    assert [each.text for each in found if each.level == "error"] == []
    assert any(each.text.startswith("member m: faces of ") for each in found)


def test_wrong_settings_are_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place, {**MANIFEST, "align": {"faces": "every"}})
    assert run(place, "--dry-run") == 2
    assert "align.faces" in capsys.readouterr().err
    write(place, {**MANIFEST, "align": {"given": "nowhere.csv"}})
    assert run(place, "--dry-run") == 2
    assert "names the file 'nowhere.csv' in align.given" in capsys.readouterr().err
    write(place, {**MANIFEST, "align": {"restore": "nowhere.safetensors"}})
    assert run(place, "--dry-run") == 2
    assert "file 'nowhere.safetensors' in align.restore" in capsys.readouterr().err
    write(place, {"name": "x", "kind": "synthetic", "align": {}})
    assert run(place, "--dry-run") == 2
    assert "align goes with kind images, not with kind synthetic" in capsys.readouterr().err


def test_another_restorer_makes_other_faces(place: Path) -> None:
    write(place, {**MANIFEST, "align": {"restore": "r.safetensors"}})
    digests = []
    for content in (b"one", b"other"):
        (place / "r.safetensors").write_bytes(content)
        digests.append(
            Dataset.open(place / "data.yaml", place).digest(FileDigests(place / "known.json"))
        )
    assert digests[0] != digests[1]


def test_a_photo_named_like_a_face_is_refused() -> None:
    faces = pd.DataFrame(
        {"path": ["a.jpg#0", "a.jpg#0"], "photo": ["a.jpg", "a.jpg#0"], "chosen": True,
         "side_px": 50.0, "quality": 0.5, "sha256": ["x", "y"]}
    )  # fmt: skip
    entries = [Entry(path, "unlabelled", None) for path in ("a.jpg", "a.jpg#0")]
    with pytest.raises(cdp.DataError, match="names a photo and a face of another"):
        list_faces(entries, faces, pd.DataFrame({"photo": [], "reason": []}), 8)


def test_a_full_disk_and_a_photo_that_goes_away_cost_only_what_they_must(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.stages import detect

    def fill_disk(directory, part, crops):
        if part == 1:
            raise StageError(f"cannot write {directory}/crops/part-00001.npy: No space left")
        write_crops(directory, part, crops)

    def count(photos, *rest):
        looked.append([path for path, _ in photos])
        return find_faces(photos, *rest)

    looked: list[list[str]] = []
    write_crops, find_faces = detect.write_crops, detect.find_faces
    write(place, {**MANIFEST, "size_px": 66})  # as no other test has it
    monkeypatch.setattr(detect, "PART_SIZE", 4)
    monkeypatch.setattr(detect, "find_faces", count)
    monkeypatch.setattr(detect, "write_crops", fill_disk)
    assert run(place, "--until", "detect", "name=full", "--force") == 1
    assert "part-00001.npy: No space left" in capsys.readouterr().err
    assert not (place / "runs" / "full" / "detect").exists()
    monkeypatch.setattr(detect, "write_crops", write_crops)
    first, second = looked
    gone = place / second[0]
    kept = gone.read_bytes()

    def compute(engine, function, parts, *, label):
        if label == "detect":
            gone.unlink()
        return iter([function(*part) for part in parts])

    monkeypatch.setattr(Engine, "map", compute)
    looked.clear()
    try:
        assert run(place, "--until", "ingest", "name=full") == 0
    finally:
        gone.write_bytes(kept)
    assert looked == [second]  # the finished part was kept
    results = cdp.open_run(place / "runs" / "full")
    reason = results.read("detect", "rejected").set_index("photo").reason
    assert reason[second[0]] == "cannot be read: No such file or directory"
    faces = results.read("detect", "faces")
    assert set(first) & set(faces.photo)
    assert set(second[1:]) & set(faces.photo)
    assert len(results.samples) == faces.chosen.sum()
