"""Same bits before and after: digests of what the code computes, recorded and compared.

    make golden                                   # first call: record; later calls: compare
    python -m tests.golden record|compare [--to DIR] [--only tiny ...] [--renamed OLD=NEW ...]

Recorded are four things, outside the repository, under `DIR/<part>.json` (default
`~/.cache/cdp/golden`): every column of every table of the tests' tiny run, the same of the default
run up to propagate, the figures that the pseudo-label benchmark prints for one seed on LFW's
features (`CDP_DATA_ROOT`), and the state of a mediator that is fitted to a fixed input.

A refactoring records before its first line and compares after its last, on one machine: another
processor may round otherwise, so nothing recorded here is a constant of a test. `--renamed OLD=NEW`
replaces a piece of the recorded names, for a table, a column or a file that got a better name.
Columns of wall times are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parents[1]
TIMES = {"seconds", "peak_memory"}
Digests = dict[str, str]


def digest_column(column: pa.ChunkedArray) -> str:
    """SHA-256 of type, nulls and values, whatever the chunks."""
    whole = column.combine_chunks()
    total = hashlib.sha256(f"{column.type} {len(column)}".encode())
    total.update(np.asarray(whole.is_valid()).tobytes())
    values = whole
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        if pa.types.is_list(values.type):
            total.update(np.diff(np.asarray(values.offsets)).tobytes())
        values = values.flatten()
    kept = values.drop_null()
    if pa.types.is_floating(kept.type) or pa.types.is_integer(kept.type):
        total.update(kept.to_numpy(zero_copy_only=False).tobytes())
    else:
        total.update("\0".join(str(value) for value in kept.to_pylist()).encode())
    return total.hexdigest()


def digest_array(name: str, array: np.ndarray) -> str:
    """SHA-256 of its bytes; of JSON, of its numbers alone, since its keys may get better names."""
    content = np.ascontiguousarray(array).tobytes()
    if name.endswith("json"):
        content = b" ".join(sorted(re.findall(rb"-?\d+\.?\d*(?:e-?\d+)?", content)))
    return hashlib.sha256(content).hexdigest()


def digest_run(run: Path) -> Digests:
    """Every column of every table of a run, and every array of its mediators."""
    from safetensors.numpy import load_file

    found: Digests = {}
    for stage in sorted(path for path in run.iterdir() if path.is_symlink()):
        for path in sorted(stage.glob("**/*.parquet")):
            if path.is_file():
                table = pq.read_table(path)
                for name in table.column_names:
                    if name not in TIMES and stage.name != "report":
                        key = f"{stage.name}/{path.relative_to(stage).as_posix()}:{name}"
                        found[key] = digest_column(table[name])
        for path in sorted(stage.glob("*.safetensors")):
            for name, array in load_file(path).items():
                found[f"{stage.name}/{path.name}:{name}"] = digest_array(name, array)
    return found


def start(*arguments: str, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def record_tiny(place: Path) -> Digests:
    """The run of the tests, all stages."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TINY_CONFIG, TINY_DATA

    (place / "configs").mkdir()
    (place / "configs" / "tiny.yaml").write_text(yaml.safe_dump(TINY_CONFIG))
    (place / "data.yaml").write_text(yaml.safe_dump(TINY_DATA))
    start(
        *("-m", "pipelines.run", "--config", str(place / "configs" / "tiny.yaml")),
        *("--runs-dir", str(place / "runs"), "--workers", "1"),
    )
    return digest_run(place / "runs" / "tiny")


def record_default(place: Path) -> Digests:
    """The default run, up to the pseudo-labels."""
    start("-m", "pipelines.run", "--runs-dir", str(place), "--until", "propagate")
    return digest_run(place / "default")


def record_benchmark(place: Path) -> Digests:
    """The figures of `bench_pseudo_labels`, row by row; its words may change."""
    printed = start("-m", "tests.benchmarks.bench_pseudo_labels", "--sets", "lfw", "--no-peers")
    rows = [line for line in printed.splitlines() if line.startswith("lfw")]
    return {
        f"row {number}": " ".join(re.findall(r"-?\d*\.\d+", row)) for number, row in enumerate(rows)
    }


def record_mediator(place: Path) -> Digests:
    """Every array of a mediator of 3,000 pairs of 60 people."""
    from cdp.mediator import Mediator

    random = np.random.default_rng(0)
    source, target = random.integers(0, 60, (2, 3000))
    same = source == target
    same[:600], target[:600] = True, source[:600]
    features = random.normal(size=(3000, 20)).astype(np.float32)
    features += 0.7 * same[:, None].astype(np.float32)
    fitted = Mediator.fit(features, same, source, target, seed=0)
    mediator = fitted[0] if isinstance(fitted, tuple) else fitted
    return {name: digest_array(name, array) for name, array in mediator.state().items()}


PARTS: dict[str, Callable[[Path], Digests]] = {
    "mediator": record_mediator,
    "tiny": record_tiny,
    "benchmark": record_benchmark,
    "default": record_default,
}


def compare(before: Digests, now: Digests, renamed: list[tuple[str, str]]) -> list[str]:
    """What differs, a line each."""
    expected = {}
    for name, digest in before.items():
        for old, new in renamed:
            name = name.replace(old, new)
        expected[name] = digest
    return [
        *(f"gone: {name}" for name in sorted(expected.keys() - now.keys())),
        *(f"new: {name}" for name in sorted(now.keys() - expected.keys())),
        *(
            f"changed: {name}: {expected[name][:40]} -> {now[name][:40]}"
            for name in sorted(expected.keys() & now.keys())
            if expected[name] != now[name]
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", nargs="?", choices=["record", "compare", "auto"], default="auto")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--to", type=Path, default=cache / "cdp" / "golden", metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--renamed", nargs="+", default=[], metavar="OLD=NEW")
    options = parser.parse_args()
    renamed = [tuple(pair.split("=", 1)) for pair in options.renamed]
    options.to.mkdir(parents=True, exist_ok=True)
    failed = False
    for part in options.only:
        target = options.to / f"{part}.json"
        if options.action == "compare" and not target.exists():
            raise SystemExit(f"nothing recorded at {target}; record before the change")
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            now = PARTS[part](Path(folder))
        if options.action == "record" or not target.exists():
            target.write_text(json.dumps(now, indent=1))
            print(f"{part}: recorded {len(now)} digests in {target}", flush=True)
            continue
        differing = compare(json.loads(target.read_text()), now, renamed)
        failed |= bool(differing)
        shown = "".join(f"\n  {line}" for line in differing[:60])
        print(f"{part}: {len(now)} digests, {len(differing)} differ{shown}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
