"""Tables of vectors as other tools write them, by pandas, pyarrow and numpy themselves."""

import io
import os
import zipfile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cdp.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.data.feature_tables import read_table

NAMES = ["ann/1.jpg", "bob/😀 2.jpg", "ann/3.jpg", "dan/4.jpg"]
FLOATS = [np.float16, np.float32, np.float64]


def draw(kind, width=12):
    return np.random.default_rng(0).normal(size=(4, width)).astype(kind)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("list_of", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 12)])
@pytest.mark.parametrize("named", [True, False])
def test_columns_of_lists(tmp_path, monkeypatch, kind, list_of, named):
    vectors = draw(kind)
    order = [2, 0, 3, 1] if named else [0, 1, 2, 3]
    column = pa.array([list(row) for row in vectors[order]], list_of(pa.from_numpy_dtype(kind)))
    columns = {"score": pa.array([0.5] * 4), "embeddings": column}
    if named:
        columns["Image_Path"] = pa.array([NAMES[row] for row in order])
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
    monkeypatch.setattr("pipelines.data.feature_tables._BLOCK_NUMBERS", 24)
    found = read_table(tmp_path / "a.parquet", NAMES)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, vectors)


@pytest.mark.parametrize("kind", FLOATS)
def test_one_column_a_dimension(tmp_path, kind):
    vectors = draw(kind)
    frame = pd.DataFrame(vectors, columns=[f"dim_{number}" for number in range(12)])
    frame.insert(0, "quality", np.float32([1, 2, 3, 4]))
    frame["id"] = NAMES
    shuffled = frame.iloc[[3, 1, 0, 2]][["dim_10", *(c for c in frame if c != "dim_10")]]
    shuffled.to_parquet(tmp_path / "a.parquet")
    found = read_table(tmp_path / "a.parquet", NAMES)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, vectors)
    pd.DataFrame(vectors).rename(columns=str).to_parquet(tmp_path / "b.parquet")
    np.testing.assert_array_equal(read_table(tmp_path / "b.parquet", NAMES), vectors)


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, monkeypatch, kind, save):
    vectors = draw(kind)
    monkeypatch.setattr("pipelines.data.feature_tables._BLOCK_NUMBERS", 24)
    save(tmp_path / "a.npz", vectors)
    found = read_table(tmp_path / "a.npz", NAMES)
    assert found.dtype == kind
    np.testing.assert_array_equal(found, vectors)
    order = [1, 3, 0, 2]
    save(tmp_path / "b.npz", features=vectors[order], names=np.array(NAMES)[order],
         boxes=np.zeros((4, 4)))  # fmt: skip
    np.testing.assert_array_equal(read_table(tmp_path / "b.npz", NAMES), vectors)


def test_rows_that_are_missing_cost_their_image_alone(tmp_path):
    """A missing, a null and a short vector, and one of an image that is not listed."""
    people = [f"p{number}.jpg" for number in range(20)]
    rows = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32).tolist()
    rows[4], rows[9] = None, rows[9][:5]
    frame = pd.DataFrame({"path": [*people, "other.jpg"], "embedding": [*rows, [1.0] * 6]})
    folder = tmp_path / "u" / "features"
    folder.mkdir(parents=True)
    frame.drop(index=15).to_parquet(folder / "a.parquet")
    (tmp_path / "u" / "list.txt").write_text("\n".join(people) + "\n")
    manifest = {"name": "m", "kind": "features", "unlabelled": {"root": "u"}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(manifest))
    bad = Dataset.open(tmp_path / "m.yaml", tmp_path).find_bad_rows(["a"])
    reason = "its vector in view a is missing, or all NaN"
    assert bad == {("unlabelled", row): reason for row in (4, 9, 15)}


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: write_npz(p / "a.npz", a=np.ones((4, 2)), b=np.ones((4, 3))),
         "one of them called"),
        (lambda p: write_npz(p / "a.npz", a=np.arange(4)), "found a int64"),
        (lambda p: write_npz(p / "a.npz", a=np.ones((3, 2))), "3 vectors without names"),
        (lambda p: write_npz(p / "a.npz", a=np.asfortranarray(np.ones((4, 2)))), "by columns"),
        (lambda p: write_npz(p / "a.npz", a=np.ones((4, 2)), id=np.array(NAMES, object)),
         "dtype=str"),
        (lambda p: write_npz(p / "a.npz", a=np.ones((4, 2)), id=np.array(list("wxyz"))),
         "none of its names is in list.txt; its first is 'w'"),
        (lambda p: write_npz(p / "a.npz", a=np.ones((4, 2)), id=np.array([NAMES[0]] * 4)),
         "named by rows 1 and 2"),
        (lambda p: write_text(p / "a.npz"), "cannot be read"),
        (lambda p: write_text(p / "a.parquet"), "cannot be read"),
        (lambda p: write_parquet(p, {"a": [[1.0]] * 4, "b": [[1.0]] * 4}),
         "columns of vectors, a, b"),
        (lambda p: write_parquet(p, {"dim_0": [1.0] * 4, "dim_2": [1.0] * 4}), "numbered from 0"),
        (lambda p: write_parquet(p, {"path": [*NAMES[:3], None], "e": [[1.0]] * 4}),
         "no image in row 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, make, said):
    with pytest.raises(DataError, match=said):
        read_table(make(tmp_path), NAMES)


def write_text(path):
    path.write_text("no table at all")
    return path


def write_parquet(place, columns):
    pq.write_table(pa.table(columns), place / "a.parquet")
    return place / "a.parquet"


def test_an_array_that_lies_about_its_size_is_refused(tmp_path):
    head = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (4, 60_000)}
    np.lib.format.write_array_header_1_0(head, shape)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", head.getvalue() + bytes(64))
    with pytest.raises(DataError, match="lies about its size"):
        read_table(tmp_path / "a.npz", NAMES)


class Tripwire:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("array", ["embedding", "names"])
def test_an_archive_of_pickled_objects_is_refused_and_not_unpickled(tmp_path, array):
    objects = np.array([Tripwire(str(tmp_path / "unpickled"))] * 4, object)
    others = {"embedding": np.ones((4, 2)), "names": np.array(NAMES)}
    np.savez(tmp_path / "a.npz", **{**others, array: objects})
    with pytest.raises(DataError, match=r"a\.npz: .*(found embedding object|are Python objects)"):
        read_table(tmp_path / "a.npz", NAMES)
    assert not (tmp_path / "unpickled").exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as loaded:
        loaded[array]
    assert (tmp_path / "unpickled").exists()  # the same file, read without care


@pytest.mark.parametrize("text", ["string", "large_string", "string_view", "dictionary"])
def test_names_of_every_type_of_text(tmp_path, text):
    """Polars writes large strings or views, pandas dictionaries of categories."""
    kind = {"string": pa.string(), "large_string": pa.large_string(),
            "dictionary": pa.dictionary(pa.int32(), pa.string())}.get(text)  # fmt: skip
    if kind is None:
        if not hasattr(pa, "string_view"):
            pytest.skip("Arrow of this version has no views of strings")
        kind = pa.string_view()
    columns = {"path": pa.array(NAMES).cast(kind), "e": np.eye(4).tolist()}
    try:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip("Arrow of this version writes no views of strings")
    found = read_table(tmp_path / "a.parquet", NAMES[::-1])
    np.testing.assert_array_equal(found, np.eye(4)[::-1])
