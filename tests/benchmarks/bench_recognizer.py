"""Effect of single settings on a recognizer trained on pseudo-labels, over several seeds.

    python -m tests.benchmarks.bench_recognizer [--seeds 3] [--config FILE] [--data-root DIR]
        [--only plain,soft] [--teacher NAME] [--runs-dir DIR] [--workers N]
        [section.field=value ...]

Every variant is a whole run that shares all it can with the others: equal stages up to the
pseudo-labels run once a seed, and so do the trainings of labelled-only and supervised where the
setting does not change them. Figures are means over seeds with the standard deviation over seeds;
the last column is the share of the gap between labelled only and supervised that is closed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.run import main as run_pipeline

VARIANTS = {
    "plain": [],
    "not masked": ["retrain.mask_negatives_above=1"],
    "weights": ["retrain.weigh_by_confidence=true"],
    "soft": ["retrain.targets=soft"],
    "soft and weights": ["retrain.weigh_by_confidence=true", "retrain.targets=soft"],
    "leftovers alone": ["retrain.leftovers=alone"],
    "leftovers not masked": ["retrain.leftovers=alone", "retrain.mask_negatives_above=1"],
    "balanced": ["retrain.sampling=identity"],
    "half share": ["retrain.pseudo_share=0.5"],
    "merged": ["retrain.same_person=merge"],
    "weights and merged": ["retrain.weigh_by_confidence=true", "retrain.same_person=merge"],
    "weights and balanced": ["retrain.weigh_by_confidence=true", "retrain.sampling=identity"],
    "distilled": ["retrain.teacher={teacher}"],
}
SUBJECTS = ("labelled_only", "labelled_pseudo", "distilled", "supervised")


def run_variant(name: str, seed: int, options: argparse.Namespace) -> pd.DataFrame | None:
    """The metrics of one run; None, with the message shown, when it fails."""
    settings = [setting.format(teacher=options.teacher) for setting in VARIANTS[name]]
    run = f"{name.replace(' ', '_')}_{seed}"
    arguments = [
        "--config", str(options.config), "--runs-dir", str(options.runs_dir),
        "--until", "evaluate", f"name={run}", f"seed={seed}", *settings, *options.overrides,
    ]  # fmt: skip
    if options.workers:
        arguments += ["--workers", str(options.workers)]
    if options.data_root:
        arguments += ["--data-root", str(options.data_root)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = run_pipeline(arguments)
    if code:
        print(f"{name}, seed {seed}: failed with exit code {code}", file=sys.stderr)
        return None
    metrics = pd.read_parquet(options.runs_dir / run / "evaluate" / "metrics.parquet")
    return metrics.assign(variant=name, seed=seed)


def print_results(results: pd.DataFrame, wanted: list[str]) -> None:
    """One table a protocol and metric."""
    results = results[results.subject.isin(SUBJECTS)]
    for (protocol, metric), group in results.groupby(["protocol", "metric"], sort=False):
        if metric not in wanted:
            continue
        print(f"\n{protocol}, {metric}")
        print(f"{'variant':18}" + "".join(f"{s:>18}" for s in SUBJECTS) + f"{'gap closed':>16}")
        for variant, rows in group.groupby("variant", sort=False):
            table = rows.pivot_table(index="seed", columns="subject", values="value")
            line = f"{variant:18}"
            for subject in SUBJECTS:
                values = table.get(subject)
                line += f"{spread(values):>18}" if values is not None else " " * 18
            best = table.get("distilled", table.get("labelled_pseudo"))
            if best is not None and "supervised" in table and "labelled_only" in table:
                gap = table.supervised - table.labelled_only
                closed = ((best - table.labelled_only) / gap.where(gap > 0)).dropna()
                line += f"{spread(closed, '.0%') if len(closed) else 'no gap':>16}"
            print(line)


def spread(values: pd.Series, form: str = ".3f") -> str:
    """Mean and standard deviation over seeds."""
    return f"{format(values.mean(), form)} ± {format(np.std(values), form)}"


def main() -> None:
    """Run all variants, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=Path("configs/default.yaml"))
    parser.add_argument("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"))
    parser.add_argument("--only", help="variants, between commas")
    parser.add_argument("--teacher", default="base", help="the member that `distilled` follows")
    parser.add_argument("--runs-dir", type=Path, help="kept when given")
    parser.add_argument("--workers", type=int, help="of every run; by default one a core")
    parser.add_argument("--metrics", default="accuracy,tar@far=0.01,rank-1,tpir20@fpir=0.1")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(VARIANTS)
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        parser.error(f"unknown variant {unknown[0]!r}; choose from: {', '.join(VARIANTS)}")
    with tempfile.TemporaryDirectory() as place:
        options.runs_dir = options.runs_dir or Path(place)
        results = []
        for seed in range(options.seeds):
            for name in names:
                found = run_variant(name, seed, options)
                results += [] if found is None else [found]
                print(f"seed {seed}, {name}: done", file=sys.stderr, flush=True)
        if results:
            print_results(pd.concat(results), options.metrics.split(","))


if __name__ == "__main__":
    main()
