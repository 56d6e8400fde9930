"""Lists of verification pairs in folds: LFW's official file, and that of CALFW and CPLFW.

The contract:
- The form is recognised by the first line: `folds<tab>pairs` is LFW's; `<image> <number>` is
  CALFW's: two lines a pair, the number is the fold of a genuine pair, from 1, or 0 for impostors.
- CALFW's file gives impostor pairs no fold. They are dealt to the folds in their order, so many to
  each as there are genuine pairs in it; how others deal them may differ.
- Paths have no suffix: LFW's list omits it.
- A line that fits neither is a `DataError` with its number.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cdp.errors import DataError
from pipelines.data.folders import join_path

_IMAGE = re.compile(r"(?P<image>(?P<person>.+)_\d+\.\w+)\s+(?P<fold>\d+)")


@dataclass(frozen=True)
class ListedPair:
    """One verification pair: two paths, whether they show one person, the fold counted from 0.

    people : the names of the two persons, equal in a genuine pair.
    """

    source: str
    target: str
    same: bool
    fold: int
    people: tuple[str, str]


def parse_pairs(lines: Sequence[str], root: str, path: Path) -> list[ListedPair]:
    """The pairs of a list below a folder of images.

    lines : of the file, without line ends.
    root : the folder, relative to the data root: of `<person>/<person>_<number, 4 digits>` in
        LFW's form, of the images themselves in CALFW's.
    path : of the file, for messages.
    """
    if lines and _IMAGE.fullmatch(lines[0].strip()):
        return _parse_endpoints(lines, root, path)
    return _parse_folds(lines, root, path)


def _parse_folds(lines: Sequence[str], root: str, path: Path) -> list[ListedPair]:
    """LFW's form: each fold's genuine pairs `person i j`, then as many `person i person j`."""
    pairs: list[ListedPair] = []
    try:
        folds, each = (int(word) for word in lines[0].split())
        if folds < 1 or each < 1:
            raise ValueError(f"{folds} folds of {each} pairs")
        for number, line in enumerate(lines[1 : 1 + 2 * folds * each]):
            words = line.split("\t")
            first, i, second, j = words if len(words) == 4 else (words[0], words[1], *words[::2])
            source, target = (
                join_path(root, f"{name}/{name}_{int(image):04d}")
                for name, image in ((first, i), (second, j))
            )
            fold = number // (2 * each)
            pairs.append(ListedPair(source, target, len(words) == 3, fold, (first, second)))
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{path}, line {len(pairs) + 2}: a pair as LFW lists them expected ({error}): person, "
            "number, number, or person, number, person, number, between tabs; or, as CALFW does, "
            "two lines a pair of an image and the fold"
        ) from error
    if len(pairs) != 2 * folds * each:
        raise DataError(f"{path}: {2 * folds * each} pairs announced, {len(pairs)} listed")
    return pairs


def _parse_endpoints(lines: Sequence[str], root: str, path: Path) -> list[ListedPair]:
    """CALFW's form: two lines a pair."""
    filled = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    pairs, found = [], []
    for number, line in filled:
        match = _IMAGE.fullmatch(line)
        if match is None:
            raise DataError(
                f"{path}, line {number}: an image <person>_<number>.<suffix> and its fold "
                f"expected, 0 for impostors, got {line!r}"
            )
        found.append((number, match))
    if len(found) % 2:
        raise DataError(f"{path}, line {found[-1][0]}: two lines a pair expected, one is left")
    for (_, first), (number, second) in zip(found[::2], found[1::2], strict=True):
        people = first["person"], second["person"]
        fold, same = int(first["fold"]), people[0] == people[1]
        if first["fold"] != second["fold"] or same != (fold > 0):
            raise DataError(
                f"{path}, line {number}: both images of a pair have one number, 0 for two people "
                f"and a fold for one, got {first['image']} {first['fold']} and {second['image']} "
                f"{second['fold']}"
            )
        source, target = (join_path(root, os.path.splitext(m["image"])[0]) for m in (first, second))
        pairs.append(ListedPair(source, target, same, fold - 1, people))
    return _deal_impostors(pairs, path)


def _deal_impostors(pairs: Sequence[ListedPair], path: Path) -> list[ListedPair]:
    """The pairs ordered by fold, impostors dealt in their order, as many as genuine pairs."""
    genuine = [pair for pair in pairs if pair.same]
    impostors = [pair for pair in pairs if not pair.same]
    size = Counter(pair.fold for pair in genuine)
    if len(impostors) != len(genuine):
        raise DataError(
            f"{path}: as many impostor as genuine pairs expected, got {len(impostors)} and "
            f"{len(genuine)}"
        )
    dealt, at = [], 0
    for fold in sorted(size):
        dealt += [pair for pair in genuine if pair.fold == fold]
        for pair in impostors[at : at + size[fold]]:
            dealt.append(ListedPair(pair.source, pair.target, False, fold, pair.people))
        at += size[fold]
    return dealt
