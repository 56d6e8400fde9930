"""The command `cdp identify`: who the faces of a folder are, by a folder of enrolled people.

The contract:
- The gallery is a folder of `<person>/<image>`, or a gallery saved before; the probes are a folder
  of images. Both hold aligned faces, as the recognizer was trained on.
- The model is the recognizer of a run, or a file of one. The threshold is given, or that of a saved
  gallery.
- One CSV row a probe: path, name (empty for nobody), nearest, similarity, margin. A file appears
  complete or not at all.
- A warning says where the enrolled people are so near each other that unknown people will be named.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from cdp.errors import CdpError, ConfigError, DataError
from pipelines.data.folders import walk_folder
from pipelines.data.names import fold_name
from pipelines.export.labels import defuse_formula
from pipelines.export.recognizer import DEFAULTS
from pipelines.files import open_atomically
from pipelines.invocation import format_command
from pipelines.store import Published

if TYPE_CHECKING:
    from cdp.recognizer.gallery import Gallery

SIZE_PX = 112
"""Side to which faces are read before the recognizer reduces them."""
BLOCK = 256
MOST_NEAR = 0.05
"""Share of enrolled images that may be nearer to another person than the threshold."""
NEAR_SHARE = 0.01
"""Share of them that the threshold proposed instead lets through."""


def build_parser() -> argparse.ArgumentParser:
    """The options, each with what it does."""
    parser = argparse.ArgumentParser(
        prog=format_command("identify"),
        description="Identify the faces of a folder among enrolled people; all faces are aligned.",
    )
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/default"), metavar="DIR",
        help="a finished run, whose recognizer is used (default: runs/default)")  # fmt: skip
    add("--model", type=Path, metavar="FILE",
        help="another recognizer: recognizer.safetensors of `cdp export recognizer`")  # fmt: skip
    add("--gallery", type=Path, required=True, metavar="DIR",
        help="a folder of <person>/<image>, or a file written by --save")  # fmt: skip
    add("--probes", type=Path, metavar="DIR", help="a folder of images to be identified")
    add("--threshold", type=float, metavar="T",
        help="cosine above which a probe is somebody (threshold@fpir of the metrics; default: that "
        "of a saved gallery, or 0.3)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", help="write a CSV file instead of printing it")
    add("--save", type=Path, metavar="FILE", help="keep the enrolled vectors, to be used again")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        if options.probes is None and options.save is None:
            raise ConfigError("give --probes to identify, or --save to keep the gallery")
        gallery = _open_gallery(options)
        if options.save is not None:
            with open_atomically(options.save) as draft:
                gallery.save(draft)
        if options.probes is not None:
            _warn_of_near_people(gallery)
            _write(gallery, options)
    except (CdpError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _open_gallery(options: argparse.Namespace) -> Gallery:
    from cdp.recognizer.gallery import Gallery
    from cdp.recognizer.recognizer import Recognizer

    model = options.model or _find_model(options.run)
    recognizer = Recognizer.load(model, device=options.device)
    if options.gallery.is_file():
        gallery = Gallery.load(options.gallery, recognizer)
    else:
        gallery = Gallery(recognizer)
        _enrol(gallery, options.gallery)
    if options.threshold is not None:
        if not -1 <= options.threshold <= 1:
            raise ConfigError(f"--threshold: a cosine expected, got {options.threshold}")
        gallery.threshold = options.threshold
    return gallery


def _find_model(run: Path) -> Path:
    """The weights that `cdp export recognizer` would export of a run."""
    published = Published.open("retrain", run / "retrain")
    names = [] if published is None else [f"{name}.safetensors" for name in DEFAULTS]
    found = [published.directory / name for name in names if published is not None]
    model = next((path for path in found if path.is_file()), None)
    if model is None:
        raise ConfigError(
            f"{run} has trained no recognizer. Name a finished run with --run, or a file with "
            "--model"
        )
    return model


def _warn_of_near_people(gallery: Gallery) -> None:
    """Say where the threshold lies below the cosines of people who are different."""
    nearest = gallery.measure_nearest_others()
    above = int((nearest > gallery.threshold).sum())
    if above <= MOST_NEAR * len(nearest):
        return
    least = math.ceil(100 * float(np.quantile(nearest, 1 - NEAR_SHARE))) / 100
    print(
        f"warning: {above} of {len(nearest)} enrolled images are nearer to another enrolled person "
        f"than the threshold {gallery.threshold:g}, and so will unknown people be, who are then "
        f"named wrongly. Above {min(least, 1):.2f} it is {NEAR_SHARE:.0%} of the images: "
        f"try --threshold {min(least, 1):.2f}, or look for people enrolled under two names",
        file=sys.stderr,
    )


def _enrol(gallery: Gallery, folder: Path) -> None:
    spelling: dict[str, str] = {}
    for path, face in _read_faces(folder):
        person, _, rest = path.partition("/")
        if not rest:
            print(f"left out: {path}: in no person's folder", file=sys.stderr)
            continue
        gallery.enrol(spelling.setdefault(fold_name(person), person), face[None])
    if not len(gallery):
        raise DataError(f"{folder} holds no <person>/<image> that can be read")
    print(f"enrolled: {len(gallery)} people", file=sys.stderr)


def _read_faces(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(path, face) of the images of a folder; what cannot be read is named and left out."""
    from cdp.images.decode import decode_image, fit_square

    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory")
    for path, fault in walk_folder(folder.resolve(), "."):
        try:
            if fault:
                raise DataError(fault)
            yield path, fit_square(decode_image((folder / path).read_bytes(), min_px=4), SIZE_PX)
        except DataError as error:
            print(f"left out: {path}: {error}", file=sys.stderr)


def _write(gallery: Gallery, options: argparse.Namespace) -> None:
    held: list[tuple[str, np.ndarray]] = []
    found = known = 0
    with _open_out(options.out) as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "name", "nearest", "similarity", "margin"])

        def flush() -> tuple[int, int]:
            rows = _identify(gallery, held)
            writer.writerows(rows)
            held.clear()
            return len(rows), sum(bool(row[1]) for row in rows)

        for each in _read_faces(options.probes):
            held.append(each)
            if len(held) == BLOCK:
                more = flush()
                found, known = found + more[0], known + more[1]
        more = flush()
        found, known = found + more[0], known + more[1]
        if not found:
            raise DataError(f"{options.probes} holds no image that can be read")
    print(
        f"{found} probes: {known} nearer to an enrolled person than the threshold "
        f"{gallery.threshold:g}, {found - known} nobody's",
        file=sys.stderr,
    )


@contextmanager
def _open_out(path: Path | None) -> Iterator[TextIO]:
    """Where the rows go: the console, a pipe, or a file that appears when it is complete."""
    if path is None:
        yield sys.stdout
    elif path.exists() and not path.is_file():
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            yield stream
    else:
        with (
            open_atomically(path) as draft,
            draft.open("w", newline="", encoding="utf-8-sig") as stream,
        ):
            yield stream


def _identify(gallery: Gallery, probes: list[tuple[str, np.ndarray]]) -> list[list[Any]]:
    """One CSV row a probe."""
    if not probes:
        return []
    matches = gallery.identify(np.stack([face for _, face in probes]))
    return [
        [defuse_formula(path), defuse_formula(match.name or ""), defuse_formula(match.nearest),
         f"{match.similarity:.4f}", f"{match.margin:.4f}"]
        for (path, _), match in zip(probes, matches, strict=True)
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
