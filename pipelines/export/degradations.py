"""The export `degradations`: one picture of the same faces under every degradation.

The contract:
- One row a preset, one column a face; the first row shows the faces resized without degradation.
- Faces are chosen and degraded by seed: the same command gives the same picture.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError, DataError, StageError
from pipelines.data.dataset import Dataset
from pipelines.packaged import find_manifest


def add_parser(subparsers: Any) -> None:
    """The options of `degradations`."""
    parser = subparsers.add_parser("degradations", help="a page of degraded faces, as PNG")
    add = parser.add_argument
    add("--data", type=Path, default=Path("synthetic"), metavar="NAME",
        help="a data manifest, by path or name (default: synthetic)")  # fmt: skip
    add("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"), metavar="DIR")
    add("--preset", nargs="+", metavar="NAME", help="which degradations (default: all)")
    add("--px", type=int, default=24, metavar="N", help="side of the network's input")
    add("--count", type=int, default=8, metavar="N", help="faces in a row")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, metavar="FILE", help="a .png that does not exist yet")
    parser.set_defaults(export=export_degradations)


def export_degradations(options: argparse.Namespace) -> str:
    """Write the picture; return a summary line."""
    from PIL import Image

    from cdp.images.degradation import DEGRADATIONS, degrade_pixels, get_degradation
    from cdp.images.page import compose_page

    if options.px < 4 or options.count < 1:
        raise ConfigError(
            f"--px of 4 and --count of 1 or more expected, got {options.px} and {options.count}"
        )
    if options.out.exists():
        raise ConfigError(f"{options.out} exists already; choose another --out, or remove it first")
    names = options.preset or [name for name in DEGRADATIONS if name != "none"]
    presets = {name: get_degradation(name) for name in ("none", *names)}
    faces = draw_faces(options)
    seeds = np.random.default_rng(options.seed).integers(0, 2**63 - 1, len(faces))
    rows = {
        name: degrade_pixels(faces, seeds, preset, options.px) for name, preset in presets.items()
    }
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(compose_page(rows)).save(options.out, format="PNG")
    except OSError as error:
        raise StageError(f"cannot write {options.out}: {error}") from error
    return f"{options.out}: {len(faces)} faces, {', '.join(rows)}"


def draw_faces(options: argparse.Namespace) -> np.ndarray:
    """Faces chosen from the data set by seed: (n, s, s, 3) uint8 RGB."""
    dataset = Dataset.open(find_manifest(options.data), options.data_root)
    if dataset.kind == "features":
        raise DataError(f"data set {dataset.manifest.name} is a table of features, not of faces")
    paths = [entry.path for entry in dataset.list_entries()]
    chosen = np.random.default_rng(options.seed).permutation(len(paths))[: options.count]
    return dataset.read_faces([paths[row] for row in chosen])
