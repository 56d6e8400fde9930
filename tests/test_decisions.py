"""The corrections table: what was confirmed is there, whatever happens to process or disk."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from cdp.errors import DataError, StageError
from pipelines.decisions import (
    ContradictionError,
    CorrectionTable,
    digest_decisions,
    list_active,
    resolve_decisions,
)


@pytest.fixture
def table(tmp_path):
    return CorrectionTable(tmp_path)


def test_decisions_come_back_as_they_were_made(table):
    assert table.read() == ()
    made = [
        table.append("ada", "accept", [["b", "a", "b"]]),
        table.append("bo", "split", [["c"], ["a", "é\n"]]),
        table.append("ada", "undo", undoes=1),
    ]
    assert [each.number for each in made] == [1, 2, 3]
    assert made[0].groups == (("a", "b"),)
    assert table.read() == tuple(made)
    assert [each.number for each in list_active(made)] == [2]
    assert made[0].at < made[1].at


@pytest.mark.parametrize("torn", [b"{", b'{"number":3,"at":"2020', b"\xff\xfe"])
def test_a_line_cut_short_is_dropped_and_the_rest_kept(table, torn):
    table.append("ada", "accept", [["a", "b"]])
    whole = table.path.read_bytes()
    table.path.write_bytes(whole + torn)
    assert [each.number for each in table.read()] == [1]
    table.append("ada", "reject", [["c"]])
    assert table.path.read_bytes().startswith(whole)
    assert [each.number for each in table.read()] == [1, 2]


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"action": "erase"}', '{"action": "accept"}'])
def test_a_damaged_line_is_named(table, line):
    table.append("ada", "accept", [["a", "b"]])
    with table.path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=r"corrections\.jsonl, line 2: not a decision"):
        table.read()


APPEND = """
import sys
from pathlib import Path
from pipelines.decisions import CorrectionTable
table = CorrectionTable(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    made = table.append(sys.argv[2], "accept", [[f"{sys.argv[2]}{number}", "x" * 3000]])
    print(made.number, flush=True)
"""


def start(table, name, count):
    command = [sys.executable, "-c", APPEND, str(table.path.parent), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_whatever_was_confirmed_survives_a_kill(table):
    confirmed = []
    for moment in (1, 7, 20):
        with start(table, f"k{moment}-", 10_000) as process:
            for _ in range(moment):
                confirmed.append(int(process.stdout.readline()))
            time.sleep(0.002 * moment)
            process.send_signal(signal.SIGKILL)
            confirmed += [int(line) for line in process.stdout.read().split()]
    found = [each.number for each in table.read()]
    assert found == list(range(1, len(found) + 1))
    assert set(confirmed) <= set(found)


def test_two_reviewers_at_once_lose_nothing(table):
    with start(table, "a", 40) as one, start(table, "b", 40) as other:
        numbers = [*one.stdout.read().split(), *other.stdout.read().split()]
    assert sorted(map(int, numbers)) == list(range(1, 81))
    assert sorted(each.number for each in table.read()) == list(range(1, 81))


def test_a_full_disk_refuses_this_decision_and_keeps_the_others(table):
    table.append("ada", "accept", [["a", "b"]])
    before = table.path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limit[1]))
        with pytest.raises(StageError, match="this decision was not kept"):
            table.append("ada", "accept", [["c", "d"]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    assert table.path.read_bytes() == before
    assert table.append("ada", "accept", [["c", "d"]]).number == 2


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "nowhere"):
        with pytest.raises(StageError, match="no decision can be kept"):
            CorrectionTable(tmp_path / place).append("ada", "accept", [["a", "b"]])


def test_a_contradiction_names_the_decision_in_its_way(table):
    table.append("ada", "accept", [["a", "b"]])
    table.append("ada", "merge", [["b"], ["c"]])
    table.append("ada", "reject", [["z"]])
    with pytest.raises(ContradictionError, match=r"decision 2 \(merge by ada") as raised:
        table.append("bo", "split", [["a"], ["c"]])
    assert raised.value.number == 2
    table.append("bo", "undo", undoes=2)
    table.append("bo", "split", [["a"], ["c"]])
    with pytest.raises(ContradictionError, match="decision 3"):
        table.append("bo", "accept", [["z", "a"]])


@pytest.mark.parametrize(
    ("action", "groups", "undoes", "expected"),
    [
        ("accept", [], None, "accept expects 1"),
        ("merge", [["a"]], None, "merge expects 2"),
        ("split", [["a"], []], None, "none empty"),
        ("split", [["a", "b"], ["b", "c"]], None, "in common; 1 of the images is in both"),
        ("apart", [["a", "b"], ["a", "b"]], None, "in common; 2 of the images are in both"),
        ("undo", [], 9, "no decision 9 to undo"),
    ],
)
def test_malformed_decisions_are_refused_and_not_kept(table, action, groups, undoes, expected):
    with pytest.raises(DataError, match=expected):
        table.append("ada", action, groups, undoes=undoes)
    assert table.read() == ()


def test_undoing_everything_leaves_no_trace_in_the_fingerprint(table):
    assert digest_decisions(table.read()) == ""
    table.append("ada", "accept", [["a", "b"]])
    once = digest_decisions(table.read())
    table.append("bo", "undo", undoes=1)
    assert digest_decisions(table.read()) == ""
    table.append("bo", "accept", [["b", "a"]])
    assert digest_decisions(table.read()) == once != ""


def test_images_that_are_gone_are_set_aside(table):
    table.append("ada", "accept", [["a", "b", "gone"]])
    table.append("ada", "split", [["gone"], ["c"]])
    corrections, missing = resolve_decisions(table.read(), ["b", "c", "a"])
    assert missing == 1
    assert list(corrections.same[0]) == [0, 2]
    assert json.loads(table.path.read_text().splitlines()[0])["who"] == "ada"
