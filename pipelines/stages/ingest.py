"""ingest: the files of a data set -> samples that can be read, and rejected files.

The contract:
- Every image is decoded here. An image that cannot be decoded, is too small or too large goes to
  `rejected` with the reason; the run goes on. Names that are not UTF-8 appear only in `rejected`,
  with the invalid bytes escaped.
- An unlabelled image with the bytes of another unlabelled or of a labelled image stays, with its
  `copy_of`. A labelled image given twice counts once; one under two names counts for neither. An
  evaluation image with the bytes of any other is rejected.
- An image one of whose ready features is zero or not finite goes to `rejected` too, in all views.
- A labelled image has the name that a reviewer gave it; one that a reviewer set aside is rejected.
- `sample_id` counts accepted images from 0, ordered by split (labelled, unlabelled, evaluation),
  then path.
- `frame` is the number of a frame of `clip`, `track` that of the faces in successive frames that
  the tracker took for one, or that the data set has as one; null for other images.
- `row` is the position in the list of the split, which is the row of ready features.
- `qualities` has a row for every sample with pixels: size, sharpness, and pose where it is known.
- The true identity of an unlabelled image, where the data set has it, is only in `truth`.
- A part of the images that was inspected is not inspected again when the run is started anew.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import DataError
from pipelines.config import IngestSettings
from pipelines.data.alignment_check import check_alignment, judge_images
from pipelines.data.crops import list_faces
from pipelines.data.dataset import Dataset
from pipelines.data.folders import LEFT_OUT
from pipelines.data.manifest import Entry
from pipelines.data.qualities import (
    MEASURES,
    QUALITIES,
    UNKNOWN,
    Measures,
    explain_poor,
    make_columns,
    measure_image,
    read_measures,
)
from pipelines.decisions import APPLIED_BY, Decision
from pipelines.stage import Stage, Work
from pipelines.tables import write_table

if TYPE_CHECKING:
    import pandas as pd

SAMPLES = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("dataset", pa.string()),
        ("path", pa.string()),
        ("split", pa.string()),
        ("identity", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("row", pa.int64()),
        ("copy_of", pa.int64()),
        ("track", pa.int64()),
        ("frame", pa.int64()),
        ("clip", pa.string()),
    ]
)
REJECTED = pa.schema([("dataset", pa.string()), ("path", pa.string()), ("reason", pa.string())])
TRUTH = pa.schema([("sample_id", pa.int64()), ("identity", pa.string())])

FOUND = ("width", "height", "sha256", "reason")
INSPECTED = pa.schema(
    [
        *zip(FOUND, (pa.int32(), pa.int32(), pa.string(), pa.string()), strict=True),
        *((name, pa.float64()) for name in MEASURES),
    ]
)
"""What is known of each image of one part; kept until the stage is published."""

TWO_NAMES = "the same file is under the names"
PART_SIZE = 1000
"""Images a part: enough parts to occupy the workers, few enough for scheduling to cost little."""


def run(work: Work) -> Mapping[str, Any]:
    entries = work.dataset.list_entries()
    rows = _number_rows(entries)
    track: dict[str, int] = {}
    found: list[tuple[int, int, str, str]] = []
    measures: list[Measures] = []
    if work.dataset.crops is not None:
        faces, without = (work.read(f"detect.{name}").to_pandas() for name in ("faces", "rejected"))
        least = work.config.ingest
        entries, found = list_faces(entries, faces, without, least.min_px, least.min_quality)
        rows = _number_rows(entries)
        track = track_faces(entries, faces)
        measures_of = read_measures(faces)
        measures = [measures_of.get(entry.path, UNKNOWN) for entry in entries]
    elif work.dataset.kind == "features":
        bad = work.dataset.find_bad_rows(_list_views(work))
        found = [
            (0, 0, "", bad.get((entry.split, row), ""))
            for entry, row in zip(entries, rows, strict=True)
        ]
    else:
        settings = work.config.ingest
        parts = [
            (work.dataset, [(e.path, e.fault) for e in entries[row : row + PART_SIZE]],
             settings, work.scratch / f"inspected-{number:05d}.parquet")
            for number, row in enumerate(range(0, len(entries), PART_SIZE))
        ]  # fmt: skip
        for target in work.engine.map(keep_inspected, parts, label="ingest"):
            images = pq.read_table(target).to_pylist()
            found += [tuple(image[name] for name in FOUND) for image in images]
            measures += [tuple(image[name] for name in MEASURES) for image in images]
    track |= number_tracks(entries, len(set(track.values())))
    entries, found = correct_names(entries, found, work.decisions)
    reasons, twins = find_copies(entries, found)
    accepted = [row for row, reason in enumerate(reasons) if not reason]
    rejected = [row for row, reason in enumerate(reasons) if reason]
    number = {row: place for place, row in enumerate(accepted)}
    copies = {row: twin for row, twin in twins.items() if row in number}
    name = work.dataset.manifest.name
    kept = [entries[row] for row in accepted]
    hidden = [entry.split == "unlabelled" for entry in kept]
    work.write(
        "samples",
        {
            "sample_id": np.arange(len(kept)),
            "dataset": [name] * len(kept),
            "path": [entry.path for entry in kept],
            "split": [entry.split for entry in kept],
            "identity": [None if h else e.identity for h, e in zip(hidden, kept, strict=True)],
            "width": [found[row][0] for row in accepted],
            "height": [found[row][1] for row in accepted],
            "sha256": [found[row][2] for row in accepted],
            "row": [rows[row] for row in accepted],
            "track": [track.get(entry.path) for entry in kept],
            "frame": [entry.frame for entry in kept],
            "clip": [entry.clip for entry in kept],
            "copy_of": [number[copies[row]] if row in copies else None for row in accepted],
        },
    )
    work.write(
        "rejected",
        {
            "dataset": [name] * len(rejected),
            "path": [_make_utf8(entries[row].path) for row in rejected],
            "reason": [reasons[row] for row in rejected],
        },
    )
    work.write("qualities", make_columns([measures[row] for row in accepted if measures]))
    known = [row for row, entry in enumerate(kept) if hidden[row] and entry.identity is not None]
    work.write("truth", {"sample_id": known, "identity": [kept[row].identity for row in known]})
    counts = Counter(entry.split for entry in kept)
    if not counts["unlabelled"]:
        raise DataError(
            f"data set {name}: no unlabelled image could be used, {len(rejected)} were rejected"
            + (f", the first because: {reasons[rejected[0]]}" if rejected else "")
        )
    aligned: dict[str, float] = {}
    warnings: list[str] = []
    if work.dataset.kind == "images" and work.dataset.crops is None:
        aligned, warnings = check_alignment(
            work.dataset,
            kept,
            lambda parts: work.engine.map(judge_images, parts, label="ingest"),
            seed=work.seed,
        )
    people = {
        split: len({entry.identity for entry in kept if entry.split == split} - {None})
        for split in ("labelled", "evaluation")
    }
    left_out = sum(reason.startswith(LEFT_OUT) for reason in reasons)
    return {
        "images": len(entries) - left_out,
        "rejected": len(rejected) - left_out,
        **({"left_out": left_out} if left_out else {}),
        "copies": {
            "of_labelled": sum(entries[twin].split == "labelled" for twin in copies.values()),
            "of_unlabelled": sum(entries[twin].split == "unlabelled" for twin in copies.values()),
            "two_names": sum(reason.startswith(TWO_NAMES) for reason in reasons),
        },
        **{split: counts[split] for split in ("labelled", "unlabelled", "evaluation")},
        "labelled_people": people["labelled"],
        "evaluation_people": people["evaluation"],
        "truth_known": len(known) == counts["unlabelled"],
        **({"aligned": aligned} if aligned else {}),
        **({"warnings": warnings} if warnings else {}),
        **({"tracks": len({*track.values()})} if track else {}),
    }


def track_faces(entries: list[Entry], faces: pd.DataFrame) -> dict[str, int]:
    """The tracks of the faces of videos and clips, by path; numbered from 0 on over all clips.

    faces : the table of the stage detect.
    """
    from cdp.images.tracks import link_boxes

    clips: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.clip is not None and entry.track is None and not entry.fault:
            clips.setdefault((entry.split, entry.clip), []).append(entry)
    box_of = faces.drop_duplicates("path").set_index("path")[["left", "top", "right", "bottom"]]
    found: dict[str, int] = {}
    first = 0
    for clip in clips.values():
        known = [entry for entry in clip if entry.path in box_of.index]
        box = box_of.loc[[entry.path for entry in known]].to_numpy(float)
        track = link_boxes(np.array([entry.frame for entry in known], np.int64), box)
        found |= {entry.path: first + int(t) for entry, t in zip(known, track, strict=True)}
        first += int(track.max(initial=-1)) + 1
    return found


def number_tracks(entries: list[Entry], first: int = 0) -> dict[str, int]:
    """The tracks that the data set has, by path, numbered from `first` on.

    Where several faces were found in one picture of a track none of them is taken for its face.
    """
    once = Counter((entry.split, entry.track, entry.frame) for entry in entries)
    sure = [
        entry for entry in entries
        if entry.track is not None and not entry.fault
        and once[entry.split, entry.track, entry.frame] == 1
    ]  # fmt: skip
    number = {name: first + place for place, name in
              enumerate(dict.fromkeys((entry.split, entry.track) for entry in sure))}  # fmt: skip
    return {entry.path: number[entry.split, entry.track] for entry in sure}


def _number_rows(entries: list[Entry]) -> list[int]:
    """The position of each entry in the list of its split."""
    seen: Counter[str] = Counter()
    rows = []
    for entry in entries:
        rows.append(seen[entry.split])
        seen[entry.split] += 1
    return rows


def _list_views(work: Work) -> list[str]:
    """The ready features that the committee names, each once."""
    named = [member.features for member in work.config.committee.all if member.features]
    return list(dict.fromkeys(named))


def keep_inspected(
    dataset: Dataset, entries: list[tuple[str, str]], settings: IngestSettings, target: Path
) -> Path:
    """Inspect the images of one part, unless an earlier attempt wrote `target`; returns it."""
    if not target.exists():
        rows = [(*image[:4], *image[4]) for image in inspect_part(dataset, entries, settings)]
        columns = zip(*rows, strict=True)
        write_table(target, dict(zip(INSPECTED.names, map(list, columns), strict=True)), INSPECTED)
    return target


def inspect_part(
    dataset: Dataset, entries: list[tuple[str, str]], settings: IngestSettings
) -> list[tuple[int, int, str, str, Measures]]:
    """(width, height, sha256, reason, measures) of each image; no reason for an accepted one.

    entries : (path, fault); an image with a fault is rejected without opening it.
    """
    from cdp.images.decode import decode_image, is_blank

    if dataset.kind == "synthetic":
        faces = dataset.read_faces([path for path, _ in entries])
        return [
            (face.shape[1], face.shape[0], hashlib.sha256(face.tobytes()).hexdigest(),
             *_rate(face, settings))
            for face in faces
        ]  # fmt: skip
    found = []
    for path, fault in entries:
        digest = ""
        try:
            if fault:
                raise DataError(fault)
            data = dataset.read_bytes(path)
            digest = hashlib.sha256(data).hexdigest()
            image = decode_image(data, min_px=settings.min_px, max_pixels=settings.max_pixels)
            # A crop of this size or less was cut by somebody; a black one may have no vector.
            large = min(image.shape[:2]) > dataset.manifest.size_px
            if is_blank(image) and (large or not image.max()):
                raise DataError("blank: the picture is of one colour")
            found.append((image.shape[1], image.shape[0], digest, *_rate(image, settings)))
        except DataError as error:
            found.append((0, 0, digest, str(error), UNKNOWN))
    return found


def _rate(image: np.ndarray, settings: IngestSettings) -> tuple[str, Measures]:
    """Why the image is too poor, or an empty string, and its measures."""
    measures = measure_image(image, pose=settings.pose)
    return explain_poor(measures[-1], settings.min_quality), measures


def correct_names(
    entries: list[Entry], found: list[tuple[int, int, str, str]], decisions: Sequence[Decision]
) -> tuple[list[Entry], list[tuple[int, int, str, str]]]:
    """Labelled images as reviewers corrected them: renamed, or rejected where they set it aside.

    found : width, height, digest and reason of each entry.
    """
    said = {key: each for each in decisions for key in each.groups[0]}
    if not said:
        return entries, found
    entries, found = list(entries), list(found)
    for row, (entry, (width, height, digest, reason)) in enumerate(
        zip(entries, found, strict=True)
    ):
        decision = said.get(digest or f"path:{entry.path}")
        if decision is None or entry.split != "labelled" or reason:
            continue
        if decision.action == "rename":
            entries[row] = replace(entry, identity=decision.identity)
        else:
            found[row] = width, height, digest, f"set aside in review, decision {decision.number}"
    return entries, found


def _make_utf8(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def find_copies(
    entries: list[Entry], found: list[tuple[int, int, str, str]]
) -> tuple[list[str], dict[int, int]]:
    """Images with the same bytes.

    entries : in the order of their splits. found : width, height, digest and reason of each.

    Returns
    -------
    reasons : why each image is rejected; empty for one that is not.
    twins : an accepted unlabelled image -> the first image with its bytes, both as positions.
    """
    names: dict[str, set[str | None]] = {}
    for entry, (_, _, digest, reason) in zip(entries, found, strict=True):
        if entry.split == "labelled" and digest and not reason:
            names.setdefault(digest, set()).add(entry.identity)
    first: dict[str, int] = {}
    reasons, twins = [], {}
    for row, (entry, (_, _, digest, reason)) in enumerate(zip(entries, found, strict=True)):
        if reason or not digest:
            pass
        elif entry.split == "labelled" and len(names[digest]) > 1:
            known = " and ".join(sorted(str(name) for name in names[digest]))
            reason = f"{TWO_NAMES} {known}: it counts for neither"
        elif (twin := first.setdefault(digest, row)) != row:
            if entry.split == "unlabelled":
                twins[row] = twin
            else:
                reason = f"same bytes as {entries[twin].path}"
        reasons.append(reason)
    return reasons, twins


STAGE = Stage(
    name="ingest",
    version=7,
    inputs=("detect.faces", "detect.rejected"),
    outputs={"samples": SAMPLES, "rejected": REJECTED, "truth": TRUTH, "qualities": QUALITIES},
    reads=("ingest",),
    reads_with_features=("committee",),
    run=run,
    corrected=APPLIED_BY["ingest"],
)
