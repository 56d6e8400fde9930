"""Which number of a recognizer says best what cannot be recognised: error versus reject.

    python -m tests.benchmarks.bench_rejection [--seeds 2] [--px 24,16]
        [--methods plain,consistency,subspheres] [--epochs 8] [--faces DIR] [--out rows.jsonl]

Trainings are those of `bench_methods`, with its data. Probes are held-out identities, degraded as
`surveillance`; the gallery is sharp. Each quality that a recognizer has rejects the probes that it
rates lowest. *Area* is the mean rank-1 error of the rest over rejected shares of 0 to 50 %, divided
by the error without rejection: 1 for a quality that means nothing, less for a better one. *Best* is
the area where wrong probes go first. `--out` gets the rows of `bench_methods` too, for its
`--table`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.bench_methods import (
    METHODS,
    load_faces,
    score,
    show_probe,
    train_one,
    write_faces,
)

SHARES = tuple(np.linspace(0, 0.5, 11).tolist())
KINDS = ("norm", "consistency", "confidence")


def measure_areas(recognizer: Any, folder: str, size_px: int, parts: int) -> dict[str, float]:
    """Rank-1 error in percent, and the area of each quality."""
    from cdp.errors import ConfigError
    from cdp.metrics import sample_probe_gallery
    from cdp.metrics.identification import identify
    from cdp.recognizer.quality import measure_quality

    faces = load_faces(folder)
    images, identity = faces["evaluation_images"], np.asarray(faces["evaluation_identity"])
    probes, gallery = sample_probe_gallery(identity, 0)
    small = show_probe(images, size_px, "surveillance")[probes]
    found = identify(
        recognizer.embed(small), identity[probes],
        recognizer.embed(images[gallery]), identity[gallery],
    )  # fmt: skip
    wrong = (found.rank > 1).astype(float)
    areas = {"error": 100 * wrong.mean(), "best": measure_area(-wrong, wrong)}
    for kind in KINDS:
        try:
            quality = measure_quality(recognizer.backbone, small, kind, parts=parts)
        except ConfigError:
            continue
        areas[kind] = measure_area(quality, wrong)
    return areas


def measure_area(quality: np.ndarray, wrong: np.ndarray) -> float:
    """Mean error over the rejected shares, as a part of the error without rejection."""
    order = np.argsort(quality, kind="stable")
    errors = [wrong[order[round(share * len(order)) :]].mean() for share in SHARES]
    return float(np.mean(errors) / max(wrong.mean(), 1e-12))


def main() -> None:
    """Train, and print a line a method, seed and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--px", default="24,16", help="sides of the probes, between commas")
    parser.add_argument("--methods", default="plain,consistency,subspheres")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--faces", type=Path, help="a folder of `lfw_faces`; else drawn")
    parser.add_argument("--out", type=Path, default=Path("bench_rejection.jsonl"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
    }
    sizes = tuple(int(px) for px in options.px.split(","))
    with tempfile.TemporaryDirectory() as drawn, options.out.open("w", encoding="utf-8") as out:
        folder = str(options.faces or drawn)
        if options.faces is None:
            with ProcessPoolExecutor(1) as pool:
                write_faces(Path(drawn), pool)
        for seed in range(options.seeds):
            for name in options.methods.split(","):
                measure(name, seed, folder, sizes, base, options.device, out)


def measure(
    name: str, seed: int, folder: str, sizes: tuple[int, ...], base: dict[str, Any], device: str,
    out: Any,
) -> None:  # fmt: skip
    """One training: its lines, and its row of `bench_methods`."""
    started = time.process_time()
    method = METHODS[name]
    recognizer, shared = train_one(method, seed, folder, base, device)
    # 8 parts of any embedding can be compared; only `subspheres` trains them to be confidences.
    parts = int(method.spec.get("head_params", {}).get("parts", 8))
    for size_px in sizes:
        areas = measure_areas(recognizer, folder, size_px, parts)
        text = ", ".join(f"{key} {value:.3f}" for key, value in areas.items())
        print(f"{name}, seed {seed}, {size_px} px: {text}", flush=True)
    values = score(method, recognizer, load_faces(folder), sizes, seed, device)
    row = {"method": name, "against": method.against, **shared, "values": values}
    out.write(json.dumps(row) + "\n")
    out.flush()
    print(f"{name}, seed {seed}: {time.process_time() - started:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
