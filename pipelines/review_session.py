"""A review session: what to ask next, and the labels as decided so far.

The contract:
- Enters: a finished run and its corrections table. Every decision goes to the table at once; the
  session holds nothing that is not read back from there, but for what was skipped.
- Shows the clusters as they would be now: the published labels with all decisions honoured.
- A question is asked while its answer is open: not accepted, not kept apart, not skipped. What an
  answer is worth follows `cdp.review.questions`; skipped questions come last.
- A run made again, or decisions made elsewhere, are noticed at the next request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdp.errors import DataError, StageError
from cdp.review.constraints import apply_constraints, settle_pairs
from cdp.review.questions import Question, filter_answered, rank_questions
from cdp.types import UNLABELLED
from pipelines.decisions import (
    Action,
    CorrectionTable,
    Decision,
    find_keys,
    list_active,
    resolve_decisions,
)
from pipelines.invocation import format_command
from pipelines.results import RunResults, open_run
from pipelines.tables import list_pairs

ASKED = 200
"""Questions kept ready, best first."""
LEAST_WORTH = 0.02
"""Expected wrong pairs below which a question is not worth a person's time."""


class ReviewSession:
    """One person at work on one run."""

    def __init__(self, run: RunResults, reviewer: str) -> None:
        self.reviewer = reviewer
        self.table = CorrectionTable(run.directory)
        self.skipped: set[tuple[int, int]] = set()
        self._load(run)

    # -- state

    def _load(self, run: RunResults) -> None:
        labels = run.labels
        self._check_whole(run)  # before anything is replaced
        self.run = run
        self.fingerprint = run.manifest("propagate")["fingerprint"]
        self.sample_id = labels.sample_id.to_numpy()
        self.names = [str(path) for path in labels.path]
        self.confidence = labels.confidence.to_numpy()
        self.published = labels.pseudo_label.to_numpy()
        samples = run.samples.set_index("sample_id").loc[self.sample_id].reset_index()
        self.keys = find_keys(samples)
        self.pairs = list_pairs(run.pairs, self.sample_id)
        self.probability = run.pairs.probability.to_numpy()
        threshold = run.manifest("propagate")["facts"].get("threshold")
        self.threshold = float(threshold) if isinstance(threshold, int | float) else 0.5
        self.vectors = run.view_of(self.sample_id)
        self.thumbnails = run.thumbnails
        self._seen: tuple[int, int] | None = None
        self.refresh()

    def _check_whole(self, run: RunResults) -> None:
        for stage in ("propagate", "thumbnails"):
            published = run.find(stage)
            inputs = published.manifest["ingredients"]["inputs"] if published else {}
            for name, fingerprint in inputs.items():
                upstream = run.find(name)
                if upstream is None or upstream.fingerprint != fingerprint:
                    raise StageError(
                        f"{run.directory}: {stage} was made from another {name} than the one "
                        "published now. Bring the run up to date first: "
                        f"{format_command('run', '--stage', 'all')}, with the options of this run"
                    )

    def refresh(self) -> None:
        """Read again what changed on disk: the run, the decisions."""
        published = self.run.find("propagate")
        if published is not None and published.fingerprint != self.fingerprint:
            self._load(open_run(self.run.directory))
            return
        try:
            stat = self.table.path.stat()
            seen = (stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            seen = (0, 0)
        if seen == self._seen:
            return
        self._seen = seen
        self.decisions = self.table.read()
        self.corrections, self.missing = resolve_decisions(self.decisions, self.keys)
        self.settled = settle_pairs(self.pairs, self.probability, self.corrections)
        self.label = apply_constraints(
            self.published, self.pairs, self.settled, self.corrections, threshold=self.threshold
        )
        self._questions: list[Question] | None = None

    # -- questions

    @property
    def questions(self) -> list[Question]:
        """The open questions, best first, skipped ones last."""
        if self._questions is None:
            ranked = rank_questions(self.label, self.pairs, self.settled, limit=4 * ASKED)
            still_open = filter_answered(ranked, self.corrections, checked=self._list_checked())
            self._questions = [q for q in still_open if q.worth >= LEAST_WORTH][:ASKED]
        first = [q for q in self._questions if _name_question(q) not in self.skipped]
        last = [q for q in self._questions if _name_question(q) in self.skipped]
        return [*first, *last]

    def _list_checked(self) -> set[frozenset[int]]:
        """Groups somebody saw whole: those left and those taken out when a cluster was split."""
        row_of = {key: row for row, key in enumerate(self.keys)}
        return {
            frozenset(row_of[key] for key in group if key in row_of)
            for decision in list_active(self.decisions)
            if decision.action == "split"
            for group in decision.groups
        }

    def skip(self, question: Question) -> None:
        """Ask this one after all others."""
        self.skipped.add(_name_question(question))

    # -- decisions

    def decide(self, action: Action, groups: Sequence[Sequence[int]]) -> Decision:
        """Append a decision about images named by sample_id; DataError when it cannot be."""
        return self._append(action, [self._find_keys(group) for group in groups])

    def undo(self, number: int) -> Decision:
        """Take one decision back."""
        decision = self.table.append(self.reviewer, "undo", undoes=number)
        self.refresh()
        return decision

    def _append(self, action: Action, groups: Sequence[Sequence[str]]) -> Decision:
        decision = self.table.append(self.reviewer, action, groups)
        self.refresh()
        return decision

    def _find_keys(self, group: Sequence[int]) -> list[str]:
        ids = np.asarray(group, np.int64)
        rows = np.minimum(np.searchsorted(self.sample_id, ids), len(self.sample_id) - 1)
        unknown = ids[self.sample_id[rows] != ids]
        if len(unknown):
            raise DataError(f"there is no unlabelled image {int(unknown[0])} in this run")
        return [self.keys[row] for row in rows.tolist()]

    # -- what the page shows

    def describe_progress(self) -> dict[str, Any]:
        """How far the review is."""
        active = list_active(self.decisions)
        return {
            "run": self.run.directory.name,
            "reviewer": self.reviewer,
            "decisions": len(active),
            "questions": len(self.questions),
            "worth": round(float(sum(question.worth for question in self.questions)), 1),
            "clusters": int(self.label.max(initial=UNLABELLED)) + 1,
            "pending": self.count_pending(),
            "missing": self.missing,
        }

    def count_pending(self) -> int:
        """Images whose cluster a rerun would change."""
        import pandas as pd

        from pipelines.results import compare_labels

        frame = pd.DataFrame({"key": np.arange(len(self.label)), "path": ""})
        before = frame.assign(pseudo_label=self.published)
        return len(compare_labels(before, frame.assign(pseudo_label=self.label)).moved)

    def describe_question(self, question: Question) -> dict[str, Any]:
        """One question with its faces."""
        sides = [question.one, question.other] if len(question.other) else [question.one]
        return {
            "name": list(_name_question(question)),
            "kind": question.kind,
            "chance": round(question.chance, 4),
            "worth": round(question.worth, 1),
            "sides": [self._describe_side(rows) for rows in sides],
        }

    def describe_cluster(self, label: int) -> dict[str, Any]:
        """One cluster as it is now, with all its faces."""
        rows = np.flatnonzero(self.label == label) if label >= 0 else np.empty(0, np.int64)
        if not len(rows):
            raise DataError(f"there is no cluster {label}")
        return {"kind": "cluster", "sides": [self._describe_side(rows)]}

    def list_clusters(
        self, *, order: str = "size", text: str = "", offset: int = 0, limit: int = 24
    ) -> dict[str, Any]:
        """Clusters as they are now, a page of them: largest first, or most doubtful first."""
        from cdp.propagation.quality import estimate_quality

        precision = estimate_quality(self.label, self.pairs, self.settled).expected_precision
        size = np.bincount(self.label[self.label != UNLABELLED], minlength=len(precision))
        chosen = np.arange(len(precision))
        if text.isdigit():
            chosen = chosen[chosen == int(text)]
        elif text:
            wanted = text.lower()
            holds = np.array([wanted in name.lower() for name in self.names], bool)
            chosen = np.intersect1d(chosen, self.label[holds])
        by = -size[chosen] if order == "size" else precision[chosen] - 1e-9 * size[chosen]
        chosen = chosen[np.argsort(by, kind="stable")]
        return {
            "total": len(chosen),
            "clusters": [
                {
                    "precision": round(float(precision[label]), 4),
                    **self._describe_side(np.flatnonzero(self.label == label), limit=12),
                }
                for label in chosen[offset : offset + limit].tolist()
            ],
        }

    def list_decisions(self) -> list[dict[str, Any]]:
        """Every decision, newest first, and whether it still counts."""
        active = {decision.number for decision in list_active(self.decisions)}
        row_of = {key: row for row, key in enumerate(self.keys)}
        told = []
        for decision in reversed(self.decisions):
            shown = [
                [self._describe_face(row_of[key]) for key in group[:6] if key in row_of]
                for group in decision.groups
            ]
            told.append(
                {
                    "number": decision.number,
                    "at": decision.at,
                    "who": decision.who,
                    "action": decision.action,
                    "undoes": decision.undoes,
                    "sizes": [len(group) for group in decision.groups],
                    "faces": shown,
                    "active": decision.number in active,
                }
            )
        return told

    def _describe_side(self, rows: np.ndarray, limit: int | None = None) -> dict[str, Any]:
        label = int(self.label[rows[0]])
        rows, distance = self._order(rows)
        return {
            "label": label,
            "size": len(rows),
            "faces": [
                self._describe_face(row, far)
                for row, far in zip(rows[:limit].tolist(), distance[:limit], strict=True)
            ],
        }

    def _order(self, rows: np.ndarray) -> tuple[np.ndarray, list[float | None]]:
        """Nearest to the middle of the group first."""
        if self.vectors is None:
            return rows, [None] * len(rows)
        vectors = self.vectors[rows]
        medoid = vectors[int(np.argmax(vectors @ vectors.sum(axis=0)))]
        distance = np.clip(1 - vectors @ medoid, 0, 2)
        order = np.argsort(distance, kind="stable")
        return rows[order], np.round(distance[order], 3).astype(float).tolist()

    def _describe_face(self, row: int, distance: float | None = None) -> dict[str, Any]:
        sample = int(self.sample_id[row])
        return {
            "id": sample,
            "name": self.names[row],
            "confidence": round(float(self.confidence[row]), 3),
            "distance": distance,
            "picture": sample in self.thumbnails,
        }


def _name_question(question: Question) -> tuple[int, int]:
    """Stays the same while the groups keep their first rows."""
    other = int(question.other[0]) if len(question.other) else -1
    return int(question.one[0]), other


def parse_groups(value: Any) -> list[list[int]]:
    """Groups of sample ids as a page sends them; DataError for anything else."""
    if not isinstance(value, list) or not all(
        isinstance(group, list) and all(type(each) is int for each in group) for group in value
    ):
        raise DataError("expected groups as lists of sample ids")
    return value


def describe_error(error: Exception) -> Mapping[str, Any]:
    """What a page is told of an error."""
    return {"error": str(error), "number": getattr(error, "number", None)}
