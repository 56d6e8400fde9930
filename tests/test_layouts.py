"""Layouts people have: archives written by other code are read, and what is broken costs itself."""

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cdp.errors import ConfigError, DataError
from pipelines.data.dataset import Dataset
from pipelines.data.layouts import records, shards
from pipelines.files import FileDigests

MAGIC = struct.pack("<I", 0xCED7230A)


def encode(value: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(stream, kind)
    return stream.getvalue()


def make_record(payload: bytes, labels: list[float], number: int = 0) -> bytes:
    """A record as the format says: written here by hand, not by the code under test."""
    head = struct.pack("<IfQQ", len(labels) if len(labels) > 1 else 0, labels[0], number, 0)
    extra = struct.pack(f"<{len(labels)}f", *labels) if len(labels) > 1 else b""
    data = head + extra + payload
    pieces = data.split(MAGIC)  # a payload that holds the magic number is stored in pieces
    written = b""
    for place, piece in enumerate(pieces):
        kind = 0 if len(pieces) == 1 else 1 if place == 0 else 3 if place == len(pieces) - 1 else 2
        written += MAGIC + struct.pack("<I", kind << 29 | len(piece)) + piece
        written += b"\0" * (-len(piece) % 4)
    return written


def write_records(path: Path, pieces: list[bytes], *, index: bool = True) -> list[int]:
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1].tolist()
    path.write_bytes(b"".join(pieces))
    if index:
        lines = [f"{key}\t{offset}" for key, offset in enumerate(offsets)]
        path.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    return offsets


@pytest.fixture
def write(tmp_path: Path):
    def make(manifest: dict, files: dict[str, bytes]) -> Dataset:
        for name, data in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        path = tmp_path / "manifest.yaml"
        path.write_text(yaml.safe_dump({"name": "mine", "kind": "images", **manifest}))
        return Dataset.open(path, tmp_path)

    make.root = tmp_path
    return make


@pytest.mark.parametrize("index", [True, False])
def test_records_of_another_writer(tmp_path: Path, index: bool) -> None:
    tricky = encode(3) + MAGIC + b"x" + MAGIC  # bytes after the end of a PNG do no harm
    images = [encode(1), encode(2, "JPEG"), tricky]
    write_records(
        tmp_path / "train.rec",
        [make_record(b"", [4.0, 6.0]),  # InsightFace: where the images end, where people end
         *(make_record(image, [label]) for image, label in zip(images, (0, 0, 7), strict=True)),
         make_record(b"", [1.0, 3.0])],
        index=index,
    )  # fmt: skip
    members = list(records.list_members(tmp_path / "train.rec"))
    assert [(m.name, m.identity, m.fault) for m in members] == [
        ("00000001", "0", ""), ("00000002", "0", ""), ("00000003", "7", ""),
    ]  # fmt: skip
    for member, image in zip(members, images, strict=True):
        assert records.read_member(tmp_path / "train.rec", member.name) == image
    with pytest.raises(DataError, match="no record 00000009"):
        records.read_member(tmp_path / "train.rec", "00000009")


def test_broken_records_cost_only_themselves(tmp_path: Path) -> None:
    good = make_record(encode(1), [5.0])
    liar = MAGIC + struct.pack("<I", 1 << 20) + b"short"
    many = MAGIC + struct.pack("<I", 24) + struct.pack("<IfQQ", 9999, 0, 0, 0)
    path = tmp_path / "a.rec"
    offsets = write_records(path, [good, b"\0" * 8, many, make_record(encode(2), [6.0]), liar])
    with path.with_suffix(".idx").open("a") as stream:
        stream.write(f"77\t{10**9}\n")
    faults = {m.name: m.fault for m in records.list_members(path)}
    assert faults == {
        "00000000": "",
        "00000001": f"no record at byte {offsets[1]}",
        "00000002": "a record of 24 bytes says that it has 9999 labels",
        "00000003": "",
        "00000004": f"the record at byte {offsets[4]} says {1 << 20} bytes, the file has 5 more",
        "00000077": f"the file ends at byte {path.stat().st_size}, where a record should be",
    }
    assert records.read_member(path, "00000003") == encode(2)
    path.with_suffix(".idx").write_text("0\tzero\n")
    with pytest.raises(DataError, match=r"a\.idx, line 1: a key and a byte expected"):
        list(records.list_members(path))


@pytest.mark.parametrize("lie", [4, 120, 300, 1 << 20])
def test_without_an_index_a_record_that_lies_hides_no_other(tmp_path: Path, lie: int) -> None:
    """Its length reaches into the next record, the one after that, or beyond the file."""
    pieces = [make_record(encode(value), [value]) for value in range(1, 7)]
    head = struct.unpack("<I", pieces[2][4:8])[0]
    pieces[2] = MAGIC + struct.pack("<I", head + lie) + pieces[2][8:]
    path = tmp_path / "a.rec"
    write_records(path, pieces, index=False)
    members = list(records.list_members(path))
    people = [m.identity for m in members if not m.fault]
    assert [person for person in people if person != "3"] == ["1", "2", "4", "5", "6"]
    # Where it ends as a later record does, the rest follows without a break.
    assert sum(bool(m.fault) for m in members) == (lie != len(pieces[3]))
    read = [records.read_member(path, m.name) for m in members if not m.fault]
    assert [encode(value) for value in (1, 2, 4, 5, 6)] == [
        data for data, person in zip(read, people, strict=True) if person != "3"
    ]


def make_tar(members: list[tuple[str, bytes]], links: tuple[str, ...] = ()) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    return stream.getvalue()


def test_shards_of_another_writer(tmp_path: Path) -> None:
    path = tmp_path / "000.tar"
    path.write_bytes(
        make_tar(
            [("a/1.jpg", encode(1)), ("a/1.cls", b"ann\n"), ("2.png", encode(2)),
             ("2.json", json.dumps({"label": 17}).encode()), ("./bob/3.png", encode(3)),
             ("4.png", encode(4)), ("4.json", b"[broken"), ("notes.txt", b"x"),
             ("../5.png", encode(5)), ("/6.png", encode(6)), ("4.png", encode(7)),
             ("8.png", encode(8)), ("8.json", b'{"label": NaN}'), ("9.png", encode(9)),
             ("9.json", b'{"label": 5.0}')],
            links=("7.png",),
        )
    )  # fmt: skip
    members = {m.name: m for m in shards.list_members(path)}
    assert {name: m.identity for name, m in members.items() if not m.fault} == {
        "a/1.jpg": "ann", "2.png": "17", "bob/3.png": "bob", "4.png": None,
        "8.png": None, "9.png": "5",
    }  # fmt: skip
    faults = {name: m.fault for name, m in members.items() if m.fault}
    assert faults == {
        "../5.png": "a name that leads out of the shard",
        "/6.png": "a name that leads out of the shard",
        "4.png (11)": "a name that the shard has already",
        "7.png": "a link, device or sparse file, no plain file",
    }
    assert shards.read_member(path, "bob/3.png") == encode(3)
    for name in ("../5.png", "7.png", "nothing.png"):
        with pytest.raises(DataError, match="has no file"):
            shards.read_member(path, name)


def test_cut_shards_keep_what_is_whole(tmp_path: Path) -> None:
    whole = make_tar([("1.png", encode(1)), ("2.png", encode(2))])
    path = tmp_path / "cut.tar"
    path.write_bytes(whole[: 512 + 512 + 512 + 20])
    found = list(shards.list_members(path))
    assert (found[0].name, found[0].fault) == ("1.png", "")
    assert found[-1].fault
    assert shards.read_member(path, "1.png") == encode(1)
    for data in (b"", b"no tar at all" * 100):
        path.write_bytes(data)
        (member,) = shards.list_members(path)
        assert member.fault.startswith("the shard cannot be read: ")


def find_images(path: Path) -> tuple[list[str], list[str]]:
    """The names of the whole members, all of them read, and the reasons of the others."""
    found = list(shards.list_members(path))
    whole = [member.name for member in found if not member.fault]
    for name in whole:
        shards.read_member(path, name)
    return whole, [member.fault for member in found if member.fault]


def test_a_damaged_place_in_a_shard_costs_itself(tmp_path: Path) -> None:
    names = [f"{value}.png" for value in range(6)]
    whole = make_tar([(name, encode(value)) for value, name in enumerate(names)])
    path = tmp_path / "0.tar"

    def write(place: int, data: bytes) -> None:
        path.write_bytes(whole[:place] + data + whole[place + len(data) :])

    write(2 * 1024 + 3, b"????")  # the checksum of a header fails
    found, (fault,) = find_images(path)
    assert found == [*names[:2], *names[3:]]
    assert fault.startswith("the shard is damaged after 2 files: ")
    for said in (b"00000001200", b"77777777777"):  # a length into the next member, beyond the file
        header = bytearray(whole[2 * 1024 : 2 * 1024 + 512])
        header[124:136] = said + b"\0"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        write(2 * 1024, bytes(header))
        found, faults = find_images(path)
        assert [name for name in found if name != "2.png"] == [*names[:2], *names[3:]]
        assert faults[-1].startswith("the shard is damaged after 3 files: ")
        assert ("2.png" in found) == (said == b"00000001200")
    write(2 * 1024, bytes(1024))  # an end in the middle
    assert find_images(path) == ([*names[:2], *names[3:]], [])
    path.write_bytes(whole + make_tar([("more.png", encode(9))]))
    assert find_images(path) == ([*names, "more.png"], [])
    path.write_bytes(make_tar([]))
    assert find_images(path) == ([], [])


def test_devices_pipes_and_hard_links_in_a_shard_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname, info.devmajor, info.devminor = kind, "/etc/passwd", 1, 3
            tar.addfile(info)
        for name in ("a/../../up.png", "//etc/x.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(encode(1))
            tar.addfile(info, io.BytesIO(encode(1)))
    found, faults = find_images(path)
    assert found == ["good.png"]
    assert (
        faults
        == ["a link, device or sparse file, no plain file"] * 4
        + ["a name that leads out of the shard"] * 2
    )


def test_an_empty_shard_among_others_is_none(write) -> None:
    manifest = {"unlabelled": {"root": "shards", "layout": "pile"}}
    dataset = write(manifest, {"shards/0.tar": make_tar([]), "shards/1.tar": make_tar(
        [("1.png", encode(1))])})  # fmt: skip
    assert [entry.path for entry in dataset.list_entries()] == ["shards/1.tar/1.png"]
    (write.root / "shards/1.tar").unlink()
    with pytest.raises(DataError, match="the unlabelled folder 'shards' holds no image"):
        dataset.list_entries()


def test_a_data_set_of_archives(write) -> None:
    write_records(
        write.root / "train.rec", [make_record(encode(v), [v]) for v in (1, 2, 3)], index=True
    )
    manifest = {
        "labelled": {"root": "train.rec"},
        "unlabelled": {"root": "shards", "layout": "pile"},
        "size_px": 20,
    }
    dataset = write(
        manifest,
        {"shards/0.tar": make_tar([("x/1.png", encode(11))]),
         "shards/1.tar": make_tar([("1.png", encode(12)), ("../2.png", encode(9))]),
         "shards/loose.png": encode(13)},
    )  # fmt: skip
    entries = dataset.list_entries()
    assert [(e.path, e.split, e.identity, bool(e.fault)) for e in entries] == [
        ("train.rec/00000000", "labelled", "1", False),
        ("train.rec/00000001", "labelled", "2", False),
        ("train.rec/00000002", "labelled", "3", False),
        ("shards/0.tar/x/1.png", "unlabelled", None, False),
        ("shards/1.tar/../2.png", "unlabelled", None, True),
        ("shards/1.tar/1.png", "unlabelled", None, False),
        ("shards/loose.png", "unlabelled", None, False),
    ]
    paths = [e.path for e in entries if not e.fault]
    assert dataset.read_faces(paths)[:, 0, 0, 0].tolist() == [1, 2, 3, 11, 12, 13]
    assert dataset.lies_in_archive("train.rec/00000000")
    assert not dataset.lies_in_archive("shards/loose.png")
    before = dataset.digest(FileDigests(write.root / "digests.json", rehash=True))
    (write.root / "shards/0.tar").write_bytes(make_tar([("x/1.png", encode(14))]))
    assert dataset.digest(FileDigests(write.root / "digests.json", rehash=True)) != before


def test_files_of_other_kinds_say_what_to_do(write) -> None:
    with pytest.raises(DataError, match=r"faces\.zip' is a file of the kind \.zip; .*Unpack it"):
        write({"unlabelled": {"root": "faces.zip"}}, {"faces.zip": b"PK"})
    with pytest.raises(DataError, match="not a directory"):
        write({"unlabelled": {"root": "nowhere"}}, {})


LIST = "path,person,split\nann/1.png,Ann,train\nx.png,Bob,train\ny.png,,unlabelled\n"


def test_a_list_beside_a_folder(write) -> None:
    manifest = {
        "labelled": {"root": "faces", "list": "lists/all.csv"},
        "unlabelled": {"root": "faces", "layout": "pile"},
    }
    files = {f"faces/{name}": encode(5) for name in ("ann/1.png", "x.png", "y.png", "z.png")}
    dataset = write(manifest, {**files, "lists/all.csv": LIST.encode("utf-8-sig")})
    entries = dataset.list_entries()
    # What the list names is labelled; the rest of the folder is not.
    assert [(e.path, e.split, e.identity) for e in entries] == [
        ("faces/ann/1.png", "labelled", "Ann"),
        ("faces/x.png", "labelled", "Bob"),
        ("faces/y.png", "unlabelled", None),
        ("faces/z.png", "unlabelled", None),
    ]
    whole = "ann/1.png,A\nx.png,B\ny.png,C\nz.png,D\n"
    with pytest.raises(DataError, match="every image of the unlabelled folder is named by"):
        write(manifest, {"lists/all.csv": whole.encode()}).list_entries()
    dataset = write(manifest, {"lists/all.csv": LIST.encode("utf-8-sig")})
    before = dataset.digest(FileDigests(write.root / "digests.json", rehash=True))
    (write.root / "lists/all.csv").write_text(LIST.replace("Bob", "Eve"))
    assert dataset.digest(FileDigests(write.root / "digests.json", rehash=True)) != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x.png,Ann\nfaces/x.png,Bob\n", "is listed as 'Ann' and as 'Bob'"),
        ("path,person\nx.png,\n", "row 1: 'x.png' has no identity"),
        ("path,person,split\nx.png,Ann,later\n", "a split expected .*got 'later'"),
        ("path,person,split\nx.png,Ann,test\n", "names no image of the labelled split"),
    ],
)
def test_wrong_lists_are_named(write, text: str, message: str) -> None:
    manifest = {
        "labelled": {"root": "faces", "list": "labels.csv"},
        "unlabelled": {"root": "pile", "layout": "pile"},
    }
    files = {"faces/x.png": encode(1), "pile/y.png": encode(2), "labels.csv": text.encode()}
    with pytest.raises(DataError, match=message):
        write(manifest, files).list_entries()


def test_listed_files_that_are_missing_or_outside_are_set_aside(write) -> None:
    manifest = {
        "labelled": {"root": "faces", "list": "labels.csv"},
        "unlabelled": {"root": "pile", "layout": "pile"},
    }
    text = "x.png,Ann\nlost.png,Ann\n../../out.png,Bob\n/etc/passwd,Eve\n"
    files = {"faces/x.png": encode(1), "pile/y.png": encode(2), "labels.csv": text.encode()}
    entries = write(manifest, files).list_entries()
    faults = {e.path: e.fault for e in entries if e.split == "labelled"}
    assert faults.pop("faces/x.png") == ""
    assert len(faults) == 3
    assert all(faults.values())


def test_the_person_in_the_name(write) -> None:
    manifest = {
        "labelled": {"root": "faces", "pattern": "{person}_*"},
        "unlabelled": {"root": "pile", "layout": "pile"},
    }
    names = ("Ann_Lee_0001.jpg", "Ann_Lee_0002.jpg", "bob_1.png", "nobody.png")
    files = {f"faces/{name}": encode(1) for name in names} | {"pile/y.png": encode(2)}
    entries = write(manifest, files).list_entries()
    found = [(e.identity, e.fault) for e in entries if e.split == "labelled"]
    assert found[:3] == [("Ann_Lee", ""), ("Ann_Lee", ""), ("bob", "")]
    assert found[3] == (None, "its name does not fit the pattern {person}_*")
    manifest["labelled"]["pattern"] = "*_*"
    with pytest.raises(ConfigError, match=r"pattern: \{person\} expected once"):
        write(manifest, files).list_entries()


@pytest.mark.parametrize("kind", ["rec", "tar"])
def test_any_bytes_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    if kind == "rec":
        whole = b"".join(make_record(encode(v), [v]) for v in (1, 2, 3))
    else:
        whole = make_tar([(f"a/{v}.png", encode(v)) for v in (1, 2, 3)])
    module = {"rec": records, "tar": shards}[kind]
    for trial in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] = rng.integers(0, 256)
        path = tmp_path / f"{trial}.{kind}"
        path.write_bytes(data[: rng.integers(1, len(data) + 1)])
        for member in module.list_members(path):
            if not member.fault:
                assert len(module.read_member(path, member.name)) <= len(whole)
