"""The export `labels`: pseudo-labels as folders of images, CSV, Label Studio, FiftyOne.

The contract:
- Images are named by `sample_id` and a cleaned file name, so no name in a data set can leave the
  output directory, hide a file or overwrite another.
- Text that a spreadsheet would evaluate as a formula gets an apostrophe in front, also behind
  semicolons and tabs, where some spreadsheets split cells.
- Images without a pseudo-label are only in the CSV.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from cdp.errors import ConfigError, DataError, StageError
from cdp.types import UNLABELLED
from pipelines.data.dataset import Dataset
from pipelines.results import RunResults, open_run

if TYPE_CHECKING:
    import pandas as pd

FORMULA = re.compile(r"(^|[;|\t\r\n])(?=[\t\r\n]|\s*[=+\-@＝＋－＠])")
"""The start of a cell, for any separator, whose text a spreadsheet would evaluate."""
BLOCK = 500
"""Synthetic faces drawn at once."""
LOCAL_FILES = "/data/local-files/?d="
"""URL prefix of files that Label Studio serves from its document root."""


def add_parser(subparsers: Any) -> None:
    """The options of `labels`."""
    parser = subparsers.add_parser("labels", help="pseudo-labels and their images")
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="DIR", help="a finished run, e.g. runs/default")
    add("--to", required=True, choices=sorted(FORMATS), help="folder: images, one folder a cluster")
    add("--out", type=Path, required=True, metavar="PATH", help="the output; must not exist yet")
    add("--links", action="store_true", help="link to the images instead of copying them")
    add("--min-size", type=int, default=2, metavar="N", help="leave out clusters below N images")
    add("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"), metavar="DIR",
        help="the data root (default: the one recorded with the run)")  # fmt: skip
    parser.set_defaults(export=export_labels)


def export_labels(options: argparse.Namespace) -> str:
    """Write one export; return a summary line."""
    run = open_run(options.run)
    labels = run.labels
    if options.to != "csv":
        labels = labels[labels.pseudo_label != UNLABELLED]
    labels = labels[(labels.cluster_size >= options.min_size) | (labels.pseudo_label == UNLABELLED)]
    if not len(labels):
        raise DataError(f"no cluster of {options.run} has {options.min_size} images or more")
    with _open_draft(options.out) as draft:
        FORMATS[options.to](run, labels, draft, options)
    clusters = labels.pseudo_label[labels.pseudo_label != UNLABELLED].nunique()
    return f"{options.out}: {len(labels):,} images, {clusters:,} clusters"


@contextmanager
def _open_draft(out: Path) -> Iterator[Path]:
    """Yield a sibling path to write to, and rename it to `out` when the block succeeds."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} exists already; choose another --out, or remove it first")
    draft = out.with_name(f".{out.name}.draft-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.rename(out)
    except OSError as error:
        place = error.filename or out
        raise StageError(f"cannot write {place}: {error.strerror}; nothing was exported") from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------- formats


def write_csv(
    run: RunResults, labels: pd.DataFrame, draft: Path, options: argparse.Namespace
) -> None:
    """One row an image: sample_id, path, pseudo_label, cluster_size, confidence."""
    names = ["sample_id", "path", "pseudo_label", "cluster_size", "confidence"]
    with draft.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in labels[names].itertuples(index=False):
            writer.writerow(
                [row.sample_id, defuse_formula(row.path), row.pseudo_label, row.cluster_size,
                 f"{row.confidence:.6f}"]
            )  # fmt: skip


def defuse_formula(text: str) -> str:
    """The text as a spreadsheet shows it without evaluating a formula."""
    return FORMULA.sub(r"\1'", text)


def write_folder(
    run: RunResults, labels: pd.DataFrame, draft: Path, options: argparse.Namespace
) -> None:
    """`cluster_00017/000123_name.jpg` for every labelled image."""
    digits = len(str(labels.pseudo_label.max()))
    targets = [
        f"cluster_{row.pseudo_label:0{digits}d}/{_name_image(row)}" for row in labels.itertuples()
    ]
    _place_images(run, labels, draft, targets, options)


def write_label_studio(
    run: RunResults, labels: pd.DataFrame, draft: Path, options: argparse.Namespace
) -> None:
    """`tasks.json` with one prediction an image, `label_config.xml`, and `images/`."""
    targets = [f"images/{_name_image(row)}" for row in labels.itertuples()]
    targets = _place_images(run, labels, draft, targets, options)
    version = f"cdp {run.manifest('propagate')['fingerprint'][:12]}"
    tasks = [
        {
            "data": {"image": f"{LOCAL_FILES}{target}", "sample_id": int(row.sample_id)},
            "predictions": [
                {
                    "model_version": version,
                    "score": round(float(row.confidence), 6),
                    "result": [
                        {
                            "from_name": "person",
                            "to_name": "image",
                            "type": "choices",
                            "value": {"choices": [_name_label(row.pseudo_label)]},
                        }
                    ],
                }
            ],
        }
        for row, target in zip(labels.itertuples(), targets, strict=True)
    ]
    choices = "\n".join(
        f"    <Choice value={quoteattr(_name_label(label))}/>"
        for label in sorted(labels.pseudo_label.unique())
    )
    (draft / "tasks.json").write_text(json.dumps(tasks, indent=1), encoding="utf-8")
    (draft / "label_config.xml").write_text(
        '<View>\n  <Image name="image" value="$image"/>\n  <Choices name="person" toName="image" '
        f'choice="single" layout="select">\n{choices}\n  </Choices>\n</View>\n',
        encoding="utf-8",
    )


def write_fiftyone(
    run: RunResults, labels: pd.DataFrame, draft: Path, options: argparse.Namespace
) -> None:
    """`data/` and `labels.json`, a FiftyOneImageClassificationDataset."""
    targets = [f"data/{row.sample_id}{_find_suffix(row.path)}" for row in labels.itertuples()]
    _place_images(run, labels, draft, targets, options)
    value = {
        "classes": [_name_label(label) for label in sorted(labels.pseudo_label.unique())],
        "labels": {
            str(row.sample_id): {
                "label": _name_label(row.pseudo_label),
                "confidence": round(float(row.confidence), 6),
                "attributes": {"path": row.path},
            }
            for row in labels.itertuples()
        },
    }
    (draft / "labels.json").write_text(json.dumps(value, indent=1), encoding="utf-8")


FORMATS: dict[str, Callable[[RunResults, pd.DataFrame, Path, argparse.Namespace], None]] = {
    "csv": write_csv,
    "folder": write_folder,
    "label-studio": write_label_studio,
    "fiftyone": write_fiftyone,
}


# --------------------------------------------------------------------------------------- images


def _name_label(label: int) -> str:
    return f"cluster {label}"


def _name_image(row: Any) -> str:
    """`000123_name.jpg`: unique by the sample id, readable by the cleaned file name."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(row.path).stem)[:60].strip("._")
    return f"{row.sample_id:06d}{f'_{stem}' if stem else ''}{_find_suffix(row.path)}"


def _find_suffix(path: str) -> str:
    suffix = Path(path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z]{1,5}", suffix) else ""


def _place_images(
    run: RunResults,
    labels: pd.DataFrame,
    draft: Path,
    targets: list[str],
    options: argparse.Namespace,
) -> list[str]:
    """Copy, link or draw every image to its target; return the targets."""
    dataset = run.open_dataset(options.data_root)
    if dataset.kind == "features":
        raise DataError(
            f"{options.run} is a run of features: it has no images to export. Use --to csv"
        )
    for folder in sorted({os.path.dirname(target) for target in targets}):
        (draft / folder).mkdir(parents=True, exist_ok=True)
    if dataset.kind == "synthetic" or dataset.crops is not None:
        return _draw_images(dataset, labels, draft, targets)
    for path, target in zip(labels.path, targets, strict=True):
        if dataset.lies_in_archive(path):
            (draft / target).write_bytes(dataset.read_bytes(path))
            continue
        original = dataset.locate(path)
        if not original.is_file():
            raise DataError(
                f"{path} is not below the data root {dataset.root} any more. Pass --data-root DIR"
            )
        if options.links:
            (draft / target).symlink_to(original)
        else:
            shutil.copyfile(original, draft / target)
    return targets


def _draw_images(
    dataset: Dataset, labels: pd.DataFrame, draft: Path, targets: list[str]
) -> list[str]:
    from PIL import Image

    paths = labels.path.tolist()
    targets = [target if target.endswith(".png") else f"{target}.png" for target in targets]
    for row in range(0, len(paths), BLOCK):
        faces = dataset.read_faces(paths[row : row + BLOCK])
        for face, target in zip(faces, targets[row : row + BLOCK], strict=True):
            Image.fromarray(face).save(draft / target)
    return targets
