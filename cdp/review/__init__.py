"""Review: a reviewer's decisions on the clustering, and the order in which to ask for them.

constraints   must-link, cannot-link and rejected images; labels that satisfy all of them
questions     which cluster, bridge or merge to show first
"""

from cdp.review.constraints import (
    Constraints,
    apply_constraints,
    bar_labels,
    find_conflict,
    settle_pairs,
)
from cdp.review.questions import Kind, Question, filter_answered, rank_questions

__all__ = [
    "Constraints",
    "Kind",
    "Question",
    "apply_constraints",
    "bar_labels",
    "filter_answered",
    "find_conflict",
    "rank_questions",
    "settle_pairs",
]
