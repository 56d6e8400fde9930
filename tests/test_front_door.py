"""Data sets as they lie on people's disks: spellings, service folders, raw files, vectors."""

import json
import posixpath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import cdp
from cdp.errors import ConfigError, DataError, StageError
from pipelines.config import IngestSettings, read_config
from pipelines.data.dataset import Dataset
from pipelines.data.folders import clean_folder, join_path
from pipelines.data.names import fold_name
from pipelines.export.__main__ import main as export
from pipelines.stages.ingest import inspect_part

ANN = "Jos\u00e9 Mu\u00f1oz"
SPELT = [ANN, "Jose\u0301  Mun\u0303oz", " JOS\u00c9 MU\u00d1OZ", "jos\u00e9\u00a0mu\u00f1oz ",
         "\u200eJos\u00e9 Mu\u00f1oz\u200b", "\ufeffJos\u00e9 Mu\u00f1oz"]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    """A folder whose name has blanks and an emoji, with a function that puts pictures into it."""
    root = tmp_path / "our faces \U0001f600"
    root.mkdir()
    rng = np.random.default_rng(0)

    def put(*names, kind="JPEG"):
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8)).save(path, kind)

    def write(**manifest):
        path = root / "mine.yaml"
        path.write_text(yaml.safe_dump({"name": "mine", "kind": "images", **manifest}))
        return Dataset.open(path, root)

    put.root, put.write = root, write
    return put


@pytest.mark.parametrize("name", SPELT)
def test_spellings_that_look_alike_are_one_name(name):
    assert fold_name(name) == fold_name(ANN)
    assert fold_name(name) != fold_name("Jos\u00e9 Mu\u00f1oz 2")


def test_a_person_spelt_otherwise_in_another_split_is_named_with_both_files(place):
    place(f"staff/{SPELT[0]}/1.jpg", "cameras/1.jpg", f"gate/{SPELT[4]}/2.jpg")
    splits = {"labelled": {"root": "staff"}, "unlabelled": {"root": "cameras"}}
    with pytest.raises(DataError, match=r"however spelt.*gallery: <labelled folder>") as error:
        place.write(**splits, evaluation={"root": "gate"}).list_entries()
    assert f"(staff/{ANN}/1.jpg; gate/\\u200e{ANN}\\u200b/2.jpg)" in str(error.value)
    probes = {"gallery": "staff", "probes": "gate"}
    entries = place.write(**splits, evaluation=probes).list_entries()
    assert {entry.identity for entry in entries} == {ANN, None}


@pytest.mark.parametrize("spelt", ["staff", "staff/", "./staff", "staff//"])
def test_a_folder_is_one_however_its_path_is_spelt(place, spelt):
    place("staff/ann/1.jpg", "cameras/1.jpg", "gate/ann/2.jpg")
    dataset = place.write(
        labelled={"root": "staff"},
        unlabelled={"root": "cameras/"},
        evaluation={"gallery": spelt, "probes": "gate/"},
    )
    paths = [entry.path for entry in dataset.list_entries()]
    assert paths == ["staff/ann/1.jpg", "cameras/1.jpg", "gate/ann/2.jpg"]
    settings = dataset.manifest.evaluation
    assert settings is not None
    assert (settings.gallery, settings.root) == ("staff", "gate")


def test_splits_of_one_folder_say_what_to_do(place):
    place("staff/ann/1.jpg", "cameras/1.jpg")
    with pytest.raises(DataError, match=r"splits overlap\. Give each split a folder"):
        place.write(labelled={"root": "staff"}, unlabelled={"root": "."}).list_entries()


def test_the_data_root_itself_is_a_folder(place):
    place("ann/1.jpg", "ann/2.jpg", "bob/1.jpg")
    split = {"root": ".", "labelled": 0.5, "evaluation": 0.0}
    entries = place.write(people=split).list_entries()
    assert {e.path: e.identity for e in entries if not e.fault} == {
        "ann/1.jpg": "ann", "ann/2.jpg": "ann", "bob/1.jpg": "bob"
    }  # fmt: skip


NAMES = st.text("ab \u00e9.-", min_size=1, max_size=4).filter(lambda name: name.strip("."))
FOLDERS = st.lists(NAMES, max_size=3)


@given(
    parts=FOLDERS,
    before=st.sampled_from(["", "./", ".//", "././"]),
    between=st.sampled_from(["/", "//", "/./"]),
    after=st.sampled_from(["", "/", "/.", "//"]),
    path=st.lists(NAMES, min_size=1, max_size=3).map("/".join),
)
def test_a_file_has_one_path_however_its_folder_is_spelt(parts, before, between, after, path):
    spelt = before + between.join(parts or ["."]) + after
    assert clean_folder(spelt) == ("/".join(parts) or ".")
    assert join_path(spelt, path) == "/".join([*parts, path])
    assert clean_folder(clean_folder(spelt)) == clean_folder(spelt)


@given(st.lists(NAMES | st.sampled_from(["..", ".", ""])), FOLDERS)
def test_a_path_below_a_folder_leads_where_both_lead(parts, path):
    """Two dots stay as written: before them may be a link."""
    folder = "/".join(parts)
    start = "/" if folder.startswith("/") else ""
    joined = join_path(folder, "/".join([*path, "1.jpg"]))
    there = posixpath.normpath(posixpath.join(folder, *path, "1.jpg"))
    assert posixpath.normpath(joined) == start + there.lstrip("/")
    assert joined.split("/").count("..") == parts.count("..")
    assert not {".", ""} & set(joined.removeprefix("/").split("/"))
    assert joined.startswith("/") == folder.startswith("/")


@pytest.mark.parametrize("spelt", [".", "./", "././/"])
def test_below_the_data_root_no_path_begins_with_a_dot(place, spelt):
    place("ann/1.jpg", "ann/2.jpg", "bob/1.jpg", "3.jpg")
    (place.root / "list.csv").write_text("path\nann/1.jpg\n./bob/1.jpg\n3.jpg\n")
    expected = ["3.jpg", "ann/1.jpg", "ann/2.jpg", "bob/1.jpg"]
    for folder, paths in (
        ({"layout": "pile"}, expected),
        ({"layout": "frames", "every": 1}, expected),
        ({"list": "list.csv"}, ["3.jpg", "ann/1.jpg", "bob/1.jpg"]),
    ):
        entries = place.write(unlabelled={"root": spelt, **folder}).list_entries()
        assert [each.path for each in entries if not each.fault] == paths
        clips = [each.clip for each in entries if not each.fault]
        assert clips == ([".", "ann", "ann", "bob"] if "every" in folder else [None] * len(paths))


SERVICE = (
    "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", "#recycle/x.jpg", "#snapshot/x.jpg", ".thumbnails/1.jpg",
    "__MACOSX/._a.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "lost+found/1.jpg",
    "$RECYCLE.BIN/S-1-5/x.jpg", ".Trash-1000/files/x.jpg", ".@__thumb/a.jpg", "@Recycle/x.jpg",
    "RECYCLED/x.jpg", "System Volume Information/x.jpg", "found.000/x.jpg", "Temporary Items/x.jpg",
    "desktop.ini",
)  # fmt: skip


@pytest.mark.parametrize("below", ["", "ann/", "ann/2024/may/"])
def test_what_servers_and_desktops_keep_is_left_out(place, below):
    place("staff/ann/1.jpg", "cameras/1.jpg", *(f"staff/{below}{name}" for name in SERVICE))
    dataset = place.write(labelled={"root": "staff"}, unlabelled={"root": "cameras"})
    entries = [entry for entry in dataset.list_entries() if entry.split == "labelled"]
    assert [entry.path for entry in entries if not entry.fault] == ["staff/ann/1.jpg"]
    faults = [entry.fault for entry in entries if entry.fault]
    assert len(faults) == len(SERVICE)
    assert all(fault.startswith("left out: ") for fault in faults)


def test_files_are_decoded_by_content_and_raw_files_are_named(place):
    kinds = {"a.JPG": "JPEG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.avif": "AVIF", "e": "PNG",
             "f.pgm": "PPM", "g.dat": "WEBP", "h.png": "JPEG", "i.jp2": "JPEG2000"}  # fmt: skip
    for name, kind in kinds.items():
        place(f"cameras/{name}", kind=kind)
    place("cameras/x.NEF", "cameras/y.dng", kind="TIFF")  # they begin like TIFF
    dataset = place.write(unlabelled={"root": "cameras"})
    fault = {e.path.removeprefix("cameras/"): e.fault for e in dataset.list_entries()}
    assert {name for name in fault if not fault[name]} == set(kinds)
    assert fault["x.NEF"] == fault["y.dng"]
    assert fault["x.NEF"] == "a camera's raw file is not read; export it as JPEG or PNG"
    faces = dataset.read_faces([f"cameras/{name}" for name in kinds])
    assert faces.shape == (len(kinds), 112, 112, 3)


@pytest.mark.parametrize(
    ("size", "colour"),
    [((24, 24), "black"), ((112, 112), "black"), ((1920, 1080), "black"), ((1920, 1080), "blue")],
)
def test_black_pictures_and_large_ones_of_one_colour_are_rejected(place, size, colour):
    place("cameras/1.jpg")
    Image.new("RGB", size, colour).save(place.root / "cameras" / "2.png")
    dataset = place.write(unlabelled={"root": "cameras"})
    entries = [(entry.path, entry.fault) for entry in dataset.list_entries()]
    reasons = [image[3] for image in inspect_part(dataset, entries, IngestSettings())]
    assert reasons == ["", "blank: the picture is of one colour"]


# -------------------------------------------------------------------------------- ready features


@pytest.fixture
def vectors(tmp_path):
    """Vectors of ten images, and the function that opens them as written to a file."""
    value = np.random.default_rng(0).normal(size=(10, 64)) / 8
    folder = tmp_path / "pile" / "features"
    folder.mkdir(parents=True)
    (tmp_path / "pile" / "list.txt").write_bytes(b"".join(b"%d.jpg\r\n" % i for i in range(10)))

    def open_as(kind, *, dims=None, name="a.bin"):
        if name.endswith(".npy"):
            np.save(folder / name, value.astype(kind))
        else:
            value.astype(kind).tofile(folder / name)
        manifest = {"name": "m", "kind": "features", "unlabelled": {"root": "pile"}}
        path = tmp_path / "m.yaml"
        path.write_text(yaml.safe_dump({**manifest, "dims": dims or {}}))
        dataset = Dataset.open(path, tmp_path)
        assert dataset.list_entries()[0].path == "0.jpg"
        return dataset.read_features("unlabelled", "a")

    return value, open_as


@pytest.mark.parametrize("dims", [None, {"a": 64}])
def test_numbers_of_the_other_byte_order_are_named(vectors, dims):
    value, open_as = vectors
    with pytest.raises(DataError, match=r"float32 of the other byte order.*tofile"):
        open_as(">f4", dims=dims)
    np.testing.assert_array_equal(open_as("<f4", dims=dims), value.astype(np.float32))


@pytest.mark.parametrize("kind", [">f4", ">f8", ">f2"])
def test_a_file_that_names_its_byte_order_is_read(vectors, kind):
    value, open_as = vectors
    read = open_as(kind, name="a.npy")
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, value.astype(kind))


@pytest.mark.parametrize(("kind", "dim"), [("float64", 128), ("float32", 128), ("float32", 32)])
def test_a_wrong_dimension_that_fits_the_size_is_noticed(vectors, kind, dim):
    with pytest.raises(DataError, match=f"they look like {kind}, 64 a row. Say so: .dims: .a: 64"):
        vectors[1](kind, dims={"a": dim})


def test_names_of_ready_features_are_people_too(tmp_path):
    for split in ("staff", "pile"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "list.txt").write_text("".join(f"{i}.jpg\n" for i in range(6)))
    (tmp_path / "staff" / "meta.txt").write_text("".join(f"{name}\n" for name in SPELT))
    splits = {"labelled": {"root": "staff"}, "unlabelled": {"root": "pile"}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"name": "m", "kind": "features", **splits}))
    entries = Dataset.open(tmp_path / "m.yaml", tmp_path).list_entries()
    assert {entry.identity for entry in entries} == {f"labelled/{ANN}", None}


# ------------------------------------------------------------------------------------- old runs


def write_old_run(place):
    """A run whose table of labels has other columns, as another version wrote it."""
    stage = place / "propagate"
    stage.mkdir(parents=True)
    pq.write_table(pa.table({"sample_id": [0], "path": ["a.jpg"], "cluster": [3]}),
                   stage / "labels.parquet")  # fmt: skip
    manifest = {"fingerprint": "0" * 64, "files": {}, "facts": {}, "schemas": {}}
    (stage / "manifest.json").write_text(json.dumps(manifest))
    options = ["--config", "mine.yaml", "knn.k=7"]
    (place / "run.json").write_text(json.dumps({"options": options}))
    return place


def test_a_run_of_another_version_says_so(tmp_path, capsys):
    run = write_old_run(tmp_path / "runs" / "old")
    said = "has no column pseudo_label: another version of CDP made it. Make it again with: "
    with pytest.raises(StageError, match=said) as error:
        len(cdp.open_run(run).labels)
    assert str(error.value).endswith("run --config mine.yaml knn.k=7 --until propagate")
    arguments = ["labels", "--run", str(run), "--to", "csv", "--out", str(tmp_path / "x.csv")]
    assert export(arguments) == 1
    assert said in capsys.readouterr().err


# -------------------------------------------------------------------------------------- settings

BASE = "data: synthetic\ncommittee: {base: {name: b, backbone: plain}}\n"


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        (BASE + "propagate:\n\tmax_size: 3\n", [], "line 4: .*a tab; YAML is indented by spaces"),
        ("data:synthetic\n" + BASE, [], "line 2: .*space behind each colon"),
        ('data: "C:\\mine.yaml"\n', [], "line 1: .*write single quotes"),
        (BASE.encode("utf-16"), [], "Save it as UTF-8"),
        (BASE + "propagate: {max_sise: 3}\n", [], r"propagate\.max_sise: .*did you mean max_size"),
        (BASE + "propogate: {max_size: 3}\n", [], "propogate: .*did you mean propagate"),
        (BASE + "max_size: 3\n", [], r"max_size: .*there is propagate\.max_size"),
        (BASE, ["knn.kk=3"], r"mine\.yaml with knn\.kk=3: knn\.kk: no such setting"),
        (BASE, ["name=My Run"], "a-z, 0-9 and _ expected, got 'My Run'"),
    ],
)  # fmt: skip
def test_mistakes_in_settings_say_what_was_meant(tmp_path, text, overrides, expected):
    path = tmp_path / "mine.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=expected):
        read_config(path, overrides)


@pytest.mark.parametrize("change", [lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t])
def test_settings_from_another_system_are_read(tmp_path, change):
    path = tmp_path / "mine.yaml"
    path.write_bytes(change(BASE + "propagate: {max_size: 3}\n").encode())
    assert read_config(path, []).propagate.max_size == 3
