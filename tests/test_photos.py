"""Photos to crops: which faces are chosen, given places, reasons, and the command `cdp align`."""

import csv
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cdp.errors import DataError
from cdp.images.detection import Faces
from cdp.synthetic.identities import SyntheticFaces
from pipelines.align import main
from pipelines.data.lists import read_list
from pipelines.data.photos import (
    AlignSettings,
    PhotoTask,
    choose_faces,
    find_faces,
    find_unknown,
    read_given,
)
from pipelines.engine import Engine


def draw_photo() -> np.ndarray:
    """Two drawn faces on grey: a large one at the left, a small one in the middle."""
    drawn = SyntheticFaces(
        size_px=112, labelled_identities=3, unlabelled_identities=2, evaluation_identities=2,
        images_min=2, images_max=2, evaluation_images=2,
    ).draw(np.array([2, 4]))  # fmt: skip
    photo = np.full((200, 380, 3), 120, np.uint8)
    photo[30:142, 10:122] = drawn[0]
    photo[70:134, 160:224] = cv2.resize(drawn[1], (64, 64), interpolation=cv2.INTER_AREA)
    return photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("photos")
    (place / "day 1").mkdir()
    photo = draw_photo()
    Image.fromarray(photo).save(place / "day 1" / "two é.png")
    Image.fromarray(photo[:, :140]).save(place / "one.png")
    Image.fromarray(photo[:, :140]).save(place / "one.jpg", quality=95)
    Image.fromarray(np.zeros((90, 90, 3), np.uint8)).save(place / "black.png")
    (place / "broken.jpg").write_bytes(b"no photo")
    return place


def find(folder: Path, name: str, *, one: bool = False, given=(), **align):
    task = PhotoTask(AlignSettings(**align), 112)
    places = {name: list(given)} if given else {}
    return find_faces([(name, one)], lambda path: (folder / path).read_bytes(), task, places)


@pytest.mark.torch
def test_a_restorer_looks_at_tiny_faces_alone(folder: Path, tmp_path: Path) -> None:
    from cdp.restoration import build_restorer, save_restorer

    torch = pytest.importorskip("torch")
    restorer = build_restorer(4, 1)  # enlarges bilinearly
    with torch.no_grad():
        restorer.refining[-1].bias.fill_(-2.0)  # and now paints all black
    save_restorer(tmp_path / "black.safetensors", restorer)
    photo = Image.open(folder / "one.png")
    photo.resize((photo.width // 8, photo.height // 8), Image.Resampling.BOX).save(
        tmp_path / "t.png"
    )
    (tmp_path / "one.png").write_bytes((folder / "one.png").read_bytes())
    settings = AlignSettings(min_face_px=7, min_score=0.6, turns=False)
    found = {
        (name, where): len(
            find_faces(
                [(name, False)],
                lambda path: (tmp_path / path).read_bytes(),
                PhotoTask(settings, 112, where),
                {},
            ).crops
        )
        for name in ("one.png", "t.png")
        for where in (None, tmp_path / "black.safetensors")
    }
    assert list(found.values()) == [1, 1, 1, 0]


def test_which_faces_are_chosen(folder: Path) -> None:
    name = "day 1/two é.png"
    main_one = find(folder, name)
    largest, central = (find(folder, name, faces=faces) for faces in ("largest", "central"))
    every = find(folder, name, faces="all")
    side = np.array(every.rows["side_px"])
    assert len(side) == 2
    assert every.rows["chosen"] == [True, True]
    assert every.rows["path"] == [f"{name}#0", f"{name}#1"]
    assert every.rows["row"] == [0, 1]
    assert largest.rows["chosen"] == (side == side.max()).tolist()
    assert central.rows["chosen"] == (side == side.min()).tolist()
    assert main_one.rows["chosen"] == largest.rows["chosen"]  # the other one is far smaller
    assert largest.rows["path"] == [name if large else f"{name}#{face}"
                                    for face, large in enumerate(side == side.max())]  # fmt: skip
    assert sorted(largest.rows["row"]) == [-1, 0]
    np.testing.assert_array_equal(largest.crops[0], every.crops[side.argmax()])
    # A photo of one known person gives one face, whatever the settings say.
    known = find(folder, name, one=True, faces="all")
    assert known.rows["chosen"] == main_one.rows["chosen"]
    assert known.rows["path"] == largest.rows["path"]


def test_the_main_face_is_the_central_one_of_those_nearly_as_large() -> None:
    def choose(sides: list[float], lefts: list[float], score: list[float], faces: str) -> list[int]:
        left, side = np.array(lefts), np.array(sides)
        box = np.stack([left, 100 - side / 2, left + side, 100 + side / 2], 1).astype(np.float32)
        found = Faces(box, np.array(score, np.float32), np.zeros((len(box), 5, 2), np.float32))
        align = AlignSettings(faces=faces)
        return np.flatnonzero(choose_faces(found, (200, 400), align, one=True)).tolist()

    sure = [0.99] * 3
    # A larger one at the border, one in the middle, a small one in the very middle behind them.
    place = [60.0, 50.0, 20.0], [0.0, 150.0, 190.0]
    assert choose(*place, sure, "main") == [1]
    assert choose(*place, sure, "largest") == [0]
    assert choose(*place, sure, "central") == [2]
    assert choose(*place, [0.99, 0.8, 0.99], "main") == [0]  # who is not sure does not count
    assert choose([60.0, 44.0, 20.0], place[1], sure, "main") == [0]
    assert choose(*place, sure, "all") == [1]  # of a known person one face at most


def test_photos_without_a_usable_face_have_a_reason(folder: Path) -> None:
    assert find(folder, "black.png").rejected == [("black.png", "no face found")]
    assert find(folder, "broken.jpg").rejected[0][1].startswith("not an image")
    unsure = find(folder, "one.png", min_score=0.99999)
    assert unsure.rejected[0][1].startswith("no face is sure: the best has the score ")
    assert unsure.rows["chosen"] == [False]
    assert len(unsure.crops) == 0


def test_a_photo_of_more_than_a_hundred_megapixels_costs_only_itself(
    folder: Path, tmp_path: Path
) -> None:
    """Refused by what its header says: it is never decoded."""
    size = struct.pack(">IIBBBBB", 10_001, 10_000, 8, 2, 0, 0, 0)
    header = b"IHDR" + size
    (tmp_path / "huge.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(size)) + header
        + struct.pack(">I", zlib.crc32(header)) + (folder / "one.png").read_bytes()[33:]
    )  # fmt: skip
    places = {"huge.png": tmp_path, "one.png": folder}
    found = find_faces(
        [(name, False) for name in places],
        lambda path: (places[path] / path).read_bytes(),
        PhotoTask(AlignSettings(), 112),
        {},
    )
    assert [name for name, _ in found.rejected] == ["huge.png"]
    assert found.rejected[0][1].startswith("too large: 10001 x 10000 px")
    assert found.rows["photo"] == ["one.png"]


def test_given_places_are_used_instead_of_detecting(folder: Path, tmp_path: Path) -> None:
    found = find(folder, "one.png")
    points = np.array(found.rows["landmarks"][0])
    table = tmp_path / "given.csv"
    names = [f"{axis}{i}" for i in range(1, 6) for axis in "xy"]
    table.write_bytes(
        b"\xef\xbb\xbf"
        + "\r\n".join(["path," + ",".join(names), "one.png," + ",".join(map(str, points))]).encode()
    )
    given = read_given(table)["one.png"]
    again = find(folder, "one.png", given=given)
    assert np.abs(again.crops[0].astype(int) - found.crops[0]).max() <= 2
    assert again.rows["score"] == [1.0]
    box = [found.rows[side][0] for side in ("left", "top", "right", "bottom")]
    table.write_text("path,left,top,right,bottom\none.png," + ",".join(map(str, box)) + "\n")
    boxed = find(folder, "one.png", given=read_given(table)["one.png"])
    np.testing.assert_allclose(boxed.rows["landmarks"][0], points, atol=4)
    table.write_text("path,identity\none.png,ann\n")
    with pytest.raises(DataError, match="neither a box"):
        read_given(table)
    table.write_text("path,left,top,right,bottom\none.png,5,5,5,5\n")
    nothing = find(folder, "one.png", given=read_given(table)["one.png"])
    assert nothing.rejected[0][1].startswith("a box of 1 px or more")


def test_the_command_writes_a_folder_and_goes_on(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(engine, function, parts, *, label):
        return iter([function(*part) for part in parts])

    monkeypatch.setattr(Engine, "map", compute)
    out = tmp_path / "faces"
    arguments = ["--from", str(folder), "--to", str(out), "--faces", "all", "--workers", "1"]
    assert main(arguments) == 0
    assert "4 faces of 5 photos" in capsys.readouterr().out
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png"))
    assert files == ["day 1/two é#0.png", "day 1/two é#1.png", "one.jpg#0.png", "one.png#0.png"]
    with Image.open(out / files[0]) as face:
        assert face.size == (112, 112)
    faces = pq.read_table(out / "faces.parquet").to_pandas()
    assert faces.chosen.sum() == 4
    with (out / "rejected.csv").open(encoding="utf-8", newline="") as stream:
        rejected = list(csv.reader(stream))
    assert rejected[0] == ["photo", "reason"]
    assert [row[0] for row in rejected[1:]] == ["black.png", "broken.jpg"]
    assert not (out / ".align").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--from": "nowhere"}, "--from: a folder of photos expected, got nowhere"),
        ({"--to": "{folder}/inside"}, "--to: a folder outside --from expected"),
        ({"--size": "4"}, "--size: 16 to 512 px expected, got 4"),
        ({"--min-score": "2"}, "min_score"),
        ({"--given": "{folder}/one.png"}, "a list expected, one of .csv"),
    ],
)
def test_wrong_options_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change, message
) -> None:
    options = {"--from": str(folder), "--to": str(tmp_path / "x"), "--workers": "1"} | {
        name: value.format(folder=folder) for name, value in change.items()
    }
    assert main([word for pair in options.items() for word in pair]) == 2
    assert message in capsys.readouterr().err


LISTS = {
    "header.csv": '\ufeffFile_Name,Label\r\n"a, b.jpg",ann\r\n\r\n 😀 x.jpg ,bob\r\n',
    "plain.csv": "a, b.jpg;ann\n 😀 x.jpg ;bob\n",
    "plain.tsv": "a, b.jpg\tann\n 😀 x.jpg \tbob\n",
    "lines.jsonl": '{"image": "a, b.jpg", "person": "ann"}\n\n'
    '{"path": " 😀 x.jpg ", "label": "bob"}\n',
    "im2rec.lst": "0\tann\ta, b.jpg\n1\tbob\t 😀 x.jpg \n",
    "insightface.lst": "1\ta, b.jpg\tann\n1\t 😀 x.jpg \tbob\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_as_people_write_them(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LISTS[name].encode())
    rows = [(row.path.strip(), row.identity) for row in read_list(tmp_path / name)]
    assert rows == [("a, b.jpg", "ann"), ("😀 x.jpg", "bob")]


def test_numbers_as_labels_and_landmarks_of_insightface(tmp_path: Path) -> None:
    (tmp_path / "a.lst").write_text("5\t12.000000\tx/1.jpg\n")
    assert read_list(tmp_path / "a.lst")[0].identity == "12"
    numbers = "\t".join(map(str, [1, 2, 30, 40, *range(10, 15), *range(20, 25)]))
    (tmp_path / "b.lst").write_text(f"0\tx/1.jpg\t7\t{numbers}\n")
    (row,) = read_list(tmp_path / "b.lst")
    assert (row.identity, row.box) == ("7", (1, 2, 30, 40))
    assert row.landmarks.tolist() == [[10, 20], [11, 21], [12, 22], [13, 23], [14, 24]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,identity\nx.jpg\n", r"a\.csv, row 1: 2 fields expected, got 1"),
        ("a.csv", 'path,identity\nx.jpg,"ann\n', r"a\.csv, after row"),
        ("a.jsonl", "{\n", r"a\.jsonl, after row 0"),
        ("a.jsonl", "[1]\n", "an object a line expected"),
        ("a.jsonl", '{"person": "ann"}\n', "a path expected, columns are 'person'"),
        ("a.csv", "path,left,top,right,bottom\nx,1,2,3,nan\n", "finite numbers"),
        ("a.parquet", "PAR1", "no Parquet table"),
        ("a.docx", "x", r"a list expected, one of \.csv"),
        ("a.csv", b"path\n\xff\xfe\n", "cannot read"),
    ],
)
def test_broken_lists_are_named(tmp_path: Path, name: str, text, message: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message):
        read_list(tmp_path / name)


@pytest.mark.long
def test_crops_of_real_photos_are_those_that_embedders_expect(data_root: Path) -> None:
    from cdp.embedding import OnnxEmbedder
    from cdp.images.decode import decode_image

    photos = sorted((data_root / "photos/people").glob("*/*.jpg"))[::5]
    task = PhotoTask(AlignSettings(faces="central"), 112)
    names = [(str(path), True) for path in photos]
    found = find_faces(names, lambda path: Path(path).read_bytes(), task, {})
    assert found.rejected == []
    ready = [data_root / "lfw112" / path.parent.name / path.name for path in photos]
    embedder = OnnxEmbedder((data_root / "onnx/edgeface_xs.onnx").read_bytes())
    wanted = embedder.embed(np.stack([decode_image(path.read_bytes()) for path in ready]))[0]
    cosine = (embedder.embed(found.crops)[0] * wanted).sum(1)
    assert cosine.mean() > 0.97


def turn_by_exif(photo: np.ndarray) -> bytes:
    """The photo stored on its side, with the note that it must be shown upright."""
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(photo))).save(stream, "PNG", exif=exif)
    return stream.getvalue()


def save(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def list_forms() -> dict[str, bytes]:
    """One photo in the forms in which pictures come."""
    photo = Image.fromarray(draw_photo()[:, :140])
    grey = np.asarray(photo.convert("L"))
    opaque = np.full_like(grey, 255)
    opaque[:, 130:] = 0
    return {
        "exif": turn_by_exif(np.asarray(photo)),
        "cmyk": save(photo.convert("CMYK"), "JPEG", quality=95),
        "grey": save(photo.convert("L"), "PNG"),
        "sixteen bit": save(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        "palette": save(photo.quantize(256), "GIF"),
        "animated": save(photo, "GIF", save_all=True, append_images=[Image.new("RGB", photo.size)]),
        "transparent": save(Image.merge("RGBA", (*photo.split(), Image.fromarray(opaque))), "PNG"),
        "tiff": save(photo, "TIFF", compression="tiff_lzw"),
        "webp": save(photo, "WEBP", quality=95),
    }


@pytest.mark.parametrize("form", list_forms())
def test_every_form_of_a_picture_gives_the_same_upright_face(folder: Path, form: str) -> None:
    data = list_forms()[form]
    found = find_faces([("x", False)], lambda path: data, PhotoTask(AlignSettings(), 112), {})
    plain = find(folder, "one.png")
    assert found.rejected == []
    assert found.rows["angle"] == [0]
    np.testing.assert_allclose(found.rows["landmarks"][0], plain.rows["landmarks"][0], atol=4)
    crop, wanted = (each.crops[0].mean(2) for each in (found, plain))
    assert np.corrcoef(crop.ravel(), wanted.ravel())[0, 1] > 0.85


def test_places_in_shares_of_the_photo_are_noticed(tmp_path: Path) -> None:
    table = tmp_path / "given.csv"
    table.write_text("path,left,top,right,bottom\na.jpg,0.1,0.2,0.5,0.8\nb.jpg,0,0,1,1\n")
    with pytest.raises(DataError, match=r"in pixels expected; all numbers are between 0 and 1"):
        read_given(table)
    table.write_text("path,left,top,right,bottom\n.\\a\\b.jpg,1,2,50,80\n")
    assert list(read_given(table)) == ["a/b.jpg"]


def test_a_list_that_names_other_photos_is_noticed() -> None:
    place = Path("given.csv")
    assert find_unknown(["a.jpg", "b.jpg"], ["b.jpg", "c.jpg"], place) == ["a.jpg"]
    with pytest.raises(DataError, match=r"given\.csv: none of its 1 paths .* 'b\.jpg'.*'p/b\.jpg'"):
        find_unknown(["b.jpg"], ["p/b.jpg"], place)


ODD = {
    "group_6.jpg": (6, 0), "drawing.jpg": (1, 0), "turned_90_a.jpg": (1, 90), "view.jpg": (0, 0),
    "turned_90_b.jpg": (1, 90), "mask.jpg": (1, 0), "profile.jpeg": (1, 0), "blur.jpg": (1, 0),
}  # fmt: skip
"""Photo -> how many faces it gives, and by how many degrees it had to be turned."""
QUICK = 3
"""Of them in the default suite; the others take half a second to two seconds each."""


@pytest.mark.parametrize(
    ("name", "count", "angle"),
    [
        pytest.param(name, *wanted, marks=[pytest.mark.long] if place >= QUICK else [])
        for place, (name, wanted) in enumerate(ODD.items())
    ],
)
def test_odd_photos_give_the_faces_that_are_there(
    data_root: Path, name: str, count: int, angle: int
) -> None:
    found = find(data_root / "photos/groups", name, faces="all")
    assert sum(found.rows["chosen"]) == len(found.crops) == count
    if not count:
        assert found.rejected == [(name, "no face found")]
        return
    assert set(found.rows["angle"]) == {angle}
    assert max(found.rows["misfit_px"][:count]) < 20
    # An upright crop: the eyes are above the mouth, and the face fills the standard place.
    assert find_faces_in_crops(found.crops) == count


def find_faces_in_crops(crops: np.ndarray) -> int:
    """How many crops show a face whose landmarks lie where those of aligned faces do."""
    from cdp.images.alignment_check import NEAR_PX, measure_offsets

    return int((measure_offsets(iter(crops)) < NEAR_PX).sum())
