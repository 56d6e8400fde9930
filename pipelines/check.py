"""The check before a run, and the command `cdp check`: what data and models hold.

The contract:
- `check_inputs` looks at every file name, a sample of the pictures and every model, and changes
  nothing. What would stop a run is an error, what would spoil it in silence a warning.
- A model's faces are those of a few labelled people: one person's must be nearer than two people's.
  An ONNX model that separates them better when it is shown other pixels is probably shown the wrong
  ones; ready features that do not separate them probably do not fit their list.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from cdp.errors import CdpError, DataError
from cdp.separation import LEAST_NEARER, choose_people, measure_separation
from pipelines.choices import check_choices, list_trainings
from pipelines.config import MemberSettings, RunConfig, read_config
from pipelines.data.dataset import Dataset
from pipelines.data.fields import DESCRIBED
from pipelines.data.folders import LEFT_OUT
from pipelines.data.layouts.listed import SPLIT_OF
from pipelines.data.manifest import SPLITS, Entry
from pipelines.data.names import fold_name, group_spellings
from pipelines.data.photos import find_unknown, read_given
from pipelines.invocation import format_command
from pipelines.members import (
    LEAST_PEOPLE,
    describe_choice,
    describe_given,
    open_embedder,
    rank_member,
)
from pipelines.packaged import CONFIGS, find_config, find_manifest, list_packaged
from pipelines.training.pretrained import try_pretrained
from pipelines.training.sets import describe_kept, draw_for_mediator

DATA_ROOT = "CDP_DATA_ROOT"
MODELS_DIR = "CDP_MODELS_DIR"
SAMPLE = 64
"""Pictures of a split that are decoded."""
OBLONG = 1.1
"""Longer side over shorter one, from which on a picture is not square."""
MANY = 0.1
"""Share of a sample that is worth a warning."""


@dataclass(frozen=True)
class Finding:
    """One thing the check saw: a note, a warning, or an error that would stop the run."""

    level: Literal["note", "warning", "error"]
    text: str

    def __str__(self) -> str:
        return self.text if self.level == "note" else f"{self.level}: {self.text}"


Findings = Iterator[Finding]


def check_inputs(
    config: RunConfig,
    dataset: Dataset,
    *,
    pictures: bool = True,
    models: bool = True,
    counts: bool = True,
) -> list[Finding]:
    """Everything the check sees, in the order it looked.

    pictures : decode a sample. models : open the models and show them labelled faces.
    counts : whether there are images and people enough.
    """
    entries: list[Entry] = []

    def list_all() -> Findings:
        entries.extend(dataset.list_entries())
        yield from _describe_listing(dataset, entries)
        yield from _describe_lists(dataset, entries)

    found = _collect(list_all)
    if any(finding.level == "error" for finding in found):
        return found  # without its images nothing else that is said of the data set holds
    used = [entry for entry in entries if not entry.fault]
    found += _collect(lambda: _check_given(dataset, used))
    if counts:
        found += check_counts(config, dataset, used)
    if pictures and dataset.kind == "images":
        found += _collect(lambda: _check_pictures(dataset, used))
    if dataset.kind == "features":
        found += _collect(lambda: _check_features(config, dataset, used))
    elif models:
        for member in config.committee.all:
            found += _collect(partial(_check_member, dataset, member, used))
        found += _collect(partial(_check_pretrained, config, dataset))
    return found


def _collect(part: Callable[[], Findings]) -> list[Finding]:
    """The findings of one part; an error of ours ends that part alone."""
    found: list[Finding] = []
    try:
        found.extend(part())
    except CdpError as error:
        found.append(Finding("error", str(error)))
    return found


# ------------------------------------------------------------------------------------- listing


def _describe_listing(dataset: Dataset, entries: Sequence[Entry]) -> Findings:
    for split in SPLITS:
        mine = [entry for entry in entries if entry.split == split]
        if mine:
            yield Finding("note", _describe_split(dataset, split, mine))
    reasons = Counter(entry.fault for entry in entries if entry.fault)
    for reason, count in sorted(reasons.items(), key=lambda each: -each[1])[:8]:
        first = next(entry.path for entry in entries if entry.fault == reason)
        known = reason.startswith(LEFT_OUT)
        shown = first.encode("utf-8", "backslashreplace").decode()
        text = f"{reason.removeprefix(LEFT_OUT)}: {count:,} (the first: {shown})"
        yield Finding("note" if known else "warning", f"left out: {text}" if known else text)
    yield from _describe_names(dataset, entries)


def _describe_split(dataset: Dataset, split: str, entries: Sequence[Entry]) -> str:
    used = [entry for entry in entries if not entry.fault]
    people = Counter(entry.identity for entry in used if entry.identity is not None)
    text = f"{split}: {len(used):,} images"
    if not people:
        return f"{text}, nobody named" + (
            "; folders are no people (layout: people says otherwise)"
            if dataset.kind == "images" and any(e.path.count("/") > 1 for e in used)
            else ""
        )
    text += f" of {len(people):,} people"
    alone = sum(count == 1 for count in people.values())
    nobody = sum(entry.identity is None for entry in used)
    deeper = sum(_count_folders(dataset, split, entry) > 1 for entry in used)
    if alone and split != "unlabelled":
        text += f", {alone:,} of them with one image"
    if nobody:
        text += f"; {nobody:,} images name nobody ({DESCRIBED})"
    if deeper:
        text += f"; {deeper:,} images lie in deeper folders: the first folder is the person"
    return text


def _describe_lists(dataset: Dataset, entries: Sequence[Entry]) -> Findings:
    """Which column of a list has the people, and which of its rows are left out."""
    for facts in dataset.inspect_lists(entries):
        if facts.others:
            others = ", ".join(f"`{name}`" for name in facts.others)
            yield Finding(
                "note",
                f"{facts.name}: people are named by the column `{facts.column}`, and not by "
                f"{others}; call the right one `identity`",
            )
        if facts.alone:
            source = f"the column `{facts.column}`" if facts.column else "the field that has it"
            yield Finding(
                "warning",
                f"{facts.name}: each of {facts.alone:,} rows has an identity of its own, by "
                f"{source}. If that does not name people, call the column that does `identity`",
            )
        for split, count in facts.left_out.items():
            meant = SPLIT_OF[split.lower()]
            yield Finding(
                "warning",
                f"{facts.name}: {count:,} rows of the split {split!r} are left out: no split "
                f"{meant} of the manifest takes its images from this list. To use them: "
                f"`{meant}: {{root: ..., list: {facts.name}}}`",
            )


def _count_folders(dataset: Dataset, split: str, entry: Entry) -> int:
    """Folders between a split's root and the image."""
    folder = dataset.manifest.people or getattr(dataset.manifest, split)
    if dataset.kind != "images" or folder is None:
        return 0
    return os.path.relpath(entry.path, folder.root).count(os.sep)


def _check_given(dataset: Dataset, used: Sequence[Entry]) -> Findings:
    """The list of faces in photos that the manifest names."""
    align = dataset.manifest.align
    if align is None or align.given is None:
        return
    place = dataset.locate(align.given)
    given = read_given(place)
    unknown = find_unknown(given, dict.fromkeys(entry.path for entry in used), place)
    faces = sum(len(listed) for listed in given.values())
    yield Finding("note", f"{align.given}: {faces:,} faces of {len(given):,} photos are given")
    if unknown:
        yield Finding(
            "warning",
            f"{align.given}: {len(unknown):,} of {len(given):,} photos are not in the data set, "
            f"the first is {unknown[0]!r}",
        )


def _describe_names(dataset: Dataset, entries: Sequence[Entry]) -> Findings:
    """The people whose folders are spelt in several ways."""
    if dataset.kind != "images":
        return
    raw: set[str] = set()
    for entry in entries:
        folder = dataset.manifest.people or getattr(dataset.manifest, entry.split)
        if entry.identity is not None and folder is not None:
            name = os.path.relpath(entry.path, folder.root).partition(os.sep)[0]
            if fold_name(name) == fold_name(entry.identity):
                raw.add(name)
    groups = group_spellings(raw)
    if groups:
        shown = "; ".join(", ".join(map(repr, group)) for group in groups[:3])
        yield Finding(
            "note",
            f"{len(groups):,} people are spelt in several ways; each is one person: {shown}",
        )


def check_counts(config: RunConfig, dataset: Dataset, used: Sequence[Entry]) -> list[Finding]:
    """What the numbers of images and people will stop later, or turn into a vote."""
    from cdp.mediator.shortage import describe_shortage

    found = []
    counts = Counter(entry.split for entry in used)
    if dataset.manifest.align is None and counts["unlabelled"] <= config.knn.k:
        found.append(
            Finding(
                "error",
                f"{counts['unlabelled']} unlabelled images are too few for knn.k={config.knn.k}, "
                f"which needs at least {config.knn.k + 1}. Add images or lower knn.k",
            )
        )
    people = [entry.identity for entry in used if entry.split == "labelled" and entry.identity]
    trained = [member.name for member in config.committee.all if member.backbone]
    if trained and dataset.kind != "features" and len(set(people)) < 2:
        found.append(
            Finding(
                "error",
                f"{', '.join(trained)} would be trained on labelled images of at least 2 people, "
                f"and there are {len(set(people))}. Label people, or give these members an `onnx` "
                "or `checkpoint` file, which need no training: see docs/models.md",
            )
        )
    if config.mediate.method != "vote":
        share = config.train.mediator_share if trained else 1.0
        kept = draw_for_mediator(np.unique(people), share, config.seed)
        shortage = describe_shortage(np.array([name for name in people if name in kept]))
        if shortage:
            shortage += describe_kept(len(kept), len(set(people)))
        if shortage and config.propagate.target_precision is not None:
            text = f"{shortage}, and propagate.target_precision needs one. Label more, or leave "
            found.append(Finding("error", f"{text}the target out"))
        elif shortage:
            text = f"{shortage}: the committee will vote instead, and its clusters train one"
            found.append(Finding("warning", text))
    return found


# ------------------------------------------------------------------------------------ pictures


def _check_pictures(dataset: Dataset, used: Sequence[Entry]) -> Findings:
    for split in SPLITS:
        mine = [entry for entry in used if entry.split == split]
        if mine:
            yield from _check_split(dataset, split, mine)


def _check_split(dataset: Dataset, split: str, entries: Sequence[Entry]) -> Findings:
    from cdp.images.decode import decode_image, is_blank

    rows = np.unique(np.linspace(0, len(entries) - 1, SAMPLE).astype(np.int64)).tolist()
    sizes, bad, blank = [], [], 0
    for row in rows:
        try:
            picture = decode_image(dataset.read_bytes(entries[row].path), min_px=1)
        except DataError as error:
            bad.append((entries[row].path, str(error)))
            continue
        sizes.append(picture.shape[:2])
        blank += is_blank(picture)
    if len(bad) > MANY * len(rows):
        yield Finding("warning", f"{split}: {len(bad)} of {len(rows)} pictures looked at cannot be "
                      f"read; {bad[0][0]}: {bad[0][1]}")  # fmt: skip
    if blank > MANY * len(rows):
        yield Finding("warning", f"{split}: {blank} of {len(rows)} pictures looked at are blank")
    if not sizes:
        return
    size: np.ndarray = np.array(sizes)
    high, wide = np.median(size, axis=0).astype(int).tolist()
    yield Finding("note", f"{split}: the median picture is {wide} x {high} px")
    oblong = int((size.max(axis=1) > OBLONG * size.min(axis=1)).sum())
    if oblong > MANY * len(rows) and dataset.manifest.align is None:
        does = "grey is added" if dataset.manifest.square == "pad" else "their margins are cut off"
        yield Finding(
            "warning",
            f"{split}: {oblong} of {len(rows)} pictures looked at are not square, and {does}. "
            "Models expect faces cut out and aligned: `align: {}` in the manifest finds them in "
            "photos; `square: pad` keeps all of a picture",
        )


# -------------------------------------------------------------------------------------- models


def _check_features(config: RunConfig, dataset: Dataset, used: Sequence[Entry]) -> Findings:
    models = list(dict.fromkeys(m.features for m in config.committee.all if m.features))
    bad = dataset.find_bad_rows(models)
    if bad:
        (split, row), reason = next(iter(bad.items()))
        yield Finding("warning", f"{len(bad):,} images are rejected; the first, row {row + 1} of "
                      f"the {split} list: {reason}")  # fmt: skip
    people = [entry.identity for entry in used if entry.split == "labelled"]
    rows = choose_people([person or "" for person in people])
    rows = np.array([row for row in rows if people[row] and ("labelled", row) not in bad], np.int64)
    for model in models:
        for split in dataset.list_feature_splits():
            vectors = dataset.read_features(split, model)
            yield Finding("note", f"view {model}, {split}: {len(vectors):,} x {vectors.shape[1]} "
                          f"{vectors.dtype}")  # fmt: skip
        identity = np.array([people[row] for row in rows])
        if len(set(identity.tolist())) >= LEAST_PEOPLE:
            vectors = np.asarray(dataset.read_features("labelled", model)[rows], np.float64)
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            near = measure_separation(unit, identity).nearer
            if near < LEAST_NEARER:
                yield Finding(
                    "warning",
                    f"view {model}: one labelled person's vectors are nearer than two people's in "
                    f"{near:.0%} of cases only. Are its rows in the order of list.txt?",
                )


def _check_member(dataset: Dataset, member: MemberSettings, used: Sequence[Entry]) -> Findings:
    path = member.onnx or member.checkpoint
    if path is None:
        return
    origin = dataset.locate_model(path)
    if not origin.is_file():
        raise DataError(f"member {member.name}: no file {origin}; --models-dir names their folder")
    given = describe_given(dataset, member) if member.onnx else None
    embedder = open_embedder(origin, "cpu", given)
    size = f"faces of {embedder.input_px} px to {embedder.embedding_dim} numbers"
    labelled = [entry for entry in used if entry.split == "labelled"]
    # Of photos the faces are not known yet; embed tries the ways when they are.
    if given is None or not labelled or dataset.manifest.align is not None:
        shown = "" if given is None else f", shown {given.describe()}"
        yield Finding("note", f"member {member.name}: {size}{shown}")
        return
    ranked = rank_member(dataset, member, origin, [entry.path for entry in labelled],
                         [entry.identity for entry in labelled])  # fmt: skip
    if not ranked:
        yield Finding("note", f"member {member.name}: {size}, shown {given.describe()}; too few "
                      "labelled people to try other ways")  # fmt: skip
        return
    best, separation = ranked[0]
    poor = separation.nearer < LEAST_NEARER
    if member.is_pixel_range_open or best == given:
        text = f"member {member.name}: {size}; {describe_choice(member.name, given, ranked)}"
        yield Finding("warning" if poor else "note", text)
        return
    before = dict(ranked).get(given)
    yield Finding(
        "warning",
        f"member {member.name} is probably shown the wrong pixels: {given.describe()} separates "
        f"labelled people with d' {before.distance if before else 0:.1f}, {best.describe()} with "
        f"{separation.distance:.1f}. Correct its preset, or leave it to `preprocessing: auto`",
    )


def _check_pretrained(config: RunConfig, dataset: Dataset) -> Findings:
    """Whether the networks that trainings start from can be trained."""
    members = {member.name: member for member in config.committee.all}
    for place, settings, _, _ in list_trainings(config, ("retrain",)):
        member = members.get(getattr(settings, "pretrained", None) or "")
        if member is None:
            continue
        try:
            try_pretrained(dataset, member, settings)
        except CdpError as error:
            yield Finding("error", f"{place}: {error}")


# --------------------------------------------------------------------------------- command line


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """The options that name config, data and models, as `cdp run` has them too."""
    add = parser.add_argument
    add(
        "--config",
        type=Path,
        default=Path("default"),
        metavar="NAME",
        help=f"a YAML file, or one of {', '.join(list_packaged(CONFIGS))} (default: default)",
    )
    add(
        "--data-root",
        type=Path,
        default=os.environ.get(DATA_ROOT),
        metavar="DIR",
        help=f"the folder that the data manifest's paths start at (or set {DATA_ROOT})",
    )
    add(
        "--models-dir",
        type=Path,
        default=os.environ.get(MODELS_DIR),
        metavar="DIR",
        help="the folder that the paths of ONNX models and checkpoints start at, before the data "
        f"root; links in it are followed (or set {MODELS_DIR})",
    )
    add(
        "overrides",
        nargs="*",
        metavar="section.field=value",
        help="settings laid over the config, e.g. propagate.max_size=300",
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of `cdp check`."""
    parser = argparse.ArgumentParser(
        prog=format_command("check"),
        description="Look at data and models before a run costs time; change nothing.",
    )
    add_inputs(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; exit 0, or 2 when something would stop the run."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        options.config = find_config(options.config)
        config = read_config(options.config, options.overrides)
        manifest = find_manifest(config.data, options.config)
        dataset = Dataset.open(manifest, options.data_root, options.models_dir)
        trained = () if dataset.kind == "features" else ("train", "retrain", "evaluate")
        check_choices(config, trained)
        found = check_inputs(config, dataset)
    except CdpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for finding in found:
        print(finding, file=sys.stderr if finding.level == "error" else sys.stdout)
    count = Counter(finding.level for finding in found)
    if not count["error"]:
        warned = f"{count['warning']} warnings" if count["warning"] else "nothing to object to"
        print(f"checked: {warned}")
    return 2 if count["error"] else 0


if __name__ == "__main__":
    sys.exit(main())
