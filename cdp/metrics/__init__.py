"""Metrics: the field's figures of clusterings, probabilities and embeddings.

clustering       pairwise and BCubed precision, recall and F, NMI
calibration      reliability curve, expected calibration error
verification     pairs in folds, accuracy, TAR@FAR
identification   rank-k with distractors, TPIR@FPIR
protocols        the last two on held-out identities, with bootstrap intervals
claims           TAR@FAR of probes against enrolled people
"""

from cdp.metrics.calibration import ReliabilityCurve, measure_reliability
from cdp.metrics.claims import score_claims
from cdp.metrics.clustering import score_bcubed, score_nmi, score_pairwise, score_with_distractors
from cdp.metrics.identification import (
    Identification,
    identify,
    rank_k,
    sample_probe_gallery,
    tpir_at_fpir,
)
from cdp.metrics.protocols import (
    OpenSet,
    ProbeSets,
    Resamples,
    Score,
    bootstrap_interval,
    gap_closed,
    pick_images,
    sample_open_set,
    sample_sets,
    score_all_pairs,
    score_folds,
    score_open_set,
    score_ranks,
    score_rejection,
)
from cdp.metrics.verification import (
    VerificationPairs,
    compare_pairs,
    decide_by_folds,
    sample_verification_pairs,
    tar_at_far,
    threshold_at_far,
    verification_accuracy,
)

__all__ = [
    "Identification",
    "OpenSet",
    "ProbeSets",
    "ReliabilityCurve",
    "Resamples",
    "Score",
    "VerificationPairs",
    "bootstrap_interval",
    "compare_pairs",
    "decide_by_folds",
    "gap_closed",
    "identify",
    "measure_reliability",
    "pick_images",
    "rank_k",
    "sample_open_set",
    "sample_probe_gallery",
    "sample_sets",
    "sample_verification_pairs",
    "score_all_pairs",
    "score_bcubed",
    "score_claims",
    "score_folds",
    "score_nmi",
    "score_open_set",
    "score_pairwise",
    "score_ranks",
    "score_rejection",
    "score_with_distractors",
    "tar_at_far",
    "threshold_at_far",
    "tpir_at_fpir",
    "verification_accuracy",
]
