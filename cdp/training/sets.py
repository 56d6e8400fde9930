"""What is trained on: images, what is known of them, and the order they are shown in.

The contract:
- A branch is a set of images with a head of its own; one without a head has no classes, and its
  images learn from a teacher alone.
- Everything drawn at random is a function of (seed, branch, pass, image) and of nothing else: any
  place of the order can be had at once, whatever came before.
- Nothing here knows of batches, devices or the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cdp.errors import ConfigError, DataError
from cdp.models.auxiliary import Auxiliary
from cdp.models.heads import Head

Sampling = Literal["image", "identity"]


class FaceRows:
    """Some rows of an image array, read when they are asked for; what a branch needs of an array.

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
class SoftTargets:
    """A few weighted classes an image, as a sparse table.

    row : (e,) int64, ascending: the image's row in its branch. An image that is not there keeps its
        hard label.
    label : (e,) int64, a class.
    weight : (e,) float, above 0: shares of the image, which are scaled to sum to 1 an image.
    """

    row: np.ndarray
    label: np.ndarray
    weight: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.row) == len(self.label) == len(self.weight):
            raise DataError(
                f"soft targets: row, label and weight of one length expected, got {len(self.row)}, "
                f"{len(self.label)} and {len(self.weight)}"
            )
        if len(self.row) and (np.diff(self.row) < 0).any():
            raise DataError("soft targets: rows in ascending order expected; sort the table by row")
        if len(self.row) and not (np.isfinite(self.weight).all() and self.weight.min() > 0):
            raise DataError("soft targets: finite weights above 0 expected; drop the others")

    def renumber(self, rows: np.ndarray, classes: np.ndarray) -> SoftTargets:
        """The targets of the kept images and classes, both numbered anew.

        rows : (m,) int64, ascending, the images that are kept.
        classes : (c,) int64, ascending, the classes that are kept.
        """
        place = np.searchsorted(rows, self.row)
        number = np.searchsorted(classes, self.label)
        kept = np.isin(self.row, rows) & np.isin(self.label, classes)
        return SoftTargets(place[kept], number[kept], self.weight[kept])

    def take(self, rows: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, ...]:
        """The targets of some images: place in `rows`, class and weight, a line a target.

        label : (len(rows),) int64, the class of an image without soft targets.
        """
        first, last = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows, "right")
        count = np.maximum(last - first, 1)
        place = np.repeat(np.arange(len(rows)), count)
        entry = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count) + first[place]
        known = (last > first)[place]
        entry[~known] = 0
        if not len(self.row):
            return place, label[place], np.ones(len(place))
        weight = np.where(known, self.weight[entry], 1.0)
        weight = weight / np.bincount(place, weights=weight, minlength=len(rows))[place]
        return place, np.where(known, self.label[entry], label[place]), weight


@dataclass(frozen=True)
class MaskedNegatives:
    """Classes an image may belong to beside its own, as a sparse table.

    row : (e,) int64, ascending: the image's row in its branch.
    label : (e,) int64, a class that is not its own.
    """

    row: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        if len(self.row) != len(self.label):
            raise DataError(
                f"masked classes: row and label of one length expected, got {len(self.row)} and "
                f"{len(self.label)}"
            )
        if len(self.row) and (np.diff(self.row) < 0).any():
            raise DataError("masked classes: rows in ascending order expected; sort by row")

    def renumber(self, rows: np.ndarray, classes: np.ndarray) -> MaskedNegatives:
        """What concerns the kept images and classes; parameters as `SoftTargets.renumber`."""
        kept = np.isin(self.row, rows) & np.isin(self.label, classes)
        place = np.searchsorted(rows, self.row[kept])
        return MaskedNegatives(place, np.searchsorted(classes, self.label[kept]))

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Place in `rows` and class, a line a masked class."""
        first, last = np.searchsorted(self.row, rows), np.searchsorted(self.row, rows, "right")
        count = last - first
        place = np.repeat(np.arange(len(rows)), count)
        entry = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count) + first[place]
        return place, self.label[entry]


@dataclass(frozen=True)
class Branch:
    """Images with labels and the head that learns them.

    head : Head or None
        Trained in place. None: no classes; the images learn from `teacher` alone.
    images : (n, s, s, 3) uint8, RGB; a memory map will do
    label : (n,) int64 in 0..identities-1; None without a head
    weight : (n,) float or None
        Factor on each image's loss, 0 or above; None is 1 for all.
    share : float or None
        Part of each batch, and weight of this branch's loss. None is the branch's part of all
        images. Shares are scaled to sum to 1.
    soft : SoftTargets or None
        What an image is instead of its one label: the loss is the weighted mean of the head's
        losses for each of its classes.
    masked : MaskedNegatives or None
        Classes an image is not pushed away from.
    teacher : (n, embedding_dim) float32, unit length, or None
        What the embedding should point at: see `cdp.training.distillation`.
    auxiliaries : tuple of (weight, Auxiliary)
        Added to the head's loss, on the hard labels. Trained in place.
    sampling : str
        "image": each image once a pass. "identity": each identity `images_per_identity` times a
        pass, whatever number of images it has (Zhang et al. 2017 call the rest the long tail).
    images_per_identity : int
        Images of one identity shown in a row, with sampling by identity; losses that compare images
        of one identity within a batch need 2 or more.
    """

    head: Head | None
    images: np.ndarray | FaceRows
    label: np.ndarray | None
    weight: np.ndarray | None = None
    share: float | None = None
    soft: SoftTargets | None = None
    masked: MaskedNegatives | None = None
    teacher: np.ndarray | None = None
    auxiliaries: tuple[tuple[float, Auxiliary], ...] = ()
    sampling: Sampling = "image"
    images_per_identity: int = 1

    def __post_init__(self) -> None:
        count = len(self.images)
        if count == 0:
            raise DataError("a branch without images cannot be trained; leave it out")
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                f"branch images (n, s, s, 3) uint8 expected, got {self.images.shape} "
                f"{self.images.dtype}"
            )
        if self.head is None:
            given = (self.label, self.soft, self.masked)
            if self.teacher is None or any(each is not None for each in given):
                raise DataError(
                    "a branch without a head learns from a teacher alone: give teacher, no labels"
                )
        else:
            self._check_label(count, self.head.identity_count)
        if self.weight is not None and (
            self.weight.shape != (count,)
            or not np.isfinite(self.weight).all()
            or self.weight.min() < 0
        ):
            raise DataError("a branch's weights must be (n,), finite and 0 or above")
        if self.teacher is not None and (self.teacher.ndim != 2 or len(self.teacher) != count):
            raise DataError(
                f"{count} teacher vectors expected, got an array of {self.teacher.shape}"
            )
        if self.sampling not in ("image", "identity") or self.images_per_identity < 1:
            raise ConfigError(
                "sampling by image or identity, of 1 image an identity or more, expected, got "
                f"{self.sampling!r} and {self.images_per_identity}"
            )

    def _check_label(self, count: int, identities: int) -> None:
        if self.label is None or self.label.shape != (count,):
            got = "none" if self.label is None else f"an array of {self.label.shape}"
            raise DataError(f"{count} labels expected, got {got}")
        low, high = int(self.label.min()), int(self.label.max())
        for title, table in (("soft targets", self.soft), ("masked classes", self.masked)):
            if table is None or not len(table.row):
                continue
            low, high = min(low, int(table.label.min())), max(high, int(table.label.max()))
            if table.row[0] < 0 or table.row[-1] >= count:
                raise DataError(
                    f"{title} of rows 0..{count - 1} expected, got {table.row[0]}..{table.row[-1]}"
                )
        if self.masked is not None and (self.label[self.masked.row] == self.masked.label).any():
            raise DataError("an image is masked its own class, which it could not learn then")
        if low < 0 or high >= identities:
            raise DataError(
                f"labels in 0..{identities - 1} expected, got {low}..{high}; "
                "leave unlabelled images out"
            )
