"""What a model is trained on: images with labels, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED
from pipelines.config import RetrainSettings, TrainingSettings
from pipelines.stage import Work

if TYPE_CHECKING:
    from cdp.training.sets import MaskedNegatives, SoftTargets
if TYPE_CHECKING:
    from cdp.training.sets import MaskedNegatives


@dataclass(frozen=True)
class LabelledSet:
    """Samples with classes: what one head is trained on.

    paths, sha256 : (n,) what to read, and its content.
    label : (n,) int64, 0 .. classes - 1; -1 for an image that only a teacher has something to say
        of.
    weight : (n,) float32 per image, or None for all equal.
    soft : SoftTargets or None, the weighted classes of some rows.
    masked : MaskedNegatives or None, the classes some rows may belong to beside their own.
    """

    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    label: np.ndarray
    weight: np.ndarray | None = None
    soft: SoftTargets | None = None
    masked: MaskedNegatives | None = None

    def digest(self) -> str:
        """Over content, labels and weights, in order."""
        total = hashlib.sha256("\n".join(self.sha256).encode())
        total.update(np.ascontiguousarray(self.label, np.int64).tobytes())
        if self.weight is not None:
            total.update(np.ascontiguousarray(self.weight, np.float32).tobytes())
        if self.soft is not None:
            for values in (self.soft.row, self.soft.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
            total.update(np.ascontiguousarray(self.soft.weight, np.float64).tobytes())
        if self.masked is not None:
            total.update(b"spared")
            for values in (self.masked.row, self.masked.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingJob:
    """One model to be had: an architecture, and what its one or two heads are trained on.

    pseudo_share : as `train_recognizer`'s share.
    teacher : key and vectors (n, t) of the labelled and (u, t) of the pseudo-labelled images, and
        the weight of following them; None without a teacher.
    """

    name: str
    backbone: str
    width: float
    settings: TrainingSettings
    labelled: LabelledSet | None
    pseudo: LabelledSet | None
    seed: int
    pseudo_share: float | None = None
    teacher: TeacherVectors | None = None


@dataclass(frozen=True)
class TeacherVectors:
    """What a teacher says of the images of a job; `digest` stands for all of it in the key.

    weight, class_weight : of the distance to them, and of the classes beside it.
    more : faces (m, s, s, 3) uint8 that only the teacher knows, and its vectors of them, or None.
    """

    digest: str
    labelled: np.ndarray | None
    pseudo: np.ndarray | None
    weight: float
    class_weight: float
    more: tuple[np.ndarray, np.ndarray] | None = None


def describe_job(
    work: Work,
    subject: str,
    labelled: LabelledSet | None,
    pseudo: LabelledSet | None,
    teacher: TeacherVectors | None = None,
    settings: RetrainSettings | None = None,
) -> TrainingJob:
    """The recognizer trained on these sets, with the settings every subject shares, or its own."""
    settings = settings or work.config.retrain
    return TrainingJob(
        subject,
        settings.backbone,
        settings.width,
        settings,
        labelled,
        pseudo,
        work.seed,
        None if labelled is None or pseudo is None else settings.pseudo_share,
        teacher,
    )


def select_clusters(
    samples: Any,
    column: str,
    min_size: int,
    *,
    weigh: bool,
    soft: Any = None,
    alone: bool = False,
    pairs: Any = None,
) -> LabelledSet | None:
    """Samples of classes with at least `min_size` images; None when there are fewer than two.

    soft : table of (sample_id, pseudo_label, weight) or None; what it says of classes that are left
        out is dropped.
    alone : every other sample is kept too, as a class of its own.
    pairs : table of (source, target), samples that may be of one person, or None. Of two classes,
        each is masked the other's.
    """
    from cdp.recognizer.fit import select_classes
    from cdp.training.sets import SoftTargets

    classes = samples[column].to_numpy()
    if classes.dtype.kind not in "iu":
        classes = samples[column].factorize(sort=True)[0]
    if alone:
        lonely = np.ones(len(classes), bool)
        lonely[select_classes(classes, min_size=min_size)[0]] = False
        start = int(classes.max(initial=UNLABELLED)) + 1
        classes = classes.copy()
        classes[lonely] = start + np.arange(lonely.sum())
        min_size = 1
    rows, label = select_classes(classes, min_size=min_size)
    numbers = np.unique(classes[rows])
    if len(numbers) < 2:
        return None
    masked = None
    if pairs is not None:
        masked = _mask_pairs(samples.sample_id.to_numpy(), pairs, classes)
        masked = masked.renumber(rows, numbers)
    chosen = samples.iloc[rows]
    weight = chosen.confidence.to_numpy(np.float32) if weigh else None
    targets = None
    if soft is not None:
        soft = soft.sort_values(["sample_id", "pseudo_label"])
        place = np.searchsorted(samples.sample_id, soft.sample_id)
        known = np.isin(soft.sample_id, samples.sample_id) & (soft.weight > 0).to_numpy()
        targets = SoftTargets(
            place[known],
            soft.pseudo_label.to_numpy()[known],
            soft.weight.to_numpy(np.float64)[known],
        ).renumber(rows, numbers)
    return LabelledSet(tuple(chosen.path), tuple(chosen.sha256), label, weight, targets, masked)


def _mask_pairs(sample_id: np.ndarray, pairs: Any, classes: np.ndarray) -> MaskedNegatives:
    """The two of each pair that have two classes, and the class of the other.

    sample_id, classes : (n,), ascending; of every sample. `UNLABELLED` is no class.
    """
    from cdp.training.sets import MaskedNegatives

    ends = [pairs[end].to_numpy() for end in ("source", "target")]
    known = np.isin(ends[0], sample_id) & np.isin(ends[1], sample_id)
    source, target = (np.searchsorted(sample_id, end[known]) for end in ends)
    own, other = classes[source], classes[target]
    apart = (own != other) & (own != UNLABELLED) & (other != UNLABELLED)
    row = np.concatenate([source[apart], target[apart]])
    label = np.concatenate([other[apart], own[apart]])
    numbers = int(classes.max(initial=0)) + 1
    row, label = np.divmod(np.unique(row * numbers + label), numbers)
    return MaskedNegatives(row, label)


def select_labelled(work: Work, without: Collection[str] = ()) -> LabelledSet:
    """The labelled samples but those of some people, people numbered in order of name."""
    samples = work.read("ingest.samples").to_pandas()
    labelled = samples[(samples.split == "labelled") & ~samples.identity.isin(list(without))]
    people = labelled.identity.nunique()
    if people < 2:
        raise DataError(
            f"training needs labelled images of at least 2 people, the data set has {people}. "
            "Add labelled images, or give the committee ONNX files or checkpoints only and vote: "
            "mediate.method=vote"
        )
    label = labelled.identity.factorize(sort=True)[0].astype(np.int64)
    return LabelledSet(tuple(labelled.path), tuple(labelled.sha256), label)
