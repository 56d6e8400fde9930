"""Questions of a review about labelled people: is a cluster one of them, and is a name right?

The contract:
- `person`: the images of a cluster that `propagate/assignments` takes for a labelled person, with
  the images of that person. `doubt`: the images of a row of `knn/label_issues`, or of all
  rows with the same two names where two names are one person's, beside the people of both names.
- The worth has the scale of `cdp.review.questions`: pairs of images that an answer is expected to
  correct.
- What a reviewer answered is asked no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED
from pipelines.decisions import ON_LABELLED, ON_NAMES, Decision, Names, find_keys, list_active

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.results import RunResults

SHOWN = 24
"""Most images of a labelled person beside a question."""
DOUBT = -(10**9)
"""Second number in the name of a question about a label."""


@dataclass(frozen=True)
class PersonQuestion:
    """Do all images of `rows` show the labelled person `identity`?

    rows : (a,) int64 rows of the unlabelled images, one cluster or an image without label.
    chance : mean probability of it over the rows. number : of the person, in the order of names.
    """

    rows: np.ndarray
    identity: str
    chance: float
    worth: float
    number: int
    kind: Literal["person"] = "person"

    @property
    def name(self) -> tuple[int, int]:
        """A key that stays the same while the first row stays."""
        return int(self.rows[0]), -2 - self.number


@dataclass(frozen=True)
class DoubtQuestion:
    """Is the name of some labelled images right?

    images : (a,) int64 sample ids. identity : the name given. seems : the name that fits best; None
    where no labelled person is likely.
    """

    images: np.ndarray
    identity: str
    seems: str | None
    issue: str
    chance: float
    worth: float
    kind: Literal["doubt"] = "doubt"

    @property
    def name(self) -> tuple[int, int]:
        """A key of the question: its first image."""
        return int(self.images[0]), DOUBT


class LabelledPeople:
    """The labelled images of a run as the review shows them, and the questions about them."""

    def __init__(self, run: RunResults, sample_id: np.ndarray) -> None:
        samples = run.samples
        self.samples = samples[samples.split == "labelled"].reset_index(drop=True)
        self.keys = find_keys(self.samples)
        self.ids = self.samples.sample_id.to_numpy()
        self.place = {sample: place for place, sample in enumerate(self.ids.tolist())}
        self.images = self.samples.groupby("identity").sample_id.apply(np.array).to_dict()
        self.thumbnails = run.labelled_thumbnails
        self.issues = run.label_issues
        found = run.assignments
        found = found[found.sample_id.isin(sample_id)]
        self.assigned = found.assign(row=np.searchsorted(sample_id, found.sample_id.to_numpy()))
        self.identity = np.full(len(sample_id), None, object)
        self.identity[self.assigned.row] = self.assigned.identity
        self.is_sure = np.zeros(len(sample_id), bool)
        self.is_sure[self.assigned.row] = self.assigned.probability >= 1

    def find_keys(self, images: Sequence[int]) -> list[str]:
        """The keys of labelled images, for a decision; DataError for any other."""
        unknown = [sample for sample in images if sample not in self.place]
        if unknown:
            raise DataError(f"there is no labelled image {unknown[0]} in this run")
        return [self.keys[self.place[sample]] for sample in images]

    def count_corrected(self, decisions: Sequence[Decision]) -> int:
        """Number of labelled images that a rerun would rename or set aside."""
        said = {
            key: each.identity
            for each in list_active(decisions, ON_NAMES)
            for key in each.groups[0]
        }
        names = zip(self.keys, self.samples.identity, strict=True)
        return sum(key in said and said[key] != name for key, name in names)

    # -- faces

    def describe(self, identity: str, without: Sequence[int] | np.ndarray = ()) -> dict[str, Any]:
        """The images of one person, `SHOWN` at most, but for some."""
        images = np.setdiff1d(self.images.get(identity, np.empty(0, np.int64)), without)
        return {**self.describe_images(images), "identity": identity}

    def describe_images(self, images: np.ndarray) -> dict[str, Any]:
        """Labelled images as one side of a question."""
        faces = [self.describe_face(sample) for sample in images[:SHOWN].tolist()]
        return {"label": None, "identity": None, "size": len(images), "faces": faces}

    def describe_keys(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The faces of the images that a decision names."""
        wanted = set(keys)
        found = [place for place, key in enumerate(self.keys) if key in wanted]
        return [self.describe_face(int(self.ids[place])) for place in found]

    def describe_face(self, sample: int) -> dict[str, Any]:
        """One labelled image."""
        image = self.samples.iloc[self.place[sample]]
        return {
            "id": sample,
            "name": image.path,
            "confidence": None,
            "distance": None,
            "size_px": [int(image.width), int(image.height)],
            "picture": sample in self.thumbnails,
        }

    def find_name(self, sample: int) -> str:
        """The person of a labelled image."""
        return str(self.samples.identity.iloc[self.place[sample]])

    # -- questions

    def name_rows(self, names: Names) -> np.ndarray:
        """(n,) object: the person of each unlabelled image after a rerun; None for nobody."""
        identity = self.identity.copy()
        for person, rows in names.denied.items():
            identity[rows & (identity == person)] = None
        named = names.identity != None  # noqa: E711
        identity[named] = names.identity[named]
        return identity

    def find_changed(self, names: Names) -> np.ndarray:
        """(n,) bool: the unlabelled images whose person a rerun would change, or make certain."""
        named = names.identity != None  # noqa: E711
        return (self.name_rows(names) != self.identity) | (named & ~self.is_sure)

    def ask_people(self, label: np.ndarray, names: Names) -> list[PersonQuestion]:
        """For each cluster, or image without label, the labelled people it is taken for.

        label : (n,) int64, the clusters as corrected so far.
        """
        size = np.bincount(label[label != UNLABELLED], minlength=1)
        table = self.assigned
        cluster = label[table.row]
        group = np.where(cluster == UNLABELLED, len(size) + table.row, cluster)
        number = {name: place for place, name in enumerate(self.images)}
        found = []
        for (place, identity), part in table.groupby([group, table.identity]):
            rows = np.flatnonzero(label == place) if place < len(size) else part.row.to_numpy()
            denied = names.denied.get(identity)
            said = names.identity[rows]
            if (said == identity).all() or (denied is not None and denied[rows].any()):
                continue
            if identity not in self.images or any(each not in (None, identity) for each in said):
                continue  # of another person, as a reviewer said
            chance = float(part.probability.sum()) / len(rows)
            worth = chance * len(rows) * len(self.images[identity])
            found.append(PersonQuestion(rows, identity, chance, worth, number[identity]))
        return found

    def ask_doubts(self, decisions: Sequence[Decision]) -> list[DoubtQuestion]:
        """The doubted labels that no reviewer has answered."""
        answered = {key for each in list_active(decisions, ON_LABELLED) for key in each.groups[0]}
        table = self.issues
        known = [
            sample in self.place and self.keys[self.place[sample]] not in answered
            for sample in table.sample_id.tolist()
        ]
        table = table[np.array(known, bool)]
        second = (table.issue == "second_label").to_numpy()
        names = [
            (row.identity, row.seems) if two else row.sample_id
            for row, two in zip(table.itertuples(), second, strict=True)
        ]
        groups: dict[object, list[int]] = {}
        for at, name in enumerate(names):
            groups.setdefault(name, []).append(at)
        return [self._ask_doubt(table.iloc[rows]) for rows in groups.values()]

    def _ask_doubt(self, rows: pd.DataFrame) -> DoubtQuestion:
        first = rows.iloc[0]
        images = np.sort(rows.sample_id.to_numpy())
        seems = first.seems if isinstance(first.seems, str) else None
        others = len(self.images.get(first.identity, ())) - len(images)
        pairs = len(images) * max(others + len(self.images.get(seems, ())), 1)
        chance = float(rows.probability.mean())
        return DoubtQuestion(
            images, str(first.identity), seems, str(first.issue), chance, chance * pairs
        )
