"""Published results that one stage rests on and that are out of date, named before they are used.

The contract:
- One stage runs from what is published upstream, current or not. A result upstream is out of date
  when `--stage all` would make it anew for other ingredients; the comparison is that of `plan_run`.
- Input files are recognised by size, inode and time, as always: only new or changed ones are read.
- Decisions of a review are compared with those that the stages applied.
- What cannot be compared (a model file that is not there) stops nothing and is named apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cdp.errors import CdpError
from pipelines.decisions import APPLIED_BY, CorrectionTable, digest_decisions
from pipelines.files import digest_json
from pipelines.stage import (
    Runtime,
    Stage,
    collect_ingredients,
    explain_change,
    explain_omission,
    find_changed_inputs,
)
from pipelines.store import Published


@dataclass(frozen=True)
class Outdated:
    """The results upstream that are out of date.

    changed : stage -> what differs between the ingredients of its result and those given now.
    following : stages whose results were made from those of `changed`, and differ in that alone.
    unknown : stage -> why it could not be compared.
    """

    changed: Mapping[str, str]
    following: tuple[str, ...]
    unknown: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.changed)

    def __str__(self) -> str:
        together: dict[str, list[str]] = {}
        for name, reason in self.changed.items():
            together.setdefault(reason, []).append(name)
        parts = [f"{', '.join(names)} ({reason})" for reason, names in together.items()]
        if self.following:
            parts.append(f"and, made from these, {', '.join(self.following)}")
        return "; ".join(parts)


def find_outdated(stages: tuple[Stage, ...], runtime: Runtime, upstream: set[str]) -> Outdated:
    """Compare the results of the stages `upstream` with what the run's config and files ask for."""
    fingerprints: dict[str, str] = {}
    changed: dict[str, str] = {}
    following: list[str] = []
    unknown: dict[str, str] = {}
    for stage in stages:
        if stage.name not in upstream or explain_omission(stage, runtime.dataset):
            continue
        published = runtime.store.open_run(runtime.config.name, stage.name)
        try:
            now = collect_ingredients(stage, runtime, fingerprints)
        except (CdpError, OSError) as error:
            unknown[stage.name] = str(error)
            if published is None:
                break  # nothing is known of what was made from it
            fingerprints[stage.name] = published.fingerprint
            continue
        fingerprints[stage.name] = digest_json(now)
        if published is None or published.fingerprint == fingerprints[stage.name]:
            continue
        before = published.manifest.get("ingredients", {})
        inputs = find_changed_inputs(before, now)
        alike = {**now, "inputs": before.get("inputs")} == before
        if alike and set(inputs) <= {*changed, *following}:
            following.append(stage.name)
        else:
            changed[stage.name] = explain_change(before, now)
    return Outdated(changed, tuple(following), unknown)


def list_upstream(stages: tuple[Stage, ...], name: str) -> set[str]:
    """The stages whose results a stage rests on, directly or through others."""
    found: set[str] = set()
    for stage in reversed(stages):
        if stage.name == name or stage.name in found:
            found.update(stage.upstream)
    return found


def find_unapplied(run: Path, stage: str) -> list[str]:
    """The stages whose results do not follow the reviewers' decisions of today.

    run : the directory of the run. Looked for among `stage` and those before it that apply
    decisions.
    """
    applying = list(APPLIED_BY)
    before = applying[: applying.index(stage) + 1] if stage in applying else []
    decisions = CorrectionTable(run).read() if before else ()
    found = []
    for name in before:
        published = Published.open(name, run / name)
        if published is None:
            continue
        applied = published.manifest.get("ingredients", {}).get("corrections", "")
        if digest_decisions(decisions, APPLIED_BY[name]) != applied:
            found.append(name)
    return found
