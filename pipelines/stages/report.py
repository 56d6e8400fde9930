"""report: what came out, as one table and as a text a person can read.

The contract:
- `summary` holds every figure of the run as (section, name, value); `summary.txt` is the same for
  the eye and is what the command line prints at the end.
- It computes nothing: every figure was measured by the stage that owns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipelines.stage import Stage, Work
from pipelines.store import write_text

SUMMARY = pa.schema([("section", pa.string()), ("name", pa.string()), ("value", pa.float64())])
SUBJECTS = ("labelled_only", "labelled_pseudo", "supervised")


def run(work: Work) -> Mapping[str, Any]:
    rows: list[tuple[str, str, float]] = []
    for stage in work.stage.upstream:
        if stage in work.upstream:
            rows += [(stage, name, value) for name, value in _list_figures(work.input_facts(stage))]
    metrics = work.read("evaluate.metrics").to_pandas()
    rows += [
        ("evaluate", f"{row.subject}/{row.protocol}/{row.metric}", float(row.value))
        for row in metrics.itertuples()
    ]
    sections, names, values = zip(*rows, strict=True)
    work.write("summary", {"section": sections, "name": names, "value": values})
    write_text(work.directory / "summary.txt", _compose(work, metrics))
    return {"figures": len(rows)}


def _list_figures(facts: Any, prefix: str = "") -> list[tuple[str, float]]:
    if isinstance(facts, Mapping):
        return [
            figure
            for key, value in facts.items()
            for figure in _list_figures(value, f"{prefix}/{key}".strip("/"))
        ]
    return [(prefix, float(facts))] if isinstance(facts, int | float) else []


def _compose(work: Work, metrics: Any) -> str:
    ingest = work.input_facts("ingest")
    mediate = work.input_facts("mediate")
    propagate = work.input_facts("propagate")
    lines = [
        f"Data      {ingest['labelled']:,} labelled images of {ingest['labelled_people']:,} "
        "people, "
        f"{ingest['unlabelled']:,} unlabelled, {ingest['evaluation']:,} for evaluation, "
        f"{ingest['rejected']:,} set aside",
        f"Pairs     {mediate['pairs']:,} candidate pairs of unlabelled images, judged by "
        f"{mediate['method']}",
        f"Clusters  {propagate['clusters']:,} pseudo-labels on {propagate['labelled']:,} images, "
        f"{propagate['unlabelled']:,} left without; largest {propagate['largest']:,}",
    ]
    clustering = metrics[metrics.protocol == "clustering"].set_index("metric").value
    if len(clustering):
        lines.append(
            "Truth     "
            f"pairwise F {clustering['pairwise_f']:.3f} (precision "
            f"{clustering['pairwise_precision']:.3f}, recall {clustering['pairwise_recall']:.3f}), "
            f"BCubed F {clustering['bcubed_f']:.3f}, NMI {clustering['nmi']:.3f}"
        )
    recognition = metrics[metrics.subject.isin(SUBJECTS)]
    if len(recognition):
        lines += ["", *_tabulate(recognition, metrics[metrics.subject == "gap_closed"])]
    return "\n".join(lines) + "\n"


def _tabulate(recognition: Any, gap: Any) -> list[str]:
    table = recognition.pivot_table(
        index=["protocol", "metric"], columns="subject", values="value", sort=False
    )
    subjects = [subject for subject in SUBJECTS if subject in table.columns]
    head = f"{'Recognizer on held-out people':42}" + "".join(f"{s:>17}" for s in subjects)
    closed = gap.set_index(["protocol", "metric"]).value if len(gap) else None
    lines = [head + (f"{'gap closed':>12}" if closed is not None else "")]
    for (protocol, metric), row in table.iterrows():
        line = f"{protocol + ' ' + metric:42}" + "".join(f"{row[s]:17.3f}" for s in subjects)
        if closed is not None and (protocol, metric) in closed.index:
            share = closed[(protocol, metric)]
            line += f"{share:12.0%}" if share == share else f"{'no gap':>12}"
        lines.append(line)
    return lines


STAGE = Stage(
    name="report",
    version=1,
    inputs=("ingest.samples", "mediate.pairs", "propagate.labels", "evaluate.metrics"),
    outputs={"summary": SUMMARY},
    reads=(),
    run=run,
)
