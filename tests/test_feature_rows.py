"""Ready features without a list: the tables name the images and their people."""

import numpy as np
import pandas as pd
import pytest
import yaml

from cdp.errors import DataError
from pipelines.data.dataset import Dataset

PEOPLE = ["ann", "ann", "bob", "bob"]
NAMES = [f"{person}/{number}.jpg" for number, person in enumerate(PEOPLE)]


@pytest.fixture
def write(tmp_path):
    """Vectors of four labelled and three unlabelled images, named by their tables alone."""

    def open_dataset() -> Dataset:
        return Dataset.open(tmp_path / "m.yaml", tmp_path)

    def write_table(path: str, columns: dict, name: str = "path") -> None:
        place = tmp_path / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".npz":
            np.savez(place, **{key: np.array(value) for key, value in columns.items()})
        else:
            pd.DataFrame(columns).to_parquet(place)

    manifest = {"name": "m", "kind": "features", "labelled": {"root": "l"},
                "unlabelled": {"root": "u"}}  # fmt: skip
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(manifest))
    named = {"path": NAMES, "identity": PEOPLE, "embedding": np.eye(4).tolist()}
    write_table("l/features/a.parquet", named)
    write_table("u/features/a.parquet", {"id": [7, 9, 8], "vector": np.eye(4)[:3].tolist()})
    open_dataset.write, open_dataset.root, open_dataset.named = write_table, tmp_path, named
    return open_dataset


def test_a_table_that_names_its_rows_is_enough(write):
    dataset = write()
    entries = dataset.list_entries()
    assert [(each.path, each.identity) for each in entries] == [
        *zip(NAMES, [f"labelled/{person}" for person in PEOPLE], strict=True),
        ("7", None), ("9", None), ("8", None)]  # fmt: skip
    np.testing.assert_array_equal(dataset.read_features("labelled", "a"), np.eye(4))
    np.testing.assert_array_equal(dataset.read_features("unlabelled", "a"), np.eye(4)[:3])


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_a_second_table_in_another_order_and_with_another_image(write, suffix):
    order = [3, 1, 0]
    columns = {"names": ["./" + NAMES[row] for row in order] + ["eve\\9.jpg"],
               "label": [PEOPLE[row] for row in order] + ["eve"],
               "embedding": [[row, 1.0] for row in order] + [[9.0, 1.0]]}  # fmt: skip
    write.write(f"l/features/b.{suffix}", columns)
    dataset = write()
    assert [each.path for each in dataset.list_entries()][:5] == [*NAMES, "eve\\9.jpg"]
    found = dataset.read_features("labelled", "b")
    assert found[:, 0].tolist()[:2] == [0, 1]
    assert np.isnan(found[2]).all()
    assert found[3:, 0].tolist() == [3, 9]
    assert np.isnan(dataset.read_features("labelled", "a")[4]).all()


def test_a_frame_whose_index_are_the_paths(write):
    frame = pd.DataFrame({"vector": list(np.eye(4)[:2])}, index=["x.jpg", "y.jpg"])
    frame.to_parquet(write.root / "u/features/a.parquet")
    assert [each.path for each in write().list_entries()][4:] == ["x.jpg", "y.jpg"]


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_numbers_of_people_beside_a_missing_one(write, suffix):
    (write.root / "u/features/a.parquet").unlink()
    columns = {"path": ["x", "y", "z"], "embedding": np.eye(3).tolist()}
    write.write(f"u/features/a.{suffix}", {**columns, "label": [7.0, float("nan"), 12.0]})
    named = [(each.path, each.identity) for each in write().list_entries()][4:]
    assert named == [("x", "unlabelled/7"), ("y", None), ("z", "unlabelled/12")]
    words = ["nan", "Nan", "<NA>"] if suffix == "npz" else ["None", "Nan", None]
    write.write(f"u/features/a.{suffix}", {**columns, "label": words})
    assert [each.identity for each in write().list_entries()][4:] == [None, "unlabelled/Nan", None]


def remove_people(write):
    write.write("l/features/a.parquet", {**write.named, "identity": ["ann", None, "bob", "bob"]})


def remove_everybody(write):
    write.write("l/features/a.parquet", {**write.named, "identity": [None] * 4})


def write_fractions(write):
    write.write("l/features/a.parquet", {**write.named, "identity": [1.0, 2.0, 0.5, 2.0]})


def write_large_floats(write):
    write.write("l/features/a.parquet", {**write.named, "identity": [1.0, 2.0, 1e17, 2.0]})


def name_nobody_in_meta(write):
    (write.root / "l/list.txt").write_text("\n".join(NAMES) + "\n")
    (write.root / "l/meta.txt").write_text("ann\nnan\nbob\nbob\n")


def save_names_as_in_windows(write):
    (write.root / "u/list.txt").write_bytes("Jörg.jpg\n".encode("cp1252"))


def contradict(write):
    write.write("l/features/b.parquet", {**write.named, "identity": ["eve", *PEOPLE[1:]]})


def leave_names_out(write):
    write.write("u/features/a.parquet", {"vector": np.eye(4)[:3].tolist()})


def name_people_only(write):
    (write.root / "u/meta.txt").write_text("a\nb\nc\n")


def pickle_names(write):
    names = np.array(["a", "b", "c"], object)
    np.savez(write.root / "u/features/a.npz", names=names, vectors=np.eye(3))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove_people, r"need a person each, and 'ann/1\.jpg' has none; 1 of 4 rows have none"),
        (remove_everybody, r"'ann/0\.jpg' has none, as no image has\. Add a column `identity`"),
        (write_fractions, r"row 3: the column `identity` of people has 0\.5; text or whole"),
        (write_large_floats, r"row 3, column `identity`: .* float 1e\+17, which is not exact"),
        (name_nobody_in_meta, r"meta\.txt, row 2: .*expected, got 'nan'; 1 of 4 rows have none"),
        (save_names_as_in_windows, r"list\.txt: text in UTF-8 expected, and line 1 holds .*0xf6"),
        (contradict, r"'ann/0\.jpg' shows 'eve', and 'ann' by another table"),
        (leave_names_out, r"list\.txt: no such file.*must name its rows in a column `path`"),
        (name_people_only, r"meta\.txt names one person a row, and beside it is no list\.txt"),
        (pickle_names, r"a\.npz: the names `names` are Python objects, which are not read"),
    ],
)
def test_what_is_missing_is_named(write, change, said):
    change(write)
    with pytest.raises(DataError, match=said):
        write().list_entries()


def test_vectors_without_names_are_refused_beside_a_table_with_names(write):
    np.save(write.root / "u/features/b.npy", np.eye(3))
    write.write("u/features/c.parquet", {"vector": np.eye(4)[:3].tolist()})
    dataset = write()
    assert len(dataset.list_entries()) == 7
    for model in ("b", "c"):
        with pytest.raises(DataError, match=f"{model}.* does not name its rows, and there is no u"):
            dataset.read_features("unlabelled", model)
    (write.root / "u/list.txt").write_text("7\n9\n8\n")
    np.testing.assert_array_equal(dataset.read_features("unlabelled", "b"), np.eye(3))
