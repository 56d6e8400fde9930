"""A data set whose clusters are known before any model runs: identities that are plain patterns.

Each identity is a pattern of 8 x 8 coloured blocks; an image of it is the pattern with every block
shifted a little. The committee is two fixed projections of the pixels, as ONNX files, so no model
is trained before the mediator. Images of one identity have a cosine near 0.8, images of two have
one near 0: whatever a processor rounds, the clusters are the identities of `SIZES`.

Four morphs, each a row of images from one pattern to another, leave something to ask a reviewer:
neighbours in the row are alike and its ends are not, so no clustering of it is beyond doubt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

SIZES = (16, 14, 12, 10, 8, 6, 6, 5, 5, 4, 4)
"""Unlabelled images of each identity with a certain cluster: those of `u00`, `u01`, ..."""
DISTRACTORS, MORPHS, MORPH_IMAGES = 8, 4, 8
"""Identities of one image, rows of images between two patterns, and images in each row."""
LABELLED, EVALUATION = (24, 6), (12, 4)
"""Identities and images of each."""
KNOWN_K = 8
SIDE_PX, PATTERN = 48, (8, 8, 3)
SHIFT = 35.0
"""Standard deviation of a block's colour, of 255."""


def write_known_config(place: Path, settings: dict[str, Any]) -> Path:
    """Draw the data set below `place/data`; the path of a config of `settings` over it."""
    root = place / "data"
    _draw_identities(root / "labelled", [LABELLED[1]] * LABELLED[0], seed=1)
    _draw_identities(root / "unlabelled", [*SIZES, *[1] * DISTRACTORS], seed=2)
    _draw_identities(root / "evaluation", [EVALUATION[1]] * EVALUATION[0], seed=3)
    _draw_morphs(root / "unlabelled", seed=4)
    for seed, (name, dimension) in enumerate((("base", 128), ("other", 96))):
        (root / f"{name}.onnx").write_bytes(build_projection(dimension, seed))
    splits = ("labelled", "unlabelled", "evaluation")
    folders = {split: {"root": split, "layout": "people"} for split in splits}
    manifest = {"name": "known", "kind": "images", "size_px": SIDE_PX, **folders}
    committee = {
        "base": {"name": "base", "onnx": "base.onnx"},
        "members": [{"name": "other", "onnx": "other.onnx"}],
    }
    (place / "configs").mkdir()
    (place / "data.yaml").write_text(yaml.safe_dump(manifest))
    config = place / "configs" / "known.yaml"
    overlay = {"name": "known", "committee": committee, "knn": {"k": KNOWN_K}}
    config.write_text(yaml.safe_dump({**settings, **overlay}))
    return config


def _draw_identities(folder: Path, sizes: list[int], *, seed: int) -> None:
    random = np.random.default_rng(seed)
    for number, size in enumerate(sizes):
        pattern = random.uniform(0, 255, PATTERN)
        _save_images(folder / f"{folder.name[0]}{number:02d}", [pattern] * size, random)


def _draw_morphs(folder: Path, *, seed: int) -> None:
    random = np.random.default_rng(seed)
    for number in range(MORPHS):
        first, last = random.uniform(0, 255, (2, *PATTERN))
        shares = np.linspace(0, 1, MORPH_IMAGES)
        _save_images(
            folder / f"m{number:02d}", [first + t * (last - first) for t in shares], random
        )


def _save_images(folder: Path, patterns: list[np.ndarray], random: np.random.Generator) -> None:
    folder.mkdir(parents=True)
    for number, pattern in enumerate(patterns):
        blocks = np.clip(pattern + random.normal(0, SHIFT, PATTERN), 0, 255).astype(np.uint8)
        pixels = blocks.repeat(SIDE_PX // PATTERN[0], 0).repeat(SIDE_PX // PATTERN[1], 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")


def build_projection(dimension: int, seed: int) -> bytes:
    """An ONNX model: 8 x 8 pixels around grey, times a fixed matrix."""
    from onnx import TensorProto, helper

    weight = np.random.default_rng(seed).normal(size=(192, dimension)).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["image", "grey"], ["centred"]),
        helper.make_node("Flatten", ["centred"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
    ]
    values = {"image": ["n", 3, 8, 8], "embedding": ["n", dimension]}
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in values.items()
    )
    constants = [
        helper.make_tensor("grey", TensorProto.FLOAT, [], [127.5]),
        helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.ravel()),
    ]
    graph = helper.make_graph(nodes, "projection", [taken], [given], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()
