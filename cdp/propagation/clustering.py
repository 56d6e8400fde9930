"""Scored pairs to clusters, by either split: the one entry to propagation.

The contract:
- Enters: candidate pairs and a score a pair. Leaves: a label a row, -1 for none, and the threshold
  that each cluster was accepted at.
- The consensus split (`average_linkage`, ours) merges groups while the mean log-odds between them
  exceed the threshold's. The rising threshold (`rising_threshold`, paper) takes components and
  raises the threshold inside those that are too large.
- Scores that are no probabilities (votes) have no log-odds: they are always split by the rising
  threshold, and no precision can be estimated from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cdp.errors import ConfigError
from cdp.propagation.average_linkage import agglomerate
from cdp.propagation.rising_threshold import MAX_SIZE, build_forest, cut_forest, propagate_labels
from cdp.propagation.threshold import NEUTRAL_THRESHOLD, choose_cut
from cdp.types import PairTable

SPLITS = ("consensus", "raise_threshold")


@dataclass(frozen=True)
class Clustering:
    """Clusters of rows.

    label : (n,) int64, 0 .. clusters - 1; -1 none.
    cut_threshold : (n,) float32, the threshold each row's cluster was accepted at.
    threshold : the threshold used, higher than the one given where a target precision asked for it.
    split : the split used, one of `SPLITS`.
    """

    label: np.ndarray
    cut_threshold: np.ndarray
    threshold: float
    split: str


def cluster_pairs(
    pairs: PairTable,
    probability: np.ndarray,
    count: int,
    *,
    split: str = "consensus",
    threshold: float = NEUTRAL_THRESHOLD,
    max_size: int | None = None,
    step: float = 0.1,
    target_precision: float | None = None,
    precision_curve: np.ndarray | None = None,
    calibrated: bool = True,
    representative: np.ndarray | None = None,
) -> Clustering:
    """Cluster rows by the scores of their pairs.

    Parameters
    ----------
    pairs, probability, count : all candidate pairs, (m,) float in [0, 1], number of rows.
    split : one of `SPLITS`.
    threshold : see `agglomerate` and `propagate_labels`.
    max_size : largest cluster, in rows. None: any size for the consensus split, `MAX_SIZE` for the
        rising threshold.
    step : how fast the threshold rises in a cluster that is too large; rising threshold only.
    target_precision : raise the threshold until held-out and estimated pairwise precision reach
        this, see `choose_cut`; None: leave it.
    precision_curve : precision on held-out identities by threshold, from the second stage; used by
        the consensus split only, since it was measured with that.
    calibrated : False for votes: the rising threshold is used whatever `split` says.
    representative : as for `estimate_quality`, where `pairs` link near-equal rows
        (`cdp.propagation.representatives`).

    Raises
    ------
    ConfigError
        A parameter is unknown or out of range, or a target precision is asked of votes.
    DataError
        As `agglomerate` and `propagate_labels`.
    """
    split = _choose_split(split, calibrated)
    if target_precision is not None and not calibrated:
        raise ConfigError(
            "target_precision needs probabilities, and votes are none. Train a mediator on "
            "labelled images, or leave the target out"
        )

    def choose(cut: Callable[[float], np.ndarray]) -> float:
        if target_precision is None:
            return threshold
        return choose_cut(
            cut,
            pairs,
            probability,
            target_precision=target_precision,
            loosest=threshold,
            precision_curve=precision_curve if split == "consensus" else None,
            representative=representative,
        )

    if split == "consensus":
        merged = agglomerate(pairs, probability, count, threshold=threshold, max_size=max_size)
        level = choose(merged.cut)
        return Clustering(merged.cut(level), np.full(count, level, np.float32), level, split)
    limit = MAX_SIZE if max_size is None else max_size
    level = choose(
        lambda level: (
            propagate_labels(
                pairs, probability, count, threshold=level, max_size=limit, step=step
            ).label
        )
    )
    found = propagate_labels(pairs, probability, count, threshold=level, max_size=limit, step=step)
    return Clustering(found.label, found.cut_threshold, level, split)


def sweep_thresholds(
    pairs: PairTable,
    probability: np.ndarray,
    count: int,
    thresholds: Sequence[float],
    *,
    split: str = "consensus",
    max_size: int | None = None,
    step: float = 0.1,
    calibrated: bool = True,
) -> list[np.ndarray]:
    """The labels of `cluster_pairs` at each of several rising thresholds, for little more than one.

    Parameters and errors are those of `cluster_pairs`.

    Returns
    -------
    One (n,) int64 array a threshold. With the consensus split and a `max_size`, merges are those
    of the lowest threshold.
    """
    if _choose_split(split, calibrated) == "consensus":
        merged = agglomerate(pairs, probability, count, threshold=thresholds[0], max_size=max_size)
        return [merged.cut(threshold) for threshold in thresholds]
    limit = MAX_SIZE if max_size is None else max_size
    forest = build_forest(pairs, probability, count)
    return [
        cut_forest(forest, threshold=threshold, max_size=limit, step=step).label
        for threshold in thresholds
    ]


def _choose_split(split: str, calibrated: bool) -> str:
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split if calibrated else "raise_threshold"
