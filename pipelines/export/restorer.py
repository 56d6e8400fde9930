"""The export `restorer`: a restorer trained on a data set's faces, with a page of examples.

The contract:
- It is trained on the labelled and unlabelled faces, which are taken as sharp; labels are not read.
- The page shows held-out faces, or faces left out of the training where the set holds none out: as
  they are, small, enlarged without a network, and restored.
- The directory has `restorer.safetensors` and `restorer.png`; it appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.errors import ConfigError, DataError, StageError
from pipelines.data.dataset import Dataset
from pipelines.members import reduce_to
from pipelines.packaged import find_manifest

if TYPE_CHECKING:
    from cdp.restoration import Restorer

MOST_FACES = 20_000
"""Faces that are trained on, at most; drawn by seed."""
SHOWN = 8


def add_parser(subparsers: Any) -> None:
    """The options of `restorer`."""
    parser = subparsers.add_parser("restorer", help="a network that enlarges tiny faces four times")
    add = parser.add_argument
    add("--data", type=Path, default=Path("synthetic"), metavar="NAME",
        help="a data manifest, by path or name (default: synthetic)")  # fmt: skip
    add("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"), metavar="DIR")
    add("--px", type=int, default=12, metavar="N", help="side of the small faces (default: 12)")
    add("--steps", type=int, default=1000, metavar="N", help="of the training (default: 1000)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--out", type=Path, required=True, metavar="DIR", help="a new directory")
    parser.set_defaults(export=export_restorer)


def export_restorer(options: argparse.Namespace) -> str:
    """Train, write the directory; return a summary line."""
    from PIL import Image

    from cdp.images.page import compose_page
    from cdp.restoration import RestorationPlan, save_restorer, train_restorer

    if options.out.exists():
        raise ConfigError(f"{options.out} exists already; choose another --out, or remove it first")
    plan = RestorationPlan(small_px=options.px, steps=options.steps, seed=options.seed)
    faces, shown = read_split_faces(options, 4 * options.px)
    restorer, _ = train_restorer(faces, plan, device=options.device)
    rows, gain_db = draw_examples(restorer, shown, options.px)
    draft = options.out.with_name(f".{options.out.name}.draft-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        save_restorer(draft / "restorer.safetensors", restorer)
        Image.fromarray(compose_page(rows)).save(draft / "restorer.png", format="PNG")
        draft.rename(options.out)
    except OSError as error:
        raise StageError(f"cannot write {options.out}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return (
        f"{options.out}: {options.px} px to {4 * options.px} px, trained on {len(faces)} faces; "
        f"{gain_db:+.1f} dB PSNR beside plain enlargement on {len(shown)} others"
    )


def read_split_faces(options: argparse.Namespace, side_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Faces to train on and faces to show, (n, side_px, side_px, 3) uint8."""
    dataset = Dataset.open(find_manifest(options.data), options.data_root)
    if dataset.kind == "features":
        raise DataError(f"data set {dataset.manifest.name} is a table of features, not of faces")
    if dataset.manifest.size_px < side_px:
        raise ConfigError(
            f"faces of {side_px} px or more expected for --px {options.px}, the data set has "
            f"{dataset.manifest.size_px}; choose a smaller --px"
        )
    entries = list(dataset.list_entries())
    held_out = np.array([entry.split == "evaluation" for entry in entries])
    order = np.random.default_rng(options.seed).permutation(len(entries))
    others = order[held_out[order]] if held_out.any() else order[:SHOWN]
    trained = np.setdiff1d(order, others, assume_unique=True)
    trained = order[np.isin(order, trained)][:MOST_FACES]

    def read(rows: np.ndarray) -> np.ndarray:
        return reduce_to(dataset.read_faces([entries[row].path for row in rows]), side_px)

    return read(trained), read(others[: 8 * SHOWN])


def draw_examples(
    restorer: Restorer, sharp: np.ndarray, small_px: int
) -> tuple[dict[str, np.ndarray], float]:
    """The rows of the page, and the gain over plain enlargement in dB, over all faces."""
    import torch

    from cdp.images.degradation import reduce_faces
    from cdp.restoration import restore_faces
    from cdp.restoration.network import enlarge_plainly

    small = reduce_faces(sharp, small_px)
    restored = restore_faces(restorer, small)
    pixels = torch.from_numpy(small).permute(0, 3, 1, 2).float()
    plain = (
        enlarge_plainly(pixels).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    )
    error = [float(np.mean((each.astype(np.float64) - sharp) ** 2)) for each in (plain, restored)]
    rows = {"sharp": sharp, f"{small_px} px": small, "enlarged": plain, "restored": restored}
    gain_db = 10 * np.log10(max(error[0], 1e-9) / max(error[1], 1e-9))
    return {name: pictures[:SHOWN] for name, pictures in rows.items()}, float(gain_db)
