"""Batches of a training: which image comes in which step, degraded, with its targets.

The contract:
- Everything drawn at random (order, degradation, flip) is a function of (seed, set, pass, image)
  and of nothing else: any step can be loaded at once, whatever came before.
- Each batch holds each training set's share of it, by largest remainder, 1 image at least.
- In a team each process degrades its part of a batch; the targets are those of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cdp.errors import ConfigError
from cdp.images.degradation import DEGRADATIONS, Degradation, degrade
from cdp.training.distributed import Team
from cdp.training.plan import Sampling, TrainingPlan
from cdp.training.sets import TrainingSet

_REVERSED = 1 << 20
"""Added to a set's number for its second order."""
_LOOKAHEAD_IMAGES = 256
"""Images degraded at once, for some steps ahead: twice as fast as 32 at a time."""


class Order:
    """The images that a training set gives to each step: pass after pass, without end.

    training_set : TrainingSet
    seed, number : int
        Of the run, and the set's place among the sets.
    sampling, images_per_identity
        As `TrainingPlan`. A set without labels is always sampled by image.
    """

    def __init__(
        self,
        training_set: TrainingSet,
        seed: int,
        number: int,
        *,
        sampling: Sampling = "image",
        images_per_identity: int = 1,
    ) -> None:
        self.label = training_set.label if sampling in ("identity", "reversed") else None
        self.reversed = sampling == "reversed"
        self.key = (seed, number)
        self.images_per_identity = images_per_identity
        self.length = len(training_set.images)
        if self.label is not None:
            self.size = np.bincount(self.label)
            self.size = self.size[self.size > 0]
            if not self.reversed:
                self.length = len(self.size) * images_per_identity
        self.current = -1
        self.rows = self.seeds = np.empty(0, dtype=np.int64)

    def take(self, start: int, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """Places start..start+amount of the sequence: image numbers and their random seeds."""
        rows, seeds = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while amount > 0:
            number, offset = divmod(start, self.length)
            if number != self.current:
                rng = np.random.default_rng([*self.key, number])
                self.rows = self._draw_rows(rng)
                self.seeds = rng.integers(0, 2**63 - 1, self.length)
                self.current = number
            part = slice(offset, offset + amount)
            rows.append(self.rows[part])
            seeds.append(self.seeds[part])
            taken = len(self.rows[part])
            start, amount = start + taken, amount - taken
        return np.concatenate(rows), np.concatenate(seeds)

    def _draw_rows(self, rng: np.random.Generator) -> np.ndarray:
        """One pass: every image once; each identity's first few images of a random order (one with
        fewer repeats them); or as many images of identities drawn by the inverse of their size."""
        if self.label is None:
            return rng.permutation(self.length)
        first = np.cumsum(self.size) - self.size
        if self.reversed:
            weight = 1 / self.size
            chosen = rng.choice(len(weight), self.length, p=weight / weight.sum())
            inside = (rng.random(self.length) * self.size[chosen]).astype(np.int64)
            return np.argsort(self.label, kind="stable")[first[chosen] + inside]
        shuffled = np.lexsort((rng.random(len(self.label)), self.label))
        place = first[:, None] + np.arange(self.images_per_identity) % self.size[:, None]
        return shuffled[place][rng.permutation(len(self.size))].ravel()


class BilateralOrder:
    """Two orders side by side: in each step half of the images by image, half reversed.

    training_set, seed, number
        As `Order`.
    count : int
        Images a step, an even number.
    """

    def __init__(self, training_set: TrainingSet, seed: int, number: int, count: int) -> None:
        self.count = count
        self.usual = Order(training_set, seed, number)
        self.rare = Order(training_set, seed, number + _REVERSED, sampling="reversed")

    def take(self, start: int, amount: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Order.take`, of whole steps."""
        half = self.count // 2
        steps = amount // self.count
        parts = [
            order.take(start // self.count * half, steps * half)
            for order in (self.usual, self.rare)
        ]
        rows, seeds = (
            np.stack([part[column].reshape(steps, half) for part in parts], 1).ravel()
            for column in (0, 1)
        )
        return rows, seeds


def apportion(batch_size: int, shares: np.ndarray) -> list[int]:
    """Whole images of a batch by share, by largest remainder, at least 1 each."""
    exact = shares * batch_size
    counts = np.maximum(np.floor(exact), 1).astype(int)
    while counts.sum() < batch_size:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > batch_size and counts.max() > 1:
        counts[np.argmax(counts)] -= 1
    return [int(c) for c in counts]


class Targets(NamedTuple):
    """Labels and weights of one training set's images in a batch.

    label : (b,) int64 or None, where there are no classes
    weight : (b,) float32 or None, where all weigh 1
    soft : (place (e,) int64, class (e,) int64, share (e,) float32) or None
    masked : (e, 2) int64 or None, a row of the head's input and a class
    teacher : (b, d) float32 or None
    seeds : (b,) int64, one an image and pass, which all its random numbers follow from
    """

    label: Tensor | None
    weight: Tensor | None
    soft: tuple[Tensor, Tensor, Tensor] | None
    masked: Tensor | None
    teacher: Tensor | None
    seeds: Tensor

    def list_classes(self) -> Tensor:
        """Every class that a label or a soft target names, repeats included."""
        assert self.label is not None
        return torch.cat([self.label, self.label if self.soft is None else self.soft[1]])


class _Loaded(NamedTuple):
    """Some steps of a training set: rows and seeds of all, this process's degraded faces."""

    rows: np.ndarray
    seeds: np.ndarray
    degraded: Tensor | None


class Batches:
    """The batches of one training, by number of the step.

    training_sets : sequence of TrainingSet
    plan : TrainingPlan
    input_px : int
        Side of the faces that the network reads.
    device : torch.device
        Where images are degraded and targets lie.
    team : Team
        The processes that share each batch.

    Attributes
    ----------
    shares : (sets,) float64, each set's part of the images, in sum 1; of shares that move the mean
        over the training
    counts : list of int, each set's images in a batch
    steps_per_epoch : int
    """

    def __init__(
        self,
        training_sets: Sequence[TrainingSet],
        plan: TrainingPlan,
        *,
        input_px: int,
        device: torch.device,
        team: Team,
    ) -> None:
        if team.size > plan.batch_size:
            raise ConfigError(
                f"an image a process expected, got batches of {plan.batch_size} for "
                f"{team.size} processes; raise batch_size or start fewer"
            )
        self.training_sets, self.plan, self.input_px = training_sets, plan, input_px
        self.device, self.team = device, team
        self._first_shares, self._last_shares = _scale_shares(training_sets)
        self.shares = self._mix_shares(plan.mean_usual_share)
        self.counts = apportion(plan.batch_size, self.shares)
        if plan.sampling == "bilateral":
            self.counts = [
                count if each.label is None else max(2, count // 2 * 2)
                for each, count in zip(training_sets, self.counts, strict=True)
            ]
        image_count = sum(len(each.images) for each in training_sets)
        self.steps_per_epoch = math.ceil(image_count / plan.batch_size)
        self.orders = [self._make_order(number) for number in range(len(training_sets))]
        self._block_steps = max(1, _LOOKAHEAD_IMAGES // plan.batch_size)
        self._block = -1
        self._loaded: list[_Loaded] = []

    def _make_order(self, number: int) -> Order | BilateralOrder:
        each, plan = self.training_sets[number], self.plan
        if plan.sampling == "bilateral" and each.label is not None:
            return BilateralOrder(each, plan.seed, number, self.counts[number])
        return Order(
            each,
            plan.seed,
            number,
            sampling="image" if plan.sampling == "bilateral" else plan.sampling,
            images_per_identity=plan.images_per_identity,
        )

    def shares_at(self, step: int) -> np.ndarray:
        """Each set's share of the loss in a step: (sets,) float64, in sum 1."""
        return self._mix_shares(self.plan.usual_share_at(step, self.steps_per_epoch))

    def _mix_shares(self, usual: float) -> np.ndarray:
        return self._last_shares + usual * (self._first_shares - self._last_shares)

    def load(self, step: int) -> tuple[Tensor, list[Targets]]:
        """This process's degraded images (b, 3, s, s), and the targets of the whole batch."""
        block, place = divmod(step, self._block_steps)
        if block != self._block:
            self._block, self._loaded = block, self._load_block(block)
        faces, targets = [], []
        for each, count, loaded in zip(self.training_sets, self.counts, self._loaded, strict=True):
            part = slice(place * count, (place + 1) * count)
            targets.append(self._make_targets(each, loaded.rows[part], loaded.seeds[part]))
            if loaded.degraded is not None:
                faces.append(loaded.degraded[place])
        return _join(faces), targets

    def load_sharp(self, step: int) -> Tensor:
        """This process's images of the step that was loaded last, not degraded: (b, 3, s, s)."""
        place = step % self._block_steps
        first, last = self.team.part(sum(self.counts))
        faces = []
        for each, count, loaded in zip(self.training_sets, self.counts, self._loaded, strict=True):
            own = place * count + np.arange(count)[max(first, 0) : max(last, 0)]
            if len(own):
                rows, seeds = loaded.rows[own], loaded.seeds[own]
                faces.append(self._degrade(each, rows, seeds, DEGRADATIONS["none"]))
            first, last = first - count, last - count
        return _join(faces)

    def _load_block(self, block: int) -> list[_Loaded]:
        """A few steps at once, a set: all rows, and this process's faces (steps, b, 3, s, s).

        Blocks begin at fixed steps, so that a resumed training makes the very same ones.
        """
        start = block * self._block_steps
        steps = min(self._block_steps, self.plan.epochs * self.steps_per_epoch - start)
        loaded: list[_Loaded] = []
        first, last = self.team.part(sum(self.counts))
        for each, order, count in zip(self.training_sets, self.orders, self.counts, strict=True):
            rows, seeds = order.take(start * count, steps * count)
            own = np.arange(count)[max(first, 0) : max(last, 0)]
            mine = (np.arange(steps)[:, None] * count + own).ravel()
            faces = None
            if len(own):
                faces = self._degrade(each, rows[mine], seeds[mine], self.plan.degradation)
                faces = faces.unflatten(0, (steps, len(own)))
            loaded.append(_Loaded(rows, seeds, faces))
            first, last = first - count, last - count
        return loaded

    def _degrade(
        self,
        training_set: TrainingSet,
        rows: np.ndarray,
        drawn: np.ndarray,
        degradation: Degradation,
    ) -> Tensor:
        """Some images of a set, degraded and mirrored by their seeds."""
        images = torch.from_numpy(np.ascontiguousarray(training_set.images[rows])).to(self.device)
        seeds = torch.from_numpy(drawn).to(self.device)
        degraded = degrade(images, seeds, degradation, self.input_px)
        if self.plan.flip:
            mirrored = (seeds & 1).bool()[:, None, None, None]
            degraded = torch.where(mirrored, degraded.flip(3), degraded)
        return degraded

    def _make_targets(
        self, training_set: TrainingSet, rows: np.ndarray, seeds: np.ndarray
    ) -> Targets:
        def send(values: np.ndarray, kind: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=kind)).to(self.device)

        label = None if training_set.label is None else training_set.label[rows]
        soft = masked = None
        lines, own = np.arange(len(rows)), label
        if training_set.soft is not None and label is not None:
            lines, own, shares = training_set.soft.take(rows, label)
            soft = send(lines, np.int64), send(own, np.int64), send(shares, np.float32)
        if training_set.masked_negatives is not None and own is not None:
            # The head reads an image with several classes once for each; each masks the others.
            place, classes = training_set.masked_negatives.take(rows[lines])
            foreign = classes != own[place]
            masked = send(np.stack([place, classes], 1)[foreign], np.int64)
        weight, teacher = training_set.weight, training_set.teacher
        return Targets(
            None if label is None else send(label, np.int64),
            None if weight is None else send(weight[rows], np.float32),
            soft,
            masked,
            None if teacher is None else send(teacher[rows], np.float32),
            send(seeds, np.int64),
        )


def _join(faces: list[Tensor]) -> Tensor:
    batch = torch.cat(faces) if len(faces) > 1 else faces[0]
    return batch.contiguous(memory_format=torch.channels_last)


def _scale_shares(training_sets: Sequence[TrainingSet]) -> tuple[np.ndarray, np.ndarray]:
    """Each set's share at the start and at the end, (sets,) each, in sum 1."""
    sizes = np.array([len(each.images) for each in training_sets], dtype=float)
    wanted = np.array(
        [
            (size / sizes.sum(),) * 2 if each.share is None else np.broadcast_to(each.share, 2)
            for size, each in zip(sizes, training_sets, strict=True)
        ]
    )
    if wanted.min() <= 0:
        raise ConfigError(f"training set shares above 0 expected, got {wanted.tolist()}")
    first, last = (wanted / wanted.sum(0)).T
    return first, last
