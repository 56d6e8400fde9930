"""The command `cdp demo`: the whole pipeline on a small set of synthetic faces.

The contract:
- Runs `configs/demo.yaml` of the package, all stages, as `cdp run` does; a second call does what is
  missing or stale alone. Exit codes are those of `cdp run`.
- Prints the largest clusters with their true identities, the pairwise F, and the page to open; of
  clusters whose precision nobody could estimate, why.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.invocation import format_command
from pipelines.packaged import CONFIGS, PACKAGE

if TYPE_CHECKING:
    from pipelines.results import RunResults

CONFIG = PACKAGE / CONFIGS / "demo.yaml"
ROWS = 10
"""Clusters in the table."""
UNKNOWN = "not known"
COLUMNS = ["cluster", "images", "expected precision", "true identity", "of that identity"]


COMPILE = """
import numpy as np
from cdp import ConsensusClusterer

rng = np.random.default_rng(0)
identity = np.repeat(np.arange(12), 6)
views = [(rng.normal(size=(12, 8))[identity] + rng.normal(size=(72, 8))).astype("f") for _ in "ab"]
ConsensusClusterer(k=20, backend="exact").fit(views, labelled_views=views, labelled_ids=identity)
"""
"""Calls what `mediate` and `propagate` call, on next to nothing."""


def build_parser() -> argparse.ArgumentParser:
    """The options, each with what it does."""
    parser = argparse.ArgumentParser(
        prog=format_command("demo"),
        description="Cluster a small set of synthetic faces, train a recognizer on the clusters, "
        "and draw a page of both: a check that the installation works, in under a minute.",
    )
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR",
                        help="where the results go (default: runs)")  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and describe its results; return the exit code."""
    options = build_parser().parse_args(arguments)

    from pipelines.results import open_run
    from pipelines.run import main as run

    with _one_thread(), _compile_ahead():
        code = run(["--config", str(CONFIG), "--runs-dir", str(options.runs_dir), "--workers", "1"])
    if code == 0:
        print(f"\n{describe_results(open_run(options.runs_dir / CONFIG.stem))}")
    return code


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one thread: for networks this small, threads wait for each other on a busy machine
    far longer than they save on an idle one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _compile_ahead() -> Iterator[None]:
    """Compile the clustering code in a second process while the models are trained.

    The first run after an installation compiles for half a minute; numba keeps the result on disk,
    where this process finds it when it needs it.
    """
    process = subprocess.Popen([sys.executable, "-c", COMPILE], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def describe_results(run: RunResults) -> str:
    """The largest clusters, how right they are, and what to open next."""
    scores = run.metrics[run.metrics.subject == "pseudo_labels"].set_index("metric").value
    page = (run.directory / "report" / "report.html").absolute()
    review = format_command("review", "--run", str(run.directory))
    return f"""\
{len(run.clusters)} clusters of unlabelled faces. The largest, with their true identities:

{tabulate_clusters(run).to_string(index=False)}
{explain_unknown(run)}
Pairwise precision {scores["pairwise_precision"]:.2f}, recall {scores["pairwise_recall"]:.2f}, \
F {scores["pairwise_f"]:.2f} over all clusters.

Open in a browser to see every cluster: {page.as_uri()}
To correct clusters by hand:            {review}"""


def explain_unknown(run: RunResults) -> str:
    """Why no cluster's precision is estimated, as a line; "" where it is."""
    if not len(run.clusters) or run.clusters.expected_precision.notna().any():
        return ""
    reasons = run.manifest("propagate")["facts"]["withheld"]
    return f"No expected precision is known: {'; '.join(reasons)}.\n"


def tabulate_clusters(run: RunResults) -> Any:
    """DataFrame of the `ROWS` largest clusters: size, expected precision, main true identity."""
    import pandas as pd

    both = run.labels.merge(run.truth, on="sample_id")
    largest = run.clusters.sort_values(["size", "pseudo_label"], ascending=[False, True])
    rows = []
    for cluster in largest.head(ROWS).itertuples():
        counts = both.identity[both.pseudo_label == cluster.pseudo_label].value_counts()
        known = pd.notna(cluster.expected_precision)
        precision = f"{cluster.expected_precision:.0%}" if known else UNKNOWN
        rows.append(
            (cluster.pseudo_label, cluster.size, precision, counts.index[0], counts.iloc[0])
        )
    return pd.DataFrame(rows, columns=COLUMNS)


if __name__ == "__main__":
    sys.exit(main())
