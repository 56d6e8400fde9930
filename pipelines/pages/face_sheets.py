"""Face sheets: choose the clusters, merges and bridges of a page, and order their faces.

The contract:
- Faces of a cluster are ordered by distance from its medoid (1 - cosine in the base view). Of a
  large cluster only the nearest and the farthest are shown.
- A page has as many faces as its budget of bytes allows: first the clusters and questions of the
  sections, then the remaining clusters, each complete or not at all.
- The result consists of plain JSON values.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.review.questions import Question, rank_questions
from cdp.types import UNLABELLED, PairTable
from pipelines.tables import find_rows

if TYPE_CHECKING:
    import pandas as pd

SECTION = 24
"""Most clusters, merges or bridges of a section."""
NEAREST, FARTHEST = 36, 12
"""Faces shown of a larger cluster."""
NONE = np.empty(0, np.int64)
FACE_BYTES = 10_000_000
"""Most bytes of all faces of a page, as base64."""


@dataclass
class Sheets:
    """The content of a page; faces and clusters are referred to by position in these lists.

    faces : name, confidence, distance, picture (base64 or "").
    clusters : label, size, precision, weakest, faces.
    largest, doubtful, random : positions of clusters.
    merges, bridges : chance that it is one person (null where no cluster's precision is known),
        worth of an answer, two sides.
    mapped : of each image of the map its face, or its name where there is no room for it.
    left_out : number of clusters for which the budget did not suffice.
    measured : whether confidences are probabilities, and no cosines.
    """

    faces: list[tuple[str, float, float | None, str]] = field(default_factory=list)
    clusters: list[dict[str, Any]] = field(default_factory=list)
    largest: list[int] = field(default_factory=list)
    doubtful: list[int] = field(default_factory=list)
    random: list[int] = field(default_factory=list)
    merges: list[dict[str, Any]] = field(default_factory=list)
    bridges: list[dict[str, Any]] = field(default_factory=list)
    mapped: list[int | str] = field(default_factory=list)
    left_out: int = 0
    measured: bool = True


def make_sheets(
    labels: pd.DataFrame,
    clusters: pd.DataFrame,
    pairs: PairTable,
    probability: np.ndarray,
    vectors: np.ndarray | None,
    thumbnails: Mapping[int, bytes],
    *,
    mapped: np.ndarray = NONE,
    seed: int = 0,
    budget: int = FACE_BYTES,
) -> Sheets:
    """Choose the clusters and questions of a page and order their faces.

    Parameters
    ----------
    labels, clusters : tables of `propagate`; `labels` ascending by sample_id.
    pairs : candidate pairs as rows of `labels`.
    probability : (m,) float32 in [0, 1], of each pair.
    vectors : (n, d) float32 unit length, the base view, or None.
    thumbnails : sample_id -> WebP file.
    mapped : (p,) rows of `labels` on the map; their clusters come before those of no section.
    seed : chooses the random clusters. budget : bytes for all faces.
    """
    maker = _Maker(labels, clusters, vectors, thumbnails, budget)
    return maker.make(pairs, probability, mapped, seed)


class _Maker:
    def __init__(
        self,
        labels: pd.DataFrame,
        clusters: pd.DataFrame,
        vectors: np.ndarray | None,
        thumbnails: Mapping[int, bytes],
        budget: int,
    ) -> None:
        self.sheets = Sheets(measured=bool(clusters.expected_precision.notna().any()))
        self.label = labels.pseudo_label.to_numpy()
        self.names = labels.path.tolist()
        self.confidence = labels.confidence.to_numpy()
        self.sample_id = labels.sample_id.to_numpy()
        self.representative = find_rows(labels)
        self.clusters = clusters
        self.vectors = vectors
        self.thumbnails = thumbnails
        self.left = budget
        self.face_of: dict[int, int] = {}
        self.cluster_of: dict[int, int | None] = {}
        order = np.argsort(self.label, kind="stable")
        first = np.searchsorted(self.label[order], np.arange(len(clusters) + 1))
        self.rows = [order[first[c] : first[c + 1]] for c in range(len(clusters))]

    def make(
        self, pairs: PairTable, probability: np.ndarray, mapped: np.ndarray, seed: int
    ) -> Sheets:
        sheets, clusters = self.sheets, self.clusters
        size = clusters["size"].to_numpy()
        precision = clusters.expected_precision.fillna(clusters.mean_probability).to_numpy()
        largest = np.argsort(-size, kind="stable")[:SECTION]
        doubtful = np.argsort(precision - 1e-9 * size, kind="stable")[:SECTION]
        random = np.random.default_rng(seed).permutation(len(size))[:SECTION]
        sheets.largest = self._add_clusters(largest)
        sheets.doubtful = self._add_clusters(doubtful)
        if len(size):
            for question in rank_questions(
                self.label,
                pairs,
                probability,
                kinds=("merge",),
                limit=2 * SECTION,
                representative=self.representative,
            ):
                self._add_question(sheets.merges, question)
            for question in rank_questions(
                self.label,
                pairs,
                probability,
                kinds=("bridge",),
                limit=2 * SECTION,
                representative=self.representative,
            ):
                self._add_question(sheets.bridges, question)
        sheets.random = self._add_clusters(np.sort(random))
        on_map = np.unique(self.label[mapped])
        self._add_clusters(on_map[on_map != UNLABELLED])
        sheets.mapped = [self._add_point(row) for row in mapped.tolist()]
        self._add_clusters(np.arange(len(size)))
        sheets.left_out = len(size) - len(sheets.clusters)
        return sheets

    def _add_clusters(self, chosen: np.ndarray) -> list[int]:
        found = [self._add_cluster(int(cluster)) for cluster in chosen]
        return [position for position in found if position is not None]

    def _add_cluster(self, cluster: int) -> int | None:
        if cluster not in self.cluster_of:
            rows = self.rows[cluster]
            shown = self._add_rows(rows, self._medoid_row(cluster))
            self.cluster_of[cluster] = None if shown is None else len(self.sheets.clusters)
            if shown is not None:
                row = self.clusters.iloc[cluster]
                self.sheets.clusters.append(
                    {
                        "label": cluster,
                        "size": len(rows),
                        "precision": _round(row.expected_precision),
                        "weakest": _round(row.weakest_edge) if self.sheets.measured else None,
                        "faces": shown,
                    }
                )
        return self.cluster_of[cluster]

    def _add_point(self, row: int) -> int | str:
        label = int(self.label[row])
        found = self._add_rows(
            np.array([row]), None if label == UNLABELLED else self._medoid_row(label)
        )
        return str(self.names[row]) if found is None else found[0]

    def _medoid_row(self, cluster: int) -> int:
        return int(np.searchsorted(self.sample_id, self.clusters.medoid_sample_id.iloc[cluster]))

    def _add_question(self, place: list[dict[str, Any]], question: Question) -> None:
        if len(place) == SECTION:
            return
        sides = []
        for rows in (question.one, question.other):
            label = int(self.label[rows[0]])
            medoid = int(rows[0]) if label == UNLABELLED else self._medoid_row(label)
            shown = self._add_rows(rows, medoid)
            if shown is None:
                return
            sides.append({"label": label, "size": len(rows), "faces": shown})
        chance = round(question.chance, 4) if self.sheets.measured else None
        place.append({"chance": chance, "worth": round(question.worth, 1), "sides": sides})

    def _add_rows(self, rows: np.ndarray, medoid: int | None) -> list[int] | None:
        """Positions of the faces of these rows, in order; None when the budget does not suffice."""
        distance = None
        if self.vectors is not None and medoid is not None:
            distance = np.clip(1 - self.vectors[rows] @ self.vectors[medoid], 0, 2)
            order = np.lexsort((rows, distance))
            rows, distance = rows[order], distance[order]
        if len(rows) > NEAREST + FARTHEST:
            kept = np.r_[0:NEAREST, len(rows) - FARTHEST : len(rows)]
            rows = rows[kept]
            distance = None if distance is None else distance[kept]
        new = [row for row in rows.tolist() if row not in self.face_of]
        pictures = [self.thumbnails.get(int(self.sample_id[row]), b"") for row in new]
        bytes_needed = sum(4 * (len(picture) + 2) // 3 for picture in pictures)
        if bytes_needed > self.left:
            return None
        self.left -= bytes_needed
        far = dict(zip(rows.tolist(), [] if distance is None else distance.tolist(), strict=False))
        for row, picture in zip(new, pictures, strict=True):
            self.face_of[row] = len(self.sheets.faces)
            distance_shown = round(far[row], 3) if row in far else None
            self.sheets.faces.append(
                (
                    str(self.names[row]),
                    round(float(self.confidence[row]), 3),
                    distance_shown,
                    base64.b64encode(picture).decode(),
                )
            )
        return [self.face_of[row] for row in rows.tolist()]


def _round(value: float) -> float | None:
    """Four decimals; None where it is unknown."""
    return None if np.isnan(value) else round(float(value), 4)
