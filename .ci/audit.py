"""Known vulnerabilities and licences of the dependencies: `python .ci/audit.py PYTHON [OPTION]...`

PYTHON is one that has pip-audit; options go to pip-audit where it asks OSV.

The contract:
- Exit 1 where a pinned version has a known vulnerability, or a runtime dependency a licence that is
  neither permissive nor weak copyleft, or none that is stated.
- A service that cannot be reached fails nothing, and is told as loudly as a failure: NOT AUDITED,
  with the packages.
- A vulnerability that does not concern this project is accepted below, by its id, with the reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SERVICES = ("pypi", "osv")
ACCEPTED: Mapping[str, str] = {}
"""Id of a vulnerability -> why it does not concern this project."""

ALLOWED = {
    "0bsd", "apache", "bsd", "bsl-1.0", "cc0-1.0", "hpnd", "isc", "mit", "mit-cmu", "mpl-2.0",
    "psf-2.0", "python software foundation", "unlicense", "zlib", "zpl",
}  # fmt: skip
"""Beginnings of permissive and weak copyleft licences, in lower case."""
READ_BY_HAND = {
    "nmslib-metabrainz": "its wheel brings the text of Apache-2.0, its metadata state nothing; "
    "LSHKIT, the GPL part that its LICENSE names, is not compiled into it",
}


# -------------------------------------------------------------------------------- vulnerabilities


def ask_service(python: str, service: str, pinned: Path, options: Iterable[str]) -> Any:
    """What pip-audit says of every pinned package; None when its service cannot be reached."""
    command = [python, "-m", "pip_audit", "--requirement", str(pinned), "--no-deps",
               "--disable-pip", "--format", "json", "--progress-spinner", "off",
               "--vulnerability-service", service, *options]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"pip-audit, {service}: {error}")
        return None
    try:
        return json.loads(done.stdout)
    except ValueError:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        print(f"pip-audit, {service}: {last[0][:300]}")
        return None


def judge_answer(answer: Any) -> tuple[list[str], list[str]]:
    """An answer of pip-audit -> (vulnerabilities that are not accepted, packages not audited)."""
    found, unknown = [], []
    for package in answer["dependencies"]:
        name = f"{package['name']} {package.get('version', '')}".strip()
        if "skip_reason" in package:
            unknown.append(name)
        for hole in package.get("vulns", ()):
            ids = [hole["id"], *hole.get("aliases", ())]
            if not ACCEPTED.keys() & set(ids):
                mended = ", ".join(hole.get("fix_versions", ())) or "no version yet"
                found.append(f"{name}: {ids[0]}, mended in {mended}")
    return found, unknown


def audit_vulnerabilities(python: str, pinned: Path, options: Iterable[str] = ()) -> int:
    """Ask one service after the other until one knows the packages; the number of faults."""
    unknown = [
        line.split("#")[0].strip()
        for line in pinned.read_text(encoding="utf-8").splitlines()
        if line.split("#")[0].strip()
    ]
    for service in SERVICES:
        answer = ask_service(python, service, pinned, options if service == "osv" else ())
        if answer is None:
            continue
        found, left = judge_answer(answer)
        known = len(answer["dependencies"]) - len(left)
        print(f"{pinned.name}: {service} knows {known} packages, {len(found)} vulnerabilities")
        for line in found:
            print(f"  VULNERABLE {line}")
        if found:
            return len(found)
        if len(left) < len(unknown):
            unknown = left
        if not unknown:
            return 0
    print("!" * 78)
    print(f"!! NOT AUDITED: no service that answers knows {len(unknown)} of {pinned.name}:")
    print(f"!! {', '.join(unknown)}")
    print("!" * 78)
    return 0


# --------------------------------------------------------------------------------------- licences


def list_runtime(requirements: Iterable[str]) -> list[metadata.Distribution]:
    """The installed distributions that the requirements bring, each once, by name."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        extras = wanted.extras or {""}
        if wanted.marker and not any(wanted.marker.evaluate({"extra": e}) for e in extras):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if name in found:
            continue
        found[name] = metadata.distribution(wanted.name)
        for text in found[name].requires or ():
            inner = Requirement(text)
            if inner.marker is None or inner.marker.evaluate({"extra": ""}):
                inner.marker = None
                waiting.append(inner)
    return [found[name] for name in sorted(found)]


def find_licences(package: Any) -> list[str]:
    """The licences that a package's metadata state, in lower case, joined ones apart."""
    told = package.get("License-Expression")
    if not told:
        classifiers = [
            line.rpartition(" :: ")[2]
            for line in package.get_all("Classifier") or ()
            if line.startswith("License ::") and line != "License :: OSI Approved"
        ]
        told = " AND ".join(classifiers) or (package.get("License") or "").split("\n")[0]
    parts = re.split(r"\s+AND\s+|\s+OR\s+|[()]", told)
    return [part.strip().lower() for part in parts if part.strip()]


def is_allowed(licence: str) -> bool:
    """Whether a licence begins as an allowed one; "3-Clause BSD" and "New BSD" do as well."""
    plain = re.sub(r"^(the |new |modified |2-clause |3-clause )+", "", licence)
    return any(plain.startswith(allowed) for allowed in ALLOWED)


def audit_licences(packages: Iterable[Any]) -> list[str]:
    """What is wrong with the licences of these metadata, one line a package."""
    wrong = []
    for package in packages:
        name = re.sub(r"[-_.]+", "-", package["Name"]).lower()
        licences = find_licences(package)
        if name in READ_BY_HAND:
            continue
        if not licences:
            wrong.append(f"{name}: states no licence")
        # Of several that hold together every one must be allowed; a choice is not told apart.
        wrong += [f"{name}: {each}" for each in licences if not is_allowed(each)]
    return wrong


def main(arguments: list[str]) -> int:
    """Audit both; the exit code."""
    python = arguments[0] if arguments else sys.executable
    options = arguments[1:]
    faults = audit_vulnerabilities(python, ROOT / "constraints.txt", options)
    faults += audit_vulnerabilities(python, ROOT / "constraints-lowest.txt", options)
    runtime = list_runtime(metadata.requires("cdp") or ())
    wrong = audit_licences([each.metadata for each in runtime])
    print(f"licences: {len(runtime)} runtime packages, {len(wrong)} not allowed")
    for line in wrong:
        print(f"  LICENCE {line}")
    return 1 if faults or wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
