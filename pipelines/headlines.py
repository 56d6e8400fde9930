"""Headline figures of a run: which they are, whom they recommend, and where nothing was gained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

OURS = {"labelled_only", "labelled_pseudo", "distilled", "supervised"}
"""Subjects of evaluate that the run trained; others are ready embedders."""
HEADLINES = ("accuracy", "tar@far=0.01", "rank-1", "tpir20@fpir=0.1")
"""Metrics of the summary and the figure of a report, where a run has them; tables have all."""


def recommend_subjects(metrics: pd.DataFrame) -> list[str]:
    """For each kind of probe, the subject with the best rank-1 and the others' figures.

    metrics : table `evaluate/metrics`. Without real probes, the list is of the drawn ones where
        ready embedders were judged beside the recognizers, and empty otherwise.
    """
    rank = metrics[(metrics.metric == "rank-1") & (metrics.subject != "gap_closed")]
    chosen = rank[rank.protocol.str.startswith("probes ")]
    if not len(chosen):
        chosen = rank[rank.protocol.str.match(r"identification \d")]
    lines = []
    for protocol, group in chosen.groupby("protocol", sort=False):
        if protocol.startswith("identification") and set(group.subject) <= OURS:
            continue
        best, *others = (
            group[group.subject != "supervised"]
            .sort_values("value", ascending=False, kind="stable")
            .itertuples()
        )
        beside = ", ".join(f"{row.subject} {row.value:.2f}" for row in others)
        count = group["count"].iloc[0]
        lines.append(
            f"{protocol}: {best.subject}, rank-1 {best.value:.2f} of {count:,} probes"
            + (f" ({beside})" if beside else "")
        )
    return lines


def describe_loss(metrics: pd.DataFrame, subject: str) -> str:
    """A sentence where a recognizer is worse than `labelled_only` in most headline figures, or "".

    metrics : table `evaluate/metrics`.
    """
    chosen = metrics[metrics.metric.isin(HEADLINES)]
    both = [
        chosen[chosen.subject == name].set_index(["protocol", "metric"]).value
        for name in (subject, "labelled_only")
    ]
    if subject == "labelled_only" or any(values.empty for values in both):
        return ""
    own, other = both[0].align(both[1], join="inner")
    worse, better = int((own < other).sum()), int((own > other).sum())
    if worse <= better:
        return ""
    return (
        f"{subject} is worse than labelled_only in {worse} of {len(own)} headline figures: the "
        "pseudo-labels did not help. Use labelled_only, or look at the clusters first"
    )
