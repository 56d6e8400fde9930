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

import numpy as np

from cdp.errors import ConfigError, DataError, StageError
from cdp.types import UNLABELLED
from pipelines.data.dataset import Dataset
from pipelines.decisions import CorrectionTable, find_keys, list_active
from pipelines.results import RunResults, open_run

if TYPE_CHECKING:
    import pandas as pd

FORMULA = re.compile(r"(^|[;|\t\r\n])(?=[\t\r\n]|\s*[=+\-@＝＋－＠])")
"""The start of a cell, for any separator, whose text a spreadsheet would evaluate."""
COLUMNS = (
    "sample_id", "path", "pseudo_label", "cluster_size", "confidence", "expected_precision",
    "medoid", "identity", "reviewed", "decision",
)  # fmt: skip
"""Columns of the CSV; `medoid` is the sample_id of the cluster's most central image.
`identity` is the labelled person that it shows, empty where none is known."""
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
    add("--reviewed-only", action="store_true",
        help="leave out images that no reviewer's decision confirms")  # fmt: skip
    add("--min-precision", type=float, default=0.0, metavar="P",
        help="leave out clusters whose expected precision is below P")  # fmt: skip
    add("--data-root", type=Path, default=os.environ.get("CDP_DATA_ROOT"), metavar="DIR",
        help="the data root (default: the one recorded with the run)")  # fmt: skip
    parser.set_defaults(export=export_labels, rests_on="propagate")


def export_labels(options: argparse.Namespace) -> str:
    """Write one export; return a summary line."""
    run = open_run(options.run)
    labels = run.labels
    if not 0 <= options.min_precision <= 1:
        raise ConfigError(f"--min-precision: 0 to 1 expected, got {options.min_precision}")
    labels = _describe_clusters(run, _describe_decisions(run, labels))
    if options.to != "csv":
        labels = labels[labels.pseudo_label != UNLABELLED]
    is_clustered = options.to != "csv" or bool((labels.pseudo_label != UNLABELLED).any())
    labels = labels[(labels.cluster_size >= options.min_size) | (labels.pseudo_label == UNLABELLED)]
    if is_clustered and (labels.pseudo_label == UNLABELLED).all():
        raise DataError(
            f"no cluster of {options.run} has {options.min_size} images or more; lower --min-size"
        )
    if options.min_precision:
        if labels.expected_precision.isna().all():
            raise DataError(
                f"--min-precision: the clusters of {options.run} have no expected precision: "
                f"{run.manifest('propagate')['facts']['withheld'][0]}. "
                "Leave the option out, or label people and run again"
            )
        labels = labels[labels.expected_precision >= options.min_precision]
    if options.reviewed_only:
        labels = labels[labels.reviewed == "yes"]
    if not len(labels):
        raise DataError(
            f"no image of {options.run} is left by --reviewed-only and --min-precision; review its "
            "clusters first, or ask for less"
        )
    with _open_draft(options.out) as draft:
        FORMATS[options.to](run, labels, draft, options)
    clusters = labels.pseudo_label[labels.pseudo_label != UNLABELLED].nunique()
    return f"{options.out}: {len(labels):,} images, {clusters:,} clusters"


def _describe_decisions(run: RunResults, labels: pd.DataFrame) -> pd.DataFrame:
    """The labels with `reviewed`, "yes" or "no", and `decision`, such as "merge 3; split 7".

    An image is reviewed when a decision in force says who is, or is not, one person with it.
    """
    said: dict[str, list[str]] = {}
    for decision in list_active(CorrectionTable(run.directory).read()):
        for key in {key for group in decision.groups for key in group}:
            said.setdefault(key, []).append(f"{decision.action} {decision.number}")
    if not said:
        return labels.assign(reviewed="no", decision="")
    samples = run.samples.set_index("sample_id").loc[labels.sample_id].reset_index()
    words = ["; ".join(said.get(key, ())) for key in find_keys(samples)]
    return labels.assign(reviewed=["yes" if each else "no" for each in words], decision=words)


def _describe_clusters(run: RunResults, labels: pd.DataFrame) -> pd.DataFrame:
    """The labels with `expected_precision` and `medoid` of their clusters; empty without one."""
    clusters = run.clusters.set_index("pseudo_label")
    medoid = labels.pseudo_label.map(clusters.medoid_sample_id).astype("Int64").astype(object)
    people = dict(zip(run.assignments.sample_id, run.assignments.identity, strict=True))
    return labels.assign(
        expected_precision=labels.pseudo_label.map(clusters.expected_precision).astype(float),
        medoid=medoid.where(medoid.notna(), ""),
        identity=[people.get(sample, "") for sample in labels.sample_id.tolist()],
    )


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
    """One row an image; a byte order mark, so that spreadsheets read the names as UTF-8."""
    names = [name for name in COLUMNS if name in labels]
    with draft.open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in labels[names].itertuples(index=False):
            writer.writerow([_format_cell(value) for value in row])


def _format_cell(value: Any) -> Any:
    if isinstance(value, str):
        return defuse_formula(value)
    if isinstance(value, float):
        return "" if value != value else f"{value:.6f}"
    return value


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
    """`data/` and `labels.json`, a FiftyOneImageClassificationDataset, and `embeddings.npy`.

    Row i of the embeddings, (n, d) float32 of the base view, is the i-th entry of `labels`.
    """
    targets = [f"data/{row.sample_id}{_find_suffix(row.path)}" for row in labels.itertuples()]
    _place_images(run, labels, draft, targets, options)
    value = {
        "classes": [_name_label(label) for label in sorted(labels.pseudo_label.unique())],
        "labels": {
            str(row.sample_id): {
                "label": _name_label(row.pseudo_label),
                "confidence": round(float(row.confidence), 6),
                "attributes": {
                    "path": row.path,
                    "reviewed": row.reviewed,
                    "decision": row.decision,
                },
            }
            for row in labels.itertuples()
        },
    }
    (draft / "labels.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    vectors = run.view_of(labels.sample_id.to_numpy())
    if vectors is not None:
        np.save(draft / "embeddings.npy", vectors)


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
