"""Figures of a run as SVG elements for a page, without files, fonts or network.

The contract:
- Each function takes arrays or DataFrames and returns one `<svg>` element as text; the same input
  gives the same text. Nothing is read or written.
- Colours are CSS variables of the page (`--ink`, `--grid`, `--c1` ...), so one figure fits
  light, dark and print.
- Every figure has a title for screen readers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Placeholder colours for matplotlib, replaced in the SVG by CSS variables of the page.
INK, MUTED, GRID = "#010203", "#010204", "#010205"
SERIES = tuple(f"#0103{number:02d}" for number in range(1, 9))
VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"} | {
    colour: f"var(--c{number})" for number, colour in enumerate(SERIES, 1)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

ENTRY_IN, LETTER_IN = 0.55, 0.075
"""Inches of a legend's entry beside its label, and of each letter of it."""


class Canvas:
    """One figure in the page's style: `with Canvas("title", 6, 3) as axes: ...`, then `str()`."""

    def __init__(self, title: str, width: float, height: float, *, panels: int = 1) -> None:
        self.title = title
        self._size = (width, height)
        self._panels = panels
        self.svg = Markup("")

    def __enter__(self) -> Any:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._context = rc_context({**STYLE, "svg.hashsalt": self.title})
        self._context.__enter__()
        self._figure = Figure(figsize=self._size, layout="constrained")
        self._canvas = FigureCanvasSVG(self._figure)
        axes = self._figure.subplots(1, self._panels)
        return axes

    def add_legend(self, handles: Sequence[Any], labels: Sequence[str]) -> None:
        """One legend for all panels, above them, in as many columns as its longest label allows."""
        entry = ENTRY_IN + LETTER_IN * max(map(len, labels), default=0)
        columns = min(6, max(1, int(self._size[0] / entry)))
        self._figure.legend(
            handles, labels, loc="outside upper center", ncols=columns, handlelength=1.6
        )

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is None:
                stream = StringIO()
                # savefig would draw everything once more, to lay it out.
                self._canvas.print_svg(stream, metadata={"Date": None})
                self.svg = _embed(stream.getvalue(), self.title)
        finally:
            self._context.__exit__(None, None, None)


def _embed(text: str, title: str) -> Markup:
    """An SVG file -> an `<svg>` element whose ids are unique in the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 style="max-width: \2pt"', text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return Markup(text)


def draw_scores(together: np.ndarray, apart: np.ndarray, *, name: str, cut: float | None) -> Markup:
    """Histogram of pair scores in [-1, 1], for pairs within clusters and between clusters."""
    canvas = Canvas(f"Histogram of the {name} of candidate pairs", 5.2, 2.7)
    with canvas as axes:
        low = min(0.0, *(float(score.min(initial=0)) for score in (apart, together)))
        bins = np.linspace(low, 1, 41)
        for score, colour, label in (
            (apart, SERIES[2], "between clusters"),
            (together, SERIES[0], "inside a cluster"),
        ):
            axes.hist(score, bins, color=colour, alpha=0.35)
            axes.hist(score, bins, histtype="step", color=colour, linewidth=1.4, label=label)
        axes.set_yscale("symlog", linthresh=10)
        axes.set(xlabel=name, ylabel="pairs", xlim=(low, 1))
        if cut is not None:
            _mark_cut(axes, cut)
        _place_legend(axes)
    return canvas.svg


def draw_measure(values: np.ndarray, name: str, most: float | None = None) -> Markup:
    """Histogram of one measure of the faces; `most` is its largest possible value, if any."""
    canvas = Canvas(f"Histogram of the {name}", 5.2, 2.2)
    with canvas as axes:
        values = values[np.isfinite(values)]
        low = min(0.0, float(values.min(initial=0)))
        high = float(np.percentile(values, 99.5)) if len(values) else 1.0
        edges = np.linspace(low, most or max(high, low + 1e-6), 41)
        axes.hist(np.minimum(values, edges[-1]), edges, color=SERIES[0], rwidth=0.9)
        axes.set(xlabel=name, ylabel="faces", xlim=(edges[0], edges[-1]))
    return canvas.svg


def draw_sizes(size: np.ndarray) -> Markup:
    """Histogram of cluster sizes."""
    canvas = Canvas("Histogram of cluster sizes", 5.2, 2.7)
    with canvas as axes:
        largest = int(size.max())
        if largest <= 80:
            axes.hist(size, np.arange(1.5, largest + 1), color=SERIES[0], rwidth=0.85)
        else:
            edges = np.unique(np.geomspace(2, largest + 1, 30).astype(int)) - 0.5
            axes.hist(size, edges, color=SERIES[0], rwidth=0.9)
            axes.set_xscale("log")
            ticks = [t for t in (2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= largest]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.set(xlabel="images in the cluster", ylabel="clusters")
    return canvas.svg


def draw_reliability(calibration: pd.DataFrame) -> Markup:
    """Predicted probability against the observed positive rate on held-out labelled identities."""
    canvas = Canvas("Reliability of the pair probabilities", 3.6, 3.0)
    with canvas as axes:
        shown = calibration[calibration.weight > 0]
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle="--")
        share = shown.weight / shown.weight.sum()
        axes.plot(shown.mean_probability, shown.observed_rate, color=SERIES[0])
        axes.scatter(shown.mean_probability, shown.observed_rate, 12 + 160 * share, color=SERIES[0])
        axes.set(xlabel="predicted probability", ylabel="observed positive rate",
                 xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")  # fmt: skip
    return canvas.svg


def draw_thresholds(curve: pd.DataFrame, cut: float | None, *, odds: bool) -> Markup:
    """Precision and recall by threshold, estimated and, where known, true.

    curve : threshold, estimated_precision, estimated_recall, true_precision, true_recall; a column
        may be missing. odds : space thresholds by log-odds.
    """
    canvas = Canvas("Precision and recall by threshold", 5.8, 3.0)
    with canvas as axes:
        for column, colour, dashes, label in (
            ("true_precision", SERIES[0], "-", "precision"),
            ("true_recall", SERIES[1], "-", "recall"),
            ("estimated_precision", SERIES[0], "--", "precision, estimated"),
            ("estimated_recall", SERIES[1], "--", "recall, estimated"),
        ):
            if column in curve:
                axes.plot(
                    curve.threshold, curve[column], dashes, color=colour, label=label, marker="o",
                    markersize=2.5,
                )  # fmt: skip
        if odds:
            axes.set_xscale("logit")
            ticks = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
        if cut is not None:  # at the edge if it lies outside, where log-odds may be infinite
            place = np.clip(cut, curve.threshold.min(), curve.threshold.max())
            _mark_cut(axes, cut, float(place))
        lowest = curve.drop(columns="threshold").min(axis=None)
        axes.set(xlabel="threshold", ylim=(min(0.9, lowest - 0.02), 1.01))
        _place_legend(axes)
    return canvas.svg


def _place_legend(axes: Axes) -> None:
    """Place the legend above the axes, where it covers no data."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, columnspacing=1.4,
                handlelength=2.4, borderaxespad=0.2)  # fmt: skip


def _mark_cut(axes: Axes, cut: float, place: float | None = None) -> None:
    at = cut if place is None else place
    axes.axvline(at, color=SERIES[3], linewidth=1.2)
    axes.annotate(
        f" cut {cut:.3g}", (at, 0.02), xycoords=("data", "axes fraction"), color=SERIES[3]
    )


def draw_training(history: pd.DataFrame, name: str) -> Markup:
    """Loss and accuracy by epoch, one line a model."""
    canvas = Canvas(f"Training of {name}", 7.4, 2.7, panels=2)
    with canvas as (left, right):
        for number, (model, rows) in enumerate(history.groupby("model", sort=False)):
            colour = SERIES[number % len(SERIES)]
            style = {"color": colour, "marker": "o", "markersize": 2.5, "label": str(model)}
            left.plot(rows.epoch, rows.loss, **style)
            right.plot(rows.epoch, rows.accuracy, **style)
        left.set(xlabel="epoch", ylabel="loss")
        right.set(xlabel="epoch", ylabel="training accuracy")
        for axes in (left, right):
            axes.xaxis.get_major_locator().set_params(integer=True)
        if history.model.nunique() > 1:
            canvas.add_legend(*left.get_legend_handles_labels())
    return canvas.svg


def draw_recognizers(
    rows: Sequence[str], values: Mapping[str, Sequence[tuple[float, float, float]]]
) -> Markup:
    """Values by protocol and metric: a line each, a dot a subject, with its interval if any.

    values : subject -> (value, low, high) a row; low and high may be NaN.
    """
    count = len(values)
    canvas = Canvas(
        "Recognizers on held-out people", 9.5, 0.9 + max(0.24, 0.06 * count) * len(rows)
    )
    with canvas as axes:
        place = np.arange(len(rows))[::-1]
        for number, (subject, found) in enumerate(values.items()):
            value, low, high = np.array(found, float).T
            offset = place + min(0.2, 0.8 / count) * (count / 2 - 0.5 - number)
            colour = SERIES[number % len(SERIES)]
            axes.hlines(offset, low, high, color=colour, linewidth=1.4)
            axes.plot(value, offset, "o", color=colour, markersize=4.5, label=subject)
        axes.set_yticks(place, rows)
        axes.set(ylim=(-0.7, len(rows) - 0.3))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        _place_legend(axes)
    return canvas.svg
