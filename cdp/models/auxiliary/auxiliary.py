"""The base class of the losses that are added to a head, and what they look at.

The contract:
- `look` maps what a loss sees of a batch (`Seen`) to (b,) losses; one that is defined on the batch
  as a whole gives every sample the same, so that the mean over the batch is the batch's.
- A loss names what it looks at beside the embedding: a feature map (`reads`), a twin of each image
  (`twin`), the parts of a neck (`neck`). The training makes these only where some loss asks.
- They compute in float32 whatever autocast says.
- In `eval` mode nothing is updated. Random numbers are functions of the images' seeds alone, so
  that a training that is stopped and resumed ends with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from cdp.models.heads import Head

TwinKind = Literal["sharp", "covered", "shuffled"]


@dataclass(frozen=True)
class Twin:
    """The images once more: `sharp` (not degraded), `covered` or `shuffled` (from the degraded).

    embedding : (b, d) float, raw
    map : (b, c, h, w) float or None
        The map that the loss reads.
    info : Tensor or None
        covered: (b, s, s) bool, the cover. shuffled: (b, cells^2) int64, see `shuffle_cells`.
    """

    embedding: Tensor
    map: Tensor | None = None
    info: Tensor | None = None

    def require_map(self) -> Tensor:
        """The map, for a loss that `reads` one."""
        return _require(self.map, "map of the twin")

    def require_info(self) -> Tensor:
        """What was done to the images, for a twin of which something is said."""
        return _require(self.info, "info of the twin")


@dataclass(frozen=True)
class Seen:
    """What a loss sees of a batch; what it does not ask for is None.

    embedding : (b, d) float, raw
    label : (b,) int64 in 0..identities-1
    map : (b, c, h, w) float or None
        The map that the loss reads.
    twin : Twin or None
    seeds : (b,) int64 or None
        One an image and pass: the source of all random numbers.
    variation : (b, 3) bool or None
        Whether an image was made small, covered, noisy.
    parts : (b, k, d) float or None
        A neck's parts.
    part_weight : (b, k) float or None
        The weight of each part.
    gate : (b,) float or None
        The gate of the neck `balanced`.
    head : Head or None
        The head of the images' set.
    progress : float
        Share of the training that is done, 0..1.
    """

    embedding: Tensor
    label: Tensor
    map: Tensor | None = None
    twin: Twin | None = None
    seeds: Tensor | None = None
    variation: Tensor | None = None
    parts: Tensor | None = None
    part_weight: Tensor | None = None
    gate: Tensor | None = None
    head: Head | None = None
    progress: float = 0.0

    def require_map(self) -> Tensor:
        """The map, for a loss that `reads` one."""
        return _require(self.map, "map")

    def require_twin(self) -> Twin:
        """The twin, for a loss that names its kind."""
        return _require(self.twin, "twin")

    def require_seeds(self) -> Tensor:
        """The images' seeds, for a loss that draws."""
        return _require(self.seeds, "seeds")

    def require_head(self) -> Head:
        """The head, for a loss that asks it."""
        return _require(self.head, "head")

    def to_float(self) -> Seen:
        """The same in float32."""
        twin = None if self.twin is None else _to_float(self.twin)
        return replace(_to_float(self), twin=twin)


_Thing = TypeVar("_Thing")


def _require(thing: _Thing | None, name: str) -> _Thing:
    """What a training gives to a loss that asks for it."""
    assert thing is not None, f"the loss asks for the {name}, and none was given"
    return thing


_Row = TypeVar("_Row", Seen, Twin)


def _to_float(value: _Row) -> _Row:
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    half: dict[str, Any] = {
        name: each.float()
        for name, each in found.items()
        if isinstance(each, Tensor) and each.is_floating_point()
    }
    return replace(value, **half)


class Auxiliary(nn.Module):
    """Base of all: owns the sizes. A loss of embeddings alone defines `score`, others `judge`."""

    reads: ClassVar[Literal["map", "early_map"] | None] = None
    """The feature map it reads: the trunk's last, or the last one that is twice as large. Such a
    loss is a `MapLoss`."""
    twin: ClassVar[TwinKind | None] = None
    """The twin it reads."""
    sees_variations: ClassVar[bool] = False
    """Whether it asks how each image was degraded."""
    neck: ClassVar[str | None] = None
    """The neck whose parts it reads."""

    def __init__(self, embedding_dim: int, identity_count: int) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.identity_count = identity_count

    def prepare(self, label: Tensor) -> None:
        """Look at the labels of the whole training set, (n,) int64, before the first step."""

    def look(self, seen: Seen) -> Tensor:
        """What is seen of b images to (b,) float32."""
        with torch.autocast(seen.embedding.device.type, enabled=False):
            return self.judge(seen.to_float())

    def judge(self, seen: Seen) -> Tensor:
        """`look` in float32, or in the tensors' own precision when called directly."""
        return self.score(seen.embedding, seen.label)

    def forward(self, embedding: Tensor, label: Tensor) -> Tensor:
        """(b, d) float and (b,) int64 in 0..identities-1 to (b,) float32."""
        return self.look(Seen(embedding, label))

    def score(self, embedding: Tensor, label: Tensor) -> Tensor:
        """The loss of embeddings alone, (b,), in their own precision."""
        raise NotImplementedError


class MapLoss(Auxiliary):
    """Base of the losses that read a feature map: they are built with its channels and side too."""

    reads: ClassVar[Literal["map", "early_map"] | None] = "map"

    def __init__(
        self, embedding_dim: int, identity_count: int, map_channels: int, map_side: int
    ) -> None:
        super().__init__(embedding_dim, identity_count)


class _Reversal(torch.autograd.Function):
    """The identity; its gradient points the other way."""

    @staticmethod
    def forward(_: object, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(value: Tensor) -> Tensor:
    """The same values with the opposite gradient (Ganin and Lempitsky 2015)."""
    found: Tensor = _Reversal.apply(value)
    return found


def mean_by_class(embedding: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means (c, d) of the c classes in a batch, each sample's class among them (b,), sizes (c,)."""
    _, place, size = torch.unique(label, return_inverse=True, return_counts=True)
    total = embedding.new_zeros(len(size), embedding.shape[1]).index_add(0, place, embedding)
    return total / size[:, None], place, size
