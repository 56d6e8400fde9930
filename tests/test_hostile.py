"""Hostile data gets nothing: no code of it runs, no file outside is read, no bound is passed."""

import ast
import csv
import io
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from test_report import make_page, read_data

from cdp.errors import ConfigError, DataError, make_printable
from pipelines.data.dataset import Dataset
from pipelines.data.feature_tables import read_table
from pipelines.decisions import CorrectionTable
from pipelines.export.labels import write_csv
from pipelines.store import Published
from pipelines.yaml_files import YAML_BYTES, parse_yaml, read_yaml

ROOT = Path(__file__).parents[1]

# -------------------------------------------------------------------------------- the code itself

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save",
    "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "yaml.load_all", "pd.read_pickle", "pandas.read_pickle", "tempfile.mktemp",
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def find_dangers(source: str) -> list[str]:
    """Calls and imports through which data could become code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {name.name.partition(".")[0] for name in node.names}
            found += sorted(names & UNSAFE_MODULES)
        elif isinstance(node, ast.ImportFrom):
            found += sorted({str(node.module).partition(".")[0]} & UNSAFE_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN:
                found.append(called)
            # numpy refuses pickles by itself; here it is said as well.
            if called in ("np.load", "numpy.load") and given.get("allow_pickle") == "True":
                found.append("allow_pickle=True")
            if given.get("shell", "False") != "False":
                found.append("shell=True")
            if given.get("weights_only") == "False":
                found.append("weights_only=False")
    return found


def test_nothing_here_turns_data_into_code():
    for folder in ("cdp", "pipelines"):
        for path in sorted(ROOT.glob(f"{folder}/**/*.py")):
            assert find_dangers(path.read_text(encoding="utf-8")) == [], path


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "eval('1')", "torch.load(p)", "yaml.load(t, L)",
     "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "import a, shelve as s"],
)  # fmt: skip
def test_the_search_for_dangers_finds_them(source):
    assert find_dangers(source)


def test_the_local_cluster_listens_on_loopback_alone():
    """Its workers trust what they are sent: nobody else may send."""
    from pipelines.engine import Engine

    with Engine(workers=1) as engine:
        assert list(engine.map(abs, [(-1,)], label="x")) == [1]
        addresses = set(list_listeners())
    assert addresses
    assert addresses <= {"127.0.0.1", "::1"}


def list_listeners() -> list[str]:
    """The addresses on which this process and its children accept connections."""
    import psutil

    own = psutil.Process()
    return [
        connection.laddr.ip
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


# ------------------------------------------------------------------------------------------- YAML

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LAUGHS, r"line \d: too much"),
        (MERGES, "too much"),
        ("a: " + "[" * 100_000, "too much"),
        ("a: " + "{b: " * 400 + "}" * 400, "too much"),
        ("a: &a {b: *a}", "holds itself"),
        ("[" + "x," * 200_000 + "]", "too much"),
        ("a: !!python/object/apply:os.system ['touch HERE']", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
    ids=["laughs", "merges", "lists", "maps", "circle", "long", "call", "name"],
)
def test_yaml_is_loaded_safely_and_within_bounds(tmp_path, text, expected):
    path = tmp_path / "hostile.yaml"
    path.write_text(text.replace("HERE", str(tmp_path / "ran")))
    started = time.process_time()
    with pytest.raises(ConfigError, match=expected):
        read_yaml(path)
    assert time.process_time() - started < 10  # of this process, however busy the machine
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match=expected):
        parse_yaml(text, "override")


def test_a_yaml_file_has_a_size(tmp_path):
    path = tmp_path / "large.yaml"
    path.write_text("a: " + "x" * YAML_BYTES)
    with pytest.raises(ConfigError, match="at most 1048576 bytes"):
        read_yaml(path)


@pytest.mark.parametrize("body", ["[" * 100_000, '{"number": 1e999}', "9" * 5000])
def test_json_that_is_too_deep_or_too_large_is_one_message(tmp_path, body):
    table = CorrectionTable(tmp_path)
    table.path.write_text(body + "\n")
    with pytest.raises(DataError, match="line 1: not a decision"):
        table.read()
    (tmp_path / "manifest.json").write_text(body)
    assert Published.open("toy", tmp_path) is None


# ------------------------------------------------------------------------------- paths that leave


@pytest.mark.parametrize(
    "path",
    ["..", "../private", "/etc", "a/../../private", "link", "./link/..", "a/../../data/../x"],
)
@pytest.mark.parametrize("field", ["people", "unlabelled", "pairs", "onnx", "features"])
def test_no_path_of_a_manifest_leaves_the_data_root(tmp_path, path, field):
    root, private = tmp_path / "data", tmp_path / "private"
    for folder in (root / "a" / "features", private / "features"):
        folder.mkdir(parents=True)
    (root / "a" / "list.txt").write_text("1.jpg\n")
    np.zeros(2, np.float32).tofile(private / "secret.bin")
    (root / "link").symlink_to(private)
    people = {"root": "a", "labelled": 0.5, "evaluation": 0.0}
    manifest = {
        "people": {"kind": "images", "people": {**people, "root": path}},
        "unlabelled": {"kind": "images", "unlabelled": {"root": path}},
        "pairs": {"kind": "images", "people": {**people, "pairs": {"file": path}}},
    }.get(field, {"kind": "features", "unlabelled": {"root": "a"}})
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"name": "m", **manifest}))
    expected = "leads out of the data root"
    if field == "features" and path == "/etc":
        expected = "no features of"  # below the root, where an absolute path is one no more
    with pytest.raises(DataError, match=expected):  # noqa: PT012
        dataset = Dataset.open(tmp_path / "m.yaml", root)
        if field == "onnx":
            dataset.locate(path)
        elif path in ("link", "./link/.."):
            (root / "a" / "features" / "x.bin").symlink_to(private / "secret.bin")
            dataset.read_features("unlabelled", "x")
        else:
            dataset.read_features("unlabelled", f"../../{path}/secret")


def test_a_list_of_features_may_not_be_a_link_out(tmp_path):
    root = tmp_path / "data"
    (root / "u").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret\n")
    (root / "u" / "list.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "m.yaml").write_text(
        yaml.safe_dump({"name": "m", "kind": "features", "unlabelled": {"root": "u"}})
    )
    with pytest.raises(DataError, match="leads out of the data root"):
        Dataset.open(tmp_path / "m.yaml", root).list_entries()


# ---------------------------------------------------------------------------------------- Parquet


def write_parquet(path: Path, column: pa.Array, **options) -> Path:
    pq.write_table(pa.table({"embedding": column}), path, **options)
    return path


FIVE = list("abcde")
VECTORS = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(20, np.float32)), 4)


def test_parquet_vectors_come_back_whole(tmp_path):
    path = write_parquet(tmp_path / "good.parquet", VECTORS, row_group_size=2)
    np.testing.assert_array_equal(read_table(path, FIVE), np.ones((5, 4)))


@pytest.mark.parametrize(
    "column",
    [
        VECTORS.take(pa.array([0, 1, 2])),
        pa.array([1.0, 2.0, 3.0, 4.0, 5.0]),
        pa.array([[1, 2]] * 5, pa.list_(pa.int64(), 2)),
        pa.array([["a", "b"]] * 5, pa.list_(pa.string(), 2)),
        pa.FixedSizeListArray.from_arrays(pa.array(np.ones(45, np.float32)), 9),
        pa.array([b"x"] * 5),
    ],
    ids=["rows", "scalars", "integers", "texts", "long", "bytes"],
)
def test_parquet_of_another_schema_is_refused_before_it_is_read(tmp_path, column, monkeypatch):
    monkeypatch.setattr("pipelines.data.feature_tables.LONGEST_VECTOR", 8)
    path = write_parquet(tmp_path / "bad.parquet", column)
    with pytest.raises(DataError, match=r"bad\.parquet.* expected"):
        read_table(path, FIVE)


def test_a_footer_that_lies_about_its_rows_costs_no_memory(tmp_path):
    """The number of rows stands in the footer as a varint: 5 becomes some 10^12 and more."""
    path = write_parquet(tmp_path / "lies.parquet", VECTORS)
    raw = path.read_bytes()
    (length,) = np.frombuffer(raw[-8:-4], "<u4")
    footer = raw[-8 - int(length) : -8]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for at in [i for i, byte in enumerate(footer) if byte == 10]:  # 5, zigzag
        forged = footer[:at] + b"\xfe\xff\xff\xff\xff\xff\x1f" + footer[at + 1 :]
        path.write_bytes(
            raw[: -8 - int(length)] + forged + np.uint32(len(forged)).tobytes() + b"PAR1"
        )
        try:
            assert read_table(path, FIVE).shape == (5, 4)
        except DataError:
            refused += 1
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_a_parquet_extension_type_runs_nothing(tmp_path):
    """Arrow once unpickled what a schema of this name carries (CVE-2023-47248)."""
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    carried = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil()),
    }
    field = pa.field("embedding", VECTORS.type, metadata=carried)
    path = tmp_path / "evil.parquet"
    pq.write_table(pa.table([VECTORS], schema=pa.schema([field])), path)
    code = (
        "import sys, pathlib; from pipelines.data.feature_tables import read_table\n"
        "print(read_table(pathlib.Path(sys.argv[1]), list('abcde')).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "(5, 4)" in done.stdout or "DataError" in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists()


def test_arrays_that_promise_more_than_they_hold_are_refused(tmp_path):
    folder = tmp_path / "data" / "u" / "features"
    folder.mkdir(parents=True)
    (folder.parent / "list.txt").write_text("a\nb\n")
    (tmp_path / "m.yaml").write_text(
        yaml.safe_dump({"name": "m", "kind": "features", "unlabelled": {"root": "u"}})
    )
    dataset = Dataset.open(tmp_path / "m.yaml", tmp_path / "data")

    def header(shape: str, descr: str = "'<f4'") -> bytes:
        text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
        text = text.ljust(118 - 1) + "\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()

    for raw in (
        b"",
        header("(2, 1000000000000)"),
        header("(2, -1)"),
        header("(2, 4)", "'|O'"),
        header("(2, 4)", "__import__('os').system('touch ran')"),
        header("()"),
        b"\x93NUMPY\x09\x00" + b"\xff" * 100,
    ):
        (folder / "x.npy").write_bytes(raw)
        with pytest.raises(DataError, match=r"x\.npy"):
            dataset.read_features("unlabelled", "x")


# ------------------------------------------------------------------------------------------ names

NAMES = [
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>.jpg',
    "</script><script>alert(2)</script>.jpg",
    "=HYPERLINK(\"http://x\";\"y\").jpg",
    "+1+1.jpg", "-1+1.jpg", "@SUM(1).jpg", "\t=1+1.jpg", "\r=1.jpg", "\n=1.jpg",
    "a;=1+1;b.jpg", 'a",=1+1,"b.jpg', "{{ 7*7 }}.jpg", "${7*7}.jpg", "\u202egpj.exe", "CON.jpg",
    "javascript:alert(1)", "&lt;b&gt;.jpg",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_no_name_becomes_markup_in_the_report(name):
    page = make_page(name)
    assert page.count("<script") == 2  # the data and the code
    assert page.count("<img") == 0
    assert "49.jpg" not in page  # no template ran
    assert read_data(page)["faces"][0][0] == name


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_no_name_becomes_a_formula_whatever_parts_the_cells(tmp_path, delimiter):
    count = len(NAMES)
    rows = {"sample_id": range(count), "path": NAMES, "pseudo_label": -1, "cluster_size": 0,
            "confidence": 0.5}  # fmt: skip
    write_csv(None, pd.DataFrame(rows), tmp_path / "x.csv", None)
    text = (tmp_path / "x.csv").read_bytes().decode()
    if delimiter == ",":
        shown = [row[1] for row in csv.reader(io.StringIO(text, newline=""))][1:]
        assert [cell.replace("'", "") for cell in shown] == NAMES
    for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter):
        for cell in row:
            assert not re.match(r"[=+@\t\r\n]|-[^0-9]", cell), cell


@pytest.mark.parametrize("name", NAMES)
def test_no_name_reaches_a_terminal_as_a_command(name):
    shown = str(DataError(f"{name}\x1b[2J\x07\x00\x9b1m\udcff is bad"))
    shown.encode()
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "is bad" in shown
    assert make_printable("é \U0001f600 名") == "é \U0001f600 名"


def test_the_pages_put_text_in_as_text():
    for path in ROOT.glob("pipelines/pages/*.js"):
        source = path.read_text(encoding="utf-8")
        dangers = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc",
            source,
        )
        assert dangers == [], path
    for path in ROOT.glob("pipelines/pages/*.html"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\son\w+\s*=", source), path
        assert not re.search(r"\|\s*safe\b", source), path
