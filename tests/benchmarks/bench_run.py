"""One whole run from nothing: seconds and memory a stage, and what came out.

    python -m tests.benchmarks.bench_run
    python -m tests.benchmarks.bench_run --config configs/lfw.yaml --data-root DIR

With `--run DIR` an existing run is reported instead of a fresh one. Beside the committee stands one
model alone: the base view's graph, cut at its oracle threshold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from cdp.metrics.calibration import measure_reliability
from cdp.metrics.clustering import score_bcubed, score_pairwise
from cdp.propagation.rising_threshold import propagate_labels
from cdp.types import PairTable
from pipelines.run import main as run_pipeline
from pipelines.stages import STAGES


def report_stages(run: Path) -> None:
    """Seconds and peak resident memory (all processes together) of every stage."""
    total = 0.0
    print(f"{'stage':10}{'seconds':>9}{'peak MiB':>10}")
    for stage in STAGES:
        path = run / stage.name / "manifest.json"
        if path.exists():
            manifest = json.loads(path.read_text(encoding="utf-8"))
            total += manifest["seconds"]
            print(f"{stage.name:10}{manifest['seconds']:9.1f}{manifest['peak_memory_mib']:10,}")
    print(f"{'all':10}{total:9.1f}")


def report_clusters(run: Path) -> None:
    """F of the pseudo-labels, as estimated, and of one model alone at its oracle threshold."""
    labels = pd.read_parquet(run / "propagate" / "labels.parquet")
    truth = pd.read_parquet(run / "ingest" / "truth.parquet")
    pairs = pd.read_parquet(run / "mediate" / "pairs.parquet")
    both = labels.merge(truth, on="sample_id")
    identity = both.identity.factorize()[0]
    source, target = (both.sample_id.searchsorted(pairs[end]) for end in ("source", "target"))
    same = identity[source] == identity[target]

    def print_scores(name: str, label: np.ndarray, note: str = "") -> None:
        pairwise, bcubed = score_pairwise(identity, label), score_bcubed(identity, label)
        print(
            f"{name:28}pairwise F {pairwise[2]:.3f} (P {pairwise[0]:.3f} R {pairwise[1]:.3f})  "
            f"BCubed F {bcubed[2]:.3f}  {note}"
        )

    print_scores("pseudo-labels, no threshold", both.pseudo_label.to_numpy())
    table = PairTable(source, target)
    best = max(
        (
            (score_pairwise(identity, label)[2], threshold, label)
            for threshold in np.arange(0.2, 1.0, 0.02)
            for label in [
                propagate_labels(
                    table,
                    pairs.base_similarity.to_numpy(),
                    len(both),
                    threshold=threshold,
                    max_size=len(both),
                ).label
            ]
        ),
        key=lambda found: found[:2],
    )
    print_scores("one model alone, oracle", best[2], f"at cosine {best[1]:.2f}")
    error = measure_reliability(pairs.probability.to_numpy(), same).expected_calibration_error
    print(f"calibration error {error:.3f}; positive rate {same.mean():.3f}")
    facts = json.loads((run / "propagate" / "manifest.json").read_text())["facts"]
    print(
        f"estimated without truth: precision {facts['estimated_precision']:.3f}, recall "
        f"{facts['estimated_recall']:.3f}, F {facts['estimated_f']:.3f}"
    )


def main() -> int:
    """Run, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path)
    parser.add_argument("--config", default="configs/default.yaml")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        run = options.run
        if run is None:
            code = run_pipeline(["--config", options.config, "--runs-dir", place, *rest])
            if code:
                return code
            run = next(path for path in Path(place).iterdir() if not path.name.startswith("."))
        report_stages(run)
        if (run / "ingest" / "truth.parquet").exists():
            report_clusters(run)
        print((run / "report" / "summary.txt").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
