"""Are the images of a data set aligned faces? A sample of each split, and what to write if not.

The contract:
- Nothing is stopped: the result is a share a split and, where faces lie elsewhere or are missing, a
  warning with the setting that mends it.
- `SAMPLE` images a split, chosen by the seed. Without the detector's networks nothing is checked,
  and a line of the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cdp.errors import BackendError, DataError
from pipelines.data.dataset import Dataset
from pipelines.data.manifest import SPLITS, Entry

log = logging.getLogger("cdp")

SAMPLE = 100
LEAST = 10
"""Images a split must have to be judged."""
LEAST_SHARE = 0.7
"""A split with a smaller share of aligned faces is warned of."""
MOST_WITHOUT = 0.1
"""A split with a larger share of images without a face is warned of."""

Judge = Callable[[list[tuple[Any, ...]]], Iterator[tuple[int, int] | None]]


def check_alignment(
    dataset: Dataset, entries: Sequence[Entry], compute: Judge, *, seed: int
) -> tuple[dict[str, float], list[str]]:
    """The share of aligned faces of each split that was judged, and warnings.

    entries : images that can be read.
    compute : calls `judge_images(*part)` for each part, on a worker.
    """
    parts, judged = [], []
    for number, split in enumerate(SPLITS):
        paths = [entry.path for entry in entries if entry.split == split]
        chosen = np.random.default_rng([seed, number]).permutation(len(paths))[:SAMPLE]
        if len(chosen) >= LEAST:
            parts.append((dataset, [paths[row] for row in sorted(chosen)]))
            judged.append(split)
    shares: dict[str, float] = {}
    warnings: list[str] = []
    for split, (_, paths), found in zip(judged, parts, compute(parts), strict=True):
        if found is None:
            log.info("whether the images are aligned faces was not checked, which needs the "
                     "detector: pip install 'cdp[detect]'")  # fmt: skip
            return {}, []
        near, without = found
        shares[split] = near / len(paths)
        if shares[split] < LEAST_SHARE:
            warnings.append(_explain(dataset, split, len(paths), near, without))
        elif without > MOST_WITHOUT * len(paths):
            warnings.append(_explain_without(split, len(paths), without))
    return shares, warnings


def _explain(dataset: Dataset, split: str, count: int, near: int, without: int) -> str:
    return (
        f"{split} images seem not to be aligned faces: of {count} sampled, {near} are, "
        f"{count - near - without} have eyes and mouth elsewhere, {without} show no face. "
        f"Embedders expect aligned faces; add this line to the manifest of {dataset.manifest.name} "
        "to have them found and aligned, and images without a face left out:  align: {}"
    )


def _explain_without(split: str, count: int, without: int) -> str:
    return (
        f"of {count} {split} images sampled, {without} show no face that the detector finds: they "
        "show something else, or are very poor. Such images are near each other in every model; "
        "they form clusters, and no estimate of precision is measured on them. To set them aside: "
        "ingest.pose=true ingest.min_quality=0.1"
    )


def judge_images(dataset: Dataset, paths: list[str]) -> tuple[int, int] | None:
    """(aligned faces, images without a face); None where the detector is not installed."""
    from cdp.images.alignment_check import NEAR_PX, measure_offsets
    from cdp.images.decode import decode_image

    def read_each() -> Iterator[np.ndarray]:
        for path in paths:
            try:
                yield decode_image(dataset.read_bytes(path), min_px=1)
            except DataError:
                yield np.zeros((8, 8, 3), np.uint8)

    try:
        offset = measure_offsets(read_each())
    except BackendError as error:
        log.debug("aligned faces are not looked for: %s", error)
        return None
    return int((offset < NEAR_PX).sum()), int(np.isnan(offset).sum())
