"""Labelled, unlabelled and held-out images side by side: their size, shape and sharpness.

The contract:
- Input are the tables `ingest/samples` and `ingest/qualities`; no image is opened.
- The panels of one measure have the same bins and axes; bars are shares of their own set, so sets
  of different sizes can be compared. Values beyond the last bin are counted in it.
- A measure that is the same for every image is described by a sentence instead of a figure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from pipelines.pages.figures import INK, SERIES, Canvas

if TYPE_CHECKING:
    import pandas as pd

SETS = {"labelled": "labelled", "unlabelled": "unlabelled", "evaluation": "held out"}
"""Split -> its name on the page."""
BINS = 30
WIDE = 12.0
"""Ratio of the 99th to the 1st percentile above which the bins grow by a factor."""


def compare_sets(samples: pd.DataFrame, qualities: pd.DataFrame) -> dict[str, Markup | str]:
    """A figure or a sentence by measure: `size`, `shape`, `sharpness`; empty without images.

    samples : table `ingest/samples`. qualities : table `ingest/qualities`.
    """
    if not len(qualities):
        return {}
    every = samples.merge(qualities, on="sample_id")
    every["shape"] = every.width / every.height
    found = {
        "size": _compare(every, "side_px", "shorter side, px", "Every image has a side of {:g} px"),
        "shape": _compare(every, "shape", "width / height", "Every image has {:g} times the width "
                          "of its height"),
        "sharpness": _compare(every, "sharpness", "sharpness: variance of the Laplacian at 112 px",
                              "Every image has the sharpness {:g}"),
    }  # fmt: skip
    if (every["shape"] == 1).all():
        found["shape"] = "Every image is square."
    return {name: figure for name, figure in found.items() if figure}


def _compare(every: pd.DataFrame, column: str, name: str, sentence: str) -> Markup | str:
    known = every[np.isfinite(every[column].to_numpy(float))]
    values = {
        title: rows[column].to_numpy(float)
        for split, title in SETS.items()
        if len(rows := known[known.split == split])
    }
    if not values:
        return ""
    whole = np.concatenate(list(values.values()))
    if np.ptp(whole) == 0:
        return f"{sentence.format(whole[0])}."
    return draw_side_by_side(values, name)


def choose_edges(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """(BINS + 1,) edges over nearly all values, and whether they grow by a factor."""
    low, high = np.percentile(values, [1, 99])
    if low > 0 and high / low > WIDE:
        return np.geomspace(low, high, BINS + 1), True
    span = max(high - low, 1e-6 * max(abs(high), 1.0))
    return np.linspace(low - 0.05 * span, high + 0.05 * span, BINS + 1), False


def draw_side_by_side(values: dict[str, np.ndarray], name: str) -> Markup:
    """One panel a set, with shared bins and axes; a dashed line is the median.

    values : name of the set -> (n,) of one measure. name : of the measure, with its unit.
    """
    edges, grows = choose_edges(np.concatenate(list(values.values())))
    counted = {
        title: np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0] / len(found)
        for title, found in values.items()
    }
    highest = 108 * max(float(share.max()) for share in counted.values())
    canvas = Canvas(f"Sets compared by {name}", 9.2, 2.3, panels=len(values))
    with canvas as drawn:
        panels = np.atleast_1d(drawn)
        for number, (axes, (title, share)) in enumerate(zip(panels, counted.items(), strict=True)):
            colour, middle = SERIES[number], float(np.median(values[title]))
            axes.stairs(100 * share, edges, fill=True, color=colour)
            axes.axvline(np.clip(middle, edges[0], edges[-1]), color=INK, linestyle="--",
                         linewidth=1.1)  # fmt: skip
            axes.set_title(f"{title}: {len(values[title]):,}, median {middle:.4g}", fontsize=9)
            axes.set(xlim=(edges[0], edges[-1]), ylim=(0, highest))
            if grows:
                _grow_by_factor(axes)
            if number:
                axes.tick_params(axis="y", labelleft=False)
        panels[0].set_ylabel("% of the images")
        panels[len(panels) // 2].set_xlabel(name)
    return canvas.svg


def _grow_by_factor(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
