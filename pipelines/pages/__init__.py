"""Pages: templates, styles and scripts, and how they become one file.

The contract:
- Templates escape everything that is put into them; data for a script travels as JSON with every
  `<`, `>` and `&` escaped, so no name of a file or person becomes markup.
- A rendered report carries its style, script and faces inside, and a policy that forbids the
  network and any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
from markupsafe import Markup


class _Packaged(BaseLoader):
    """Templates that lie beside this file, however the package is installed."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
        try:
            return read_page(template), None, None
        except OSError:
            raise TemplateNotFound(template) from None


def read_page(name: str) -> str:
    """The text of one file beside this one."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Render a template; a value it lacks is an error."""
    environment = Environment(
        loader=_Packaged(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["duration"] = _tell_duration
    return environment.get_template(template).render(**values)


def _tell_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60, 1)
    return f"{minutes:g} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def render_report(
    *,
    name: str,
    dataset: Any,
    facts: Mapping[str, Mapping[str, Any]],
    costs: list[dict[str, Any]],
    funnel: list[tuple[str, int, str]],
    rejected: Any,
    figures: Mapping[str, Markup],
    metrics: Any,
    recognizers: list[dict[str, Any]],
    sheets: Any,
) -> str:
    """The report of a run as one HTML file.

    figures : name -> SVG; a missing one is said to be missing, with the reason.
    sheets : `pipelines.pages.face_sheets.Sheets`.
    """
    from pipelines.pages.figures import draw_recognizers

    script = read_page("faces.js") + read_page("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    subjects = [
        subject
        for subject in ("labelled_only", "labelled_pseudo", "distilled", "supervised")
        if any(subject in row["subjects"] for row in recognizers)
    ]
    nothing = (float("nan"),) * 3
    for row in recognizers:
        row["has_interval"] = any(low == low for _, low, _ in row["subjects"].values())
    drawn = dict(figures)
    if recognizers:
        rows = [row for row in recognizers if row.get("headline")] or recognizers
        drawn["recognizers"] = draw_recognizers(
            [f"{row['protocol']} {row['metric']}" for row in rows],
            {s: [row["subjects"].get(s, nothing) for row in rows] for s in subjects},
        )
    clustering = metrics[metrics.protocol == "clustering"]
    return render(
        "report.html",
        name=name,
        dataset=dataset,
        facts=facts,
        costs=costs,
        funnel=funnel,
        reasons=_count_reasons(rejected),
        figures=drawn,
        truth=dict(zip(clustering.metric, clustering.value, strict=True)),
        recognizers=recognizers,
        subjects=subjects,
        sheets=sheets,
        has_pictures=any(face[3] for face in sheets.faces),
        data={
            "faces": sheets.faces,
            "clusters": sheets.clusters,
            "largest": sheets.largest,
            "doubtful": sheets.doubtful,
            "random": sheets.random,
            "merges": sheets.merges,
            "bridges": sheets.bridges,
        },
        style=Markup(read_page("page.css")),
        script=Markup(script),
        policy=(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
    )


def _count_reasons(rejected: Any) -> list[tuple[str, int]]:
    """Why images were set aside, most frequent first; repeats of any image are one reason."""
    reasons = rejected.reason.str.replace(r"^same bytes as .*", "same bytes as another", regex=True)
    return [(str(reason), int(count)) for reason, count in reasons.value_counts()[:8].items()]
