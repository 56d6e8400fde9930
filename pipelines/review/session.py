"""A review session: open questions, the labels as corrected so far, new decisions.

The contract:
- Enters: a finished run and its corrections table. Every decision is appended to the table at once;
  apart from skipped questions, all state is read back from there.
- The clusters shown are the published labels after applying all active decisions, and what the
  tracks of videos say where nobody has decided: what a rerun would give for them.
- A question is open until its images are accepted or kept apart. Questions are ranked by
  `cdp.review.questions`; skipped ones come last.
- A new version of the run, and decisions made elsewhere, are noticed at the next request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdp.errors import DataError, StageError
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.quality import QualityEstimate
from cdp.review.constraints import Constraints, apply_constraints, settle_pairs
from cdp.review.questions import Question as ClusterQuestion
from cdp.review.questions import QuestionRanking, filter_answered
from cdp.review.tracks import give_way
from cdp.types import UNLABELLED
from pipelines.decisions import (
    ON_LABELLED,
    Action,
    CorrectionTable,
    Decision,
    find_keys,
    find_names,
    list_active,
    resolve_decisions,
)
from pipelines.missed_pairs import read_missed
from pipelines.results import RunResults, open_run
from pipelines.review.left_out import PAGE, RejectedFiles, UnlabelledImages
from pipelines.review.neighbours import NeighbourLists
from pipelines.review.people import DoubtQuestion, LabelledPeople, PersonQuestion
from pipelines.store import compare_inputs
from pipelines.tables import find_rows, list_pairs
from pipelines.track_constraints import find_track_constraints

Question = ClusterQuestion | PersonQuestion | DoubtQuestion

ASKED = 200
"""Most open questions in the list, highest worth first."""
CUTS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999)
"""Thresholds of a stricter cut, the loosest first."""
MOST_PARTS = 24
LEAST_WORTH = 0.02
"""Expected number of wrong pairs below which a question is not asked."""


class ReviewSession:
    """One reviewer of one run."""

    def __init__(self, run: RunResults, reviewer: str) -> None:
        self.reviewer = reviewer
        self.table = CorrectionTable(run.directory)
        self.skipped: set[tuple[int, int]] = set()
        self._load(run)

    # -- state

    def _load(self, run: RunResults) -> None:
        labels = run.labels
        self._check_whole(run)  # before any state is replaced
        self.run = run
        self.fingerprint = run.manifest("propagate")["fingerprint"]
        self.sample_id = labels.sample_id.to_numpy()
        self.names = [str(path) for path in labels.path]
        self.confidence = labels.confidence.to_numpy()
        self.published = labels.pseudo_label.to_numpy()
        self.representative = find_rows(labels)
        samples = run.samples.set_index("sample_id").loc[self.sample_id].reset_index()
        self.keys = find_keys(samples)
        self._row_of = {key: row for row, key in enumerate(self.keys)}
        self.followed = _follow_tracks(run, samples)
        self.pairs = list_pairs(run.pairs, self.sample_id)
        self.probability = run.pairs.probability.to_numpy()
        threshold = run.manifest("propagate")["facts"].get("threshold")
        self.threshold = float(threshold) if isinstance(threshold, int | float) else 0.5
        scored = run.manifest("mediate")["facts"]
        missed = read_missed(scored)
        self._ranking = QuestionRanking(self.pairs, self.representative, missed=missed)
        self.voted = scored.get("method") == "vote"
        self.is_precision_known = not (self.voted or scored.get("self_trained"))
        self.withheld = run.manifest("propagate")["facts"].get("withheld", [])
        self.size_px = samples[["width", "height"]].to_numpy()
        self.vectors = run.view_of(self.sample_id)
        self.thumbnails = run.thumbnails
        self.people = LabelledPeople(run, self.sample_id)
        self.neighbours = NeighbourLists(run)
        self.rejected = RejectedFiles(run)
        self._seen: tuple[int, int] | None = None
        self.refresh()

    def _check_whole(self, run: RunResults) -> None:
        for stage in ("propagate", "thumbnails"):
            for name, is_present in compare_inputs(run.directory, stage).items():
                if not is_present:
                    raise StageError(
                        f"{run.directory}: {stage} was made from another {name} than the one "
                        "published now. Bring the run up to date first: "
                        f"{run.compose_command()}"
                    )

    def refresh(self) -> None:
        """Read again the run and the decisions if they changed on disk."""
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
        decided, self.missing = resolve_decisions(self.decisions, self.keys)
        self.corrections = give_way(self.followed, decided) if self.followed else decided
        self.settled = settle_pairs(self.pairs, self.probability, self.corrections)
        self.label = apply_constraints(
            self.published, self.pairs, self.settled, self.corrections, threshold=self.threshold
        )
        self.named = find_names(self.decisions, self.keys)
        self._ranked: list[ClusterQuestion] | None = None
        self._questions: list[Question] | None = None
        self._unlabelled: UnlabelledImages | None = None

    # -- questions

    @property
    def questions(self) -> list[Question]:
        """The open questions, highest worth first, skipped ones last."""
        if self._questions is None:
            ranked, checked = self._rank(), self._list_checked()
            still_open = filter_answered(ranked, self.corrections, checked=checked)
            every: list[Question] = [*still_open, *self.people.ask_people(self.label, self.named)]
            every += self.people.ask_doubts(self.decisions)
            every.sort(key=lambda question: -question.worth)
            self._questions = [q for q in every if q.worth >= LEAST_WORTH][:ASKED]
        first = [q for q in self._questions if name_question(q) not in self.skipped]
        last = [q for q in self._questions if name_question(q) in self.skipped]
        return [*first, *last]

    def _rank(self) -> list[ClusterQuestion]:
        """Questions about the clusters as corrected, those with an answer included."""
        if self._ranked is None:
            self._ranked = self._ranking.rank(self.label, self.settled, limit=4 * ASKED)
        return self._ranked

    def _list_checked(self) -> set[frozenset[int]]:
        """Groups a reviewer has seen completely: both parts of every split."""
        return {
            frozenset(self._row_of[key] for key in group if key in self._row_of)
            for decision in list_active(self.decisions)
            if decision.action == "split"
            for group in decision.groups
        }

    def skip(self, name: Sequence[int]) -> None:
        """Move the question of that name behind all others; DataError when it is no name."""
        if len(name) != 2 or not all(type(each) is int for each in name):
            raise DataError("expected the name of a question, two numbers")
        self.skipped.add((name[0], name[1]))

    # -- decisions

    def name_reviewer(self, name: str) -> None:
        """Who decides from now on; DataError for an empty or very long name."""
        if not 1 <= len(name.strip()) <= 100:
            raise DataError("a name of 1 to 100 characters expected")
        self.reviewer = name.strip()

    def decide(
        self, action: Action, groups: Sequence[Sequence[int]], identity: str | None = None
    ) -> Decision:
        """Append a decision on groups of sample ids; DataError when it is invalid.

        identity : the labelled person, for decisions that name one.
        """
        if identity is not None and identity not in self.people.images:
            raise DataError(f"there is no labelled person {identity!r} in this run")
        find = self.people.find_keys if action in ON_LABELLED else self._find_keys
        return self._append(action, [find(group) for group in groups], identity)

    def undo(self, number: int) -> Decision:
        """Undo one decision."""
        decision = self.table.append(self.reviewer, "undo", undoes=number)
        self.refresh()
        return decision

    def _append(
        self, action: Action, groups: Sequence[Sequence[str]], identity: str | None
    ) -> Decision:
        decision = self.table.append(self.reviewer, action, groups, identity=identity)
        self.refresh()
        return decision

    def _find_keys(self, group: Sequence[int]) -> list[str]:
        ids = np.asarray(group, np.int64)
        rows = np.minimum(np.searchsorted(self.sample_id, ids), len(self.sample_id) - 1)
        unknown = ids[self.sample_id[rows] != ids]
        if len(unknown):
            raise DataError(f"there is no unlabelled image {int(unknown[0])} in this run")
        return [self.keys[row] for row in rows.tolist()]

    def split_parts(self, groups: Sequence[Sequence[int]]) -> list[Decision]:
        """Append that no two groups share a person: each is split from all groups after it."""
        if len(groups) < 2:
            raise DataError("expected two groups or more")
        return [
            self.decide("split", [group, [each for later in groups[at + 1 :] for each in later]])
            for at, group in enumerate(groups[:-1])
        ]

    def propose_parts(self, ids: Sequence[int]) -> dict[str, Any]:
        """A stricter cut of some images: the loosest threshold that parts them.

        ids : sample ids of one cluster. Sides come largest first; images that stay alone are one
        side each, `MOST_PARTS` sides at most. DataError where nothing parts them.
        """
        self._find_keys(ids)
        rows = np.unique(np.searchsorted(self.sample_id, np.asarray(ids, np.int64)))
        inside = np.isin(self.pairs.source, rows) & np.isin(self.pairs.target, rows)
        within = self.pairs.take(inside)
        for threshold in CUTS:
            found = agglomerate(within, self.settled[inside], len(self.label), threshold=threshold)
            part = found.label[rows]
            alone = part == UNLABELLED
            part[alone] = found.cluster_count + np.arange(int(alone.sum()))
            if len(np.unique(part)) > 1:
                break
        else:
            raise DataError("no threshold parts these images; mark those that do not belong")
        names, size = np.unique(part, return_counts=True)
        chosen = names[np.argsort(-size, kind="stable")][:MOST_PARTS]
        sides = [self._describe_side(rows[part == name]) for name in chosen]
        return {"kind": "parts", "sides": sides, "threshold": threshold,
                "more": int(len(rows) - sum(side["size"] for side in sides))}  # fmt: skip

    # -- answers to the page

    def describe_progress(self) -> dict[str, Any]:
        """Counts of decisions, open questions, clusters and images that a rerun would move."""
        active = list_active(self.decisions)
        return {
            "run": self.run.directory.name,
            "reviewer": self.reviewer,
            "decisions": len(active),
            "questions": len(self.questions),
            "asked_at_most": ASKED,
            "worth": round(float(sum(question.worth for question in self.questions)), 1),
            "estimated_f": self._estimate_f(),
            "certainty": "confidence" if self.is_precision_known else "mean cosine",
            "clusters": int(self.label.max(initial=UNLABELLED)) + 1,
            "pending": self.count_pending(),
            "missing": self.missing,
        }

    def _estimate_f(self) -> float | None:
        """The estimated pairwise F of the labels as corrected; None where it is withheld."""
        if self.voted:
            return None
        found = self._estimate().withhold(*self.withheld)
        return None if found.f is None else round(found.f, 4)

    def _estimate(self) -> QualityEstimate:
        self._rank()
        assert self._ranking.quality is not None
        return self._ranking.quality

    def count_pending(self) -> int:
        """Number of images whose cluster, or whose labelled person, a rerun would change."""
        people = self.people
        moved = find_moved(self.published, self.label)
        moved |= people.find_changed(self.named)
        return int(moved.sum()) + people.count_corrected(self.decisions)

    def describe_question(self, question: Question) -> dict[str, Any]:
        """One question with its faces."""
        if not isinstance(question, ClusterQuestion):
            return self._describe_person(question)
        sides = [question.one, question.other] if len(question.other) else [question.one]
        return {
            "name": list(name_question(question)),
            "kind": question.kind,
            "chance": round(question.chance, 4) if self.is_precision_known else None,
            "worth": round(question.worth, 1),
            "sides": [self._describe_side(rows) for rows in sides],
        }

    def _describe_person(self, question: PersonQuestion | DoubtQuestion) -> dict[str, Any]:
        people = self.people
        if isinstance(question, PersonQuestion):
            sides = [self._describe_side(question.rows), people.describe(question.identity)]
            seems = None
        else:
            doubted, seems = question.images, question.seems
            shown = [question.identity, *([] if seems is None else [seems])]
            sides = [
                people.describe_images(doubted),
                *(people.describe(name, without=doubted) for name in shown),
            ]
        return {
            "name": list(question.name),
            "kind": question.kind,
            "identity": question.identity,
            "seems": seems,
            "issue": getattr(question, "issue", None),
            "chance": round(question.chance, 4),
            "worth": round(question.worth, 1),
            "sides": sides,
        }

    def find_picture(self, sample: int) -> bytes | None:
        """The WebP file of one image, labelled or not; None where there is none."""
        return self.thumbnails.get(sample) or self.people.thumbnails.get(sample)

    def describe_neighbours(self, sample: int) -> list[dict[str, Any]]:
        """The nearest neighbours of an image: face, cosine, and cluster or labelled person."""
        found = []
        for other, cosine in self.neighbours.find(sample):
            face = self._find_face(other)
            if face is not None:
                found.append({**face, "cosine": round(float(cosine), 4)})
        return found

    def _find_face(self, sample: int) -> dict[str, Any] | None:
        """Any image of the run with its cluster or person; None for one that is not shown."""
        row = int(np.searchsorted(self.sample_id, sample))
        if row < len(self.sample_id) and self.sample_id[row] == sample:
            return {**self._describe_face(row), "cluster": int(self.label[row]), "identity": None}
        if sample not in self.people.place:
            return None
        face = self.people.describe_face(sample)
        return {**face, "cluster": None, "identity": self.people.find_name(sample)}

    def list_unlabelled(self, *, kind: str = "", text: str = "", offset: int = 0) -> dict[str, Any]:
        """One page of the images without a label, each with the reason."""
        if self._unlabelled is None:
            out = self.corrections.rejected
            self._unlabelled = UnlabelledImages(
                self.label, self.published, np.empty(0, np.int64) if out is None else out,
                self.pairs, self.settled, threshold=self.threshold, voted=self.voted,
            )  # fmt: skip
        images = self._unlabelled
        rows = images.list_rows(kind, text, self.names)
        return {
            "total": len(rows),
            "reasons": images.count(),
            "images": [
                {**self._describe_face(row), "reason": images.explain(row, self.names)}
                for row in rows[offset : offset + PAGE].tolist()
            ],
        }

    def describe_cluster(self, label: int) -> dict[str, Any]:
        """One current cluster with all its faces."""
        rows = np.flatnonzero(self.label == label) if label >= 0 else np.empty(0, np.int64)
        if not len(rows):
            raise DataError(f"there is no cluster {label}")
        return {"kind": "cluster", "sides": [self._describe_side(rows)]}

    def list_clusters(
        self,
        *,
        order: str = "size",
        text: str = "",
        sizes: tuple[int, int] | None = None,
        offset: int = 0,
        limit: int = 24,
    ) -> dict[str, Any]:
        """One page of the current clusters: largest, or lowest expected precision, first.

        sizes : least and most images of a cluster.
        """
        precision = self._estimate().expected_precision
        size = np.bincount(self.label[self.label != UNLABELLED], minlength=len(precision))
        chosen = np.arange(len(precision))
        if sizes is not None:
            chosen = chosen[(size >= sizes[0]) & (size <= sizes[1])]
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
                    "precision": round(float(precision[label]), 4)
                    if self.is_precision_known
                    else None,
                    **self._describe_side(np.flatnonzero(self.label == label), limit=12),
                }
                for label in chosen[offset : offset + limit].tolist()
            ],
        }

    def list_decisions(self) -> list[dict[str, Any]]:
        """Every decision, newest first, with whether it is active."""
        active = {decision.number for decision in list_active(self.decisions)}
        row_of = self._row_of
        described = []
        for decision in reversed(self.decisions):
            labelled = decision.action in ON_LABELLED
            shown = [
                self.people.describe_keys(group[:6])
                if labelled
                else [self._describe_face(row_of[key]) for key in group[:6] if key in row_of]
                for group in decision.groups
            ]
            described.append(
                {
                    "number": decision.number,
                    "at": decision.at,
                    "who": decision.who,
                    "action": decision.action,
                    "undoes": decision.undoes,
                    "identity": decision.identity,
                    "sizes": [len(group) for group in decision.groups],
                    "faces": shown,
                    "active": decision.number in active,
                }
            )
        return described

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
        """Rows and distances (1 - cosine), nearest to the group's medoid first."""
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
            "size_px": self.size_px[row].tolist(),
            "picture": sample in self.thumbnails,
        }


def _follow_tracks(run: RunResults, samples: Any) -> Constraints:
    """What the tracks say about the images of the run, as `propagate` knows them."""
    config = run.manifest("propagate")["ingredients"]["config"]
    embedded = run.find("embed")
    if embedded is None or not config["propagate"].get("tracks") or "track" not in samples:
        return Constraints(len(samples))
    committee = config["committee"]
    members = [member["name"] for member in (committee["base"], *committee["members"])]
    views = [embedded.path(f"embeddings/unlabelled/{member}") for member in members]
    return find_track_constraints(samples, views, seed=config["seed"])


def find_moved(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """(n,) bool: the images whose cluster is another one now.

    Each cluster of now continues one cluster of before at most, the one it shares most images
    with: of two clusters that merge, the images of the smaller one move.
    """
    cells, cell_of, shared = np.unique(
        np.stack([before, now]), axis=1, return_inverse=True, return_counts=True
    )
    labelled = (cells != UNLABELLED).all(axis=0)
    stays = (cells == UNLABELLED).all(axis=0)
    taken: tuple[set[int], set[int]] = (set(), set())
    for cell in np.argsort(-shared, kind="stable").tolist():
        old, new = cells[:, cell].tolist()
        if labelled[cell] and old not in taken[0] and new not in taken[1]:
            taken[0].add(old)
            taken[1].add(new)
            stays[cell] = True
    return ~stays[cell_of.reshape(-1)]


def name_question(question: Question) -> tuple[int, int]:
    """A key of the question that stays the same while its groups keep their first rows."""
    if not isinstance(question, ClusterQuestion):
        return question.name
    other = int(question.other[0]) if len(question.other) else -1
    return int(question.one[0]), other
