"""Each method of the recognizer against the same training without it, over several seeds.

    python -m tests.benchmarks.bench_methods [--seeds 3] [--px 24,16] [--methods ccl,bbn]
        [--budget SECONDS] [--jobs N] [--device auto] [--out rows.jsonl] [--epochs 8]
        [--batch-size 128] [--learning-rate 0.2] [--backbone residual] [--faces DIR]
        [--table rows.jsonl ...]

The data are the synthetic faces of the default run: the labelled identities with their names, the
unlabelled ones as pseudo-labels without an error, so that nothing but the method differs; or, with
`--faces`, those that `lfw_faces` wrote, with its pseudo-labels. Probes are held-out identities,
sharp, as `surveillance` degrades them, and all with a mask. Methods that differ after the training
alone share one; those of a ready network (`pretrained`) need `--faces`, and are named. A line of
`--out` is one method and seed, written when it ends; no training starts after `--budget` seconds.
The table at the end has a row a method: the mean difference to the training without it with the
same seed, and the standard deviation of that difference over seeds. A difference within two
standard errors is marked `~`: the seeds cannot separate it from chance.
`--table` prints the table of such files and trains nothing.

It needs `cdp` alone. Trainings run in `--jobs` processes on one device; on a GPU in bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

PROBES = ("none", "surveillance", "masked")
DRAWN_AT_ONCE = 400


@dataclass(frozen=True)
class Method:
    """Settings of the recognizer and of its training, and the method that it is compared with."""

    against: str = "default"
    spec: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    degradation: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the degradation `surveillance` in the training."""
    adapt: str | None = None
    """Fit the trained recognizer to unlabelled faces, degraded as the probes `surveillance`."""
    pool: str = "norm"
    """How several pictures of a person become one vector: mean, norm, parts, nan."""
    min_size: int = 2
    """Smallest pseudo-class; 1 makes a class of every image that is alone."""
    teacher: bool = False
    """Follow the vectors of the teacher; `--faces` alone has one."""
    pretrained: str | None = None
    """The network of `onnx/` below `CDP_DATA_ROOT` that it starts from; None: fresh weights."""
    share: tuple[float, float] | None = None
    """Part of the unlabelled images in the loss at the start and at the end; None: as of images."""

    @property
    def training(self) -> str:
        """What determines its training; equal for methods that share one."""
        return json.dumps(
            [
                self.spec,
                self.plan,
                self.degradation,
                self.min_size,
                self.teacher,
                self.share,
                self.pretrained,
            ],
            sort_keys=True,
            default=str,
        )


def add_loss(name: str, against: str = "default", **params: float) -> Method:
    """A loss beside the head's, on top of what `against` has."""
    base = METHODS[against] if against != "default" else Method()
    spec = {**base.spec, "auxiliaries": {**base.spec.get("auxiliaries", {}), name: params}}
    return Method(against, spec, base.plan)


METHODS: dict[str, Method] = {
    "default": Method(),
    "softmax": Method(spec={"head": "softmax"}),
    "identities": Method(plan={"sampling": "identity", "images_per_identity": 4}),
    # heads
    "cosface": Method(spec={"head": "cosface"}),
    "ccl": Method(spec={"head": "ccl"}),
    "domain_balance": Method("cosface", spec={"head": "domain_balance"}),
    "subspheres": Method("cosface", spec={"head": "subspheres"}),
    # necks
    "subdecisions": Method(spec={"neck": "subdecisions"}),
    "trunk_branch": Method(spec={"neck": "trunk_branch"}),
    "twofold": Method(spec={"neck": "twofold"}),
    "bbn": Method("twofold", {"neck": "twofold"}, {"sampling": "bilateral"}),
    "reversed": Method(plan={"sampling": "reversed"}),
    "balanced": Method("domain_balance", spec={"head": "domain_balance", "neck": "balanced"}),
    # on average as large as that of the images, so that the batches are those of `default`
    "moving share": Method(share=(0.9, 0.3)),
}
METHODS |= {
    "fused parts": Method("subspheres", spec={"head": "subspheres"}, pool="parts"),
    # after the training
    "plain mean of sets": Method(pool="mean"),
    "nan": Method(pool="nan"),
    "adapted moments": Method(adapt="moments"),
    "adda": Method(adapt="adda"),
    # losses
    "consistency": add_loss("consistency", "subdecisions", weight=0.1),
    "gate": add_loss("gate", "balanced", weight=0.01),
    "mutual_channel": add_loss("mutual_channel", weight=0.1, diversity=2.0),
    "construction": add_loss("construction"),
    "spatial_diversity": add_loss("spatial_diversity", weight=1.0),
    "feature_diversity": add_loss("feature_diversity", weight=1.0),
    "decorrelation": add_loss("decorrelation", weight=0.1),
    "domain": add_loss("domain", weight=0.1),
    "promotion": add_loss("promotion", "softmax", weight=0.1, rare=8),
    "batch_triplet": add_loss("batch_triplet", "identities", weight=1.0),
    "map_distillation": add_loss("map_distillation", weight=1.0),
    "relation_distillation": add_loss("relation_distillation", weight=5.0),
}
STRONG = {"low_res_rate": 0.9, "blur_rate": 0.4, "noise_rate": 0.5, "jpeg_rate": 0.5}
TWINS = {"map_distillation": {"weight": 1.0}, "relation_distillation": {"weight": 5.0}}
METHODS |= {
    # recipes
    "alone": Method(min_size=1),
    "longer": Method(plan={"epochs": 20}),
    "longest": Method(plan={"epochs": 40}),
    "gentle": Method("longer", {"head_params": {"margin": 0.2}}, {"epochs": 20}),
    "decay": Method(plan={"weight_decay": 2e-3}),
    "strong": Method(degradation=STRONG),
    "wide": Method(spec={"width": 1.5}),
    "plain backbone": Method(spec={"backbone": "plain"}),
    "both twins": Method(spec={"auxiliaries": TWINS}),
    "distilled": Method(plan={"distil_weight": 3.0}, teacher=True),
    "vectors alone": Method(
        plan={"epochs": 20, "class_weight": 0.0, "distil_weight": 100.0}, teacher=True
    ),
}
"""Each against the training without it; `distilled` follows the teacher's vectors too."""
FURTHER = {"epochs": 2, "batch_size": 64, "optimizer": "adamw", "learning_rate": 5e-4,
           "weight_decay": 1e-2, "warmup_epochs": 0.5}  # fmt: skip
METHODS |= {
    name: Method(name, {}, {**FURTHER, **plan}, teacher=bool(plan), pretrained="edgeface_xs")
    for name, plan in {
        "pretrained": {},
        "pretrained student": {"class_weight": 0.0},
        "longer pretrained student": {"class_weight": 0.0, "epochs": 6},
    }.items()
}
"""A ready network trained further, by labels and pseudo-labels, or by a teacher's vectors alone."""


@cache
def load_faces(folder: str) -> dict[str, np.ndarray]:
    """The arrays that `draw_faces` wrote, mapped."""
    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(Path(folder).glob("*.npy"))}


def draw_part(rows: np.ndarray) -> np.ndarray:
    """Some faces of the default data set."""
    from cdp.synthetic import SyntheticFaces

    return SyntheticFaces().draw(rows)


def write_faces(folder: Path, pool: ProcessPoolExecutor) -> None:
    """Draw the default data set once, for all processes."""
    from cdp.synthetic import SyntheticFaces

    data = SyntheticFaces()
    rows = np.arange(len(data))
    parts = [rows[start : start + DRAWN_AT_ONCE] for start in range(0, len(rows), DRAWN_AT_ONCE)]
    images = np.concatenate(list(pool.map(draw_part, parts)))
    for split in ("labelled", "unlabelled", "evaluation"):
        chosen = data.split == split
        np.save(folder / f"{split}_images.npy", images[chosen])
        np.save(folder / f"{split}_identity.npy", data.identity[chosen])


def train_methods(
    names: list[str], seed: int, folder: str, probe_px: tuple[int, ...], backbone: str,
    base: Mapping[str, Any], device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """One training, and a row of figures a method that it serves."""
    recognizer, shared = train_one(METHODS[names[0]], seed, folder, backbone, base, device)
    faces = load_faces(folder)
    return [
        {"method": name, "against": METHODS[name].against, **shared,
         "values": score(METHODS[name], recognizer, faces, probe_px, seed, device)}
        for name in names
    ]  # fmt: skip


def train_one(
    method: Method, seed: int, folder: str, backbone: str, base: Mapping[str, Any], device: str
) -> tuple[Any, dict[str, Any]]:
    """The recognizer of one training, and what its rows say of how it was made."""
    import torch

    from cdp.images.degradation import get_degradation
    from cdp.recognizer import RecognizerSpec, train_recognizer
    from cdp.training import TrainingPlan
    from cdp.training.plan import resolve_device, resolve_precision

    torch.set_num_threads(1)
    started = time.perf_counter()
    faces = load_faces(folder)
    degradation = replace(get_degradation("surveillance"), **method.degradation)
    plan = TrainingPlan(**{**base, **method.plan}, seed=seed, degradation=degradation)
    ready = None if method.pretrained is None else open_network(method.pretrained)
    length = {} if ready is None else {"embedding_dim": ready.spec.embedding_dim}
    recognizer, history = train_recognizer(
        make_set(faces, "labelled", method.teacher),
        make_set(faces, "unlabelled", method.teacher, min_size=method.min_size),
        spec=RecognizerSpec(**{"backbone": backbone, **length, **method.spec}),
        plan=plan,
        pretrained=ready,
        pseudo_share=method.share,
        device=device,
        progress=False,
    )
    where = resolve_device(device)
    return recognizer, {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 2),
        "device": torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        "precision": str(resolve_precision(plan.precision, where)).removeprefix("torch."),
        "loss": history[-1]["loss"],
    }


def open_network(name: str) -> Any:
    """A ready network as a backbone of 24 px."""
    from cdp.embedding import OnnxEmbedder
    from cdp.recognizer import open_pretrained

    path = Path(os.environ["CDP_DATA_ROOT"]) / "onnx" / f"{name}.onnx"
    return open_pretrained(OnnxEmbedder(path.read_bytes(), name=name), input_px=24)


def make_set(faces: Mapping[str, np.ndarray], split: str, follows: bool, min_size: int = 1) -> Any:
    """The faces of a split, with a teacher's vectors where asked for."""
    from cdp.recognizer import FaceSet

    teacher = faces[f"{split}_teacher"] if follows else None
    label = faces[f"{split}_identity"]
    return FaceSet(faces[f"{split}_images"], label, teacher=teacher, min_size=min_size)


def score(
    method: Method, trained: Any, faces: Mapping[str, np.ndarray], probe_px: tuple[int, ...],
    seed: int, device: str,
) -> dict[str, float]:  # fmt: skip
    """All figures of a method."""
    recognizer = trained
    if method.adapt is not None:
        recognizer = adapt(trained, method.adapt, faces, seed, device)
    values = score_probes(recognizer, faces, probe_px)
    return values | score_sets(recognizer, faces, probe_px[-1], method.pool, seed)


def score_probes(
    recognizer: Any, faces: Mapping[str, np.ndarray], probe_px: tuple[int, ...]
) -> dict[str, float]:
    """TAR@FAR and rank-1 of held-out identities, for each size and kind of probe."""
    from cdp.metrics import sample_probe_gallery, sample_verification_pairs
    from cdp.metrics.identification import identify
    from cdp.metrics.protocols import Resamples, pick_images, score_all_pairs
    from cdp.metrics.verification import compare_pairs, verification_accuracy

    images, identity = faces["evaluation_images"], faces["evaluation_identity"]
    identity = np.unique(identity, return_inverse=True)[1]
    resamples = Resamples(identity, 1, 0)
    compared = pick_images(identity, 10, 0)
    pairs = sample_verification_pairs(identity, 300, 10, 0)
    probes, gallery = sample_probe_gallery(identity, 0)
    sharp = recognizer.embed(images)
    found = {}
    for size_px in probe_px:
        for kind in PROBES:
            small = recognizer.embed(show_probe(images, size_px, kind))
            for score in score_all_pairs(small, compared, resamples, (0.01,)):
                found[f"{size_px}px {kind} {score.metric}"] = score.value
            similarity = compare_pairs(small, pairs.source, pairs.target)
            accuracy, _ = verification_accuracy(similarity, pairs.same, pairs.fold)
            found[f"{size_px}px {kind} accuracy"] = accuracy
            ranked = identify(small[probes], identity[probes], sharp[gallery], identity[gallery])
            found[f"{size_px}px {kind} rank-1"] = float(np.mean(ranked.rank <= 1))
    return found


def adapt(
    recognizer: Any, kind: str, faces: Mapping[str, np.ndarray], seed: int, device: str
) -> Any:
    """The recognizer fitted to the unlabelled faces, degraded."""
    from cdp.adaptation import AdaptationPlan, adapt_encoder, adapt_moments
    from cdp.recognizer import Recognizer

    camera = show_probe(faces["unlabelled_images"], recognizer.input_px, "surveillance")
    backbone = copy.deepcopy(recognizer.backbone)
    if kind == "moments":
        adapt_moments(backbone, camera, device=device)
    else:
        plan = AdaptationPlan(steps=200, seed=seed)
        backbone, _ = adapt_encoder(
            backbone, faces["labelled_images"], camera, plan, device=device, progress=False
        )
    return Recognizer(backbone, device=device)


def score_sets(
    recognizer: Any, faces: Mapping[str, np.ndarray], size_px: int, pool: str, seed: int
) -> dict[str, float]:
    """Rank-1 of identities by one and by up to eight degraded pictures at once."""
    from cdp.metrics.identification import identify
    from cdp.metrics.protocols import sample_sets

    images, identity = faces["evaluation_images"], faces["evaluation_identity"]
    sets = sample_sets(np.asarray(identity), 0)
    weigh: Any = train_nan(recognizer, faces, size_px, seed) if pool == "nan" else pool
    small = show_probe(images, size_px, "surveillance")
    sharp = recognizer.embed(images[sets.gallery])
    found = {}
    for count in (1, 2, 4, 8):
        rows = sets.take(count)
        pooled = recognizer.embed_set(small[rows], identity[rows], weigh=weigh)
        ranked = identify(pooled, np.unique(identity[rows]), sharp, identity[sets.gallery])
        found[f"{size_px}px sets of {count} rank-1"] = float(np.mean(ranked.rank <= 1))
    return found


def train_nan(recognizer: Any, faces: Mapping[str, np.ndarray], size_px: int, seed: int) -> Any:
    """The aggregator, trained on two degraded versions of each labelled face."""
    from cdp.aggregation import train_aggregator
    from cdp.images.degradation import degrade_pixels, get_degradation

    images, identity = faces["labelled_images"], faces["labelled_identity"]
    vectors = [
        recognizer.embed(
            degrade_pixels(
                np.array(images), np.arange(len(images)) + version * len(images) + 10**6,
                get_degradation("surveillance"), size_px,
            )
        )
        for version in range(2)
    ]  # fmt: skip
    return train_aggregator(np.concatenate(vectors), np.tile(identity, 2), steps=300, seed=seed)


def show_probe(images: np.ndarray, size_px: int, kind: str) -> np.ndarray:
    """Held-out faces as probes: (n, s, s, 3) uint8 to (n, px, px, 3) uint8."""
    from cdp.images.degradation import Degradation, degrade_pixels, get_degradation, reduce_faces

    if kind == "none":
        return reduce_faces(images, size_px)
    recipe = Degradation(mask_rate=1.0) if kind == "masked" else get_degradation(kind)
    return degrade_pixels(np.array(images), np.arange(len(images)), recipe, size_px)


def plan_trainings(names: list[str], seeds: int) -> list[tuple[list[str], int]]:
    """All trainings, a seed after the other, each with the methods that it serves."""
    served: dict[str, list[str]] = {}
    for name in METHODS:
        if name in {*names, *list_baselines(names)}:
            served.setdefault(METHODS[name].training, []).append(name)
    return [(group, seed) for seed in range(seeds) for group in served.values()]


def list_baselines(names: list[str]) -> set[str]:
    """What some methods are compared with."""
    return {METHODS[name].against for name in names}


def run_trainings(
    pool: ProcessPoolExecutor, trainings: list[tuple[list[str], int]], common: tuple[Any, ...],
    jobs: int, ends: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of all trainings as they end; none begins after the time `ends`."""
    waiting, running = list(trainings), set[Future[list[dict[str, Any]]]]()
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < ends:
            running.add(pool.submit(train_methods, *waiting.pop(0), *common))
        if not running:
            break
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for each in done:
            yield from each.result()
    if waiting:
        print(f"no time for {len(waiting)} of {len(trainings)} trainings", file=sys.stderr)


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    """A row a method: the difference to its baseline, mean ± standard deviation over seeds."""
    by_key = {(row["method"], row["seed"]): row for row in rows}
    columns = list(rows[0]["values"])
    print("| method | against | seeds | " + " | ".join(columns) + " |")
    print("|---" * (3 + len(columns)) + "|")
    for name in names:
        against = METHODS[name].against
        own = [row for (method, _), row in by_key.items() if method == name]
        pairs = [
            (row["values"], by_key[against, row["seed"]]["values"])
            for row in own
            if (against, row["seed"]) in by_key
        ]
        if not pairs:
            continue
        cells = [format_difference(name == against, column, pairs) for column in columns]
        print(f"| {name} | {against} | {len(pairs)} | " + " | ".join(cells) + " |")


def format_difference(
    is_baseline: bool, column: str, pairs: list[tuple[dict[str, float], dict[str, float]]]
) -> str:
    """The value of a baseline; else the difference, `~` where chance explains it."""
    values = np.array([own[column] for own, _ in pairs])
    if is_baseline:
        return f"{values.mean():.3f} ± {values.std():.3f}"
    difference = values - np.array([base[column] for _, base in pairs])
    if len(difference) < 2:
        return f"{difference.mean():+.3f}"
    spread = float(difference.std(ddof=1))
    chance = "~" if abs(difference.mean()) <= 2 * spread / len(difference) ** 0.5 else ""
    return f"{chance}{difference.mean():+.3f} ± {spread:.3f}"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--px", default="24,16", help="sides of the probes, between commas")
    parser.add_argument("--methods", help="names between commas; all by default")
    parser.add_argument("--budget", type=float, default=270, help="seconds, drawing included")
    parser.add_argument("--jobs", type=int, help="trainings at a time; by default cores - 2, 2..12")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--backbone", default="residual", help="of all but `plain backbone`")
    parser.add_argument("--faces", type=Path, help="a folder of `lfw_faces`; else drawn")
    parser.add_argument("--table", type=Path, nargs="+", help="print these files' table only")
    parser.add_argument("--out", type=Path, default=Path("bench_methods.jsonl"))
    options = parser.parse_args()
    everywhere = [name for name, method in METHODS.items() if method.pretrained is None]
    options.methods = options.methods.split(",") if options.methods else everywhere
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; choose from: {', '.join(METHODS)}")
    options.px = tuple(int(px) for px in options.px.split(","))
    options.jobs = options.jobs or min(max((os.cpu_count() or 1) - 2, 1), 12)
    return options


def main() -> None:
    """Draw the faces, train everything, print the table."""
    options = read_options()
    if options.table:
        lines = [line for path in options.table for line in path.read_text().splitlines()]
        rows = [json.loads(line) for line in lines]
        print_table(rows, [name for name in METHODS if name in {row["method"] for row in rows}])
        return
    ends = time.monotonic() + options.budget
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    rows = []
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.jobs, mp_context=context) as pool,
        options.out.open("w", encoding="utf-8") as out,
    ):
        if options.faces is None:
            write_faces(Path(folder), pool)
        trainings = plan_trainings(options.methods, options.seeds)
        print(f"{len(trainings)} trainings, {options.jobs} at a time", file=sys.stderr, flush=True)
        base = {
            "epochs": options.epochs,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
        }
        faces = str(options.faces or folder)
        common = (faces, options.px, options.backbone, base, options.device)
        for row in run_trainings(pool, trainings, common, options.jobs, ends):
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            print(f"{row['method']}, seed {row['seed']}: {row['seconds']} s", file=sys.stderr)
    if rows:
        print_table(rows, [name for name in METHODS if name in {row["method"] for row in rows}])


if __name__ == "__main__":
    main()
