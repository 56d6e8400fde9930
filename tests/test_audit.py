"""The audit of dependencies: what fails it, what does not, and what it must not keep quiet."""

import importlib.util
import json
import subprocess
import sys
import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PIP_AUDIT = ROOT / ".venv" / "audit" / "bin" / "python"


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pinned(tmp_path):
    path = tmp_path / "pinned.txt"
    path.write_text("# why\nold==1.0\nnew==2.0  # the newest\n")
    return path


HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}
WHOLE = {"name": "new", "version": "2.0", "vulns": []}
STRANGE = {"name": "old", "skip_reason": "not found"}


def answering(audit, monkeypatch, **answers):
    """Let the services answer so; the rest cannot be reached."""
    monkeypatch.setattr(
        audit, "ask_service", lambda python, service, pinned, options: answers.get(service)
    )


def test_a_known_vulnerability_fails_and_names_what_mends_it(audit, pinned, monkeypatch, capsys):
    holed = {"dependencies": [{"name": "old", "version": "1.0", "vulns": [HOLE]}, WHOLE]}
    answering(audit, monkeypatch, pypi=holed)
    assert audit.audit_vulnerabilities("python", pinned) == 1
    assert "VULNERABLE old 1.0: PYSEC-1, mended in 1.1" in capsys.readouterr().out
    monkeypatch.setattr(audit, "ACCEPTED", {"CVE-1": "not called"})
    assert audit.audit_vulnerabilities("python", pinned) == 0


def test_what_one_service_does_not_know_the_other_is_asked(audit, pinned, monkeypatch, capsys):
    holed = {"dependencies": [{"name": "old", "version": "1.0", "vulns": [HOLE]}, WHOLE]}
    answering(audit, monkeypatch, pypi={"dependencies": [STRANGE, WHOLE]}, osv=holed)
    assert audit.audit_vulnerabilities("python", pinned) == 1
    answering(audit, monkeypatch, pypi={"dependencies": [STRANGE, WHOLE]})
    assert audit.audit_vulnerabilities("python", pinned) == 0
    printed = capsys.readouterr().out
    assert "NOT AUDITED: no service that answers knows 1 of pinned.txt" in printed


def test_services_out_of_reach_fail_nothing_and_are_reported(audit, pinned, monkeypatch, capsys):
    answering(audit, monkeypatch)
    assert audit.audit_vulnerabilities("python", pinned) == 0
    assert "NOT AUDITED" in capsys.readouterr().out
    monkeypatch.undo()
    assert audit.audit_vulnerabilities("/nowhere/python", pinned) == 0
    assert "!! old==1.0, new==2.0" in capsys.readouterr().out


def test_a_vulnerability_named_by_a_server_fails_the_real_command(tmp_path):
    """pip-audit itself, asking a server on loopback that answers as OSV does."""
    if not PIP_AUDIT.exists():
        pytest.skip("no pip-audit; make it with: make audit")
    changes = [{"introduced": "0"}, {"fixed": "1.1"}]
    affected = {
        "package": {"name": "old", "ecosystem": "PyPI"},
        "versions": ["1.0"],
        "ranges": [{"type": "ECOSYSTEM", "events": changes}],
    }
    when = "2026-01-01T00:00:00Z"
    hole = {"id": "GHSA-x", "summary": "x", "details": "x", "aliases": [], "published": when,
            "modified": when, "affected": [affected]}  # fmt: skip

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = asked["package"]["name"] == "old"
            body = json.dumps({"vulns": [hole]} if found else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    pinned = tmp_path / "pinned.txt"
    pinned.write_text("old==1.0\nnew==2.0\n")
    code = (
        "import importlib.util, sys, pathlib\n"
        "spec = importlib.util.spec_from_file_location('audit', sys.argv[1])\n"
        "audit = importlib.util.module_from_spec(spec); spec.loader.exec_module(audit)\n"
        "audit.SERVICES = ('osv',)\n"
        "sys.exit(audit.audit_vulnerabilities(sys.argv[2], pathlib.Path(sys.argv[3]),"
        " sys.argv[4:]))"
    )
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        done = subprocess.run(
            [sys.executable, "-c", code, str(ROOT / ".ci" / "audit.py"), str(PIP_AUDIT),
             str(pinned), "--osv-url", url],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        server.shutdown()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "VULNERABLE old 1.0: GHSA-x, mended in 1.1" in done.stdout


def describe(name, **fields):
    metadata = Message()
    metadata["Name"] = name
    for key, value in fields.items():
        for each in value if isinstance(value, list) else [value]:
            metadata[key.replace("_", "-")] = each
    return metadata


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"License_Expression": "MIT"}, True),
        ({"License_Expression": "Apache-2.0 OR BSD-2-Clause"}, True),
        ({"License_Expression": "BSD-3-Clause AND GPL-3.0-or-later"}, False),
        ({"License_Expression": "AGPL-3.0-only"}, False),
        ({"License": "3-Clause BSD License"}, True),
        ({"License": "MPL-2.0 AND MIT"}, True),
        ({"License": "GPLv3"}, False),
        ({"License": "Proprietary"}, False),
        ({"Classifier": ["License :: OSI Approved :: Apache Software License"]}, True),
        (
            {"Classifier": ["License :: OSI Approved :: GNU Affero General Public License v3"]},
            False,
        ),
        ({}, False),
    ],
)
def test_licences_are_permissive_or_weak_copyleft_and_stated(audit, fields, fine):
    assert (audit.audit_licences([describe("x", **fields)]) == []) == fine


def test_every_runtime_dependency_is_seen(audit):
    names = {each.metadata["Name"].lower() for each in audit.list_runtime(["pandas", "dask"])}
    assert {"pandas", "numpy", "dask", "toolz"} <= names
