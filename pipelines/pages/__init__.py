"""Pages: HTML templates, styles and scripts of the report and of review, and their rendering.

`report.html`, `report.js` are the report; `review.html`, `review.js`, `review.css` the review page;
`page.css` and `faces.js` serve both. `figures.py` draws SVG, `face_sheets.py` chooses the faces,
`embedding_map.py` draws the map, `model_inputs.py` what the models are shown.

The contract:
- Templates escape every value; data for a script is JSON with every `<`, `>` and `&` escaped, so no
  name of a file or person becomes markup.
- A rendered report includes its style, script and faces, and a content security policy that forbids
  the network and every other script.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import BaseLoader, Environment, StrictUndefined, TemplateNotFound
from markupsafe import Markup, escape

if TYPE_CHECKING:
    import pandas as pd

    from pipelines.data.manifest import DataManifest
    from pipelines.pages.face_sheets import Sheets
    from pipelines.pages.model_inputs import Seen
    from pipelines.verdict import Finding

LISTED_ISSUES = 200
"""Label issues shown in the report, the surest."""


class _Packaged(BaseLoader):
    """Loads templates from this package, also when it is installed as an archive."""

    def get_source(self, environment: Environment, template: str) -> tuple[str, None, None]:
        try:
            return read_page(template), None, None
        except OSError:
            raise TemplateNotFound(template) from None


def read_page(name: str) -> str:
    """The text of one file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Render a template; a missing value is an error."""
    environment = Environment(
        loader=_Packaged(),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["duration"] = _format_duration
    environment.filters["prose"] = _format_prose
    return environment.get_template(template).render(**values)


def _format_prose(text: str) -> Markup:
    """A sentence whose words between backticks are code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60, 1)
    return f"{minutes:g} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def render_report(
    *,
    name: str,
    dataset: DataManifest,
    facts: Mapping[str, Mapping[str, Any]],
    verdict: Sequence[Finding],
    costs: list[dict[str, Any]],
    funnel: list[tuple[str, int, str]],
    rejected: pd.DataFrame,
    issues: pd.DataFrame,
    figures: Mapping[str, Markup],
    compared: Mapping[str, Markup | str],
    seen: Sequence[Seen],
    metrics: pd.DataFrame,
    recognizers: list[dict[str, Any]],
    sheets: Sheets,
) -> str:
    """The report of a run as one HTML file.

    dataset : the manifest of the data set.
    facts : stage -> facts of its manifest. verdict : what to trust and to distrust.
    costs : stage, seconds, memory_mib of each stage. funnel : (step, images, explanation).
    rejected : table `ingest/rejected`. issues : table `knn/label_issues`.
    metrics : table `evaluate/metrics`.
    figures : name -> SVG; where one is missing, the page gives the reason.
    compared : measure -> SVG or sentence about labelled, unlabelled and held-out images.
    seen : what each model is shown.
    recognizers : a row a protocol and metric: its values by subject, gap and count.
    sheets : the clusters and faces to show.
    """
    from pipelines.pages.figures import draw_recognizers

    script = read_page("faces.js") + read_page("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ours = ("labelled_only", "labelled_pseudo", "distilled", "adapted", "supervised")
    found = dict.fromkeys(subject for row in recognizers for subject in row["subjects"])
    subjects = [*(s for s in ours if s in found), *(s for s in found if s not in ours)]
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
        issues=issues.head(LISTED_ISSUES).to_dict("records"),
        issue_count=len(issues),
        verdict=verdict,
        costs=costs,
        funnel=funnel,
        reasons=_count_reasons(rejected),
        figures=drawn,
        compared=compared,
        seen=seen,
        truth=dict(zip(clustering.metric, clustering.value, strict=True)),
        recognizers=recognizers,
        subjects=subjects,
        headlines=_pick_headlines(recognizers),
        sheets=sheets,
        has_pictures=any(face[3] for face in sheets.faces),
        data={
            "faces": sheets.faces,
            "certainty": "confidence" if sheets.measured else "mean cosine",
            "clusters": sheets.clusters,
            "largest": sheets.largest,
            "doubtful": sheets.doubtful,
            "random": sheets.random,
            "merges": sheets.merges,
            "bridges": sheets.bridges,
            "mapped": sheets.mapped,
        },
        style=Markup(read_page("page.css")),
        script=Markup(script),
        policy=(
            "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
    )


def _pick_headlines(recognizers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Four figures of the recognizer trained on pseudo-labels: the first row of each metric.

    Each has metric, protocol, value, and `before`, the value without pseudo-labels or None.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in recognizers:
        subjects = row["subjects"]
        if row.get("headline") and "labelled_pseudo" in subjects and row["metric"] not in found:
            before = subjects.get("labelled_only")
            found[row["metric"]] = {
                "metric": row["metric"],
                "protocol": row["protocol"],
                "value": subjects["labelled_pseudo"][0],
                "before": None if before is None else before[0],
            }
    return list(found.values())[:4]


def _count_reasons(rejected: pd.DataFrame) -> list[tuple[str, int]]:
    """(reason, images) of the rejected, most frequent first; all repeats count as one reason."""
    reasons = rejected.reason.str.replace(r"^same bytes as .*", "same bytes as another", regex=True)
    return [(str(reason), int(count)) for reason, count in reasons.value_counts()[:8].items()]
