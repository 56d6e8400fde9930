"""Propagation: scored pairs to pseudo-labels."""

from cdp.propagation.average_linkage import Agglomeration, agglomerate
from cdp.propagation.quality import QualityEstimate, compare_groups, estimate_quality
from cdp.propagation.rising_threshold import (
    MAX_SIZE,
    Propagation,
    SpanningForest,
    build_forest,
    cut_forest,
    merge_forests,
    propagate_labels,
    to_networkx,
)
from cdp.propagation.soft_labels import SoftLabels, diffuse_labels
from cdp.propagation.threshold import choose_cut

__all__ = [
    "MAX_SIZE",
    "Agglomeration",
    "Propagation",
    "QualityEstimate",
    "SoftLabels",
    "SpanningForest",
    "agglomerate",
    "build_forest",
    "choose_cut",
    "compare_groups",
    "cut_forest",
    "diffuse_labels",
    "estimate_quality",
    "merge_forests",
    "propagate_labels",
    "to_networkx",
]
