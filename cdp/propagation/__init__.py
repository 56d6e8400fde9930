"""Propagation: scored pairs to pseudo-labels, and their estimated quality."""

from cdp.propagation.average_linkage import Agglomeration, agglomerate
from cdp.propagation.clustering import SPLITS, Clustering, cluster_pairs, sweep_thresholds
from cdp.propagation.group_pairs import compare_groups
from cdp.propagation.quality import QualityEstimate, estimate_quality
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
    "SPLITS",
    "Agglomeration",
    "Clustering",
    "Propagation",
    "QualityEstimate",
    "SoftLabels",
    "SpanningForest",
    "agglomerate",
    "build_forest",
    "choose_cut",
    "cluster_pairs",
    "compare_groups",
    "cut_forest",
    "diffuse_labels",
    "estimate_quality",
    "merge_forests",
    "propagate_labels",
    "sweep_thresholds",
    "to_networkx",
]
