"""What the added losses see of a batch: features of the images and of their twins.

The contract:
- A map, a twin or a neck's parts are made only where some loss of some training set asks for them.
- In a team every process sees the whole batch; only its own rows carry a gradient.
- Twins leave the running moments of the batch normalisations as they are: they do not look like the
  images that the network is used on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cdp.images.degradation import find_variations
from cdp.images.twins import cover_faces, shuffle_cells
from cdp.models import Backbone, Features
from cdp.models.auxiliary import Auxiliary, Seen, Twin, TwinKind
from cdp.training.batches import Batches, Targets
from cdp.training.distributed import gather_rows
from cdp.training.sets import TrainingSet


class Observer:
    """Runs the backbone over batches and their twins, and hands each loss what it asks for.

    backbone : Backbone
    training_sets : sequence of TrainingSet
    batches : Batches
        Those that are trained on.
    precision : torch.dtype
        Of the backbone's forward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        training_sets: Sequence[TrainingSet],
        batches: Batches,
        precision: torch.dtype,
    ) -> None:
        self.backbone, self.batches, self.precision = backbone, batches, precision
        losses = [loss for each in training_sets for _, loss in each.auxiliaries]
        self.reads = {loss.reads for loss in losses}
        self.twins = sorted({loss.twin for loss in losses if loss.twin is not None})
        self.sees_parts = any(loss.neck is not None for loss in losses)

    def run(
        self, images: Tensor, targets: Sequence[Targets], step: int
    ) -> tuple[Features, dict[TwinKind, tuple[Features, Tensor | None]]]:
        """Features of the whole batch, and of each twin with its cover or permutation.

        images : (b, 3, s, s) float
            This process's.
        """
        seeds = torch.cat([each.seeds for each in targets])
        first, last = self.batches.team.part(len(seeds))
        whole = self._extract(images, seeds[first:last], len(seeds))
        twins: dict[TwinKind, tuple[Features, Tensor | None]] = {}
        for kind in self.twins:
            twin, info = self._make_twin(kind, images, seeds[first:last], step)
            with keep_moments(self.backbone):
                features = self._extract(twin, seeds[first:last], len(seeds))
            twins[kind] = features, self._gather(info, len(seeds))
        return whole, twins

    def _extract(self, images: Tensor, seeds: Tensor, count: int) -> Features:
        """Features of the whole batch of `count` images, in float32."""
        device = images.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            own = self.backbone.extract(images, seeds, early="early_map" in self.reads)
        wanted = own._replace(
            map=own.map if "map" in self.reads else None,
            early_map=own.early_map if "early_map" in self.reads else None,
            parts=own.parts if self.sees_parts else None,
            part_weight=own.part_weight if self.sees_parts else None,
            gate=own.gate if self.sees_parts else None,
        )
        return Features(*(self._gather(each, count) for each in wanted))  # type: ignore[arg-type]

    def _gather(self, own: Tensor | None, count: int) -> Tensor | None:
        """Rows of all processes; floating numbers in float32."""
        if own is None:
            return None
        if own.is_floating_point():
            own = own.float()
        if self.batches.team.size == 1:
            return own
        rows = gather_rows(own.reshape(len(own), -1).float(), count, self.batches.team)
        return rows.to(own.dtype).reshape(count, *own.shape[1:])

    def _make_twin(
        self, kind: TwinKind, images: Tensor, seeds: Tensor, step: int
    ) -> tuple[Tensor, Tensor | None]:
        if kind == "sharp":
            return self.batches.load_sharp(step), None
        if kind == "covered":
            return cover_faces(images, seeds)
        return shuffle_cells(images, seeds, self.backbone.map_shape.side)

    def show(
        self,
        loss: Auxiliary,
        training_set: TrainingSet,
        target: Targets,
        rows: slice,
        features: Features,
        twins: dict[TwinKind, tuple[Features, Tensor | None]],
        progress: float,
    ) -> Seen:
        """What one loss sees of one training set's rows of the batch."""
        assert target.label is not None
        twin = None
        if loss.twin is not None:
            seen, info = twins[loss.twin]
            twin = Twin(seen.embedding[rows], _pick_map(loss, seen, rows), _cut(info, rows))
        plan = self.batches.plan
        return Seen(
            features.embedding[rows],
            target.label,
            _pick_map(loss, features, rows),
            twin,
            target.seeds,
            find_variations(target.seeds, plan.degradation, self.batches.input_px)
            if loss.sees_variations
            else None,
            _cut(features.parts, rows),
            _cut(features.part_weight, rows),
            _cut(features.gate, rows),
            training_set.head,
            progress,
        )


def _pick_map(loss: Auxiliary, features: Features, rows: slice) -> Tensor | None:
    if loss.reads is None:
        return None
    return _cut(features.early_map if loss.reads == "early_map" else features.map, rows)


def _cut(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


@contextmanager
def keep_moments(network: nn.Module) -> Iterator[None]:
    """Leave the running moments of batch normalisations as they are, for the length of a block."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    before = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in zip(norms, before, strict=True):
            module.momentum = momentum


def list_rows(counts: Sequence[int]) -> list[slice]:
    """Each training set's rows of a batch."""
    starts = [sum(counts[:number]) for number in range(len(counts))]
    return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
