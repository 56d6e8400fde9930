"""Questions about labelled people: clusters that look like one of them, and names in doubt."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cdp.errors import DataError
from pipelines.data.manifest import Entry
from pipelines.decisions import (
    ContradictionError,
    CorrectionTable,
    digest_decisions,
    find_names,
    list_active,
    resolve_decisions,
)
from pipelines.review.people import LabelledPeople
from pipelines.stages.ingest import correct_names

pytestmark = pytest.mark.torch

PILE = np.arange(6, 12)
KEYS = [f"u{sample}" for sample in PILE]


@pytest.fixture
def table(tmp_path):
    return CorrectionTable(tmp_path)


@pytest.fixture
def people():
    """Ann has images 0 to 2, Bob 3 to 5; 6 to 9 are one cluster, of which three look like Ann."""
    samples = pd.DataFrame(
        {
            "sample_id": np.arange(12),
            "path": [f"{each}.png" for each in range(12)],
            "split": ["labelled"] * 6 + ["unlabelled"] * 6,
            "identity": ["Ann"] * 3 + ["Bob"] * 3 + [None] * 6,
            "sha256": [f"{'l' if each < 6 else 'u'}{each}" for each in range(12)],
            "width": 20,
            "height": 30,
        }
    )
    assigned = pd.DataFrame(
        {
            "sample_id": [6, 7, 8, 10],
            "identity": ["Ann", "Ann", "Ann", "Bob"],
            "probability": np.float32([0.8, 0.8, 0.8, 0.9]),
        }
    )
    issues = pd.DataFrame(
        {
            "sample_id": [2, 3, 4],
            "issue": ["wrong_name", "second_label", "second_label"],
            "identity": ["Ann", "Bob", "Bob"],
            "seems": [None, "Ann", "Ann"],
            "probability": np.float32([0.9, 0.7, 0.7]),
        }
    )
    run = SimpleNamespace(
        samples=samples, assignments=assigned, label_issues=issues, labelled_thumbnails={0: b"x"}
    )
    return LabelledPeople(run, PILE)


LABEL = np.array([0, 0, 0, 0, -1, -1])


def test_a_cluster_is_asked_about_beside_the_person_it_looks_like(people, table):
    ann, bob = people.ask_people(LABEL, find_names((), KEYS))
    assert (ann.identity, ann.rows.tolist()) == ("Ann", [0, 1, 2, 3])
    assert ann.chance == pytest.approx(0.6)
    assert ann.worth == pytest.approx(0.6 * 4 * 3)
    assert (bob.identity, bob.rows.tolist()) == ("Bob", [4])
    beside = people.describe("Ann")
    assert [face["id"] for face in beside["faces"]] == [0, 1, 2]
    assert [face["picture"] for face in beside["faces"]] == [True, False, False]
    table.append("ada", "name", [KEYS[:4]], identity="Ann")
    table.append("ada", "deny", [KEYS[4:5]], identity="Bob")
    names = find_names(table.read(), KEYS)
    assert people.ask_people(LABEL, names) == []
    assert people.name_rows(names).tolist() == ["Ann"] * 4 + [None] * 2
    # Four images are Ann's for certain now, the fifth is not Bob.
    assert people.find_changed(names).tolist() == [True] * 5 + [False]
    people.is_sure[:3] = True
    assert np.flatnonzero(people.find_changed(names)).tolist() == [3, 4]


def test_a_name_links_its_images_and_keeps_other_people_apart(table):
    table.append("ada", "name", [["a", "b"]], identity="Ann")
    table.append("ada", "name", [["c"]], identity="Ann")
    table.append("ada", "name", [["d"]], identity="Bob")
    table.append("ada", "merge", [["d"], ["e"]])
    keys = [*"abcde"]
    found, _ = resolve_decisions(table.read(), keys)
    assert len(set(found.link_rows()[:3])) == 1
    assert find_names(table.read(), keys).identity.tolist() == ["Ann"] * 3 + ["Bob"] * 2
    for action, groups, identity in (
        ("merge", [["a"], ["e"]], None),
        ("name", [["b"]], "Bob"),
        ("deny", [["a", "x"]], "Ann"),
        ("deny", [["e"]], "Bob"),
        ("split", [["a"], ["c"]], None),
    ):
        with pytest.raises(ContradictionError):
            table.append("bo", action, groups, identity=identity)
    for action, identity in (("name", None), ("accept", "Ann"), ("rename", None)):
        with pytest.raises(DataError, match="name a person"):
            table.append("bo", action, [["z"]], identity=identity)
    before = digest_decisions(table.read())
    table.append("ada", "undo", undoes=3)
    table.append("ada", "name", [["d"]], identity="Cy")
    assert digest_decisions(table.read()) != before
    assert table.read()[-1].identity == "Cy"


def test_doubts_are_asked_once_an_image_or_once_two_names(people, table):
    wrong, second = sorted(people.ask_doubts(()), key=lambda each: each.issue, reverse=True)
    assert (wrong.images.tolist(), wrong.seems) == ([2], None)
    assert (second.images.tolist(), second.identity, second.seems) == ([3, 4], "Bob", "Ann")
    assert second.worth == pytest.approx(0.7 * 2 * (1 + 3))
    table.append("ada", "keep", [people.find_keys([2])])
    table.append("ada", "rename", [people.find_keys([3, 4])], identity="Ann")
    assert people.ask_doubts(table.read()) == []
    assert people.count_corrected(table.read()) == 2
    with pytest.raises(ContradictionError, match="decision 1"):
        table.append("bo", "exclude", [people.find_keys([2])])
    with pytest.raises(DataError, match="no labelled image 7"):
        people.find_keys([7])
    assert resolve_decisions(table.read(), KEYS)[1] == 0  # not counted as gone


def test_labelled_images_enter_a_run_as_reviewers_corrected_them(table):
    entries = [Entry(f"{key}.png", split, name) for key, split, name in (
        ("a", "labelled", "Ann"), ("b", "labelled", "Ann"), ("c", "labelled", "Bob"),
        ("a2", "evaluation", "Ann"),
    )]  # fmt: skip
    found = [(9, 9, each, "") for each in ("a", "b", "", "a")]
    assert correct_names(entries, found, ()) == (entries, found)
    table.append("ada", "rename", [["a", "path:c.png"]], identity="Cy")
    table.append("ada", "exclude", [["b"]])
    after, reasons = correct_names(entries, found, list_active(table.read()))
    assert [each.identity for each in after] == ["Cy", "Ann", "Cy", "Ann"]
    assert [each[3] for each in reasons] == ["", "set aside in review, decision 2", "", ""]
