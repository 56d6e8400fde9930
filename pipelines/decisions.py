"""The corrections table of a run: the decisions of reviewers, in an append-only file.

    runs/<run>/corrections.jsonl     one decision a line: pd.read_json(path, lines=True)

The contract:
- A decision is fsynced before `append` returns. An incomplete last line, left by a crash, was never
  confirmed and is removed at the next append. A damaged line in the middle is a DataError.
- Images are identified by the SHA-256 of their bytes (ready features by their path), so decisions
  stay valid after a rename, a new order or a new run. Images that no longer exist are counted.
- A decision that contradicts earlier ones is rejected with the number of the decision to undo.
- Decisions on unlabelled images constrain the clusters, those on labelled images correct names.
- An undo is a decision too. Only decisions that are not undone enter the fingerprint: after undoing
  all of them, it is that of a run without decisions.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cdp.errors import DataError, StageError
from cdp.review.constraints import Constraints, find_conflict
from pipelines.files import digest_json

if TYPE_CHECKING:
    import pandas as pd

FILE_NAME = "corrections.jsonl"
Action = Literal[
    "accept",
    "merge",
    "split",
    "apart",
    "reject",
    "name",
    "deny",
    "rename",
    "keep",
    "exclude",
    "undo",
]
GROUPS = {"accept": 1, "merge": 2, "split": 2, "apart": 2, "reject": 1, "name": 1, "deny": 1,
          "rename": 1, "keep": 1, "exclude": 1, "undo": 0}  # fmt: skip
"""Action -> number of groups of images it takes."""
ON_CLUSTERS: tuple[Action, ...] = ("accept", "merge", "split", "apart", "reject", "name", "deny")
"""Decisions on unlabelled images; the stage propagate applies them."""
ON_NAMES: tuple[Action, ...] = ("rename", "exclude")
"""Decisions that change the names of labelled images; the stage ingest applies them."""
ON_DOUBTS: tuple[Action, ...] = ("keep",)
"""Decisions that the name of a labelled image is right; the stage knn applies them."""
ON_LABELLED = (*ON_NAMES, *ON_DOUBTS)
APPLIED_BY: Mapping[str, tuple[Action, ...]] = {
    "ingest": ON_NAMES,
    "knn": ON_DOUBTS,
    "propagate": ON_CLUSTERS,
    "retrain": ON_CLUSTERS,
}
"""Stage, in the order of a run -> the decisions that it applies."""
NAMING = ("name", "deny", "rename")
"""Decisions that name a person."""


@dataclass(frozen=True)
class Decision:
    """One decision of a reviewer.

    number : 1, 2, ... in the order of the file.
    at : time in UTC, ISO 8601 with milliseconds. who : the reviewer.
    groups : keys of images, see `find_keys`. accept: all images show one person. merge: both groups
        show one person. split, apart: no person is in both groups. reject: images without a usable
        face. name, deny: all images show, or none shows, the labelled person `identity`. rename:
        labelled images whose right name is `identity`. keep: their name is right. exclude: labelled
        images to set aside.
    undoes : for `undo`, the number of the decision it cancels.
    """

    number: int
    at: str
    who: str
    action: Action
    groups: tuple[tuple[str, ...], ...] = ()
    undoes: int | None = None
    identity: str | None = None


class ContradictionError(DataError):
    """A decision contradicts earlier ones; `number` is the one to undo, None for several."""

    def __init__(self, message: str, number: int | None) -> None:
        super().__init__(message)
        self.number = number


class CorrectionTable:
    """The corrections file of one run; several processes may append at the same time."""

    def __init__(self, run_directory: Path) -> None:
        self.path = run_directory / FILE_NAME

    def read(self) -> tuple[Decision, ...]:
        """All decisions in the order of the file, undone ones included."""
        try:
            data = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return ()
        except OSError as error:
            raise StageError(
                f"cannot read {self.path}: {error.strerror}. Fix its permissions, or choose "
                "another --runs-dir"
            ) from error
        return self._parse(data)

    def append(
        self,
        who: str,
        action: Action,
        groups: Sequence[Sequence[str]] = (),
        *,
        undoes: int | None = None,
        identity: str | None = None,
    ) -> Decision:
        """Append one decision and sync it; ContradictionError when earlier ones contradict it."""
        decision = Decision(
            number=1,
            at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            who=who,
            action=action,
            groups=tuple(tuple(sorted(set(group))) for group in groups),
            undoes=undoes,
            identity=identity,
        )
        if not self.path.exists():
            check_decision(decision, ())  # a rejected decision leaves no empty file
        with self._open() as stream:
            data = stream.read()
            whole = data[: data.rfind(b"\n") + 1]
            earlier = self._parse(whole)
            check_decision(decision, earlier)
            if earlier:
                decision = replace(decision, number=earlier[-1].number + 1)
            content = asdict(decision)
            if decision.identity is None:
                del content["identity"]
            line = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            try:
                stream.truncate(len(whole))
                stream.seek(len(whole))
                _write_all(stream, line.encode() + b"\n")
                os.fsync(stream.fileno())
            except OSError as error:
                with _quietly():
                    stream.truncate(len(whole))
                raise StageError(
                    f"cannot write {self.path}: {error.strerror}; this decision was not kept, "
                    "those before it were. Free space or correct the permissions, then decide again"
                ) from error
            return decision

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            fresh = not self.path.exists()
            stream = self.path.open("r+b" if not fresh else "a+b", buffering=0)
        except OSError as error:
            raise StageError(
                f"cannot write {self.path}: {error.strerror}; no decision can be kept. Fix its "
                "permissions, then decide again"
            ) from error
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if fresh:
                handle = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            stream.seek(0)
            yield stream

    def _parse(self, data: bytes) -> tuple[Decision, ...]:
        lines = data.split(b"\n")[:-1]  # an incomplete last line was never confirmed
        decisions = []
        for number, line in enumerate(lines, 1):
            try:
                decisions.append(_read_decision(json.loads(line)))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise DataError(
                    f"{self.path}, line {number}: not a decision ({error}). Restore the file from "
                    "a copy, or delete that line to go on without it"
                ) from error
        return tuple(decisions)


def _write_all(stream: Any, data: bytes) -> None:
    """Write all of `data`; one call to an unbuffered stream may write only a part of it."""
    while data:
        data = data[stream.write(data) :]


@contextmanager
def _quietly() -> Iterator[None]:
    try:
        yield
    except OSError:
        return


def _read_decision(value: Any) -> Decision:
    if not isinstance(value, Mapping) or value["action"] not in get_args(Action):
        raise ValueError("expected an object with a known action")
    groups = tuple(tuple(str(key) for key in group) for group in value["groups"])
    undoes = None if value.get("undoes") is None else int(value["undoes"])
    identity = None if value.get("identity") is None else str(value["identity"])
    return Decision(
        int(value["number"]), str(value["at"]), str(value["who"]), value["action"], groups, undoes,
        identity,
    )  # fmt: skip


# -------------------------------------------------------------------------------------- meaning


def list_active(
    decisions: Sequence[Decision], actions: Collection[str] = get_args(Action)
) -> tuple[Decision, ...]:
    """The decisions in force, of some actions: neither undone nor an undo."""
    undone = {decision.undoes for decision in decisions if decision.action == "undo"}
    return tuple(
        decision
        for decision in decisions
        if decision.action != "undo"
        and decision.action in actions
        and decision.number not in undone
    )


def digest_decisions(
    decisions: Sequence[Decision], actions: Collection[str] = get_args(Action)
) -> str:
    """Digest of the active decisions without reviewer and time; empty when there is none."""
    content = sorted(
        [
            decision.action,
            *([[decision.identity]] if decision.identity is not None else []),
            *sorted(sorted(group) for group in decision.groups),
        ]
        for decision in list_active(decisions, actions)
    )
    return digest_json(content) if content else ""


def find_keys(samples: pd.DataFrame) -> list[str]:
    """The key of each image in the table: its SHA-256, or its path for ready features.

    samples : DataFrame with path and sha256. A path that repeats is numbered from its second use.
    """
    keys, uses = [], Counter[str]()
    for digest, path in zip(samples.sha256, samples.path, strict=True):
        key = digest or f"path:{path}"
        uses[key] += 1
        keys.append(key if uses[key] == 1 else f"{key}#{uses[key]}")
    return keys


def resolve_decisions(
    decisions: Sequence[Decision], keys: Sequence[str]
) -> tuple[Constraints, int]:
    """Active decisions on unlabelled images as constraints on rows; row i is the image `keys[i]`.

    Images of one labelled person are linked, those of two are apart, and so are images that show a
    person from those that do not.

    Returns
    -------
    constraints : must-link, cannot-link and rejected rows.
    missing : number of images in the decisions that are not in `keys`.
    """
    row_of = {key: row for row, key in enumerate(keys)}
    missing: set[str] = set()

    def find(group: Sequence[str]) -> np.ndarray:
        missing.update(key for key in group if key not in row_of)
        return np.array(sorted(row_of[key] for key in group if key in row_of), np.int64)

    same: list[np.ndarray] = []
    apart: list[tuple[np.ndarray, np.ndarray]] = []
    rejected: list[np.ndarray] = [np.empty(0, np.int64)]
    named: dict[str, list[np.ndarray]] = {}
    denied: list[tuple[str, np.ndarray]] = []
    for decision in list_active(decisions, ON_CLUSTERS):
        groups = [find(group) for group in decision.groups]
        if decision.action == "name":
            named.setdefault(str(decision.identity), []).append(groups[0])
        elif decision.action == "deny":
            denied.append((str(decision.identity), groups[0]))
        elif decision.action in ("accept", "merge"):
            same.append(np.unique(np.concatenate(groups)))
        elif decision.action == "reject":
            rejected.append(groups[0])
        else:
            apart.append((groups[0], groups[1]))
    people = {name: np.unique(np.concatenate(groups)) for name, groups in sorted(named.items())}
    same += people.values()
    rest = list(people.values())
    apart += [(one, np.concatenate(rest[at:])) for at, one in enumerate(rest[:-1], 1)]
    apart += [(rows, people[name]) for name, rows in denied if name in people]
    out = np.unique(np.concatenate(rejected))
    return Constraints(len(keys), tuple(same), tuple(apart), out), len(missing)


@dataclass(frozen=True)
class Names:
    """The labelled people that reviewers named.

    identity : (n,) object, the person that an image shows; None where nobody said so.
    denied : person -> (n,) bool, the images that do not show the person.
    """

    identity: np.ndarray
    denied: Mapping[str, np.ndarray]


def find_names(decisions: Sequence[Decision], keys: Sequence[str]) -> Names:
    """Who is on the images `keys`, or not, by the active decisions and what they link."""
    row_of = {key: row for row, key in enumerate(keys)}
    atom = resolve_decisions(decisions, keys)[0].link_rows()
    identity = np.full(len(keys), None, object)
    denied: dict[str, np.ndarray] = {}
    for decision in list_active(decisions, ("name", "deny")):
        rows = np.array([row_of[key] for key in decision.groups[0] if key in row_of], np.int64)
        linked = np.isin(atom, atom[rows])
        if decision.action == "name":
            identity[linked] = decision.identity
        else:
            name = str(decision.identity)
            denied[name] = linked | denied.get(name, np.zeros(len(keys), bool))
    return Names(identity, denied)


def check_decision(decision: Decision, earlier: Sequence[Decision]) -> None:
    """DataError for a malformed decision, ContradictionError for an impossible one."""
    active = list_active(earlier)
    if decision.action == "undo":
        if decision.undoes not in {each.number for each in active}:
            raise DataError(
                f"there is no decision {decision.undoes} to undo; it may be undone already"
            )
        return
    if len(decision.groups) != GROUPS[decision.action] or not all(decision.groups):
        raise DataError(
            f"{decision.action} expects {GROUPS[decision.action]} group(s) of images, none empty; "
            f"got {[len(group) for group in decision.groups]}"
        )
    both = set.intersection(*map(set, decision.groups))
    if decision.action in ("split", "apart") and both:
        raise DataError(
            f"{decision.action} expects two groups without an image in common; "
            f"{len(both)} of the images {'is' if len(both) == 1 else 'are'} in both. Leave "
            f"{'it' if len(both) == 1 else 'them'} out of one"
        )
    if (decision.action in NAMING) != bool(decision.identity):
        raise DataError(f"{decision.action} with the identity {decision.identity!r}: "
                        f"{', '.join(NAMING)} name a person, other decisions none")  # fmt: skip
    if decision.action in ON_LABELLED:
        taken = set(decision.groups[0])
        for other in list_active(earlier, ON_LABELLED):
            if not taken.isdisjoint(other.groups[0]):
                raise _contradict(other)
        return
    active = list_active(earlier, ON_CLUSTERS)
    keys = sorted({key for each in (*active, decision) for group in each.groups for key in group})
    conflict = find_conflict(resolve_decisions((*active, decision), keys)[0])
    if conflict is None:
        return
    for number in reversed(range(len(active))):
        rest = (*active[:number], *active[number + 1 :], decision)
        if find_conflict(resolve_decisions(rest, keys)[0]) is None:
            raise _contradict(active[number])
    raise ContradictionError("this contradicts several earlier decisions; undo them first", None)


def _contradict(other: Decision) -> ContradictionError:
    return ContradictionError(
        f"this contradicts decision {other.number} ({other.action} by {other.who}, "
        f"{other.at[:16].replace('T', ' ')}). Undo that one first",
        other.number,
    )
