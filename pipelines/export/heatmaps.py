"""The export `heatmaps`: where a recognizer or an ONNX model looks, as one picture.

The contract:
- A row of faces, then for each model its occlusion maps (what a patch over each place costs), and,
  for networks of ours, its heat maps (the places that carry the match) and the mean responses of
  some filters of the last map but one.
- An ONNX model is shown what its preset says. Where none is named and the data set has labelled
  people, it is shown what separates a few of them best, as a member of a committee is.
- A network of ours has the maps of the ONNX model that is exported of it: both see a face and its
  mirror image.
- Faces are chosen by seed: the same command gives the same picture.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cdp.errors import ConfigError, DataError, StageError
from cdp.images.preprocessing import PRESETS, Preprocessing
from cdp.separation import choose_people
from pipelines.data.dataset import Dataset
from pipelines.export.degradations import draw_faces
from pipelines.members import (
    LEAST_PEOPLE,
    describe_choice,
    open_embedder,
    rank_ways,
    reduce_to,
)
from pipelines.packaged import find_manifest

PROBED_FACES = 200


def add_parser(subparsers: Any) -> None:
    """The options of `heatmaps`."""
    parser = subparsers.add_parser("heatmaps", help="a page of heat maps, as PNG")
    add = parser.add_argument
    add("--model", nargs="+", type=Path, required=True, metavar="FILE",
        help="recognizers (.safetensors), as runs/x/retrain/labelled_pseudo.safetensors, and ONNX "
        "models (.onnx)")  # fmt: skip
    add("--preset", nargs="+", choices=PRESETS, metavar="NAME",
        help="the family that the ONNX models come from, one for all or one for each of them: "
        f"{', '.join(PRESETS)} (default: what separates the labelled people of --data best)"
        )  # fmt: skip
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
    ways = choose_ways(options)
    wanted = options.count
    options.count = max(wanted, PROBED_FACES)  # the mean responses are over more faces
    faces = reduce_to(draw_faces(options), options.px)
    rows = {"faces": faces[:wanted]}
    for path in options.model:
        rows |= draw_model(path, faces, wanted, ways.get(path))
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(compose_page(rows)).save(options.out, format="PNG")
    except OSError as error:
        raise StageError(f"cannot write {options.out}: {error}") from error
    shown = "".join(f"; {path.stem} is shown {way.describe()}" for path, way in ways.items())
    return f"{options.out}: {len(rows['faces'])} faces, {len(options.model)} models{shown}"


def choose_ways(options: argparse.Namespace) -> dict[Path, Preprocessing]:
    """What each ONNX model is shown.

    Raises
    ------
    ConfigError
        Presets of another number than ONNX models.
    DataError
        A model's file is missing.
    """
    for path in options.model:
        if not path.is_file():
            raise DataError(f"a model expected at {path}, found no file")
    models = [path for path in options.model if path.suffix.lower() == ".onnx"]
    presets = options.preset or []
    if len(presets) not in (0, 1, len(models)) or (presets and not models):
        raise ConfigError(
            f"--preset: one for all ONNX models or one for each expected, got {len(presets)} "
            f"for {len(models)} of them"
        )
    dataset = Dataset.open(find_manifest(options.data), options.data_root) if models else None
    names = presets * len(models) if len(presets) == 1 else presets
    return {
        path: choose_way(dataset, path, names[place] if names else None)
        for place, path in enumerate(models)
        if dataset is not None
    }


def choose_way(dataset: Dataset, path: Path, preset: str | None) -> Preprocessing:
    """What an ONNX model is shown: its preset, or what separates the labelled people best."""
    given = PRESETS[preset or "plain"]
    if given.input_px is None and open_embedder(path, "cpu", given).input_px is None:
        given = replace(given, input_px=dataset.manifest.size_px)
    if preset is not None:
        return given
    labelled = [entry for entry in dataset.list_entries() if entry.split == "labelled"]
    identity = np.array([str(entry.identity) for entry in labelled])
    rows = choose_people(identity.tolist())
    if len(np.unique(identity[rows])) < LEAST_PEOPLE:
        return given
    ranked = rank_ways(dataset, given, path, [labelled[row].path for row in rows], identity[rows])
    if ranked[0][0] != given:
        print(describe_choice(path.stem, given, ranked))
    return ranked[0][0]


def draw_model(
    path: Path, faces: np.ndarray, count: int, way: Preprocessing | None = None
) -> dict[str, np.ndarray]:
    """The rows of one model; `way` is what an ONNX model is shown, None RGB in 0..255."""
    from cdp.embedding import BackboneEmbedder
    from cdp.inspection import locate_filters, map_attention, map_occlusion, overlay_maps

    if not path.is_file():
        raise DataError(f"a model expected at {path}, found no file")
    embedder, shown = open_embedder(path, "cpu", way), faces[:count]
    maps = map_occlusion(embedder, shown, flip=isinstance(embedder, BackboneEmbedder))
    rows = {f"{path.stem}\nocclusion": overlay_maps(shown, maps)}
    if isinstance(embedder, BackboneEmbedder):
        backbone = embedder.backbone
        rows[f"{path.stem}\nheat"] = overlay_maps(shown, map_attention(backbone, shown))
        places = locate_filters(backbone, faces)
        order = np.argsort(-places.response.std((1, 2)), kind="stable")[:count]
        mean = np.repeat(faces.mean(0, keepdims=True), len(order), 0).round().astype(np.uint8)
        rows[f"{path.stem}\nfilters"] = overlay_maps(mean, places.response[order])
    return rows
