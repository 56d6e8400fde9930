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
