"""Data sets as a user lays them out, and the ways they can be wrong."""

import numpy as np
import pytest
import yaml

from cdp.errors import ConfigError, DataError
from pipelines.data.dataset import Dataset
from pipelines.data.pairs import parse_pairs
from pipelines.files import FileDigests


@pytest.fixture
def write(tmp_path):
    """Make files below a data root and a manifest; return the opened data set."""
    root = tmp_path / "data"
    root.mkdir()

    def make(manifest, files=()):
        for name in files:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name.encode())
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({"name": "mine", "kind": "images", **manifest}))
        return Dataset.open(path, root)

    make.root = root
    return make


def people(count, images):
    return [f"all/person{p:03d}/{i}.jpg" for p in range(count) for i in range(images)]


BY_PERSON = {"people": {"root": "all", "labelled": 0.2, "evaluation": 0.3}}


def test_people_are_split_by_person_and_the_split_is_seeded(write):
    files = people(20, 3) + [f"all/single{p}/0.jpg" for p in range(7)]
    entries = write(BY_PERSON, files).list_entries()
    split_of = {}
    for entry in entries:
        assert split_of.setdefault(entry.identity, entry.split) == entry.split
    counts = {split: list(split_of.values()).count(split) for split in set(split_of.values())}
    assert counts == {"labelled": 4, "evaluation": 6, "unlabelled": 17}
    assert all(split_of[f"single{p}"] == "unlabelled" for p in range(7))
    assert write(BY_PERSON).list_entries() == entries
    other = {"people": {**BY_PERSON["people"], "seed": 1}}
    assert write(other).list_entries() != entries


def test_folders_may_be_splits_of_their_own(write):
    manifest = {
        "labelled": {"root": "staff"},
        "unlabelled": {"root": "camera", "layout": "pile"},
        "evaluation": {"root": "gate"},
    }
    files = ["staff/ann/1.jpg", "staff/bob/1.png", "camera/day 1/é.jpg", "camera/x.jpeg",
             "gate/eve/1.jpg", "staff/ann/notes.txt"]  # fmt: skip
    entries = write(manifest, files).list_entries()
    assert [(e.path, e.split, e.identity) for e in entries] == [
        ("staff/ann/1.jpg", "labelled", "ann"),
        ("staff/ann/notes.txt", "labelled", "ann"),
        ("staff/bob/1.png", "labelled", "bob"),
        ("camera/day 1/é.jpg", "unlabelled", None),
        ("camera/x.jpeg", "unlabelled", None),
        ("gate/eve/1.jpg", "evaluation", "eve"),
    ]
    assert [e.fault for e in entries if e.fault] == ["left out: not an image, by its first bytes"]


def test_the_first_folder_is_the_person_and_service_folders_are_left_out(write):
    manifest = {"labelled": {"root": "staff"}, "unlabelled": {"root": "camera"}}
    files = [f"staff/p{p}/{session}/{i}.jpg" for p in range(4) for session in ("2023", "2024/may")
             for i in (1, 2)]  # fmt: skip
    files += ["staff/p0/@eaDir/1.jpg/SYNO.jpg", "staff/.Trash-1000/1.jpg", "staff/p1/._1.jpg"]
    files += ["staff/stray.jpg", "camera/day 1/1.jpg", "camera/#recycle/2.jpg"]
    entries = write(manifest, files).list_entries()
    used = [entry for entry in entries if not entry.fault]
    assert {e.identity for e in used if e.split == "labelled"} == {"p0", "p1", "p2", "p3"}
    assert len(used) == 17
    # Folders of a camera are no people: nothing is known of the pile.
    assert [e.identity for e in used if e.split == "unlabelled"] == [None]
    faults = {entry.path: entry.fault for entry in entries if entry.fault}
    assert sorted(faults) == ["camera/#recycle", "staff/.Trash-1000", "staff/p0/@eaDir",
                              "staff/p1/._1.jpg", "staff/stray.jpg"]  # fmt: skip
    assert "<person>/<image> expected" in faults["staff/stray.jpg"]
    assert all(
        fault.startswith("left out: ") for path, fault in faults.items() if "stray" not in path
    )


def test_what_a_server_adds_makes_no_other_data_set(write, tmp_path):
    dataset = write(BY_PERSON, people(5, 2))
    before = dataset.digest(FileDigests(tmp_path / "a.json"))
    for name in ("all/person000/@eaDir/0.jpg", "all/.DS_Store", "all/notes.txt"):
        (write.root / name).parent.mkdir(exist_ok=True)
        (write.root / name).write_bytes(b"x")
    assert dataset.digest(FileDigests(tmp_path / "b.json")) == before


def test_files_are_known_by_their_content(write, monkeypatch):
    monkeypatch.setattr("cdp.images.plugins.list_plugin_formats", lambda: ())
    manifest = {"unlabelled": {"root": "camera"}}
    dataset = write(manifest, ["camera/a.jpg"])
    heads = {
        "b": b"\xff\xd8\xff\xe0",
        "c.photo": b"\0\0\0\x1cftypavif\0\0\0\0",
        "d.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        "e.mp4": b"\0\0\0\x18ftypisom",
    }
    for name, head in heads.items():
        (write.root / "camera" / name).write_bytes(head + bytes(100))
    faults = {e.path.removeprefix("camera/"): e.fault for e in dataset.list_entries()}
    assert faults["a.jpg"] == faults["b"] == faults["c.photo"] == ""
    assert faults["d.heic"].startswith("HEIC is not read without a plugin: pip install 'cdp[")
    assert "cannot be read from frame 0" in faults["e.mp4/end (0)"]


def test_spellings_of_a_name_are_one_person(write):
    manifest = {"labelled": {"root": "a"}, "unlabelled": {"root": "b", "layout": "people"}}
    files = [
        "a/Jos\u00e9/1.jpg",
        "a/Jose\u0301 /2.jpg",
        "a/JOS\u00c9/3.jpg",
        "a/eve/1.jpg",
        "b/bob/1.jpg",
    ]
    entries = write(manifest, files).list_entries()
    assert {e.identity for e in entries if e.split == "labelled"} == {"JOS\u00c9", "eve"}
    with pytest.raises(DataError, match="is in the labelled and in the unlabelled split"):
        write(manifest, ["b/ Jose\u0301/4.jpg"]).list_entries()


def test_links_are_followed_where_the_manifest_allows_it(write, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "ann").mkdir(parents=True)
    (elsewhere / "ann" / "1.jpg").write_bytes(b"1")
    (elsewhere / "ann" / "again").symlink_to(elsewhere)
    (write.root / "pile").mkdir()
    (write.root / "pile" / "disk").symlink_to(elsewhere)
    manifest = {"unlabelled": {"root": "pile"}}
    closed = [entry for entry in write(manifest, ["pile/0.jpg"]).list_entries() if entry.fault]
    assert "allow_links: true" in closed[0].fault
    dataset = write({**manifest, "allow_links": True})
    used = [entry.path for entry in dataset.list_entries() if not entry.fault]
    assert used == ["pile/0.jpg", "pile/disk/ann/1.jpg"]
    assert dataset.read_bytes("pile/disk/ann/1.jpg") == b"1"
    with pytest.raises(DataError, match="leads out"):
        dataset.locate("../secret.jpg")


def test_one_person_in_two_splits_is_refused(write):
    manifest = {"labelled": {"root": "a"}, "unlabelled": {"root": "b"}, "evaluation": {"root": "c"}}
    dataset = write(manifest, ["a/ann/1.jpg", "b/bob/1.jpg", "c/ann/2.jpg"])
    with pytest.raises(DataError, match="'ann' is in the labelled and in the evaluation split"):
        dataset.list_entries()


def test_one_file_in_two_splits_is_refused(write):
    manifest = {
        "unlabelled": {"root": "a", "layout": "pile"},
        "labelled": {"root": "a/b"},
    }
    dataset = write(manifest, ["a/b/ann/1.jpg"])
    with pytest.raises(DataError, match="the splits overlap"):
        dataset.list_entries()


@pytest.mark.parametrize(
    ("manifest", "error", "expected"),
    [
        ({"people": {"root": "none", "labelled": 0.2, "evaluation": 0.2}}, DataError, "not a dir"),
        ({"people": {"root": "../x", "labelled": 0.2, "evaluation": 0.2}}, DataError, "leads out"),
        ({"people": {"root": "/etc", "labelled": 0.2, "evaluation": 0.2}}, DataError, "leads out"),
        ({"people": {"root": "all", "labelled": 2.0, "evaluation": 0}}, ConfigError, "labelled"),
        ({"people": {"root": "all", "labelled": 0.7, "evaluation": 0.7}}, ConfigError, "more than"),
        ({}, ConfigError, "either people"),
        ({"labelled": {"root": "all"}}, ConfigError, "needs an unlabelled folder"),
        ({"kind": "video"}, ConfigError, "kind: .*'images', 'synthetic' or 'features'"),
        ({"typo": 1}, ConfigError, "typo: no such setting"),
    ],
)
def test_a_wrong_manifest_is_one_clear_message(write, manifest, error, expected):
    with pytest.raises(error, match=expected):
        write(manifest, people(5, 2)).list_entries()


def test_a_missing_data_root_says_how_to_give_one(tmp_path):
    path = tmp_path / "manifest.yaml"
    path.write_text(
        yaml.safe_dump({"name": "m", "kind": "images", "source": "ask Ann", **BY_PERSON})
    )
    with pytest.raises(DataError, match=r"--data-root.*CDP_DATA_ROOT.*ask Ann"):
        Dataset.open(path, None)
    with pytest.raises(DataError, match=r"is not a directory.*ask Ann"):
        Dataset.open(path, tmp_path / "nowhere")


def test_a_link_out_of_the_data_root_is_not_followed(write, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    dataset = write(BY_PERSON, people(5, 2))
    (write.root / "all" / "person000" / "link.jpg").symlink_to(secret)
    with pytest.raises(DataError, match="leads out of the data root"):
        dataset.read_bytes("all/person000/link.jpg")


def test_the_digest_follows_content_and_splits_not_the_place(write, tmp_path):
    def digest(dataset):
        return dataset.digest(FileDigests(tmp_path / "index.json"))

    dataset = write(BY_PERSON, people(5, 2))
    before = digest(dataset)
    moved = tmp_path / "moved"
    write.root.rename(moved)
    assert digest(Dataset(dataset.manifest, moved)) == before
    (moved / "all" / "person000" / "0.jpg").write_bytes(b"other")
    assert digest(Dataset(dataset.manifest, moved)) != before


FEATURES = {"kind": "features", "labelled": {"root": "l"}, "unlabelled": {"root": "u"}}


@pytest.fixture
def features(write):
    rng = np.random.default_rng(0)
    vectors = {}
    for split, count in (("l", 4), ("u", 6)):
        folder = write.root / split / "features"
        folder.mkdir(parents=True)
        names = [f"{split}/{9 - i}.jpg" for i in range(count)]
        (write.root / split / "list.txt").write_text("\n".join(names) + "\n")
        vectors[split] = rng.normal(size=(count, 5)).astype(np.float32)
        vectors[split].tofile(folder / "one.bin")
        np.save(folder / "two.npy", vectors[split].astype(np.float16))
    (write.root / "l" / "meta.txt").write_text("7\n7\n8\n8\n")
    return vectors


def test_features_in_the_released_layout_are_mapped_in_list_order(write, features):
    dataset = write(FEATURES)
    entries = dataset.list_entries()
    assert [e.path for e in entries][:4] == ["l/9.jpg", "l/8.jpg", "l/7.jpg", "l/6.jpg"]
    assert [e.identity for e in entries] == ["labelled/7"] * 2 + ["labelled/8"] * 2 + [None] * 6
    np.testing.assert_array_equal(dataset.read_features("unlabelled", "one"), features["u"])
    two = dataset.read_features("labelled", "two")
    np.testing.assert_allclose(two, features["l"], atol=1e-2)


def test_features_that_do_not_fit_their_list_are_refused(write, features):
    dataset = write(FEATURES)
    (write.root / "u" / "list.txt").write_text("a\nb\nc\nd\ne\nf\ng\n")
    with pytest.raises(DataError, match="no whole number of float32 vectors for the 7 rows"):
        dataset.read_features("unlabelled", "one")
    with pytest.raises(DataError, match=r"expected floats \(7, d\)"):
        dataset.read_features("unlabelled", "two")
    with pytest.raises(
        DataError, match=r"expected three.bin, three.npy, three.npz or three.parquet"
    ):
        dataset.read_features("unlabelled", "three")
    (write.root / "l" / "meta.txt").write_text("1\n")
    with pytest.raises(DataError, match=r"meta\.txt has 1 rows, list.txt has 4"):
        dataset.list_entries()


@pytest.mark.parametrize("kind", ["float16", "float64"])
@pytest.mark.parametrize("made", ["normal", "sparse", "rounded"])
def test_numbers_of_another_width_are_noticed_and_read_once_their_dimension_is_given(
    write, features, kind, made
):
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(6, 64)) / 8
    vectors = {"normal": vectors, "sparse": np.maximum(vectors, 0),
               "rounded": vectors.astype(np.float16)}[made]  # fmt: skip
    path = write.root / "u" / "features" / "raw.bin"
    vectors.astype(kind).tofile(path)
    with pytest.raises(
        DataError, match=rf"raw\.bin.*look like {kind}, 64 a row.*dims: {{raw: 64}}"
    ):
        write(FEATURES).read_features("unlabelled", "raw")
    expected = vectors.astype(kind)
    named = write({**FEATURES, "dims": {"raw": 64}})
    np.testing.assert_array_equal(named.read_features("unlabelled", "raw"), expected)
    (write.root / "dims.txt").write_text("one 5\nraw 64\n")
    np.testing.assert_array_equal(write(FEATURES).read_features("unlabelled", "raw"), expected)
    (write.root / "dims.txt").write_text("raw 63\n")
    with pytest.raises(DataError, match="not 2, 4 or 8 bytes a number"):
        write(FEATURES).read_features("unlabelled", "raw")
    (write.root / "dims.txt").write_text("raw: 64 numbers\n")
    with pytest.raises(DataError, match=r"dims\.txt, line 1: `<model> <dimension>` expected"):
        write(FEATURES).read_features("unlabelled", "raw")


def test_bad_rows_are_listed_and_many_of_them_are_an_error(write, features):
    dataset = write(FEATURES)
    vectors = np.tile(np.arange(1, 6, dtype=np.float32), (6, 1))
    vectors[4] = 0
    vectors.tofile(write.root / "u" / "features" / "one.bin")
    bad = dataset.find_bad_rows(["one", "two"])
    assert bad == {("unlabelled", 4): "its vector in view one is all zeros"}
    vectors[2] = np.nan
    vectors.tofile(write.root / "u" / "features" / "one.bin")
    with pytest.raises(
        DataError, match="view one: 2 of 6 vectors cannot be used; the first, row 3"
    ):
        dataset.find_bad_rows(["one", "two"])


def test_one_model_has_one_dimension_in_all_splits(write, features):
    np.ones((6, 10), np.float32).tofile(write.root / "u" / "features" / "one.bin")
    with pytest.raises(
        DataError, match="view one: 5 numbers a vector in the labelled split, 10 in"
    ):
        write(FEATURES).find_bad_rows(["one"])


def test_pickled_features_are_refused(write, features):
    np.save(write.root / "u" / "features" / "evil.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a \.npy array of numbers"):
        write(FEATURES).read_features("unlabelled", "evil")


# ---------------------------------------------------------------------------------------- pairs

LISTED = """2\t2
person000\t1\t2
person001\t2\t3
person000\t1\tperson001\t3
person001\t1\tperson002\t2
person003\t1\t3
person004\t2\t1
person003\t1\tperson004\t3
person005\t1\tperson003\t2
"""


def write_pairs(write, listed=LISTED, **settings):
    """Ten people of three images each, named and listed as LFW does it."""
    (write.root / "pairs.txt").write_text(listed)
    named = [f"all/person{p:03d}/person{p:03d}_{i:04d}.jpg" for p in range(10) for i in (1, 2, 3)]
    people = {**BY_PERSON["people"], "evaluation": 0.0, "pairs": {"file": "pairs.txt", **settings}}
    return write({"people": people}, named)


def test_listed_pairs_are_read_fold_by_fold(write):
    pairs = write_pairs(write).read_pairs()
    assert [pair.same for pair in pairs] == [True, True, False, False] * 2
    assert [pair.fold for pair in pairs] == [0] * 4 + [1] * 4
    assert (pairs[1].source, pairs[1].target) == (
        "all/person001/person001_0002",
        "all/person001/person001_0003",
    )
    assert (pairs[7].source, pairs[7].target) == (
        "all/person005/person005_0001",
        "all/person003/person003_0002",
    )
    assert write(BY_PERSON, people(5, 2)).read_pairs() == []


ENDPOINTS = """Ann_0001.jpg\t1
Ann_0002.jpg\t1
Bo_B_0003.jpg\t1
Bo_B_0001.jpg\t1
Cy_0001.jpg\t2
Cy_0002.jpg\t2
Ann_0001.jpg\t0
Bo_B_0003.jpg\t0
Ann_0002.jpg\t0
Bo_B_0001.jpg\t0
Cy_0002.jpg\t0
Dee_0001.jpg\t0
"""


def write_endpoints(write, listed=ENDPOINTS):
    """Five people in one folder, listed as CALFW does it."""
    (write.root / "pairs.txt").write_text(listed)
    named = [
        f"flat/{p}_{i:04d}.jpg" for p in ("Ann", "Bo_B", "Cy", "Dee", "Eve") for i in (1, 2, 3)
    ]
    pairs = {"file": "pairs.txt", "held_out_folds": [2]}
    people = {"root": "flat", "pattern": "{person}_*", "labelled": 0.34, "evaluation": 0.0}
    return write({"people": {**people, "pairs": pairs}}, named)


def test_pairs_of_two_lines_are_read_and_impostors_dealt_to_the_folds(write):
    dataset = write_endpoints(write)
    pairs = dataset.read_pairs()
    assert [(pair.fold, pair.same) for pair in pairs] == [
        (0, True), (0, True), (0, False), (0, False), (1, True), (1, False),
    ]  # fmt: skip
    assert (pairs[1].source, pairs[1].target) == ("flat/Bo_B_0003", "flat/Bo_B_0001")
    assert pairs[5].people == ("Cy", "Dee")
    entries = dataset.list_entries()
    assert {e.identity for e in entries if e.split == "evaluation"} == {"Cy", "Dee"}
    stems = {e.path.rpartition(".")[0] for e in entries}
    assert all({pair.source, pair.target} <= stems for pair in pairs)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (ENDPOINTS.replace("Cy_0002.jpg\t2", "Cy 2"), "line 6: an image <person>_<number>"),
        (ENDPOINTS.replace("Cy_0002.jpg\t2", "Cy_0002.jpg 1"), "line 6: both images of a pair"),
        (ENDPOINTS.replace("Dee_0001", "Cy_0001"), "line 12: both images of a pair"),
        (ENDPOINTS[: ENDPOINTS.rindex("Dee")], "line 11: two lines a pair expected"),
        (ENDPOINTS[: ENDPOINTS.rindex("Cy")], "as many impostor as genuine pairs expected"),
    ],
)
def test_a_list_of_two_lines_a_pair_is_checked(write, listed, expected):
    dataset = write_endpoints(write)
    (write.root / "pairs.txt").write_text(listed)
    with pytest.raises(DataError, match=expected):
        dataset.read_pairs()


def test_people_of_held_out_folds_are_for_evaluation_alone(write):
    entries = write_pairs(write, held_out_folds=[2]).list_entries()
    held_out = {entry.identity for entry in entries if entry.split == "evaluation"}
    assert held_out == {"person003", "person004", "person005"}
    labelled = {entry.identity for entry in entries if entry.split == "labelled"}
    assert len(labelled) == 1  # a fifth of the other seven


def test_a_changed_list_is_another_data_set(write, tmp_path):
    dataset = write_pairs(write)
    before = dataset.digest(FileDigests(tmp_path / "a.json"))
    (write.root / "pairs.txt").write_text(LISTED.replace("1\t2", "1\t3", 1))
    assert dataset.digest(FileDigests(tmp_path / "b.json")) != before


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", r"pairs\.txt, line 2: a pair as LFW lists them expected"),
        ("2\t2\nperson000\t1\n", "line 2: a pair"),
        ("1\t1\nperson000\t1\t2\nperson000\tone\tperson001\t2\n", "line 3: a pair"),
        ("2\t2\nperson000\t1\t2\n", "8 pairs announced, 1 listed"),
    ],
)
def test_a_list_that_is_none_is_named_by_its_line(write, listed, expected):
    dataset = write_pairs(write, listed)
    with pytest.raises(DataError, match=expected):
        dataset.read_pairs()


def test_folds_and_files_that_are_not_there_are_named(write):
    with pytest.raises(ConfigError, match=r"held_out_folds: 1\.\.2 expected, got 3"):
        write_pairs(write, held_out_folds=[3]).list_entries()
    missing = {"people": {**BY_PERSON["people"], "pairs": {"file": "lfw.txt"}}}
    with pytest.raises(DataError, match=r"names the pairs 'lfw\.txt', and there is no such"):
        write(missing)


def test_the_official_list_parts_its_people(data_root):
    """Real data: ten folds of 600 pairs, and nobody in two of them."""
    path = data_root / "lfw_pairs.txt"
    pairs = parse_pairs(path.read_text().splitlines(), "lfw112", path)
    assert len(pairs) == 6000
    people = [set() for _ in range(10)]
    for pair in pairs:
        assert (data_root / f"{pair.source}.jpg").is_file()
        people[pair.fold] |= set(pair.people)
    assert sum(len(each) for each in people) == len(set().union(*people))
