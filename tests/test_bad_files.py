"""Bad data costs itself only: each kind of bad file really on disk, and drawn ones beyond count."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import TINY_CONFIG
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from cdp.errors import CdpError, ConfigError, DataError
from cdp.images.decode import decode_image
from pipelines.config import RunConfig, read_config
from pipelines.data.dataset import LARGEST_FILE, Dataset
from pipelines.data.manifest import DataManifest
from pipelines.files import FileDigests
from pipelines.run import main
from pipelines.yaml_files import parse_yaml, read_yaml, validate_settings


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header promises any size, over a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 999))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


# ------------------------------------------------------------------------- files, through ingest


def draw(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (30, 20, 3)).astype("uint8")
    )


def lay_good_files(root: Path) -> dict[str, tuple[int, int]]:
    """Files that look odd and must be used: path -> (width, height)."""
    grey16 = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20) * 109)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [draw(40).convert("P"), draw(41).convert("P")]
    files = {
        "staff/ann lee/1.jpg": encode(draw(1), "JPEG"),
        "staff/ann lee/ 2 .jpg": encode(draw(2), "JPEG"),
        "staff/<b>bob</b>/1.png": encode(draw(3)),
        "staff/=1+1/1.png": encode(draw(4)),
        "pile/cmyk.jpg": encode(draw(5).convert("CMYK"), "JPEG"),
        "pile/deep.png": encode(grey16),
        "pile/alpha.png": encode(draw(6).convert("RGBA")),
        "pile/moving.gif": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "pile/turned.jpg": encode(draw(7), "JPEG", exif=turned),
        "pile/\U0001f600 é.png": encode(draw(8)),
        "pile/a\tb\nc.png": encode(draw(9)),
        "pile/png.jpg": encode(draw(10)),
        "pile/small.png": encode(draw(11).crop((0, 0, 9, 8))),
        "pile/folder.jpg/inside.png": encode(draw(12)),
    }
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "pile" / "link.png").symlink_to("../outside_folders.png")
    (root / "outside_folders.png").write_bytes(encode(draw(13)))
    size = dict.fromkeys([*files, "pile/link.png"], (20, 30))
    return size | {"pile/turned.jpg": (30, 20), "pile/small.png": (9, 8)}


def lay_copies(root: Path) -> dict[str, str]:
    """Files with the bytes of others: path -> the other's."""
    copies = {"pile/zz copy.jpg": "pile/png.jpg", "pile/0.jpg": "staff/ann lee/1.jpg"}
    for copy, original in copies.items():
        (root / copy).write_bytes((root / original).read_bytes())
    return copies


def lay_two_names(root: Path) -> dict[str, str]:
    """One file under two names: path -> what the reason must say."""
    reason = "the same file is under the names =1+1 and ann lee: it counts for neither"
    for folder in ("ann lee", "=1+1"):
        (root / "staff" / folder / "same.png").write_bytes(encode(draw(60)))
    return {f"staff/{folder}/same.png": reason for folder in ("ann lee", "=1+1")}


def lay_bad_files(root: Path, secret: Path) -> dict[str, str]:
    """Files that cannot be used: path -> what the reason must say."""
    pile = root / "pile"
    whole = encode(draw(20).resize((200, 300)), "JPEG")
    files: dict[str, tuple[bytes, str]] = {
        "empty.jpg": (b"", "empty file"),
        "cut.jpg": (whole[: len(whole) // 2], "corrupt image"),
        "text.jpg": (b"no image at all", "not an image"),
        "one.png": (encode(draw(21).crop((0, 0, 1, 1))), "too small: 1 x 1 px"),
        "bomb.png": (png_that_claims(60_000, 60_000), "too large"),
        "hundred.png": (png_that_claims(10_001, 10_000), "too large: 10001 x 10000"),
        "float.tif": (encode(Image.new("F", (20, 20)), "TIFF"), "floating-point"),
        "program.jpg": (encode(draw(22), "EPS"), "not an image"),
    }
    for name, (data, _) in files.items():
        (pile / name).write_bytes(data)
    reasons = {f"pile/{name}": reason for name, (_, reason) in files.items()}
    with (pile / "huge.jpg").open("wb") as stream:
        stream.truncate(LARGEST_FILE + 1)  # holes: nothing of it is on disk
    os.mkfifo(pile / "pipe.jpg")
    (pile / "gone.jpg").symlink_to("nowhere.jpg")
    (pile / "circle.jpg").symlink_to("circle.jpg")
    (pile / "out.jpg").symlink_to(secret)
    (pile / "device.jpg").symlink_to("/dev/zero")
    (pile / "elsewhere").symlink_to(secret.parent)
    (pile / "looks_like.jpg").symlink_to("folder.jpg")
    with open(os.fsencode(pile) + b"/\xff\xfe.jpg", "wb") as stream:
        stream.write(encode(draw(23)))
    return reasons | {
        "pile/huge.jpg": "too large",
        "pile/pipe.jpg": "no file",
        "pile/gone.jpg": "cannot be read: No such file",
        "pile/circle.jpg": "cannot be read",
        "pile/out.jpg": "leads out of the data root",
        "pile/device.jpg": "leads out of the data root",
        "pile/elsewhere": "a link to a folder",
        "pile/looks_like.jpg": "a link to a folder",
        "pile/\\udcff\\udcfe.jpg": "not UTF-8",
    }


def write_run(place: Path, manifest: dict) -> list[str]:
    """The command line of a run over a data root at `place/data`."""
    (place / "configs").mkdir()
    (place / "data.yaml").write_text(yaml.safe_dump({"name": "mine", "size_px": 48, **manifest}))
    (place / "configs" / "mine.yaml").write_text(yaml.safe_dump(TINY_CONFIG))
    return ["--config", str(place / "configs" / "mine.yaml"), "--runs-dir", str(place / "runs"),
            "--data-root", str(place / "data"), "--workers", "1"]  # fmt: skip


FOLDERS = {
    "kind": "images",
    "labelled": {"root": "staff"},
    "unlabelled": {"root": "pile", "layout": "pile"},
}


@pytest.mark.torch
def test_every_bad_file_is_set_aside_with_its_reason_and_the_rest_is_used(tmp_path, capsys):
    secret = tmp_path / "private" / "secret.jpg"
    secret.parent.mkdir()
    secret.write_bytes(encode(draw(99)))
    good = lay_good_files(tmp_path / "data")
    copies = lay_copies(tmp_path / "data")
    bad = lay_bad_files(tmp_path / "data", secret) | lay_two_names(tmp_path / "data")
    arguments = write_run(tmp_path, FOLDERS)
    assert main([*arguments, "--until", "ingest"]) == 0, capsys.readouterr().err
    run = tmp_path / "runs" / "tiny"
    rejected = pd.read_parquet(run / "ingest" / "rejected.parquet")
    reasons = dict(zip(rejected.path, rejected.reason, strict=True))
    assert set(reasons) == set(bad)
    for path, expected in bad.items():
        assert expected in reasons[path], path
        assert len(reasons[path]) < 200
    samples = pd.read_parquet(run / "ingest" / "samples.parquet").set_index("path")
    assert set(samples.index) == set(good) | set(copies)
    path_of = samples.reset_index().set_index("sample_id").path
    found = samples.copy_of.dropna().astype(int).map(path_of)
    assert found.to_dict() == copies
    for path, size in good.items():
        assert tuple(samples.loc[path, ["width", "height"]]) == size, path
    staff = samples[samples.split == "labelled"]
    # The first folder is the person: `<b>bob<` of `<b>bob</b>/1.png`.
    assert set(staff.identity) == {"ann lee", "<b>bob<", "=1+1"}
    # What ingest accepts can be read by every later stage, the smallest image included.
    dataset = Dataset.open(tmp_path / "data.yaml", tmp_path / "data")
    assert dataset.read_faces(list(good)).shape == (len(good), 48, 48, 3)
    # The digest opens nothing that is set aside, and knows when there is more of it.
    assert main([*arguments, "--until", "ingest"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "data" / "pile" / "another.jpg").symlink_to("nowhere.jpg")
    assert main([*arguments, "--until", "ingest", "--dry-run"]) == 0
    assert "the data set changed" in capsys.readouterr().out


def test_a_file_nobody_may_read_is_set_aside(tmp_path):
    """In a process that gives up all capabilities: root could read anything."""
    lay_good_files(tmp_path / "data")
    locked = tmp_path / "data" / "pile" / "locked.png"
    locked.write_bytes(encode(draw(50)))
    locked.chmod(0)
    closed = tmp_path / "data" / "pile" / "closed"
    closed.mkdir()
    (closed / "1.png").write_bytes(encode(draw(51)))
    closed.chmod(0)
    write_run(tmp_path, FOLDERS)
    code = """if True:
        import ctypes, sys
        from pathlib import Path
        from pipelines.data.dataset import Dataset
        from pipelines.config import IngestSettings
        from pipelines.stages.ingest import inspect_part
        from pipelines.files import FileDigests
        place = Path(sys.argv[1])
        version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
        assert ctypes.CDLL(None).capset(version_3, (ctypes.c_uint32 * 6)()) == 0
        dataset = Dataset.open(place / "data.yaml", place / "data")
        entries = dataset.list_entries()
        found = inspect_part(dataset, [(e.path, e.fault) for e in entries], IngestSettings())
        dataset.digest(FileDigests(place / "nowhere" / "files.json"))
        for entry, (*_, reason, _) in zip(entries, found):
            if reason:
                print(entry.path, "|", reason)
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
    finally:
        closed.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "pile/closed | a folder that cannot be listed: Permission denied",
        "pile/locked.png | cannot be read: Permission denied",
    ]


@pytest.mark.torch
def test_one_person_in_two_splits_is_one_message(tmp_path, capsys):
    lay_good_files(tmp_path / "data")
    again = tmp_path / "data" / "gate" / "ann lee"
    again.mkdir(parents=True)
    (again / "9.png").write_bytes(encode(draw(60)))
    arguments = write_run(tmp_path, {**FOLDERS, "evaluation": {"root": "gate"}})
    assert main([*arguments, "--until", "ingest"]) == 2
    message = capsys.readouterr().err
    assert "'ann lee' is in the labelled and in the evaluation split" in message
    assert "Traceback" not in message


# ------------------------------------------------------------------------------- drawn settings

KEYS = st.sampled_from(
    ["name", "kind", "people", "labelled", "unlabelled", "evaluation", "size_px", "synthetic",
     "root", "layout", "pairs", "file", "seed", "data", "committee", "base", "members", "knn", "k",
     "train", "backbone", "onnx", "propagate", "threshold", "retrain", "far"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.binary(max_size=8), st.dates(),
    st.sampled_from(["images", "features", "synthetic", "..", "/etc", "a/../b", "auto"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=4), inner),
    max_leaves=20,
)
MAPPINGS = st.dictionaries(KEYS, VALUES, max_size=8)
QUICK = settings(
    max_examples=50, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
THOROUGH = settings(QUICK, max_examples=3000)


def open_drawn(place: Path, data: bytes) -> None:
    """A manifest of any bytes: a data set, or one printable message."""
    path = place / "drawn.yaml"
    path.write_bytes(data)
    root = place / "root"
    root.mkdir(exist_ok=True)
    try:
        Dataset.open(path, root)
    except CdpError as error:
        message = str(error).encode()
    else:
        message = b"a data set"
    assert message


def check_manifest(place: Path, value: object) -> None:
    open_drawn(place, yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))
    try:
        settings = validate_settings(DataManifest, value, source="drawn")
    except ConfigError as error:
        str(error).encode()
    else:
        # What is accepted says the same when it is written down and read again.
        again = yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json")))
        assert validate_settings(DataManifest, again, source="again") == settings


def check_config(place: Path, value: dict) -> None:
    path = place / "config.yaml"
    text = yaml.safe_dump({**json_like(), **value}, allow_unicode=True)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        config = read_config(path, [])
    except ConfigError as error:
        str(error).encode()
    else:
        assert validate_settings(RunConfig, config.model_dump(mode="json"), source="x") == config


def json_like() -> dict:
    return {"data": "d.yaml", "committee": {"base": {"name": "base", "backbone": "plain"}}}


def check_override(place: Path, override: str) -> None:
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump(json_like()))
    try:
        read_config(path, [override])
    except ConfigError as error:
        str(error).encode()


def list_settings(kind: type = RunConfig, prefix: str = "") -> list[str]:
    found = []
    for name, field in kind.model_fields.items():
        found.append(f"{prefix}{name}")
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
            found += list_settings(field.annotation, f"{prefix}{name}.")
    return found


OVERRIDES = st.one_of(
    st.text(max_size=30),
    st.builds("{}={}".format, st.sampled_from(list_settings()), st.text(max_size=12)),
    st.builds("{}={}".format, st.sampled_from(list_settings()), SCALARS),
)
YAML_TEXT = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="a1-:?[]{},&*!|>'\"%@`#<=. \n\t~", max_size=60),
    st.sampled_from(
        ["a: 2024-13-45", "a: !!timestamp x", "a: !!bool x", "a: !!int x", "a: !!float x",
         "a: !!binary '*'", "a: 0x_", "a: 0b_", "a: 1:99:99", "a: !!python/name:os.system",
         "? [a]\n: b", "? {a: b}\n: c", "a: !!set {b, c}", "a: !!omap [b: c]", "a: 1\na: 2",
         "a: &a [*a]", "\ufeffa: 1", "--- a\n--- b", "a: .nan", "a: .inf", "%YAML 9.9\n---\na: 1"]
    ),
)  # fmt: skip


@QUICK
@given(value=VALUES | MAPPINGS)
def test_any_value_as_a_manifest(tmp_path, value):
    check_manifest(tmp_path, value)


@QUICK
@given(data=st.binary(max_size=80) | YAML_TEXT.map(lambda text: text.encode("utf-8", "replace")))
def test_any_bytes_as_a_manifest(tmp_path, data):
    open_drawn(tmp_path, data)


@QUICK
@given(value=MAPPINGS)
def test_any_value_as_a_config(tmp_path, value):
    check_config(tmp_path, value)


@QUICK
@given(override=OVERRIDES)
def test_any_override(tmp_path, override):
    check_override(tmp_path, override)


@pytest.mark.long
@THOROUGH
@given(data=st.data())
def test_any_settings_thoroughly(tmp_path, data):
    check_manifest(tmp_path, data.draw(VALUES | MAPPINGS))
    open_drawn(tmp_path, data.draw(YAML_TEXT).encode("utf-8", "replace"))
    check_config(tmp_path, data.draw(MAPPINGS))
    check_override(tmp_path, data.draw(OVERRIDES))


@pytest.mark.parametrize("text", ["a: 2024-13-45", "a: " + "9" * 5000, "a: !!bool x", "a: 1\na: 2"])
def test_values_that_are_none_are_a_config_error(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_yaml(path)


def test_a_byte_order_mark_and_merge_keys_are_taken(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: *a}\n")
    both = {"x": 1, "y": 2}
    assert read_yaml(path) == {"a": both, "b": {"x": 1, "y": 3}, "c": both}


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
def test_no_setting_is_nan_or_infinite(tmp_path, number):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(json_like()))
    for name in ("retrain.width", "train.weight_decay", "train.head_options.s"):
        with pytest.raises(ConfigError, match="finite number"):
            read_config(path, [f"{name}={number}"])


# ------------------------------------------------------------------------------- drawn features


def lay_features(root: Path, count: int = 5) -> Dataset:
    (root / "u" / "features").mkdir(parents=True, exist_ok=True)
    (root / "u" / "list.txt").write_text("".join(f"{i}.jpg\n" for i in range(count)))
    manifest = {"name": "f", "kind": "features", "unlabelled": {"root": "u"}}
    return Dataset(validate_settings(DataManifest, manifest, source="test"), root.resolve())


def read_features(dataset: Dataset, suffix: str, data: bytes, count: int = 5) -> None:
    """Any bytes as features: vectors that fit the list, or one message."""
    path = dataset.locate(f"u/features/x{suffix}")
    path.write_bytes(data)
    message = "x."
    try:
        found = dataset.read_features("unlabelled", "x")
    except DataError as error:
        message = str(error)
    else:
        assert found.dtype.kind == "f"
        assert found.ndim == 2
        assert len(found) == count
        np.asarray(found).sum()  # every byte of it is there
    finally:
        path.unlink()
    assert "x." in message


ARRAYS = npst.arrays(
    dtype=st.one_of(npst.floating_dtypes(endianness="="), npst.integer_dtypes(),
                    st.sampled_from([np.dtype("S3"), np.dtype("?"), np.dtype([("a", "f4")])])),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
)  # fmt: skip


def as_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def as_parquet(column: pa.Array, name: str = "embedding") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: column}), sink)
    return sink.getvalue().to_pybytes()


LISTS = st.lists(
    st.none() | st.lists(st.floats(width=32) | st.none(), min_size=2, max_size=2), max_size=7
)


def damage(raw: bytes, places: list[tuple[int, int]]) -> bytes:
    changed = bytearray(raw)
    for place, value in places:
        if changed:
            changed[place % len(changed)] = value
    return bytes(changed)


DAMAGE = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=5)


def check_features(place: Path, data: st.DataObject) -> None:
    dataset = lay_features(place)
    read_features(dataset, ".bin", data.draw(st.binary(max_size=100)))
    array = data.draw(ARRAYS)
    read_features(dataset, ".npy", damage(as_npy(array), data.draw(DAMAGE)))
    kind = data.draw(
        st.sampled_from(
            [pa.list_(pa.float32(), 2), pa.list_(pa.float32()), pa.list_(pa.int64(), 2)]
        )
    )
    rows = data.draw(LISTS)
    if kind.value_type == pa.int64():
        rows = [None if row is None else [1, 2] for row in rows]
    name = data.draw(st.sampled_from(["embedding", "other"]))
    try:
        raw = as_parquet(pa.array(rows, kind), name)
    except pa.ArrowNotImplementedError:  # older Arrow writes no null vector: nothing to read
        reject()
    read_features(dataset, ".parquet", damage(raw, data.draw(DAMAGE)))


@QUICK
@given(data=st.data())
def test_any_features(tmp_path, data):
    check_features(tmp_path, data)


@pytest.mark.long
@THOROUGH
@given(data=st.data())
def test_any_features_thoroughly(tmp_path, data):
    check_features(tmp_path, data)


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\n\r"), min_size=1, max_size=12
)


@QUICK
@given(names=st.lists(NAMES, min_size=1, max_size=6, unique=True), data=st.data())
def test_every_name_of_a_list_keeps_its_row(tmp_path, names, data):
    """Also those with characters that Unicode, but no list, ends a line at."""
    dataset = lay_features(tmp_path)
    ending = data.draw(st.sampled_from(["\n", "\r\n"]))
    (tmp_path / "u" / "list.txt").write_bytes(ending.join([*names, ""]).encode())
    meta = data.draw(st.lists(st.sampled_from(["7", "7 ", " ", "", "é"]), min_size=len(names),
                              max_size=len(names)))  # fmt: skip
    (tmp_path / "u" / "meta.txt").write_bytes(ending.join([*meta, ""]).encode())
    entries = dataset.list_entries()
    first = names[0].removeprefix("\ufeff")  # at the beginning of a file it is a mark, no name
    assert [entry.path for entry in entries] == [first, *names[1:]]
    expected = [f"unlabelled/{each.strip()}" if each.strip() else None for each in meta]
    assert [entry.identity for entry in entries] == expected


def test_a_blank_label_of_a_labelled_row_is_named(tmp_path):
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "list.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    (tmp_path / "l" / "meta.txt").write_text("1\n \n1\n")
    dataset = lay_features(tmp_path)
    labelled = {"labelled": {"root": "l"}, **dataset.manifest.model_dump(exclude={"labelled"})}
    manifest = validate_settings(DataManifest, labelled, source="test")
    with pytest.raises(DataError, match=r"meta\.txt, row 2: the identity of 'b\.jpg' expected"):
        Dataset(manifest, tmp_path.resolve()).list_entries()


# ------------------------------------------------------------------------------------ drawn images


@QUICK
@given(data=st.data())
def test_any_image_comes_back_upright_and_whole(data):
    mode = data.draw(st.sampled_from(["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "I;16"]))
    format = data.draw(st.sampled_from(["PNG", "TIFF"] if mode in ("I;16", "LA") else
                                       ["TIFF", "JPEG"] if mode == "CMYK" else
                                       ["PNG", "TIFF", "GIF"] if mode != "RGBA" else
                                       ["PNG", "TIFF", "WEBP"]))  # fmt: skip
    height, width = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    noise = np.random.default_rng(0).integers(0, 65536, (height, width)).astype(np.uint16)
    image = (
        Image.fromarray(noise)
        if mode == "I;16"
        else Image.fromarray((noise >> 8).astype(np.uint8)).convert("RGB").convert(mode)
    )
    orientation = data.draw(st.integers(0, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} if format in ("PNG", "JPEG", "TIFF", "WEBP") else {}
    found = decode_image(encode(image, format, **options), min_px=1)
    turned = bool(options) and 5 <= orientation <= 8
    assert found.shape == ((width, height, 3) if turned else (height, width, 3))
    assert found.dtype == np.uint8


def test_a_yaml_value_is_what_safe_load_says(tmp_path):
    for path in [*Path("configs").glob("*.yaml"), *Path("data_manifests").glob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert parse_yaml(text, "x") == yaml.safe_load(text)
    assert json.dumps(parse_yaml("[1, a, {b: null}]", "x")) == '[1, "a", {"b": null}]'


def test_digests_open_no_pipe_and_no_device(tmp_path):
    """A digest that opened either would never end."""
    root = tmp_path / "data"
    lay_good_files(root)
    os.mkfifo(root / "pile" / "pipe.png")
    (root / "pile" / "zero.png").symlink_to("/dev/zero")
    write_run(tmp_path, FOLDERS)
    dataset = Dataset.open(tmp_path / "data.yaml", root)
    assert dataset.digest(FileDigests(tmp_path / "files.json"))
