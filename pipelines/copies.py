"""Degraded copies of labelled pictures, where these are sharper than the pile.

The contract:
- The pictures of both splits are compared on a seeded sample, as the embedders see them. Copies are
  made where the labelled ones are clearly sharper (`cdp.images.sharpness_gap`), or as
  `embed.degrade_labelled` says; never where a member is of ready features.
- Copies stand in `embed/embeddings` as the split `copies`: knn and mediate take them in place of
  the split `labelled`. The sample id of copy c is that of its picture plus c times `COPY_STEP`.
- The first copy of a picture that is no sharper than the pile's median is the picture itself.
- Copies of one picture show one identity, so a person with one picture has pairs to learn from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.data.dataset import Dataset
from pipelines.files import save_arrays
from pipelines.members import reduce_to
from pipelines.stage import Work
from pipelines.tables import SPLITS

if TYPE_CHECKING:
    import pandas as pd

    from cdp.images.sharpness_gap import SharpnessGap

COPIES = "copies"
"""The split of degraded copies."""
COPY_STEP = 1 << 40
"""More than there are sample ids."""
SAMPLE = 400
"""Pictures of each split that are compared."""
ROWS_A_PERSON = 6
"""Copies are made until a person of the usual number of pictures has about so many rows."""
PART_SIZE = 100
APPEARANCE_TABLE = pa.schema(
    [
        ("measure", pa.string()),
        ("labelled", pa.float32()),
        ("pile", pa.float32()),
        ("shift", pa.float32()),
    ]
)


def find_trained_split(embedded: Mapping[str, Any]) -> str:
    """The split that the mediator is trained on: `copies` where embed made some."""
    return COPIES if embedded.get(COPIES) else SPLITS[0]


def find_originals(sample_id: np.ndarray) -> np.ndarray:
    """(n,) int64 sample ids: those of the pictures that copies were made of; others as they are."""
    return np.asarray(sample_id) % COPY_STEP


def compare_pictures(work: Work, samples: pd.DataFrame) -> tuple[SharpnessGap, np.ndarray] | None:
    """How far the labelled pictures and the pile lie apart, and the appearance of the pile.

    samples : the rows to embed, of both splits.

    Returns
    -------
    None where nothing is to be compared: ready features, an empty split, or a setting that says so.
    """
    from cdp.images.sharpness_gap import measure_sharpness_gap

    members = work.config.committee.all
    if work.config.embed.degrade_labelled == "never" or any(m.features for m in members):
        return None
    random = np.random.default_rng([work.seed, 0x6C6F6F6B])
    parts = []
    for split in SPLITS:
        paths = samples[samples.split == split].path.to_numpy()
        if not len(paths):
            return None
        few = paths[np.sort(random.permutation(len(paths))[:SAMPLE])].tolist()
        for row in range(0, len(few), PART_SIZE):
            target = work.scratch / f"appearance-{split}-{row:05d}.npz"
            chosen = few[row : row + PART_SIZE]
            parts.append((work.dataset, chosen, work.config.embed.reduce_px, target))
    for _ in work.engine.map(measure_part, parts, label="embed compares pictures"):
        pass
    sides = [
        np.concatenate(
            [np.load(job[3])["measured"] for job in parts if f"-{split}-" in job[3].name]
        )
        for split in SPLITS
    ]
    return measure_sharpness_gap(*sides), sides[1]


def measure_part(dataset: Dataset, paths: list[str], reduce_px: int | None, target: Path) -> None:
    """The appearance of some pictures as the embedders see them."""
    from cdp.images.appearance import measure_appearance

    if not target.exists():
        faces = reduce_to(dataset.read_faces(paths), reduce_px)
        save_arrays(target, measured=measure_appearance(faces))


def choose_pictures(samples: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, int]:
    """The labelled pictures that copies are made of, and how many of each.

    No more than the mediator is trained on; several of each where people have few pictures.
    """
    from cdp.mediator.curriculum import LABELLED_ROWS, choose_labelled

    labelled = samples[samples.split == SPLITS[0]]
    identity = labelled.identity.factorize(sort=True)[0]
    count = count_copies(identity)
    rows = choose_labelled(identity, limit=max(LABELLED_ROWS // count, 1), seed=seed)
    return labelled.iloc[rows], count


def count_copies(identity: np.ndarray) -> int:
    """Copies of each labelled picture; identity : (n,) int64, n >= 1."""
    usual = float(np.median(np.unique(identity, return_counts=True)[1]))
    return int(np.clip(np.ceil(ROWS_A_PERSON / usual), 1, ROWS_A_PERSON))


def seed_copies(sample_id: np.ndarray, copy: int, seed: int) -> np.ndarray:
    """(n,) int64, what copy `copy` of each picture is drawn by."""
    return np.asarray((np.asarray(sample_id) * 31 + copy + seed * 7919) % COPY_STEP)


def degrade_copies(
    dataset: Dataset,
    paths: list[str],
    sample_id: np.ndarray,
    copy: int,
    seed: int,
    appearance: np.ndarray,
    reduce_px: int | None,
) -> np.ndarray:
    """Copy `copy` of each picture, (n, s, s, 3) uint8, at the side the embedders see."""
    from cdp.images.matching import match_pile

    faces = dataset.read_faces(paths)
    seeds = seed_copies(sample_id, copy, seed)
    shown = reduce_to(faces, reduce_px)
    if copy > 1:
        return match_pile(faces, appearance, seeds, size_px=shown.shape[1])
    return degrade_sharp(faces, shown, appearance, seeds)


def degrade_sharp(
    faces: np.ndarray, shown: np.ndarray, appearance: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """Faces as they are `shown` to the embedders, the sharp ones degraded to look like the pile.

    faces : (n, s, s, 3) uint8. shown : (n, t, t, 3) uint8, the same. appearance : of the pile.
    """
    from cdp.images.appearance import measure_appearance
    from cdp.images.matching import match_pile
    from cdp.images.sharpness_gap import find_poor

    copies = shown.copy()
    sharp = ~find_poor(measure_appearance(shown), appearance)
    if sharp.any():
        side = shown.shape[1]
        copies[sharp] = match_pile(faces[sharp], appearance, seeds[sharp], size_px=side)
    return copies


def tabulate_gap(gap: SharpnessGap | None) -> dict[str, Any]:
    """Columns of the table `appearance`."""
    shifts = () if gap is None else gap.shifts
    return {name: [getattr(each, name) for each in shifts] for name in APPEARANCE_TABLE.names}
