"""Lists of images: which column names people, what names nobody, encodings and separators."""

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cdp.errors import DataError
from pipelines.check import check_inputs
from pipelines.config import RunConfig
from pipelines.data.dataset import Dataset
from pipelines.data.fields import MISSING, read_field
from pipelines.data.lists import read_image_list, read_list

PEOPLE = ["ann", "ann", "bob", "bob"]


def read_people(path: Path, text: str | bytes) -> list[str | None]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [row.identity for row in read_list(path)]


@pytest.mark.parametrize("column", ["identity", "label", "person", "name", "full_name"])
def test_a_column_of_people_wins_over_one_of_numbers(tmp_path: Path, column: str) -> None:
    rows = "".join(f"{number},{number}.png,{person}\n" for number, person in enumerate(PEOPLE))
    assert read_people(tmp_path / "a.csv", f"id,path,{column}\n{rows}") == PEOPLE
    found = read_image_list(tmp_path / "a.csv")
    assert (found.column, found.others) == (column, ())
    lines = [json.dumps({"id": n, "path": f"{n}.png", column: p}) for n, p in enumerate(PEOPLE)]
    lines[1] = lines[1].replace('"ann"', "null")
    assert read_people(tmp_path / "a.jsonl", "\n".join(lines)) == ["ann", None, "bob", "bob"]


def test_without_another_column_the_id_is_the_person(tmp_path: Path) -> None:
    assert read_people(tmp_path / "a.csv", "id,path\n7,1.png\n7,2.png\n") == ["7", "7"]
    read_people(tmp_path / "b.csv", "path,name,label\n1.png,ann,x\n")
    found = read_image_list(tmp_path / "b.csv")
    assert (found.column, found.others) == ("label", ("name",))


def test_what_names_nobody() -> None:
    assert not any(read_field(word) for word in (*MISSING, "", "  ", " nan ", None, float("nan")))
    for person in ("Nan", "Na", "na", "none", "Null", "nana", "NAN"):
        assert read_field(person) == person


def test_whole_numbers_are_one_identity_however_written() -> None:
    assert [read_field(value) for value in (7, 7.0, "7", "7.0", " 7.000000")] == ["7"] * 5
    assert [read_field(value) for value in ("007", "7.5", 7.5, "-1.0", "1.0.0")] == [
        "007", "7.5", "7.5", "-1", "1.0.0",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"which is not exact\. Save the column as text"):
        read_field(1e17)


def test_missing_people_of_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame({"path": ["1.png", "2.png", "3.png"], "identity": [7.0, None, 12.0]})
    frame.to_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    frame.astype(str).to_csv(tmp_path / "b.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    (tmp_path / "b.jsonl").write_text(
        '{"path": "1.png", "identity": 7}\n{"path": "2.png", "identity": NaN}\n'
        '{"path": "3.png", "identity": 12}\n'
    )
    for name in ("a.csv", "a.parquet", "b.csv", "a.jsonl", "b.jsonl"):
        assert [row.identity for row in read_list(tmp_path / name)] == ["7", None, "12"], name


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("head", [True, False])
def test_separators(tmp_path: Path, separator: str, head: bool) -> None:
    rows = [("path", "identity")] * head + [("1.png", "Jörg, Dr."), ("2.png", "ann")]
    lines = [separator.join(f'"{field}"' for field in row) for row in rows]
    assert read_people(tmp_path / "a.csv", "\n".join(lines)) == ["Jörg, Dr.", "ann"]


def test_a_path_may_hold_a_separator(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a|b|c.png,ann\n")
    (row,) = read_list(tmp_path / "a.csv")
    assert (row.path, row.identity) == ("a|b|c.png", "ann")


TEXT = "path,identity\r\n1.png,Jörg\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_are_read(tmp_path: Path, encoding: str) -> None:
    assert read_people(tmp_path / "a.csv", TEXT.encode(encoding)) == ["Jörg"]


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("cp1252", r"a\.csv: text in UTF-8 expected, and line 2 holds the byte 0xf6.*Save it as"),
        ("utf-16-le", r"a\.csv: text in UTF-8 expected, and many of its bytes are zero, as in UTF"),
    ],
)
def test_encodings_that_are_named(tmp_path: Path, encoding: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_people(tmp_path / "a.csv", TEXT.encode(encoding))


@pytest.fixture
def check(tmp_path: Path):
    """The findings of a check of a list of four images in `faces` beside a pile of one."""
    for name in ("faces/0.png", "faces/1.png", "faces/2.png", "faces/3.png", "pile/9.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")

    def describe(text: str, **manifest) -> list[str]:
        (tmp_path / "a.csv").write_text(text)
        whole = {"name": "m", "kind": "images", "unlabelled": {"root": "pile"},
                 "labelled": {"root": "faces", "list": "a.csv"}, **manifest}  # fmt: skip
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(whole))
        dataset = Dataset.open(tmp_path / "m.yaml", tmp_path)
        member = {"name": "a", "backbone": "residual"}
        config = RunConfig.model_validate(
            {"name": "r", "data": "m.yaml", "committee": {"base": member, "members": ()}}
        )
        return [str(each) for each in check_inputs(config, dataset, pictures=False, models=False)]

    return describe


def write_rows(head: str, *fields: list[str]) -> str:
    return "\n".join([head, *map(",".join, zip(*fields, strict=True))]) + "\n"


PATHS = [f"{number}.png" for number in range(4)]


@pytest.mark.torch  # the check asks whether a mediator can be trained
def test_a_column_that_names_every_row_is_reported(check) -> None:
    found = check(write_rows("path,id,celebrity", PATHS, list("1234"), PEOPLE))
    said = "a.csv: each of 4 rows has an identity of its own, by the column `id`. If that does"
    assert any(text.startswith(f"warning: {said}") for text in found)
    found = check(write_rows("path,label,name", PATHS, PEOPLE, PEOPLE))
    assert not [text for text in found if "of its own" in text]
    said = "a.csv: people are named by the column `label`, and not by `name`; call the right one"
    assert any(text.startswith(said) for text in found)


@pytest.mark.torch  # the check asks whether a mediator can be trained
def test_rows_of_a_split_that_nobody_takes_are_counted(check) -> None:
    splits = ["train", "train", "val", "val"]
    rows = write_rows("path,identity,split", PATHS, PEOPLE, splits)
    said = "warning: a.csv: 2 rows of the split 'val' are left out: no split evaluation of the"
    assert any(text.startswith(said) for text in check(rows))
    assert not [text for text in check(rows, evaluation={"root": "faces", "list": "a.csv"})
                if "left out" in text]  # fmt: skip
    # The pile is a folder that holds them: they are among its images.
    assert not [text for text in check(rows, unlabelled={"root": "faces"}) if "left out" in text]


@pytest.mark.torch  # the check asks whether a mediator can be trained
def test_after_a_listing_that_failed_nothing_else_is_said(check) -> None:
    (found,) = check(write_rows("path,identity", PATHS, ["ann", "nan", "bob", ""]))
    assert found.startswith("error: a.csv, row 2: '1.png' has no identity; 2 of 4 rows have none (")
    assert "in the column `identity`). Name the person" in found
    (found,) = check("0.png,ann\n1.png,\n")
    assert "row 2: '1.png' has no identity; 1 of 2 rows have none (an empty field" in found
    (found,) = check("path\n0.png\n")
    assert "no column of the list is one of people, such as `identity`" in found


@pytest.mark.torch  # the check asks whether a mediator can be trained
def test_images_that_name_nobody_are_counted(check) -> None:
    text = write_rows("path,identity", PATHS, ["ann", "nan", "bob", ""])
    listed = {"root": "faces", "list": "a.csv"}
    found = check(text, labelled={"root": "pile", "layout": "pile"}, unlabelled=listed)
    said = "unlabelled: 4 images of 2 people; 2 images name nobody (an empty field"
    assert any(text.startswith(said) for text in found)


@pytest.mark.torch  # the check asks whether a mediator can be trained
def test_paths_that_lead_out_are_counted_together(check) -> None:
    paths = ["/data/0.png", "/data/1.png", "../../2.png", "../../3.png"]
    found = check(write_rows("path,identity", paths, PEOPLE))
    (absolute,) = (text for text in found if "an absolute path" in text)
    assert absolute.endswith(": 2 (the first: /data/0.png)")
    (out,) = (text for text in found if "leads out" in text)
    assert ": 2 (the first: " in out
