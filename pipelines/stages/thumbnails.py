"""thumbnails: labelled and unlabelled images -> small WebP pictures for report and review.

The contract:
- One WebP picture an image, at most `SIDE_PX` a side; smaller faces are not enlarged. Those of
  unlabelled images are in `thumbnails`, those of labelled ones in `labelled`.
- `rejected` has pictures of rejected files that can be decoded, at most `REJECTED_MOST` of them and
  as evenly over the reasons as they come.
- Report and review read only these, no image file of the data set.
- A part whose file exists is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cdp.errors import DataError
from pipelines.data.dataset import Dataset
from pipelines.stage import Stage, Work
from pipelines.tables import write_table

THUMBNAILS = pa.schema([("sample_id", pa.int64()), ("image", pa.binary())])
REJECTED = pa.schema([("path", pa.string()), ("image", pa.binary())])
REJECTED_MOST, REJECTED_EACH = 1000, 200
"""Rejected files with a picture at most: of all reasons, and of reasons with the same start."""
TABLES = {"unlabelled": "thumbnails", "labelled": "labelled"}
"""Split -> table of its pictures."""
SIDE_PX = 64
QUALITY = 55
"""Of the WebP encoder, 0 to 100."""
PART_SIZE = 1000
"""Images a part."""


def run(work: Work) -> Mapping[str, Any]:
    samples = work.read("ingest.samples", columns=["sample_id", "path", "split"]).to_pandas()
    parts = []
    for split, table in TABLES.items():
        chosen = samples[samples.split == split]
        for number, row in enumerate(range(0, len(chosen), PART_SIZE)):
            part = chosen.iloc[row : row + PART_SIZE]
            target = work.path(table) / f"part-{number:05d}.parquet"
            parts.append((work.dataset, part.sample_id.to_numpy(), part.path.tolist(), target))
        if not len(chosen):
            work.write(table, THUMBNAILS.empty_table())
    for _ in work.engine.map(make_part, parts, label="thumbnails"):
        pass
    rejected = _choose_rejected(work)
    jobs = [
        (work.dataset, rejected[row : row + PART_SIZE],
         work.path("rejected") / f"part-{number:05d}.parquet")
        for number, row in enumerate(range(0, len(rejected), PART_SIZE))
    ]  # fmt: skip
    for _ in work.engine.map(make_rejected, jobs, label="thumbnails"):
        pass
    if not jobs:
        work.write("rejected", REJECTED.empty_table())
    return {"images": int(samples.split.isin([*TABLES]).sum())}


def _choose_rejected(work: Work) -> list[str]:
    """Paths of the rejected files to show, as far as the data set has files."""
    if work.dataset.kind == "synthetic":
        return []
    rejected = work.read("ingest.rejected", columns=["path", "reason"]).to_pandas()
    start = rejected.reason.str.slice(0, 12)
    chosen = rejected[rejected.groupby(start).cumcount() < REJECTED_EACH]
    return chosen.path.tolist()[:REJECTED_MOST]


def make_rejected(dataset: Dataset, paths: list[str], target: Path) -> None:
    """Make and write the pictures of those rejected files that can be decoded."""
    from PIL import Image

    from cdp.images.decode import decode_image, pad_square

    if target.exists():
        return
    found = {}
    for path in paths:
        try:
            picture = Image.fromarray(decode_image(dataset.read_bytes(path), min_px=1))
        except DataError:
            continue
        picture.thumbnail((SIDE_PX, SIDE_PX))
        found[path] = encode_thumbnail(pad_square(np.asarray(picture)))
    columns = {"path": list(found), "image": list(found.values())}
    write_table(target, columns, REJECTED)


def make_part(dataset: Dataset, sample_id: np.ndarray, paths: list[str], target: Path) -> None:
    """Make and write the pictures of one block of images."""
    if target.exists():
        return
    images = [encode_thumbnail(face) for face in dataset.read_faces(paths)]
    write_table(target, {"sample_id": sample_id, "image": images}, THUMBNAILS)


def encode_thumbnail(face: np.ndarray) -> bytes:
    """(s, s, 3) uint8 RGB -> a WebP file."""
    from io import BytesIO

    import cv2
    from PIL import Image

    if len(face) > SIDE_PX:
        face = cv2.resize(face, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
    stream = BytesIO()
    Image.fromarray(face).save(stream, "WEBP", quality=QUALITY, method=2)
    return stream.getvalue()


STAGE = Stage(
    name="thumbnails",
    version=3,
    inputs=("ingest.samples", "ingest.rejected"),
    outputs={"thumbnails": THUMBNAILS, "labelled": THUMBNAILS, "rejected": REJECTED},
    reads=(),
    run=run,
    needs_images=True,
)
