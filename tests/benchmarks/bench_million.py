"""The pipeline on a million embeddings: time and private memory a stage, recall and F.

    python -m tests.benchmarks.bench_million [--rows 1000000] [--labelled 20000] [--keep DIR]
    python -m tests.benchmarks.bench_million --rows 50000 100000 200000      # growth

Drawn are `--rows` unlabelled and `--labelled` labelled rows of other identities, 128 numbers in
each of three views (`draw_halves` of `bench_default`: heavy-tailed identities, look-alikes). They
are written as ready features with a data manifest, and `cdp run` makes a run of them in a process
of its own with two workers. "private" is the memory of all its processes that no file backs,
sampled, "largest" that of one process; "cpu" is the processor time of all. With several sizes the
growth of the processor time is printed too. With --keep the features and the run stay in that
folder, and a run that was cut short goes on. Further options go to `cdp run`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import yaml

from tests.benchmarks.bench_default import draw_halves

VIEWS = ("base", "second", "third")
SAMPLE_S = 0.5


def write_features(rows: int, labelled: int, dimension: int, folder: Path) -> None:
    """Draw the data set and write it as ready features, with data manifest and config."""
    draw_halves(labelled, rows, (dimension,) * len(VIEWS), folder)
    for split in ("labelled", "unlabelled"):
        place = folder / split
        (place / "features").mkdir()
        for number, view in enumerate(VIEWS):
            (place / f"view-{number}.npy").rename(place / "features" / f"{view}.npy")
        identity = pd.Series(_load(place / "identity.npy"))
        names = identity.index.map("{:08d}.jpg".format)
        (place / "list.txt").write_text("\n".join(names) + "\n")
        (place / "meta.txt").write_text("\n".join(identity.astype(str)) + "\n")
    manifest = {
        "name": "drawn",
        "kind": "features",
        **{split: {"root": split} for split in ("labelled", "unlabelled")},
    }
    members = [{"name": view, "features": view} for view in VIEWS]
    config = {"data": "drawn.yaml", "committee": {"base": members[0], "members": members[1:]}}
    (folder / "drawn.yaml").write_text(yaml.safe_dump(manifest))
    (folder / "million.yaml").write_text(yaml.safe_dump(config))


def _load(path: Path) -> Any:
    import numpy as np

    return np.load(path)


@dataclass
class Usage:
    """What the processes of a run use, by stage."""

    stage: str = "start"
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    private_mib: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest_mib: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _seen: dict[tuple[int, float], float] = field(default_factory=dict)
    _at: float = field(default_factory=time.perf_counter)

    def sample(self, root: psutil.Process) -> None:
        """Add what was used since the last call to the current stage."""
        private, largest = 0.0, 0.0
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error, OSError):
                times = process.cpu_times()
                key = process.pid, process.create_time()
                used = times.user + times.system
                self.cpu[self.stage] += used - self._seen.get(key, 0.0)
                self._seen[key] = used
                own = _read_private_mib(process.pid)
                private, largest = private + own, max(largest, own)
        self.private_mib[self.stage] = max(self.private_mib[self.stage], private)
        self.largest_mib[self.stage] = max(self.largest_mib[self.stage], largest)
        now = time.perf_counter()
        self.seconds[self.stage] += now - self._at
        self._at = now


def _read_private_mib(pid: int) -> float:
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def run_pipeline(folder: Path, extra: list[str], command: list[str] | None = None) -> Usage:
    """Make the run in a process of its own and watch it."""
    command = command or [sys.executable, "-m", "pipelines.run"]
    command = [*command, "--config", str(folder / "million.yaml"), "--workers", "2"]
    command += ["--runs-dir", str(folder / "runs"), "--data-root", str(folder)]
    process = subprocess.Popen([*command, *extra], stdout=subprocess.PIPE, text=True)
    usage, done = Usage(), threading.Event()

    def watch() -> None:
        root = psutil.Process(process.pid)
        while not done.wait(SAMPLE_S):
            with suppress(psutil.Error):
                usage.sample(root)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    assert process.stdout is not None
    for line in process.stdout:
        print("  " + line.rstrip()[:160], file=sys.stderr, flush=True)
        started = re.match(r"(\w+)\s+(run|link)\s", line)
        if started:
            usage.stage = started[1]
    code = process.wait()
    done.set()
    thread.join()
    if code:
        raise SystemExit(f"the run ended with {code}")
    return usage


def describe_run(folder: Path) -> str:
    """Recall of the graphs, number of pairs, and F: against the truth, and as estimated."""
    run = folder / "runs" / "million"

    def read_facts(stage: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((run / stage / "manifest.json").read_text())["facts"]
        return facts

    metrics = pd.read_parquet(run / "evaluate" / "metrics.parquet").set_index("metric").value
    found = read_facts("propagate")
    return (
        f"recall {read_facts('knn')['lowest_recall']}, {read_facts('mediate')['pairs']} pairs, "
        f"{found['clusters']} clusters; pairwise F {100 * metrics['pairwise_f']:.1f} "
        f"(P {100 * metrics['pairwise_precision']:.1f} R {100 * metrics['pairwise_recall']:.1f}), "
        f"BCubed F {100 * metrics['bcubed_f']:.1f}, estimated F {100 * found['estimated_f']:.1f}"
    )


def print_usage(usage: Usage, before: Usage | None) -> None:
    print(f"{'stage':<11}{'s':>8}{'cpu s':>8}{'private MiB':>13}{'largest':>9}{'growth':>8}")
    stages = [*usage.seconds, "whole"]
    for stage in stages:
        row = [_pick(usage, name, stage) for name in ("seconds", "cpu")]
        row += [_pick(usage, name, stage) for name in ("private_mib", "largest_mib")]
        earlier = 0.0 if before is None else _pick(before, "cpu", stage)
        growth = f"{row[1] / earlier:8.2f}" if earlier > 0 else f"{'-':>8}"
        print(f"{stage:<11}{row[0]:8.1f}{row[1]:8.1f}{row[2]:13.0f}{row[3]:9.0f}{growth}")


def _pick(usage: Usage, name: str, stage: str) -> float:
    column: dict[str, float] = getattr(usage, name)
    if stage != "whole":
        return column.get(stage, 0.0)
    return max(column.values()) if name.endswith("mib") else sum(column.values())


def measure_size(rows: int, options: argparse.Namespace, folder: Path) -> Usage:
    if not (folder / "million.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_features(rows, options.labelled, options.dimension, folder)
    return run_pipeline(folder, options.extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--labelled", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=128)
    parser.add_argument("--keep", type=Path, help="keep features and runs in this folder")
    options, options.extra = parser.parse_known_args()
    before = None
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as place:
            folder = (options.keep or Path(place)) / str(rows)
            shape = f"{rows} unlabelled x {options.dimension} x {len(VIEWS)}"
            cores = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
            print(f"\n{options.labelled} labelled + {shape}; {cores}")
            usage = measure_size(rows, options, folder)
            print_usage(usage, before)
            print(describe_run(folder), flush=True)
            before = usage


if __name__ == "__main__":
    main()
