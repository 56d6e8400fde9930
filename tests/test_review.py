"""The review server over HTTP, and a rerun that applies the decisions."""

import http.client
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from known_clusters import SIZES

import cdp
from cdp.errors import DataError, StageError
from pipelines.decisions import CorrectionTable
from pipelines.graphs.view import describe_neighbours
from pipelines.review.neighbours import NeighbourLists
from pipelines.review.session import ReviewSession, find_moved, name_question
from pipelines.run import main
from pipelines.tables import vector_column, write_table

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]


class Client:
    """Asks one review server as its own page would."""

    def __init__(self, process, address):
        self.process = process
        self.host, self.token = re.fullmatch(r"http://([^/]+)/([^/]+)/", address).groups()

    def ask(self, method, path, body=None, **headers):
        """(status, headers, body) of one request; a header None is left out."""
        given = {"Host": self.host}
        if method == "POST":
            given |= {"Origin": f"http://{self.host}", "Content-Type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection(self.host, timeout=120)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
        for name, value in {**given, "Content-Length": str(len(data))}.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(data)
        response = connection.getresponse()
        found = response.status, dict(response.getheaders()), response.read()
        connection.close()
        return found

    def get(self, path):
        status, _, body = self.ask("GET", f"/{self.token}/{path}")
        return status, json.loads(body)

    def post(self, path, body):
        status, _, answer = self.ask("POST", f"/{self.token}/{path}", body)
        return status, json.loads(answer)


@contextmanager
def serve(run, stop=signal.SIGINT):
    command = [sys.executable, "-m", "pipelines.review", "--run", str(run), "--reviewer", "ada"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert "review of" in process.stdout.readline()
            yield Client(process, process.stdout.readline().strip())
        finally:
            process.send_signal(stop)
            process.stdout.read()
            assert process.wait(120) == (0 if stop == signal.SIGINT else -stop)


@pytest.fixture(scope="module")
def client(known_run):
    """A server nobody decides anything on."""
    with serve(known_run) as client:
        yield client


def test_it_listens_on_loopback_only(client):
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(client.process.pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening == ["127.0.0.1"]


def test_without_the_token_nothing_is_found(client):
    right = client.token
    for path in ("/", "/asset/page.css", "/x/", f"/{right[:-1]}/", f"/{right}x/", f"/{right}",
                 "/x/question", "/x/face/0"):  # fmt: skip
        status, _, body = client.ask("GET", path)
        assert status == 404, path
        assert right.encode() not in body
    assert client.ask("GET", f"/{right}/")[0] == 200
    _, _, body = client.ask("GET", f"/{right[:-1]}/", Accept="text/html,*/*")
    assert body.decode().endswith("Open the address that the command printed last.\n")


def test_other_hosts_and_other_pages_are_refused(client):
    question = f"/{client.token}/question"
    decisions = f"/{client.token}/decisions"
    port = client.host.partition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", "", f"127.0.0.1:{port}0"):
        assert client.ask("GET", question, Host=host)[0] == 403, host
    assert client.ask("GET", question, Host=f"localhost:{port}")[0] == 200
    assert client.ask("GET", question, Sec_Fetch_Site="cross-site")[0] == 403
    undo = {"action": "undo", "number": 1}
    for origin in ("http://evil.example", "null", None, "https://127.0.0.1"):
        assert client.ask("POST", decisions, undo, Origin=origin)[0] == 403, origin
    assert client.ask("POST", decisions, undo, Content_Type="text/plain")[0] == 415
    assert client.ask("POST", decisions, undo)[0] == 400


def test_no_file_can_be_reached_by_a_path(client, known_run):
    for path in (
        "asset/../../../etc/passwd",
        "asset/%2e%2e/%2e%2e/etc/passwd",
        "asset/__init__.py",
        "asset/..",
        "asset//etc/passwd",
        "face/../run.json",
        "face/99999999",
        "face/-1",
        "face/1e3",
        "../run.json",
        "report/report.html",
    ):
        status, _, body = client.ask("GET", f"/{client.token}/{path}")
        assert status == 404, path
        assert b"root:" not in body
    sample = int(cdp.open_run(known_run).labels.sample_id[0])
    status, headers, body = client.ask("GET", f"/{client.token}/face/{sample}")
    assert (status, headers["Content-Type"]) == (200, "image/webp")
    assert body == cdp.open_run(known_run).thumbnails[sample]


def test_answers_carry_a_policy_and_do_not_name_the_server(client):
    for path in ("", "question", "asset/review.js", "nowhere"):
        _, headers, _ = client.ask("GET", f"/{client.token}/{path}")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Server" not in headers
        assert not [name for name in headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        {"action": "erase", "groups": []},
        {"action": "accept"},
        {"action": "accept", "groups": []},
        {"action": "accept", "groups": [["1"]]},
        {"action": "accept", "groups": [[1.5]]},
        {"action": "accept", "groups": [[10**9]]},
        {"action": "accept", "groups": [[-1, True]]},
        {"action": "merge", "groups": [[1], []]},
        {"action": "undo", "number": "1"},
        {"action": "undo", "number": 77},
    ],
    ids=str,
)
def test_malformed_decisions_are_refused(client, known_run, body):
    status, _, answer = client.ask("POST", f"/{client.token}/decisions", body)
    assert status == 400
    assert json.loads(answer)["error"]
    assert not (known_run / "corrections.jsonl").exists()


def test_questions_come_in_the_order_of_their_worth(known_run):
    session = ReviewSession(cdp.open_run(known_run), "ada")
    worth = [question.worth for question in session.questions]
    assert worth == sorted(worth, reverse=True)
    assert len(worth) > 3
    first = session.questions[0]
    session.skip(list(name_question(first)))
    assert session.questions[-1] is first
    with pytest.raises(DataError, match="name of a question"):
        session.skip([1])


def test_a_skip_names_its_question(client):
    shown = client.get("question")[1]["question"]["name"]
    assert client.post("skip", {"name": [0, 1, 2]})[0] == 400
    assert client.post("skip", {})[0] == 400
    assert client.get("question")[1]["question"]["name"] == shown
    # A question that another page shows is skipped, not the first of this one.
    assert client.post("skip", {"name": [10**6, 10**6]})[0] == 200
    assert client.get("question")[1]["question"]["name"] == shown
    assert client.post("skip", {"name": shown})[0] == 200
    assert client.get("question")[1]["question"]["name"] != shown


def find_parts(session):
    """The first cluster that a stricter threshold parts, and its parts."""
    for label in range(session.label.max() + 1):
        whole = ids(session.describe_cluster(label)["sides"][0])
        try:
            return whole, session.propose_parts(whole)
        except DataError:  # nothing parts it
            continue
    raise AssertionError("no cluster can be parted")


def test_a_stricter_cut_is_proposed_kept_and_undone(own_known_run):
    session = ReviewSession(cdp.open_run(own_known_run), "ada")
    whole, found = find_parts(session)
    parts = [ids(side) for side in found["sides"]]
    assert len(parts) >= 2
    assert sum(map(len, parts)) + found["more"] == len(whole)
    assert {each for part in parts for each in part} <= set(whole)
    assert sorted(map(len, parts), reverse=True) == [len(part) for part in parts]
    session.name_reviewer(" Ada L ")
    made = session.split_parts(parts)
    assert len(made) == len(parts) - 1
    assert {decision.who for decision in made} == {"Ada L"}
    rows = [np.searchsorted(session.sample_id, part) for part in parts]
    labels = [set(session.label[each].tolist()) - {-1} for each in rows]
    assert all(not one & two for at, one in enumerate(labels) for two in labels[:at])
    assert session.count_pending() > 0
    for decision in reversed(made):
        session.undo(decision.number)
    assert session.count_pending() == 0
    with pytest.raises(DataError, match="no threshold parts"):
        session.propose_parts(whole[:1])
    with pytest.raises(DataError, match="two groups"):
        session.split_parts([whole])
    with pytest.raises(DataError, match="1 to 100 characters"):
        session.name_reviewer("  ")


def test_the_page_asks_for_parts_and_names_its_reviewer(own_known_run):
    with serve(own_known_run) as client:
        asked = [client.post("parts", {"ids": each}) for each in find_clusters(client, len(SIZES))]
        assert {status for status, _ in asked} <= {200, 400}
        found = next(answer for status, answer in asked if status == 200)
        assert all("no threshold parts" in answer["error"] for status, answer in asked
                   if status == 400)  # fmt: skip
        parts = [ids(side) for side in found["sides"]]
        sent = {"action": "parts", "groups": parts, "who": "bo"}
        status, answer = client.post("decisions", sent)
        assert (status, len(answer["numbers"])) == (200, len(parts) - 1)
        assert client.post("parts", {"ids": "all"})[0] == 400
        progress = client.get("question")[1]["progress"]
        assert progress["reviewer"] == "bo"
        assert 0 <= progress["estimated_f"] <= 1


@pytest.mark.parametrize(
    ("before", "now", "moved"),
    [
        ([0] * 20 + [1] * 36, [0] * 56, 20),
        ([0] * 10, [0] * 7 + [1] * 3, 3),
        ([0, 0, -1, -1], [0, 0, 0, -1], 1),
        ([0, 0, 1, 1], [1, 1, 0, 0], 0),
        ([0, 0, 1, 1], [-1, -1, 0, 0], 2),
        ([-1, -1], [-1, -1], 0),
    ],
)
def test_pending_counts_the_images_of_a_merge(before, now, moved):
    assert find_moved(np.array(before), np.array(now)).sum() == moved


def ids(side):
    return [face["id"] for face in side["faces"]]


def find_clusters(client, count):
    status, answer = client.get("clusters?order=size")
    assert status == 200
    labels = [cluster["label"] for cluster in answer["clusters"][:count]]
    return [ids(client.get(f"cluster/{label}")[1]["sides"][0]) for label in labels]


def test_decisions_are_kept_shown_undone_and_applied(own_known_run, known):
    with serve(own_known_run) as client:
        one, two, three, four, five = find_clusters(client, 5)
        assert [len(each) for each in (one, two, three, four, five)] == [*SIZES[:5]]
        assert client.post("decisions", {"action": "merge", "groups": [one, two]})[0] == 200
        split = {"action": "split", "groups": [three[:1], three[1:]]}
        assert client.post("decisions", split)[0] == 200
        assert client.post("decisions", {"action": "reject", "groups": [four[:1]]})[0] == 200
        assert client.post("decisions", {"action": "accept", "groups": [four[1:]]})[0] == 200
        assert client.post("decisions", {"action": "accept", "groups": [three]})[0] == 409
        assert client.post("decisions", {"action": "undo", "number": 2})[0] == 200
        assert client.post("decisions", {"action": "accept", "groups": [three]})[0] == 200
        kept = [each.action for each in CorrectionTable(own_known_run).read()]
        assert kept == ["merge", "split", "reject", "accept", "undo", "accept"]
        answer = client.get("decisions")[1]["decisions"]
        assert [each["active"] for each in answer] == [True, False, True, True, False, True]
        assert {each["who"] for each in answer} == {"ada"}
        live = find_clusters(client, 1)[0]
        assert set(one + two) <= set(live)
        pending = client.get("question")[1]["progress"]["pending"]
        name = {"action": "name", "groups": [five], "identity": "l01"}
        assert client.post("decisions", {**name, "identity": "nobody"})[0] == 400
        assert client.post("decisions", name)[0] == 200
        assert client.get("question")[1]["progress"]["pending"] == pending + len(five)
        assert client.post("decisions", {**name, "action": "deny"})[0] == 409

    runs = own_known_run.parent
    arguments = [*known, "--runs-dir", str(runs), "--until", "propagate"]
    before = cdp.open_run(own_known_run)
    assert len(before.labels) <= len(before.samples)
    assert main(arguments) == 0
    label = cdp.open_run(own_known_run).labels.set_index("sample_id").pseudo_label
    for group in (one + two, three, four[1:]):
        assert label[group].nunique() == 1
        assert label[group].iloc[0] >= 0
    assert label[four[0]] == -1
    changed = before.compare(own_known_run)
    assert len(changed.merged) == 1
    facts = cdp.open_run(own_known_run).manifest("propagate")["facts"]
    assert facts["corrections"] == 5
    assigned = cdp.open_run(own_known_run).assignments.set_index("sample_id")
    assert set(assigned.identity[five]) == {"l01"}

    for number in (1, 3, 4, 6, 7):
        CorrectionTable(own_known_run).append("bo", "undo", undoes=number)
    assert main(arguments) == 0
    pd.testing.assert_frame_equal(cdp.open_run(own_known_run).labels, before.labels)


def test_only_what_depends_on_corrections_runs_again(own_known_run, known, capsys):
    run = cdp.open_run(own_known_run)
    members = run.cluster(0).images.sample_id
    keys = run.samples.set_index("sample_id").sha256[members]
    CorrectionTable(own_known_run).append("ada", "accept", [list(keys)])
    arguments = [*known, "--runs-dir", str(own_known_run.parent), "--dry-run"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mediate   skip" in printed
    assert "thumbnails skip" in printed
    assert "propagate run   the corrections changed" in printed


def test_a_decision_that_was_answered_survives_a_kill(own_known_run):
    run = cdp.open_run(own_known_run)
    group = [int(sample) for sample in run.cluster(0).images.sample_id]
    with serve(own_known_run, stop=signal.SIGKILL) as client:
        assert client.post("decisions", {"action": "accept", "groups": [group]})[0] == 200
    with (own_known_run / "corrections.jsonl").open("a") as stream:
        stream.write('{"number": 2, "at')  # as a kill in the middle of a write would leave it
    with serve(own_known_run) as client:
        assert client.get("question")[1]["progress"]["decisions"] == 1
        assert client.post("decisions", {"action": "undo", "number": 1})[1]["number"] == 2


def list_groups(run):
    """The images of each cluster, in order."""
    labels = run.labels[run.labels.pseudo_label >= 0]
    return [[*map(int, rows.sample_id)] for _, rows in labels.groupby("pseudo_label")]


def decide_until_gone(client, groups, answered):
    """Accept one cluster after the other until nobody answers; the numbers of what was answered."""
    for group in groups:
        try:
            status, answer = client.post("decisions", {"action": "accept", "groups": [group]})
        except (OSError, http.client.HTTPException, ValueError):
            return
        assert status == 200
        answered.append(answer["number"])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_seeded_moments_no_answered_decision_is_lost(own_known_run, known, seed):
    """Two servers on one run, both killed while both are being asked; ten times a seed."""
    dice = random.Random(seed)
    groups = list_groups(cdp.open_run(own_known_run))
    answered, kills = [], 0
    for _ in range(10):
        with (
            serve(own_known_run, signal.SIGKILL) as one,
            serve(own_known_run, signal.SIGKILL) as other,
        ):
            asking = [
                threading.Thread(target=decide_until_gone, args=(each, groups * 50, answered))
                for each in (one, other)
            ]
            for thread in asking:
                thread.start()
            time.sleep(dice.uniform(0.02, 1.0))
            for each in (one, other):
                each.process.kill()
                kills += 1
            for thread in asking:
                thread.join()
        kept = [decision.number for decision in CorrectionTable(own_known_run).read()]
        assert kept == list(range(1, len(kept) + 1))
        assert len(answered) == len(set(answered))
        assert set(answered) <= set(kept)
    print(f"seed {seed}: killed {kills} servers, {len(answered)} decisions answered, none lost")
    assert len(answered) > 10
    arguments = [*known, "--runs-dir", str(own_known_run.parent), "--until", "propagate"]
    assert main(arguments) == 0
    label = cdp.open_run(own_known_run).labels.set_index("sample_id").pseudo_label
    for decision in CorrectionTable(own_known_run).read():
        samples = cdp.open_run(own_known_run).samples.set_index("sha256").sample_id
        assert label[samples[list(decision.groups[0])]].nunique() == 1


def test_two_reviews_at_once_keep_what_both_decide(own_known_run):
    one_half, other_half = (list_groups(cdp.open_run(own_known_run))[start::2] for start in (0, 1))
    answered = []
    with serve(own_known_run) as one, serve(own_known_run) as other:
        asking = [
            threading.Thread(target=decide_until_gone, args=(client, groups, answered))
            for client, groups in ((one, one_half), (other, other_half))
        ]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        seen = [client.get("question")[1]["progress"]["decisions"] for client in (one, other)]
    count = len(one_half) + len(other_half)
    assert sorted(answered) == list(range(1, count + 1))
    assert seen == [count, count]


def test_a_running_server_sees_decisions_made_elsewhere(own_known_run):
    with serve(own_known_run) as client:
        before = client.get("question")[1]["progress"]
        assert before["decisions"] == 0
        run = cdp.open_run(own_known_run)
        key = run.samples.set_index("sample_id").sha256[run.labels.sample_id[0]]
        CorrectionTable(own_known_run).append("bo", "reject", [[key]])
        assert client.get("question")[1]["progress"]["decisions"] == 1


def test_a_run_half_made_is_refused_and_an_open_review_goes_on(own_known_run, capsys):
    from pipelines.review.__main__ import main as review
    from pipelines.review.session import ReviewSession

    session = ReviewSession(cdp.open_run(own_known_run), "ada")
    asked = len(session.questions)
    for stage in ("mediate", "propagate"):
        manifest = (own_known_run / stage / "manifest.json").resolve()
        record = json.loads(manifest.read_text()) | {"fingerprint": "another"}
        manifest.write_text(json.dumps(record))
    assert review(["--run", str(own_known_run)]) == 2
    assert "propagate was made from another mediate" in capsys.readouterr().err
    for _ in range(2):
        with pytest.raises(StageError, match="Bring the run up to date first"):
            session.refresh()
    assert len(session.questions) == asked


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--run", "nowhere"], "no run at nowhere"),
        (["--run", "RUN", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["--run", "RUN", "--port", "99999"], "expected a number from 0 to 65535, got 99999"),
    ],
)
def test_mistakes_get_one_message(known_run, capsys, arguments, expected):
    from pipelines.review.__main__ import main as review

    given = [str(known_run) if each == "RUN" else each for each in arguments]
    assert review(given) == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.count("\n") == 1


def test_neighbours_have_cosine_and_cluster(client, known_run):
    run = cdp.open_run(known_run)
    sample = int(run.labels[run.labels.pseudo_label == 0].sample_id.iloc[0])
    status, found = client.get(f"neighbours/{sample}")
    assert status == 200
    table = run.read("knn", "neighbours/unlabelled/base").set_index("sample_id")
    assert [each["id"] for each in found["neighbours"]] == table.neighbour[sample].tolist()
    cosine = [each["cosine"] for each in found["neighbours"]]
    np.testing.assert_allclose(cosine, table.similarity[sample], atol=1e-4)
    label = run.labels.set_index("sample_id").pseudo_label
    assert all(each["cluster"] == label[each["id"]] for each in found["neighbours"])
    labelled = int(run.samples.sample_id[run.samples.split == "labelled"].iloc[0])
    own = client.get(f"neighbours/{labelled}")[1]["neighbours"]
    assert {each["cluster"] for each in own} == {None}
    assert all(each["identity"] for each in own)
    assert client.get("neighbours/999999")[1] == {"neighbours": []}


def test_images_without_a_cluster_are_listed_with_their_reasons(client, known_run):
    labels = cdp.open_run(known_run).labels
    without = set(labels.path[labels.pseudo_label == -1])
    status, found = client.get("left-out/unlabelled")
    assert status == 200
    assert found["total"] == len(without) == sum(each["count"] for each in found["reasons"])
    assert {each["name"] for each in found["images"]} <= without
    assert all(each["reason"] for each in found["images"])
    kind = found["reasons"][0]
    assert client.get(f"left-out/unlabelled?kind={kind['key']}")[1]["total"] == kind["count"]
    assert client.get("left-out/rejected")[1]["total"] == 0
    assert client.get("left-out/unlabelled?offset=-1")[0] == 400
    assert client.get("left-out/labels")[0] == 404


def test_clusters_are_listed_by_size(client, known_run):
    size = cdp.open_run(known_run).clusters["size"]
    found = client.get("clusters?sizes=4-6")[1]
    assert found["total"] == ((size >= 4) & (size <= 6)).sum() > 0
    assert client.get("clusters?sizes=x")[1]["total"] == len(size)


def test_an_adopted_image_has_the_neighbours_of_its_own_split(tmp_path):
    """An unlabelled image that trains the mediator is in the labelled graph too."""
    lists = {"labelled": ([1, 7], [[7, -1], [1, -1]]), "unlabelled": ([7, 8, 9], [[8, 9]] * 3)}
    for split, (ids, neighbour) in lists.items():
        similarity = np.full((len(ids), 2), 0.5, np.float32)
        columns = {
            "sample_id": np.array(ids),
            "neighbour": vector_column(np.array(neighbour)),
            "similarity": vector_column(similarity),
        }
        target = tmp_path / "neighbours" / split / "base"
        target.mkdir(parents=True)
        write_table(target / "part-0.parquet", columns, describe_neighbours(2))

    settings = {"config": {"committee": {"base": {"name": "base"}}}}
    published = SimpleNamespace(
        manifest={"ingredients": settings},
        path=lambda table: tmp_path / table,
        read=lambda table, columns: pq.read_table(tmp_path / table, columns=columns),
    )
    found = NeighbourLists(SimpleNamespace(find=lambda _stage: published))
    assert [other for other, _ in found.find(7)] == [8, 9]
    assert [other for other, _ in found.find(1)] == [7]
    assert found.find(2) == []
