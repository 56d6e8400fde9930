"""Error-versus-reject curves of a run as a figure: rank-1 error by the share of probes left out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.pages.figures import MUTED, SERIES, Canvas

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.lines import Line2D

MOST_PANELS = 4
_REJECTED = re.compile(r"rank-1, (\d+)% rejected")
_PROTOCOL = re.compile(r"rejecting(?P<quality>(?: by \w+)?) (?P<probe>.+)")
_STYLES: dict[str, Any] = {"": "-", " by consistency": "--", " by confidence": ":"}


def collect_curves(metrics: pd.DataFrame) -> pd.DataFrame:
    """Points of the curves: subject, quality, probe, rejected in percent, error in percent.

    metrics : table `evaluate/metrics`. Where nothing is rejected the error is that of
        `identification`. `quality` is "" for the norm, else " by NAME".
    """
    import pandas as pd

    points = []
    plain = metrics[metrics.metric == "rank-1"].set_index(["subject", "protocol"]).value
    for row in metrics.itertuples():
        name, share = _PROTOCOL.fullmatch(row.protocol), _REJECTED.fullmatch(row.metric)
        if name is not None and share is not None:
            key = row.subject, name["quality"], name["probe"]
            points.append((*key, int(share[1]), 100 * (1 - row.value)))
            start = plain.get((row.subject, f"identification {name['probe']}"))
            if start is not None:
                points.append((*key, 0, 100 * (1 - float(start))))
    columns = ["subject", "quality", "probe", "rejected", "error"]
    table = pd.DataFrame(points, columns=columns).drop_duplicates()
    return table.sort_values(columns[:4], kind="stable", ignore_index=True)


def draw_rejection(metrics: pd.DataFrame, subjects: list[str]) -> Markup | None:
    """A panel a probe, the hardest kind; a line a subject (colour) and quality (style).

    None without such metrics.

    subjects : those that are drawn, in this order.
    """
    points = collect_curves(metrics)
    points = points[points.subject.isin(subjects)]
    if points.empty:
        return None
    mean = points.groupby("probe").error.mean().sort_values(ascending=False)
    kind = str(mean.index[0]).partition(" ")[2]
    probes = sorted(
        (probe for probe in mean.index if str(probe).partition(" ")[2] == kind),
        key=lambda probe: -int(re.findall(r"\d+", probe)[0]),
    )[:MOST_PANELS]
    width = max(8.0, 2.4 * len(probes) + 0.6)  # which the legend needs
    canvas = Canvas("Error versus reject", width, 2.8, panels=len(probes))
    with canvas as panels:
        for axes, probe in zip([panels] if len(probes) == 1 else panels, probes, strict=True):
            axes.set(title=probe, xlabel="probes rejected, %", ylim=(0, None))
            for number, subject in enumerate(subjects):
                own = points[(points.subject == subject) & (points.probe == probe)]
                for quality, line in own.groupby("quality"):
                    axes.plot(
                        line.rejected, line.error, _STYLES.get(str(quality), "-."), marker="o",
                        markersize=3, color=SERIES[number % len(SERIES)],
                    )  # fmt: skip
            axes.set_ylim(0, 1.05 * float(points[points.probe.isin(probes)].error.max()) or 1)
        first = [panels] if len(probes) == 1 else panels
        first[0].set_ylabel("rank-1 error, %")
        canvas.add_legend(*_explain(subjects, points))
    return canvas.svg


def _explain(subjects: list[str], points: pd.DataFrame) -> tuple[list[Line2D], list[str]]:
    """A line of the legend for each subject, by colour, and for each quality, by style."""
    from matplotlib.lines import Line2D

    known = set(points.subject)
    named = [
        (Line2D([], [], color=SERIES[number % len(SERIES)], marker="o", markersize=3), subject)
        for number, subject in enumerate(subjects)
        if subject in known
    ]
    qualities = sorted(set(points.quality))
    if len(qualities) > 1:
        named += [
            (Line2D([], [], color=MUTED, linestyle=_STYLES.get(each, "-.")), each or "by norm")
            for each in qualities
        ]
    handles, labels = zip(*named, strict=True)
    return list(handles), [label.replace("_", " ").strip() for label in labels]
