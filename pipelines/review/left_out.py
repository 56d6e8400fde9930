"""Images without a cluster in a review: those without a label, and files that were rejected.

The contract:
- Read only: lists with a reason in words for each image, in pages, by kind of reason and by name.
- The reason of an image without a label follows from the pairs and the decisions as they are now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.types import UNLABELLED, PairTable
from pipelines.data.reasons import name_reason

if TYPE_CHECKING:
    from pipelines.results import RunResults

PAGE = 48
"""Images of one page."""
KINDS = {
    "rejected": "rejected in the review",
    "alone": "left alone by a decision of the review",
    "none": "in no candidate pair",
    "below": "no pair above the cut",
    "outweighed": "a pair above the cut, outweighed by others",
}
"""Key -> why an image has no label."""


@dataclass(frozen=True)
class BestPairs:
    """Of each row its best pair: other row (-1 for none) and score, each (n,)."""

    other: np.ndarray
    score: np.ndarray

    @classmethod
    def find(cls, pairs: PairTable, score: np.ndarray, wanted: np.ndarray) -> BestPairs:
        """The best pair of the `wanted` rows, (n,) bool."""
        other = np.full(len(wanted), -1, np.int64)
        best = np.zeros(len(wanted), np.float32)
        chosen = np.flatnonzero(wanted[pairs.source] | wanted[pairs.target])
        order = chosen[np.argsort(score[chosen], kind="stable")]  # the last one written is the best
        for one, two in ((pairs.source, pairs.target), (pairs.target, pairs.source)):
            ends, values = one[order], score[order]
            draft, there = np.zeros(len(wanted), np.float32), np.full(len(wanted), -1, np.int64)
            draft[ends], there[ends] = values, two[order]
            better = (there >= 0) & ((other < 0) | (draft > best))
            best[better], other[better] = draft[better], there[better]
        return cls(other, best)


class UnlabelledImages:
    """The images without a label, each with the reason.

    label : (n,) int64 as corrected. published : (n,) int64 of the run. rejected : rows that a
    reviewer rejected. threshold : of the cut. voted : scores are cosines, no probabilities.
    """

    def __init__(
        self,
        label: np.ndarray,
        published: np.ndarray,
        rejected: np.ndarray,
        pairs: PairTable,
        score: np.ndarray,
        *,
        threshold: float,
        voted: bool,
    ) -> None:
        self.threshold, self.voted = threshold, voted
        wanted = label == UNLABELLED
        self.best = BestPairs.find(pairs, score, wanted)
        kind = np.where(self.best.score >= threshold, "outweighed", "below").astype(object)
        kind[self.best.other < 0] = "none"
        kind[published != UNLABELLED] = "alone"
        kind[rejected] = "rejected"
        self.rows = np.flatnonzero(wanted)
        self.kind = kind[self.rows]

    def count(self) -> list[dict[str, Any]]:
        """Kinds of reasons with their number of images, in the order of `KINDS`."""
        found = Counter(self.kind.tolist())
        return [
            {"key": key, "text": text, "count": found[key]}
            for key, text in KINDS.items()
            if found[key]
        ]

    def list_rows(self, kind: str, text: str, names: Sequence[str]) -> np.ndarray:
        """Rows of one kind ("" is any) whose name contains a text, the nearest to the cut first."""
        chosen = self.rows[self.kind == kind] if kind else self.rows
        if text:
            wanted = text.lower()
            holds = [wanted in names[row].lower() for row in chosen.tolist()]
            chosen = chosen[np.array(holds, bool)]
        return chosen[np.argsort(-self.best.score[chosen], kind="stable")]

    def explain(self, row: int, names: Sequence[str]) -> str:
        """Why the image of that row has no label, in a sentence."""
        kind = self.kind[np.searchsorted(self.rows, row)]
        if kind in ("rejected", "alone", "none"):
            return KINDS[kind]
        score, other = float(self.best.score[row]), names[int(self.best.other[row])]
        chance = f"{_name_chance(score)} likely one person"
        is_alike = f"has the cosine {score:.3f}" if self.voted else f"is {chance}"
        cut = f"{self.threshold:.3f}" if self.voted else _name_chance(self.threshold)
        text = f"its best pair, with {other}, {is_alike}; the cut is at {cut}"
        if kind == "outweighed":
            text += ", but pairs with the rest of that cluster outweigh it, or it was too large"
        return text


def _name_chance(share: float) -> str:
    return f"{100 * share:.{1 if share > 0.99 or share < 0.01 else 0}f} %"


class RejectedFiles:
    """The files that were rejected, each with its reason and, where it can be shown, a picture."""

    def __init__(self, run: RunResults) -> None:
        table = run.rejected
        self.paths = [str(path) for path in table.path]
        self.reasons = [str(reason) for reason in table.reason]
        self.kinds = [name_reason(reason) for reason in self.reasons]
        pictures = run.rejected_thumbnails
        self.pictures = {
            row: pictures[path] for row, path in enumerate(self.paths) if path in pictures
        }

    def list_page(self, kind: str, text: str, offset: int) -> dict[str, Any]:
        """One page of one kind of reason ("" is any), in the order of the table."""
        wanted = text.lower()
        chosen = [
            row
            for row, (path, own) in enumerate(zip(self.paths, self.kinds, strict=True))
            if kind in ("", own) and wanted in path.lower()
        ]
        return {
            "total": len(chosen),
            "reasons": [
                {"key": each, "text": each, "count": number}
                for each, number in Counter(self.kinds).most_common()
            ],
            "images": [
                {"number": row, "name": self.paths[row], "reason": self.reasons[row],
                 "picture": row in self.pictures}
                for row in chosen[offset : offset + PAGE]
            ],
        }  # fmt: skip
