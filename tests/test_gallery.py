"""Gallery and `cdp identify`: enrolled people are found, others are nobody, files travel."""

import csv

import numpy as np
import pytest
from PIL import Image

import cdp
from cdp.errors import DataError
from cdp.models import build_backbone
from pipelines import identify

pytestmark = [pytest.mark.torch]


def draw_people(people: int, images: int, noise: float, seed: int = 0) -> np.ndarray:
    """(people, images, 32) float32 of unit length."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(people, 1, 32)) + noise * rng.normal(size=(people, images, 32))
    return (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)


@pytest.fixture
def people():
    return draw_people(8, 5, 0.4)


@pytest.fixture
def gallery(people):
    gallery = cdp.Gallery(threshold=0.6)
    for number in range(6):
        gallery.enrol(f"p{number}", people[number, :2])
    gallery.enrol("p3", people[3, 2:3])  # once more
    return gallery


def test_people_are_found_and_others_are_nobody(gallery, people):
    matches = gallery.identify(people[:, 3:].reshape(-1, 32))
    assert [match.name for match in matches] == [
        *(f"p{n}" for n in range(6) for _ in "ab"),
        *[None] * 4,
    ]
    assert len(gallery) == 6
    for row, match in zip(people[:, 3:].reshape(-1, 32), matches, strict=True):
        best = {n: max(float(v @ row) for v in people[n, : 3 if n == 3 else 2]) for n in range(6)}
        first, second = sorted(best.values(), reverse=True)[:2]
        assert match.similarity == pytest.approx(first, abs=1e-6)
        assert match.margin == pytest.approx(first - second, abs=1e-6)
        assert best[int(match.nearest[1:])] == max(best.values())


def test_a_person_who_is_removed_is_nobody(gallery, people):
    gallery.remove("p2")
    assert gallery.names == ["p0", "p1", "p3", "p4", "p5"]
    names = [match.name for match in gallery.identify(people[:6, 4])]
    assert names == ["p0", "p1", None, "p3", "p4", "p5"]
    with pytest.raises(DataError, match="not enrolled"):
        gallery.remove("p2")


def test_a_gallery_travels_as_a_file(gallery, people, tmp_path):
    gallery.save(tmp_path / "g.safetensors")
    again = cdp.Gallery.load(tmp_path / "g.safetensors")
    assert (again.names, again.threshold) == (gallery.names, 0.6)
    probes = people[:, 4]
    assert again.identify(probes) == gallery.identify(probes)
    with pytest.raises(DataError, match="no gallery at"):
        cdp.Gallery.load(tmp_path / "nothing")
    (tmp_path / "bad").write_bytes(b"bad")
    with pytest.raises(DataError, match="no saved gallery"):
        cdp.Gallery.load(tmp_path / "bad")


def test_a_saved_gallery_is_of_one_recognizer(tmp_path):
    faces = np.random.default_rng(0).integers(0, 255, (3, 24, 24, 3)).astype(np.uint8)
    ours, other = (
        cdp.Recognizer(build_backbone("plain", width=0.5, seed=seed), device="cpu")
        for seed in range(2)
    )
    gallery = cdp.Gallery(ours, threshold=0.1)
    gallery.enrol("ann", faces)
    gallery.save(tmp_path / "g")
    ours.save(tmp_path / "ours")
    again = cdp.Gallery.load(tmp_path / "g", cdp.Recognizer.load(tmp_path / "ours", device="cpu"))
    assert again.identify(faces)[0].name == "ann"
    with pytest.raises(DataError, match=r"enrolled by another recognizer.*enrol the people again"):
        cdp.Gallery.load(tmp_path / "g", other)
    cdp.Gallery.load(tmp_path / "g").save(tmp_path / "copy")  # of vectors alone
    with pytest.raises(DataError, match="another recognizer"):
        cdp.Gallery.load(tmp_path / "copy", other)


def test_mistakes_are_named(gallery, people):
    with pytest.raises(DataError, match="32 numbers are enrolled, got 2"):
        gallery.enrol("eve", np.eye(2, dtype=np.float32))
    with pytest.raises(DataError, match="unit length"):
        gallery.enrol("eve", people[0] * 2)
    with pytest.raises(DataError, match="one image or more"):
        gallery.enrol("eve", people[0, :0])
    with pytest.raises(DataError, match="faces need a recognizer"):
        gallery.identify(np.zeros((1, 24, 24, 3), np.uint8))
    with pytest.raises(DataError, match="probes of 32 numbers expected, got 5"):
        gallery.identify(np.eye(5, dtype=np.float32))
    with pytest.raises(DataError, match="nobody is enrolled"):
        cdp.Gallery().identify(people[0])
    with pytest.raises(DataError, match="a cosine"):
        cdp.Gallery(threshold=2)


@pytest.fixture
def folders(tmp_path):
    """Three people as blocks of colours, a model, and probes."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (3, 6, 6, 3)).astype(np.uint8)
    for person in range(3):
        face = np.kron(patterns[person], np.ones((8, 8, 1), np.uint8))
        for number in range(2):
            path = tmp_path / "staff" / f"p{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noisy = face.astype(int) + rng.integers(-5, 6, face.shape)
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)
        (tmp_path / "gate").mkdir(exist_ok=True)
        Image.fromarray(face).save(tmp_path / "gate" / f"=p{person}.png")
    (tmp_path / "gate" / "broken.jpg").write_bytes(b"nothing")
    cdp.Recognizer(build_backbone("plain", width=0.5), device="cpu").save(
        tmp_path / "m.safetensors"
    )
    return tmp_path


def test_a_folder_is_identified_and_the_gallery_kept(folders, capsys):
    given = ["--model", str(folders / "m.safetensors"), "--probes", str(folders / "gate"),
             "--device", "cpu"]  # fmt: skip
    more = ["--gallery", str(folders / "staff"), "--threshold", "0.1"]
    files = ["--out", str(folders / "out.csv"), "--save", str(folders / "g")]
    assert identify.main([*given, *more, *files]) == 0
    printed = capsys.readouterr().err
    assert "enrolled: 3 people" in printed
    assert "left out: broken.jpg" in printed
    assert "3 probes" in printed
    with (folders / "out.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["nearest"] for row in rows] == ["p0", "p1", "p2"]
    assert rows[0]["path"] == "'=p0.png"
    assert identify.main([*given, "--gallery", str(folders / "g")]) == 0
    printed = capsys.readouterr().out
    assert [line.split(",")[2] for line in printed.splitlines()[1:]] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--gallery", "nowhere"], "nowhere is not a directory"),
        (["--model", "nothing.safetensors"], "nothing.safetensors"),
        (["--threshold", "7"], "--threshold: a cosine expected"),
    ],
)
def test_mistakes_of_the_command_are_one_message(folders, capsys, change, expected):
    given = ["--model", str(folders / "m.safetensors"), "--gallery", str(folders / "staff"),
             "--probes", str(folders / "gate"), "--device", "cpu"]  # fmt: skip
    assert identify.main([*given, *change]) == 2
    assert expected in capsys.readouterr().err


def test_a_run_without_recognizer_is_named(folders, capsys):
    given = ["--gallery", str(folders / "staff"), "--probes", str(folders / "gate")]
    assert identify.main([*given, "--run", str(folders / "no_run")]) == 2
    assert "has trained no recognizer" in capsys.readouterr().err
    assert identify.main(["--gallery", str(folders / "staff")]) == 2
    assert "give --probes" in capsys.readouterr().err


def test_a_threshold_below_the_cosines_of_different_people_is_warned_of(folders, capsys):
    given = ["--model", str(folders / "m.safetensors"), "--gallery", str(folders / "staff"),
             "--probes", str(folders / "gate"), "--device", "cpu"]  # fmt: skip
    assert identify.main([*given, "--threshold", "-1"]) == 0
    printed = capsys.readouterr().err
    assert "warning: 6 of 6 enrolled images are nearer to another enrolled person than" in printed
    assert "3 probes: 3 nearer to an enrolled person than the threshold -1, 0 nobody's" in printed
    proposed = printed.partition("try --threshold ")[2].partition(",")[0]
    assert identify.main([*given, "--threshold", proposed]) == 0
    assert "warning" not in capsys.readouterr().err


def test_enrolled_people_show_how_near_unknown_people_come():
    people = draw_people(60, 4, 1.0)
    gallery = cdp.Gallery()
    for number, vectors in enumerate(people[:40]):
        gallery.enrol(f"p{number}", vectors)
    nearest = gallery.measure_nearest_others()
    assert nearest.shape == (160,)
    others = people[1:40].reshape(-1, 32) @ people[0, 2]
    assert nearest[2] == pytest.approx(others.max(), abs=1e-6)
    gallery.threshold = float(np.quantile(nearest, 0.8))
    named = [match.name for match in gallery.identify(people[40:].reshape(-1, 32))]
    assert np.mean([name is not None for name in named]) == pytest.approx(0.2, abs=0.12)
    alone = cdp.Gallery()
    alone.enrol("ann", people[0])
    assert alone.measure_nearest_others().shape == (0,)


def test_a_large_gallery_is_measured_on_some_images(monkeypatch):
    monkeypatch.setattr("cdp.recognizer.gallery.MEASURED", 7)
    people = draw_people(10, 5, 0.4)
    gallery = cdp.Gallery()
    for number, vectors in enumerate(people):
        gallery.enrol(f"p{number}", vectors)
    few = gallery.measure_nearest_others()
    monkeypatch.setattr("cdp.recognizer.gallery.MEASURED", 1000)
    assert np.allclose(few, gallery.measure_nearest_others()[[0, 8, 16, 24, 32, 40, 49]], atol=1e-6)


def test_names_found_before_are_kept_where_no_probe_can_be_read(folders, capsys):
    (folders / "nothing").mkdir()
    out = folders / "out.csv"
    out.write_text("found before")
    given = ["--model", str(folders / "m.safetensors"), "--gallery", str(folders / "staff"),
             "--device", "cpu", "--out", str(out)]  # fmt: skip
    assert identify.main([*given, "--probes", str(folders / "nothing")]) == 2
    assert "holds no image that can be read" in capsys.readouterr().err
    assert out.read_text() == "found before"
    assert [path.name for path in folders.glob(".*")] == []


def test_a_gallery_that_cannot_be_written_is_one_message(folders, capsys):
    given = ["--model", str(folders / "m.safetensors"), "--gallery", str(folders / "staff")]
    (folders / "taken").write_text("")
    assert identify.main([*given, "--device", "cpu", "--save", str(folders / "taken" / "g")]) == 2
    assert "error: " in capsys.readouterr().err
    assert identify.main([*given, "--device", "cpu", "--save", str(folders / "new" / "g")]) == 0
    assert len(cdp.Gallery.load(folders / "new" / "g")) == 3
