"""Pair scoring without labels: the committee votes on each candidate pair.

The contract:
- `PairVoter` has the interface of `cdp.mediator.pair_scorer.PairScorer`, so that estimator and
  pipeline run one chain with either. Its scores are cosines, not probabilities.
- A pair's score in `score_block` depends on the pair alone: any partition into blocks gives the
  same bits. The cosine to cut at is chosen in `finish`, which sees all pairs.
- The levels of the rising threshold start at that cosine, given or chosen (`choose_first_level`).

Source: paper section 3.3, consensus by votes; the base cosine as the score is ours, and so is the
choice of the cosine (`cdp.mediator.vote_cosine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from cdp.committee.features import measure_affinity
from cdp.committee.pairs import check_candidates, vote_pairs
from cdp.errors import ConfigError
from cdp.mediator.vote_cosine import choose_cosine, measure_floor
from cdp.parameters import check_level, check_number
from cdp.types import Graph, PairTable, View, load_graph, load_view


@dataclass(frozen=True)
class PairScores:
    """Scores of all candidate pairs of a set.

    probability : (m,) float32 in [0, 1], that the pair shows one identity.
    rate : the estimated share of positive pairs; None where the committee voted.
    cosine : the cosine that kept pairs exceed; None where a mediator scored.
    doubts : reasons why the probabilities may not hold on this set; the quality estimated from
        them is withheld.
    """

    probability: np.ndarray
    rate: float | None
    cosine: float | None = None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairVoter:
    """Score pairs without labels: the base cosine if enough committee members agree, else 0.

    min_similarity : a pair is kept when its base cosine exceeds this; "auto": chosen from the set's
        own pairs by `choose_cosine`; else a number in [-1, 1].
    min_votes : and at least so many committee members have it as an edge. Without committee members
        (one view) the cosine alone decides.
    candidates : "base" or "all", as for `cdp.committee.make_pairs`.

    `calibrated` is False: scores are no probabilities.
    """

    min_similarity: float | Literal["auto"] = "auto"
    min_votes: int = 1
    candidates: str = "base"
    calibrated: ClassVar[bool] = False
    precision_curve: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_candidates(self.candidates)
        check_level("min_similarity", self.min_similarity, bounds=(-1, 1))
        check_number("min_votes", self.min_votes, "a whole number of committee members", whole=True)
        if self.min_votes < 0:
            raise ConfigError(f"min_votes must be 0 or more, got {self.min_votes}")

    def whiten(self, views: Sequence[View], *, threads: int | None = None) -> None:
        """None: votes use no whitened rows."""

    def score_block(
        self,
        graphs: Sequence[Graph],
        pairs: PairTable,
        affinity: np.ndarray,
        whitened: np.ndarray | None = None,
        *,
        threads: int | None = 1,
    ) -> np.ndarray:
        """Score any part of the pairs; parameters as for `PairScorer.score_block`.

        Raises
        ------
        ConfigError
            More votes are asked for than there are committee members.
        """
        members = len(graphs) - 1
        if members and self.min_votes > members:
            raise ConfigError(
                f"min_votes must be in 0 .. {members}, the number of committee members (views "
                f"without the base), got {self.min_votes}"
            )
        similarity = affinity[:, 0]
        least = 0.0 if self.min_similarity == "auto" else self.min_similarity
        votes = vote_pairs(graphs, pairs)
        kept = (similarity > least) & (votes >= min(self.min_votes, members))
        return np.where(kept, np.clip(similarity, 0, 1), 0).astype(np.float32)

    def finish(
        self,
        views: Sequence[View],
        pairs: PairTable,
        probability: np.ndarray,
        count: int,
        *,
        threads: int | None = None,
    ) -> PairScores:
        """Choose the cosine where it is "auto"; votes have no positive rate to correct."""
        if self.min_similarity != "auto":
            return PairScores(probability, None, self.min_similarity)
        floor = measure_floor(load_view(views[0]))
        cosine = choose_cosine(pairs, probability, count, floor=floor)
        kept = np.where(probability > np.float64(cosine), probability, 0)
        return PairScores(kept.astype(np.float32), None, cosine)

    def score(
        self,
        views: Sequence[View],
        graphs: Sequence[Graph],
        pairs: PairTable,
        *,
        threads: int | None = None,
    ) -> PairScores:
        """Score all candidate pairs of a set; parameters and errors as for `PairScorer.score`."""
        affinity = measure_affinity(views[0], pairs, threads=threads)[:, None]
        kept = self.score_block(graphs, pairs, affinity, threads=threads)
        return self.finish(views, pairs, kept, len(load_graph(graphs[0])), threads=threads)


def choose_first_level(cosine: float, threshold: float | None = None) -> float:
    """The first level of the rising threshold where the committee voted.

    cosine : `PairScores.cosine`, which kept pairs exceed. threshold : a higher level to start at.

    Never below 0: the score of a pair that is not kept is 0, and must exceed no level. A cosine
    above 1, which no pair exceeds, counts as 1.

    Source: the released code starts its levels at the cosine that pairs are kept above.
    """
    return max(0.0, min(1.0, float(cosine)), 0.0 if threshold is None else float(threshold))
