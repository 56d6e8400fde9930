"""Metrics of clustering, verification and identification, calibration, and protocols."""

from cdp.metrics.calibration import Calibration, measure_calibration
from cdp.metrics.clustering import score_amid_strangers, score_bcubed, score_nmi, score_pairwise
from cdp.metrics.identification import (
    Identification,
    identify,
    rank_k,
    sample_probe_gallery,
    tpir_at_fpir,
)
from cdp.metrics.protocols import bootstrap_interval, gap_closed
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
    "Calibration",
    "Identification",
    "VerificationPairs",
    "bootstrap_interval",
    "compare_pairs",
    "decide_by_folds",
    "gap_closed",
    "identify",
    "measure_calibration",
    "rank_k",
    "sample_probe_gallery",
    "sample_verification_pairs",
    "score_amid_strangers",
    "score_bcubed",
    "score_nmi",
    "score_pairwise",
    "tar_at_far",
    "threshold_at_far",
    "tpir_at_fpir",
    "verification_accuracy",
]
