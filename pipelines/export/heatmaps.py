"""The export `heatmaps`: where a recognizer or an ONNX model looks, as one picture.

The contract:
- A row of faces, then for each model its occlusion maps (what a patch over each place costs), and,
  for networks of ours, its heat maps (the places that carry the match) and the mean responses of
  some filters of the last map but one.
- Faces are chosen by seed: the same command gives the same picture.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError, DataError, StageError
from pipelines.export.degradations import draw_faces
from pipelines.members import open_embedder, reduce_to

PROBED_FACES = 200


def add_parser(subparsers: Any) -> None:
    """The options of `heatmaps`."""
    parser = subparsers.add_parser("heatmaps", help="a page of heat maps, as PNG")
    add = parser.add_argument
    add("--model", nargs="+", type=Path, required=True, metavar="FILE",
        help="recognizers (.safetensors), as runs/x/retrain/labelled_pseudo.safetensors, and ONNX "
        "models (.onnx)")  # fmt: skip
    add("--data", type=Path, default=Path("synthetic"), metavar="NAME",
        help="a data manifest, by path or name (default: synthetic)")  # fmt: skip
    add("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"), metavar="DIR")
    add("--px", type=int, metavar="N", help="reduce the faces to this side first")
    add("--count", type=int, default=8, metavar="N", help="faces in a row")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, metavar="FILE", help="a .png that does not exist yet")
    parser.set_defaults(export=export_heatmaps)


def export_heatmaps(options: argparse.Namespace) -> str:
    """Write the picture; return a summary line."""
    from PIL import Image

    from cdp.images.page import compose_page

    if options.count < 1 or (options.px is not None and options.px < 4):
        raise ConfigError(
            f"--count of 1 and --px of 4 or more expected, got {options.count} and {options.px}"
        )
    if options.out.exists():
        raise ConfigError(f"{options.out} exists already; choose another --out, or remove it first")
    wanted = options.count
    options.count = max(wanted, PROBED_FACES)  # the mean responses are over more faces
    faces = reduce_to(draw_faces(options), options.px)
    rows = {"faces": faces[:wanted]}
    for path in options.model:
        rows |= draw_model(path, faces, wanted)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(compose_page(rows)).save(options.out, format="PNG")
    except OSError as error:
        raise StageError(f"cannot write {options.out}: {error}") from error
    return f"{options.out}: {len(rows['faces'])} faces, {len(options.model)} models"


def draw_model(path: Path, faces: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """The rows of one model."""
    from cdp.embedding import BackboneEmbedder
    from cdp.inspection import locate_filters, map_attention, map_occlusion, overlay_maps

    if not path.is_file():
        raise DataError(f"a model expected at {path}, found no file")
    embedder, shown = open_embedder(path, "cpu"), faces[:count]
    rows = {f"{path.stem}\nocclusion": overlay_maps(shown, map_occlusion(embedder, shown))}
    if isinstance(embedder, BackboneEmbedder):
        backbone = embedder.backbone
        rows[f"{path.stem}\nheat"] = overlay_maps(shown, map_attention(backbone, shown))
        places = locate_filters(backbone, faces)
        order = np.argsort(-places.response.std((1, 2)), kind="stable")[:count]
        mean = np.repeat(faces.mean(0, keepdims=True), len(order), 0).round().astype(np.uint8)
        rows[f"{path.stem}\nfilters"] = overlay_maps(mean, places.response[order])
    return rows
