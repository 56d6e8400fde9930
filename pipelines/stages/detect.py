"""detect: photos -> aligned faces, where the data manifest says `align`.

The contract:
- Every face found is a row of `faces`, in the order of the photos; chosen ones have a crop of
  `size_px`, stored once in `crops/part-*.npy`, from which all later stages read.
- A photo that cannot be read or has no usable face goes to `rejected` with the reason.
- `faces.html` shows photos with their faces framed, the doubtful ones first.
- A part whose tables are there is not made again; what is found does not depend on the parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.crops import write_crops
from pipelines.data.dataset import Dataset
from pipelines.data.lists import Listed
from pipelines.data.photos import FACES, PhotoTask, find_faces, find_unknown, read_given
from pipelines.files import write_text
from pipelines.stage import Stage, Work
from pipelines.tables import write_table

REJECTED = pa.schema([("photo", pa.string()), ("reason", pa.string())])
PAGE = "faces.html"
"""The page of found faces, for a look at what the detector did."""
PART_SIZE = 100
"""Photos a part: some seconds of small photos, some minutes of large ones."""


def run(work: Work) -> Mapping[str, Any]:
    dataset = work.dataset
    align = dataset.manifest.align
    assert align is not None
    restorer = None if align.restore is None else dataset.locate(align.restore)
    task = PhotoTask(align, dataset.manifest.size_px, restorer)
    given = read_given(None if align.given is None else dataset.locate(align.given))
    entries = [entry for entry in dataset.list_entries() if not entry.fault]
    if align.given is not None:
        photos_of = dict.fromkeys(entry.path for entry in entries)
        find_unknown(given, photos_of, dataset.locate(align.given))
    parts = []
    for number, row in enumerate(range(0, len(entries), PART_SIZE)):
        photos = [(e.path, e.identity is not None) for e in entries[row : row + PART_SIZE]]
        listed = {path: given[path] for path, _ in photos if path in given}
        name = f"part-{number:05d}.parquet"
        targets = (work.path("faces") / name, work.path("rejected") / name)
        parts.append((dataset, photos, task, listed, number, work.directory, *targets))
    counts = list(work.engine.map(detect_part, parts, label="detect"))
    if not parts:
        work.write("faces", FACES.empty_table())
        work.write("rejected", REJECTED.empty_table())
    write_text(work.directory / PAGE, _draw_page(work, len(entries)))
    faces, chosen, without, turned = (np.array(counts, np.int64).reshape(-1, 4).sum(0)).tolist()
    return {"photos": len(entries), "faces": faces, "chosen": chosen, "without_face": without,
            "turned": turned}  # fmt: skip


def _draw_page(work: Work, photos: int) -> str:
    from cdp.images.decode import decode_image
    from pipelines.pages.found_faces import render_found_faces

    faces, rejected = (pq.read_table(work.path(name)).to_pandas() for name in work.stage.outputs)
    return render_found_faces(
        work.dataset.manifest.name,
        faces,
        rejected,
        photos,
        lambda path: decode_image(work.dataset.read_bytes(path), min_px=1),
        seed=work.seed,
    )


def detect_part(
    dataset: Dataset,
    photos: list[tuple[str, bool]],
    task: PhotoTask,
    given: dict[str, list[Listed]],
    part: int,
    directory: Path,
    faces: Path,
    rejected: Path,
) -> tuple[int, int, int, int]:
    """Find the faces of one part and write them, its table `faces` last.

    Returns the numbers of faces, chosen faces, photos without one, and photos that were turned.
    """
    if not faces.exists():
        found = find_faces(photos, dataset.read_bytes, task, given, part)
        names, reasons = zip(*found.rejected, strict=True) if found.rejected else ((), ())
        write_table(rejected, {"photo": list(names), "reason": list(reasons)}, REJECTED)
        write_crops(directory, part, found.crops)
        write_table(faces, found.rows, FACES)
    table = pq.read_table(faces, columns=["chosen", "angle", "face"]).to_pandas()
    without = pq.read_metadata(rejected).num_rows
    turned = int(((table.angle != 0) & (table.face == 0)).sum())
    return len(table), int(table.chosen.sum()), without, turned


STAGE = Stage(
    name="detect",
    version=3,
    inputs=(),
    outputs={"faces": FACES, "rejected": REJECTED},
    reads=(),
    run=run,
    needs_images=True,
    needs_align=True,
)
