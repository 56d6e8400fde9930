"""Training sets: images, their labels and weights, and the head that is trained on them.

The contract:
- A training set has a head; one without a head has no classes, and its images are used for
  distillation only.
- Soft targets and masked negatives are sparse tables of (row, class), ascending by row.
- Wrong shapes, rows or classes are a `DataError` when a value is made, not a step of training.
- Nothing here knows of batches, devices or the network.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import numpy as np

from cdp.errors import DataError
from cdp.models.auxiliary import Auxiliary
from cdp.models.heads import Head

Share = float | tuple[float, float]
"""A part of the images and the loss, or its value at the start and at the end of a training."""


class FaceRows:
    """Some rows of an image array, read when they are indexed; a lazy `images[rows]`.

    images : (n, s, s, 3) uint8; a memory map stays one
    rows : (m,) int64
    """

    def __init__(self, images: np.ndarray, rows: np.ndarray) -> None:
        self.images, self.rows = images, rows
        self.dtype, self.ndim = images.dtype, images.ndim
        self.shape = (len(rows), *images.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return np.asarray(self.images[self.rows[places]])


@dataclass(frozen=True)
class RowLabels:
    """Further classes of some images, as a sparse table: the base of the two tables below.

    row : (e,) int64, ascending: the image's row in its training set.
    label : (e,) int64, a class.
    """

    title: ClassVar[str] = "row labels"

    row: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.title}: columns of one length expected, got {lengths}")
        if len(self.row) and (np.diff(self.row) < 0).any():
            raise DataError(
                f"{self.title}: rows in ascending order expected; sort the table by row"
            )

    def renumber(self, rows: np.ndarray, classes: np.ndarray) -> Self:
        """The entries of the kept images and classes, both numbered anew.

        rows : (m,) int64, ascending, the images that are kept.
        classes : (c,) int64, ascending, the classes that are kept.
        """
        kept = np.isin(self.row, rows) & np.isin(self.label, classes)
        columns = {field.name: getattr(self, field.name)[kept] for field in fields(self)}
        columns["row"] = np.searchsorted(rows, columns["row"])
        columns["label"] = np.searchsorted(classes, columns["label"])
        return replace(self, **columns)

    def check_range(self, image_count: int) -> None:
        """`DataError` when a row is none of 0..image_count-1."""
        if len(self.row) and (self.row[0] < 0 or self.row[-1] >= image_count):
            raise DataError(
                f"{self.title} of rows 0..{image_count - 1} expected, got "
                f"{self.row[0]}..{self.row[-1]}"
            )

    def _find_entries(
        self, rows: np.ndarray, *, at_least: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The entries of some images, `at_least` a line each: place in `rows`, entry, and whether
        the image has any entry at all."""
        first, last = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows, "right")
        count = np.maximum(last - first, at_least)
        place = np.repeat(np.arange(len(rows)), count)
        entry = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count) + first[place]
        return place, entry, (last > first)[place]


@dataclass(frozen=True)
class SoftTargets(RowLabels):
    """A few weighted classes an image. An image without an entry keeps its hard label.

    row : (e,) int64, ascending: the image's row in its training set.
    label : (e,) int64, a class.
    weight : (e,) float, above 0: shares of the image, which are scaled to sum to 1 an image.
    """

    title: ClassVar[str] = "soft targets"

    weight: np.ndarray

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.row) and not (np.isfinite(self.weight).all() and self.weight.min() > 0):
            raise DataError(f"{self.title}: finite weights above 0 expected; drop the others")

    def take(self, rows: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, ...]:
        """The targets of some images: place in `rows`, class and weight, a line a target.

        label : (len(rows),) int64, the class of an image without soft targets.
        """
        place, entry, known = self._find_entries(rows, at_least=1)
        if not len(self.row):
            return place, label[place], np.ones(len(place))
        entry[~known] = 0
        weight = np.where(known, self.weight[entry], 1.0)
        weight = weight / np.bincount(place, weights=weight, minlength=len(rows))[place]
        return place, np.where(known, self.label[entry], label[place]), weight


@dataclass(frozen=True)
class MaskedNegatives(RowLabels):
    """Classes that an image's softmax leaves out of its negatives.

    An image that may belong to a second class is not pushed away from it.

    row : (e,) int64, ascending: the image's row in its training set.
    label : (e,) int64, a class other than the image's own.
    """

    title: ClassVar[str] = "masked negatives"

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place in `rows` and class, a line a masked class."""
        place, entry, _ = self._find_entries(rows, at_least=0)
        return place, self.label[entry]


@dataclass(frozen=True)
class TrainingSet:
    """Images with labels and the head that is trained on them.

    head : Head or None
        Trained in place. None: no classes; the images are used for distillation only.
    images : (n, s, s, 3) uint8, RGB; a memory map will do
    label : (n,) int64 in 0..identities-1; None without a head
    weight : (n,) float or None
        Factor on each image's loss, 0 or above; None is 1 for all.
    share : float, (first, last) or None
        Part of each batch, and weight of this set's loss. None is the set's part of all images. Of
        a pair the weight goes from `first` to `last` with the square of the epochs done, as BBN's
        does, and the part of a batch is the mean weight. Shares are scaled to sum to 1.
    soft : SoftTargets or None
        Several classes of an image in place of its label: the loss is the weighted mean of the
        head's losses for each of them.
    masked_negatives : MaskedNegatives or None
        Classes that are left out of an image's negatives.
    teacher : (n, embedding_dim) float32, unit length, or None
        Direction that each embedding is trained to have: see `cdp.training.distillation`.
    auxiliaries : tuple of (weight, Auxiliary)
        Added to the head's loss, on the hard labels. Trained in place.
    """

    head: Head | None
    images: np.ndarray | FaceRows
    label: np.ndarray | None
    weight: np.ndarray | None = None
    share: Share | None = None
    soft: SoftTargets | None = None
    masked_negatives: MaskedNegatives | None = None
    teacher: np.ndarray | None = None
    auxiliaries: tuple[tuple[float, Auxiliary], ...] = ()

    def __post_init__(self) -> None:
        count = len(self.images)
        if count == 0:
            raise DataError("a training set without images cannot be trained on; leave it out")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                f"training images (n, s, s, 3) uint8 expected, got {self.images.shape} "
                f"{self.images.dtype}"
            )
        if self.head is None:
            given = (self.label, self.soft, self.masked_negatives)
            if self.teacher is None or any(each is not None for each in given):
                raise DataError(
                    "a training set without a head is used for distillation only: give teacher, "
                    "no labels"
                )
        else:
            self._check_label(count, self.head.identity_count)
        if self.weight is not None and (
            self.weight.shape != (count,)
            or not np.isfinite(self.weight).all()
            or self.weight.min() < 0
        ):
            raise DataError("weights of training images must be (n,), finite and 0 or above")
        if self.teacher is not None and (self.teacher.ndim != 2 or len(self.teacher) != count):
            raise DataError(
                f"{count} teacher vectors expected, got an array of {self.teacher.shape}"
            )

    def _check_label(self, count: int, identities: int) -> None:
        if self.label is None or self.label.shape != (count,):
            got = "none" if self.label is None else f"an array of {self.label.shape}"
            raise DataError(f"{count} labels expected, got {got}")
        low, high = int(self.label.min()), int(self.label.max())
        masked = self.masked_negatives
        for table in (self.soft, masked):
            if table is not None and len(table.row):
                table.check_range(count)
                low, high = min(low, int(table.label.min())), max(high, int(table.label.max()))
        if masked is not None and (self.label[masked.row] == masked.label).any():
            raise DataError("masked negatives hold an image's own class; leave it out of the table")
        if low < 0 or high >= identities:
            raise DataError(
                f"labels in 0..{identities - 1} expected, got {low}..{high}; "
                "leave unlabelled images out"
            )
