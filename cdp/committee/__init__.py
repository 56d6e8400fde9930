"""The committee: candidate pairs of N + 1 views, their votes and their features."""

from cdp.committee.features import (
    VARIANTS,
    count_features,
    describe_pairs,
    measure_affinity,
    name_features,
)
from cdp.committee.pairs import CANDIDATES, choose_candidates, make_pairs, vote_pairs

__all__ = [
    "CANDIDATES",
    "VARIANTS",
    "choose_candidates",
    "count_features",
    "describe_pairs",
    "make_pairs",
    "measure_affinity",
    "name_features",
    "vote_pairs",
]
