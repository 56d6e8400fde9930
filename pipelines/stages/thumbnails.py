"""thumbnails: labelled and unlabelled images -> small WebP pictures for report and review.

The contract:
- One WebP picture an image, at most `SIDE_PX` a side; smaller faces are not enlarged. Those of
  unlabelled images are in `thumbnails`, those of labelled ones in `labelled`.
- Report and review read only these, no image file of the data set.
- A part whose file exists is not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.dataset import Dataset
from pipelines.stage import Stage, Work
from pipelines.tables import write_table

THUMBNAILS = pa.schema([("sample_id", pa.int64()), ("image", pa.binary())])
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
    return {"images": int(samples.split.isin([*TABLES]).sum())}


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
    version=2,
    inputs=("ingest.samples",),
    outputs={"thumbnails": THUMBNAILS, "labelled": THUMBNAILS},
    reads=(),
    run=run,
    needs_images=True,
)
