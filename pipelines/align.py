"""The command `cdp align --from DIR --to DIR`: photos to a folder of aligned faces.

The contract:
- A photo `<path>.jpg` below `--from` gives `<path>.png` below `--to`, with `--faces all` one file a
  face, `<path>#0.png`; of photos that differ in their suffix alone the suffix is kept.
- `faces.parquet` lists all faces found, `rejected.csv` the photos without one, with the reason.
- A call that was ended goes on where it ended; a photo is not looked at twice with the same
  settings.
- Exit 0 done, 1 failed, 2 wrong options or nothing to do.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cdp.errors import CdpError, ConfigError, DataError
from pipelines.data.dataset import Dataset
from pipelines.data.manifest import DataManifest
from pipelines.data.photos import (
    FACES,
    AlignSettings,
    PhotoTask,
    find_faces,
    find_unknown,
    read_given,
)
from pipelines.engine import Engine
from pipelines.files import digest_json, open_atomically
from pipelines.invocation import format_command
from pipelines.tables import write_table
from pipelines.yaml_files import validate_settings

PART_SIZE = 100
"""Photos a part."""
WORK = ".align"
"""Folder below `--to` for finished parts."""
REJECTED = pa.schema([("photo", pa.string()), ("reason", pa.string())])


def build_parser() -> argparse.ArgumentParser:
    """The options, each with what it does."""
    defaults = AlignSettings()
    parser = argparse.ArgumentParser(
        prog=format_command("align"),
        description="Find the faces of photos and cut them out upright, eyes and mouth in place.",
    )
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="DIR", help="the photos")
    add("--to", dest="target", type=Path, required=True, metavar="DIR", help="the aligned faces")
    add("--faces", choices=["main", "largest", "central", "all"], default=defaults.faces,
        help="which faces of a photo (default: main)")  # fmt: skip
    add("--size", type=int, default=112, metavar="PX", help="side of a face (default: 112)")
    add("--min-score", type=float, default=defaults.min_score, metavar="S",
        help=f"smallest score of a face (default: {defaults.min_score:g})")  # fmt: skip
    add("--min-face", type=float, default=defaults.min_face_px, metavar="PX",
        help=f"smallest face in a photo (default: {defaults.min_face_px:g} px)")  # fmt: skip
    add("--no-turns", action="store_true", help="do not try photos turned by 90, 180, 270 degrees")
    add("--given", type=Path, metavar="FILE",
        help="list of path and box or landmarks, used instead of detecting")  # fmt: skip
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return _align(options)
    except KeyboardInterrupt:
        print("\ninterrupted; give the same command again to go on", file=sys.stderr)
        return 130
    except CdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | DataError) else 1
    except OSError as error:
        print(f"error: cannot write below {options.target}: {error}", file=sys.stderr)
        return 1


def _align(options: argparse.Namespace) -> int:
    dataset, task, given = _read_options(options)
    entries = dataset.list_entries()
    photos = [(entry.path, entry.fault) for entry in entries]
    names = _name_targets([path for path, _ in photos])
    if options.given is not None:
        find_unknown(given, dict(photos), options.given)
    work = options.target / WORK
    work.mkdir(parents=True, exist_ok=True)
    settings = digest_json([task.align.model_dump(mode="json"), task.size_px, _digest_given(given)])
    parts = [
        (dataset, photos[row : row + PART_SIZE], names[row : row + PART_SIZE], task, given,
         options.target,
         work / f"part-{row // PART_SIZE:05d}-{settings[:12]}.parquet")
        for row in range(0, len(photos), PART_SIZE)
    ]  # fmt: skip
    started = time.perf_counter()
    with Engine(workers=options.workers) as engine:
        for _ in engine.map(align_part, parts, label="align"):
            pass
    targets = [part[-1] for part in parts]
    faces = pa.concat_tables([pq.read_table(target, schema=FACES) for target in targets])
    write_table(options.target / "faces.parquet", faces, FACES)
    rejected = [row for target in targets for row in _read_rejected(target)]
    with (
        open_atomically(options.target / "rejected.csv") as draft,
        draft.open("w", newline="", encoding="utf-8") as stream,
    ):
        csv.writer(stream).writerows([("photo", "reason"), *rejected])
    shutil.rmtree(work)
    chosen = sum(faces["chosen"].to_pylist())
    seconds = time.perf_counter() - started
    print(
        f"{chosen:,} faces of {len(photos):,} photos in {options.target} ({seconds:.0f} s); "
        f"{len(rejected):,} photos without a usable face: {options.target / 'rejected.csv'}"
    )
    return 0 if chosen else 1


def _read_options(
    options: argparse.Namespace,
) -> tuple[Dataset, PhotoTask, dict[str, list]]:  # type: ignore[type-arg]
    if not options.source.is_dir():
        raise DataError(f"--from: a folder of photos expected, got {options.source}")
    if options.target.resolve().is_relative_to(options.source.resolve()):
        raise ConfigError(
            f"--to: a folder outside --from expected, else faces would be taken for photos; got "
            f"{options.target}"
        )
    if not 16 <= options.size <= 512:
        raise ConfigError(f"--size: 16 to 512 px expected, got {options.size}")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers: expected 1 or more, got {options.workers}")
    align = validate_settings(
        AlignSettings,
        {"faces": options.faces, "min_score": options.min_score, "min_face_px": options.min_face,
         "turns": not options.no_turns},
        source="options",
    )  # fmt: skip
    folder = {"root": ".", "layout": "pile"}
    manifest = {"name": "photos", "kind": "images", "size_px": options.size, "unlabelled": folder}
    dataset = Dataset(
        validate_settings(DataManifest, manifest, source="options"), options.source.resolve()
    )
    given = read_given(options.given)
    return dataset, PhotoTask(align, options.size), given


def _digest_given(given: dict[str, list]) -> str:  # type: ignore[type-arg]
    return digest_json([[path, str(listed)] for path, listed in given.items()]) if given else ""


def align_part(
    dataset: Dataset,
    photos: list[tuple[str, str]],
    names: list[str],
    task: PhotoTask,
    given: dict[str, list],  # type: ignore[type-arg]
    target: Path,
    table: Path,
) -> None:
    """Write the faces of some photos, then their table; nothing where the table is there."""
    from PIL import Image

    if table.exists():
        return
    place_of = {path: name for (path, _), name in zip(photos, names, strict=True)}
    readable = [(path, False) for path, fault in photos if not fault]
    found = find_faces(readable, dataset.read_bytes, task, given)
    rows = found.rows
    for name, photo, row in zip(rows["path"], rows["photo"], rows["row"], strict=True):
        if row >= 0:
            place = target / f"{place_of[photo]}{name.removeprefix(photo)}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(found.crops[row]).save(place, compress_level=3)
    rejected = [*found.rejected, *((path, fault) for path, fault in photos if fault)]
    reasons = {"photo": [_make_utf8(path) for path, _ in rejected],
               "reason": [reason for _, reason in rejected]}  # fmt: skip
    write_table(_beside(table), reasons, REJECTED)
    write_table(table, rows, FACES)


def _name_targets(paths: list[str]) -> list[str]:
    """The path of each crop without `.png`: the photo's without suffix where that is unique."""
    stems = [os.path.splitext(path)[0] for path in paths]
    count = Counter(stems)
    return [stem if count[stem] == 1 else path for stem, path in zip(stems, paths, strict=True)]


def _make_utf8(path: str) -> str:
    return path.encode("utf-8", "backslashreplace").decode()


def _beside(table: Path) -> Path:
    return table.with_suffix(".rejected")


def _read_rejected(table: Path) -> list[tuple[str, str]]:
    read = pq.read_table(_beside(table))
    return list(zip(read["photo"].to_pylist(), read["reason"].to_pylist(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
