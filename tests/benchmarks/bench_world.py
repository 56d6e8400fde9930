"""The default chain on data as people have it: true quality, estimate, and what the check found.

    python -m tests.benchmarks.bench_world [--seeds 3] [--first-seed 0]
        [--sets lfw synthetic mild surveillance] [--views DIR]
        [--situations clean overlap noise labels bursts dominating few images sharp copies
        mixed seen]

A row a situation, the mean over the seeds; no setting is changed between rows.

- `lfw`: real faces at 24 px, five networks (`lfw_features` under `CDP_DATA_ROOT` or
  `../shared/data`); `--views DIR` reads one `<name>.npy` a network and `identity.npy` instead, as
  `bench_pseudo_labels` writes them. A fifth of the people with two images or more is labelled,
  another fifth is left out of the unlabelled rows. `synthetic`: 160 labelled people of eight
  images, 250 of four and 1,000 of one without a label, three views.
- `overlap`: half of the images of a share of the labelled people are unlabelled. Its reference is
  the same unlabelled rows with the labels of the people left out.
- `noise`: a share of the labelled images have the label of a person drawn at random.
- `labels`: a quarter of the labelled people have two labels, their images dealt to both.
- `bursts`: each unlabelled image of 300 people is repeated, with noise of .01 a number.
- `dominating`: half of the unlabelled images show one person.
- `few`: so many labelled people, or none. `images`: so many labelled images of each person at most.
- `sharp`: sharp labelled photos of 45 people, 14, 3 or 1 of each, and a poor pile, and the same
  labels of the pile's quality; sets `mild` and `surveillance` only (`worlds_sharp`), whose faces
  are embedded once into `--kept`.
- `copies`: the same sharp labels with copies of them that were degraded until they look like the
  pile's, as a run with images makes them; `mild` and `surveillance` only.
- `mixed`: 14 photos, every second one of them sharp, without and with copies. `seen`: 14 photos,
  and the pile shows the labelled people too: labels of its quality, sharp ones, those with copies.

Images without a label count as clusters of one.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cdp import ConsensusClusterer
from cdp.metrics.clustering import score_bcubed, score_pairwise
from tests.benchmarks.bench_pseudo_labels import read_release, split_wild
from tests.benchmarks.worlds_sharp import CAMERAS, SharpWorld, draw_sharp_world, match_copies

LARGE = 100
"""Images of the person that is made half of the unlabelled ones, at least."""
SITUATIONS = (
    "clean",
    "overlap",
    "noise",
    "labels",
    "bursts",
    "dominating",
    "few",
    "images",
    "sharp",
    "copies",
    "mixed",
    "seen",
)
Views = list[np.ndarray]


@dataclass(frozen=True)
class World:
    """Labelled and unlabelled rows of one set.

    views : of all rows. identity : (n,) the true person of each row. labelled, unlabelled, other :
    row numbers; `other` are rows of people who are in neither of the two.
    """

    views: Views
    identity: np.ndarray
    labelled: np.ndarray
    unlabelled: np.ndarray
    other: np.ndarray

    def take(self, rows: np.ndarray) -> Views:
        return [view[rows] for view in self.views]


@dataclass(frozen=True)
class Case:
    """One situation: what is given, and the truth.

    label : given labels of the labelled rows. truth : of the unlabelled rows. person : true person
    of the labelled rows. degraded : copies of the labelled rows, and the row of each; or None.
    """

    name: str
    labelled: Views
    label: np.ndarray
    person: np.ndarray
    unlabelled: Views
    truth: np.ndarray
    degraded: tuple[Views, np.ndarray] | tuple[None, None] = (None, None)


def read_world(name: str, seed: int, folder: Path | None) -> World:
    if name == "synthetic":
        return make_synthetic(seed)
    if folder is not None:
        identity = np.load(folder / "identity.npy")
        files = sorted(file for file in folder.glob("*.npy") if file.stem != "identity")
        views, given = [np.load(file) for file in files], split_wild(identity, 0)
    else:
        views, identity, given = read_release(find_data() / "lfw_features")
    mark = given if seed == 0 else split_wild(identity, seed)
    people = np.unique(identity[mark])
    random = np.random.default_rng([seed, 7])
    rest = np.unique(identity[~mark])
    several = random.permutation(rest[np.bincount(identity)[rest] >= 2])
    out = np.isin(identity, several[: len(people)])
    rows = [np.flatnonzero(part) for part in (mark, ~mark & ~out, out)]
    return World(views, identity, *rows)


def find_data() -> Path:
    return Path(os.environ.get("CDP_DATA_ROOT", "../shared/data"))


def make_synthetic(seed: int) -> World:
    """People as points, three views of each image; images differ in how far they lie from it."""
    random = np.random.default_rng(seed)
    size = np.concatenate([np.full(160, 8), np.full(250, 4), np.full(1000, 1), np.full(160, 8)])
    identity = np.repeat(np.arange(len(size)), size)
    models = [random.normal(size=(48, d)) / 7 for d in (128, 96, 64)]
    spread = random.uniform(0.55, 0.95, size=(len(identity), 1))
    centre = random.normal(size=(len(size), 48))
    face = centre[identity] + spread * random.normal(size=(len(identity), 48))
    views = [
        ((face + 0.35 * random.normal(size=face.shape)) @ model).astype(np.float32)
        for model in models
    ]
    part = np.searchsorted([160, 1410], identity, side="right")
    return World(views, identity, *(np.flatnonzero(part == each) for each in range(3)))


def list_cases(world: World, seed: int, situations: list[str]) -> Iterator[Case]:
    random = np.random.default_rng([seed, 8])
    labelled, identity = world.labelled, world.identity
    person = identity[labelled]
    own, rest = world.take(labelled), world.take(world.unlabelled)
    truth = identity[world.unlabelled]
    people = np.unique(person)
    if "clean" in situations:
        yield Case("clean", own, person, person, rest, truth)
    if "overlap" in situations:
        for share in (0.1, 0.5, 1.0):
            yield from share_people(world, share, seed)
    if "noise" in situations:
        for share in (0.02, 0.05, 0.1, 0.2):
            label = person.copy()
            wrong = random.permutation(len(label))[: round(share * len(label))]
            label[wrong] = random.choice(people, len(wrong))
            yield Case(f"noise {share:.0%}", own, label, person, rest, truth)
    if "labels" in situations:
        label = person.copy()
        for each in random.permutation(people)[: len(people) // 4]:
            rows = random.permutation(np.flatnonzero(person == each))
            label[rows[::2]] = 10_000_000 + each
        yield Case("two labels a person, 25%", own, label, person, rest, truth)
    if "bursts" in situations:
        shown = random.permutation(np.unique(truth))[:300]
        first = np.flatnonzero(np.isin(truth, shown))
        one = [view[first] for view in rest]
        yield Case("bursts of 1", own, person, person, one, truth[first])
        for length in (8, 30):
            rows = np.repeat(first, length)
            burst = []
            for view in rest:
                scale = 0.01 * np.linalg.norm(view[rows], axis=1, keepdims=True)
                burst.append(view[rows] + scale * random.normal(size=(len(rows), view.shape[1])))
            yield Case(f"bursts of {length}", own, person, person, burst, truth[rows])
    if "dominating" in situations and np.bincount(truth).max() >= LARGE:
        largest = np.bincount(truth).argmax()
        rows = np.flatnonzero(truth == largest)
        others = random.permutation(np.flatnonzero(truth != largest))[: len(rows)]
        half = np.sort(np.concatenate([rows, others]))
        yield Case("one person is half", own, person, person, world.take(world.unlabelled[half]),
                   truth[half])  # fmt: skip
    if "few" in situations:
        for number in (0, 1, 2, 5, 20):
            kept = np.isin(person, random.permutation(people)[:number])
            few = [view[kept] for view in own]
            yield Case(f"{number} labelled people", few, person[kept], person[kept], rest, truth)
    if "images" in situations:
        shuffled = random.permutation(len(person))
        rank = np.empty(len(person), np.int64)
        rank[shuffled] = pd.Series(person[shuffled]).groupby(person[shuffled]).cumcount()
        for number in (1, 2, 3, 4, 8, 12, 16, 20, 30):
            kept = rank < number
            few = [view[kept] for view in own]
            yield Case(f"{number} images a person", few, person[kept], person[kept], rest, truth)


def list_sharp_cases(
    camera: str, seed: int, kept: Path | None, situations: list[str]
) -> Iterator[Case]:
    if kept is None:
        raise SystemExit(f"the set {camera} embeds faces: name a folder for them by --kept")
    root = find_data()
    for photos in (14, 3, 1):
        world = draw_sharp_world(root, kept, photos, seed, camera)
        if photos == 14 and {"mixed", "seen"} & set(situations):
            copies = match_copies(root, kept, world, seed, camera)
            yield from list_mixed_cases(world, copies, situations)
        own = (world.identity, world.identity, world.pile, world.truth)
        if "sharp" in situations:
            yield Case(f"{photos} photos, alike", world.alike, *own)
            yield Case(f"{photos} photos, sharp", world.labelled, *own)
        if "copies" in situations:
            copies = match_copies(root, kept, world, seed, camera)
            yield Case(f"{photos} photos, from images", world.labelled, *own, copies)


def list_mixed_cases(
    world: SharpWorld, copies: tuple[Views, np.ndarray], situations: list[str]
) -> Iterator[Case]:
    """Labels that are sharp in part; and sharp ones of people whom the pile shows too."""
    label = world.identity
    if "mixed" in situations:
        sharp = pd.Series(label).groupby(label).cumcount().to_numpy() % 2 == 0
        pick = sharp[:, None]
        half = [np.where(pick, *each) for each in zip(world.labelled, world.alike, strict=True)]
        degraded = [
            np.concatenate([np.where(pick, view[: len(label)], poor), view[len(label) :]])
            for view, poor in zip(copies[0], world.alike, strict=True)
        ]
        own = (half, label, label, world.pile, world.truth)
        yield Case("half of 14 photos sharp", *own)
        yield Case("half of 14 photos sharp, from images", *own, (degraded, copies[1]))
    if "seen" in situations:
        pile = [np.concatenate(each) for each in zip(world.pile, world.seen, strict=True)]
        own = (label, label, pile, np.concatenate([world.truth, world.seen_truth]))
        yield Case("seen, 14 photos, alike", world.alike, *own)
        yield Case("seen, 14 photos, sharp", world.labelled, *own)
        yield Case("seen, 14 photos, from images", world.labelled, *own, copies)


def share_people(world: World, share: float, seed: int) -> Iterator[Case]:
    random = np.random.default_rng([seed, 9])
    person = world.identity[world.labelled]
    people = random.permutation(np.unique(person))
    seen = []
    for each in people[: round(share * len(people))]:
        rows = random.permutation(world.labelled[person == each])
        seen.extend(rows[: len(rows) // 2].tolist())
    kept = np.setdiff1d(world.labelled, seen)
    rows = np.sort(np.concatenate([world.unlabelled, np.array(seen, np.int64)]))
    pile, truth = world.take(rows), world.identity[rows]
    for name, labelled in (("reference of", world.other), ("overlap", kept)):
        label = world.identity[labelled]
        yield Case(f"{name} {share:.0%}", world.take(labelled), label, label, pile, truth)


def judge(case: Case, seed: int) -> dict[str, float | str]:
    """True and estimated quality of one fit, and what its check of the labels found."""
    start = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fitted = ConsensusClusterer(backend="exact", random_state=seed).fit(
                case.unlabelled,
                labelled_views=case.labelled,
                labelled_ids=case.label,
                degraded_views=case.degraded[0],
                degraded_of=case.degraded[1],
            )
        except ValueError as error:
            return {"situation": case.name, "said": str(error)[:60]}
    precision, recall, f = score_pairwise(case.truth, fitted.labels_)
    row: dict[str, float | str] = {
        "situation": case.name,
        "P": precision,
        "R": recall,
        "F": f,
        "BCubed F": score_bcubed(case.truth, fitted.labels_)[2],
        "threshold": fitted.threshold_,
        "CPU s": time.process_time() - start,
        "said": "; ".join(str(each.message)[:60] for each in caught[:2]),
    }
    quality = fitted.quality_
    if quality is not None:
        row |= {"est. P": quality.precision, "est. F": quality.f}
    issues = fitted.label_issues_
    wrong = case.label != case.person
    flagged = issues.row[issues.issue == "wrong_name"].to_numpy(np.int64)
    row |= {
        "wrong names": len(flagged),
        "second labels": int((issues.issue == "second_label").sum()),
    }
    if wrong.any() and case.label.max() < 10_000_000:
        row["names P"] = float(wrong[flagged].mean()) if len(flagged) else 1.0
        row["names R"] = len(np.intersect1d(flagged, np.flatnonzero(wrong))) / wrong.sum()
    known = np.isin(case.truth, case.person)
    found = fitted.assignments_
    if known.any():
        right = case.truth[found.row.to_numpy(np.int64)] == found.label.to_numpy()
        row["people P"] = float(right.mean()) if len(found) else 1.0
        row["people R"] = right.sum() / known.sum()
    else:
        row["assigned"] = len(found)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    sets = ["lfw", "synthetic", *CAMERAS]
    parser.add_argument("--sets", nargs="+", default=["lfw"], choices=sets)
    parser.add_argument("--kept", type=Path, help="folder of embedded faces, sharp and poor")
    parser.add_argument("--views", type=Path, help="folder of <name>.npy and identity.npy")
    parser.add_argument("--situations", nargs="+", default=list(SITUATIONS), choices=SITUATIONS)
    arguments = parser.parse_args()
    for name in arguments.sets:
        rows = []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            if name in CAMERAS:
                cases = list_sharp_cases(name, seed, arguments.kept, arguments.situations)
            else:
                world = read_world(name, seed, arguments.views)
                cases = list_cases(world, seed, arguments.situations)
            for case in cases:
                rows.append(judge(case, seed))
                shown = {
                    key: round(value, 3) if isinstance(value, float) else value
                    for key, value in rows[-1].items()
                }
                print(name, seed, shown, flush=True)
        table = pd.DataFrame(rows)
        numbers = table.drop(columns="said").groupby("situation", sort=False).mean()
        print(f"\n{name}, mean over {arguments.seeds} seeds")
        print(numbers.round(3).to_string(na_rep=""), flush=True)


if __name__ == "__main__":
    main()
