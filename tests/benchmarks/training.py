"""Images per second of the trainer, of its data side and of embedding.

    python -m tests.benchmarks.training [--threads 2] [--source-px 48] [--input-px 24]
        [--recipe surveillance] [--backbones plain,residual] [--batch 64]

Wall time of the best of several rounds, so that a busy machine disturbs least. The data side is all
a training step does before the network: rows of a mapped file, degradation, mirror image. It must
reach twice the rate of the whole step (`ratio` 2 or more): then it never is the bottleneck.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cdp.embedding import BackboneEmbedder
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import BACKBONES, build_backbone
from cdp.models.heads import build_head
from cdp.training.loop import _Trainer, train_model
from cdp.training.plan import TrainingPlan
from cdp.training.sets import TrainingSet


def measure_rate(images: int, work: Callable[[], object], rounds: int) -> float:
    work()
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return images / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--source-px", type=int, default=48)
    parser.add_argument("--input-px", type=int, default=24)
    parser.add_argument("--recipe", default="surveillance", choices=sorted(DEGRADATIONS))
    parser.add_argument("--batch", type=int, default=64, help="images a step")
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(options, Path(place) / "faces.npy")


def measure(options: argparse.Namespace, place: Path) -> None:
    """Print all rates; `place` is where the mapped file goes."""
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    side = options.source_px
    np.save(place, rng.integers(0, 256, (1024, side, side, 3)).astype(np.uint8))
    images = np.load(place, mmap_mode="r")
    label = np.arange(1024) % 150
    print(f"{options.threads} threads, faces of {side} px, backbones of {options.input_px} px")
    batch, seeds = torch.from_numpy(np.array(images[:64])), torch.arange(64)
    for name, recipe in DEGRADATIONS.items():
        speed = measure_rate(64, partial(degrade, batch, seeds, recipe, options.input_px), 30)
        print(f"degrade {name:14} {speed:8.0f} images/s")
    plan = TrainingPlan(
        epochs=1, batch_size=options.batch, degradation=DEGRADATIONS[options.recipe]
    )

    def make(name: str) -> _Trainer:
        backbone = build_backbone(name, input_px=options.input_px)
        training_set = TrainingSet(build_head("adaface", 128, 150), images, label)
        return _Trainer(backbone, [training_set], plan, torch.device("cpu"))

    def load(trainer: _Trainer) -> None:
        for step in range(trainer.steps_per_epoch):
            trainer.batches.load(step)

    loaded = measure_rate(1024, partial(load, make("plain")), 3)
    print(f"data side, {options.recipe}: {loaded:.0f} images/s")
    for name in options.backbones.split(","):

        def train(name: str = name) -> None:
            backbone = build_backbone(name, input_px=options.input_px)
            training_set = TrainingSet(build_head("adaface", 128, 150), images, label)
            train_model(backbone, [training_set], plan, device="cpu", progress=False)

        embedder = BackboneEmbedder(build_backbone(name, input_px=options.input_px), device="cpu")
        trained = measure_rate(1024, train, 3)
        embedded = measure_rate(1024, partial(embedder.embed, images), 3)
        print(
            f"{name:14} train {trained:8.0f} images/s   embed {embedded:8.0f} images/s   "
            f"data side / train: ratio {loaded / trained:.1f}"
        )


if __name__ == "__main__":
    main()
