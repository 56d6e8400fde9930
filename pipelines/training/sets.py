"""What a model is trained on: images with labels, by content, and the job of training on them.

The contract:
- A set names its images by path and content; nothing is read here.
- The digest of a set covers content, labels, weights and tables, in order: it is part of the key
  under which a trained model is found again.
- Classes are numbered 0 .. classes-1 in the order of their numbers or names before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED
from pipelines.config import RetrainSettings, TrainingSettings
from pipelines.decisions import Decision, find_keys, find_names
from pipelines.stage import Work
from pipelines.tables import SPLITS
from pipelines.training.pretrained import Pretrained, find_pretrained

if TYPE_CHECKING:
    from cdp.training.sets import MaskedNegatives, SoftTargets


@dataclass(frozen=True)
class LabelledSet:
    """Images with classes: what one head is trained on.

    paths, sha256 : (n,) the files, and their content.
    label : (n,) int64, 0 .. classes-1; -1 for an image that is used for distillation only.
    weight : (n,) float32 factor on each image's loss, or None for all equal.
    soft : SoftTargets or None, the weighted classes of some rows.
    masked_negatives : MaskedNegatives or None, classes that some rows leave out of their negatives.
    """

    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    label: np.ndarray
    weight: np.ndarray | None = None
    soft: SoftTargets | None = None
    masked_negatives: MaskedNegatives | None = None

    def digest(self) -> str:
        """SHA-256 over content, labels, weights and tables, in order."""
        total = hashlib.sha256("\n".join(self.sha256).encode())
        total.update(np.ascontiguousarray(self.label, np.int64).tobytes())
        if self.weight is not None:
            total.update(np.ascontiguousarray(self.weight, np.float32).tobytes())
        if self.soft is not None:
            for values in (self.soft.row, self.soft.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
            total.update(np.ascontiguousarray(self.soft.weight, np.float64).tobytes())
        if self.masked_negatives is not None:
            total.update(b"spared")
            for values in (self.masked_negatives.row, self.masked_negatives.label):
                total.update(np.ascontiguousarray(values, np.int64).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class TrainingJob:
    """One model to be trained: an architecture, its settings and its one or two labelled sets.

    pseudo_share : as in `train_recognizer`.
    """

    name: str
    backbone: str
    width: float
    settings: TrainingSettings
    labelled: LabelledSet | None
    pseudo: LabelledSet | None
    seed: int
    pseudo_share: float | tuple[float, float] | None = None
    teacher: TeacherVectors | None = None
    pretrained: Pretrained | None = None


@dataclass(frozen=True)
class TeacherVectors:
    """A teacher's vectors of the images of a job.

    digest : stands for all vectors in the model's key.
    labelled, pseudo : (n, t) and (u, t) float32 of unit length, or None for a set that is missing.
    distil_weight, class_weight : as in `TrainingPlan`.
    extra : faces (m, s, s, 3) uint8 that are used for distillation only, and the vectors of them.
    """

    digest: str
    labelled: np.ndarray | None
    pseudo: np.ndarray | None
    distil_weight: float
    class_weight: float
    extra: tuple[np.ndarray, np.ndarray] | None = None


def describe_job(
    work: Work,
    subject: str,
    labelled: LabelledSet | None,
    pseudo: LabelledSet | None,
    teacher: TeacherVectors | None = None,
    settings: RetrainSettings | None = None,
) -> TrainingJob:
    """The training of one subject, by the settings of `retrain` unless others are given."""
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
        find_pretrained(work, settings.pretrained),
    )


def name_clusters(samples: Any, pseudo_label: Any, decisions: Sequence[Decision]) -> Any:
    """The samples, where the unlabelled images that reviewers named are labelled ones.

    An image that shares a cluster with a named one is of that person too.

    samples : table of samples, copies included. pseudo_label : Series by sample_id.
    decisions : of reviewers, on unlabelled images.
    """
    import pandas as pd

    pile = samples[samples.split == SPLITS[1]]
    said = find_names(decisions, find_keys(pile)).identity
    label = pile.sample_id.map(pseudo_label).fillna(UNLABELLED).to_numpy(np.int64)
    named = pd.notna(said)
    inside = label != UNLABELLED
    person = dict(zip(label[named & inside], said[named & inside], strict=True))
    follows = inside & ~named
    said[follows] = [person.get(each) for each in label[follows].tolist()]
    found = samples.copy()
    known = pd.notna(said)
    rows = pile.index[known]
    found.loc[rows, "identity"] = said[known]
    found.loc[rows, "split"] = SPLITS[0]
    return found


def select_labelled(work: Work, without: Collection[str] = (), samples: Any = None) -> LabelledSet:
    """The labelled images but those of some identities; classes in the order of the names.

    samples : table of samples to choose from; None: that of ingest.
    """
    samples = work.read("ingest.samples").to_pandas() if samples is None else samples
    labelled = samples[(samples.split == "labelled") & ~samples.identity.isin(list(without))]
    identities = labelled.identity.nunique()
    if identities < 2:
        raise DataError(
            "training needs labelled images of at least 2 people, the data set has "
            f"{identities}. Add labelled people, or give every member of the committee an `onnx` "
            "or `checkpoint` file, which need no training: see docs/models.md"
        )
    label = labelled.identity.factorize(sort=True)[0].astype(np.int64)
    return LabelledSet(tuple(labelled.path), tuple(labelled.sha256), label)


def draw_for_mediator(names: np.ndarray, share: float, seed: int) -> set[str]:
    """The labelled people that no member is trained on; `names` sorted, each once."""
    order = np.random.default_rng(seed).permutation(len(names))
    return set(names[order[: round(share * len(names))]])


def describe_kept(kept: int, people: int) -> str:
    """That only some labelled people are kept for the mediator, in brackets; "" if all are."""
    if kept >= people:
        return ""
    return f" (train.mediator_share keeps {kept} of the {people} labelled people for it)"


def describe_kept_of(work: Work, kept: int) -> str:
    """`describe_kept` of the people of a run."""
    samples = work.read("ingest.samples", columns=["split", "identity"]).to_pandas()
    people = samples[samples.split == SPLITS[0]].identity.nunique()
    return describe_kept(kept, people)


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
    """Images of classes with at least `min_size` images; None when there are fewer than two.

    samples : table of (sample_id, path, sha256, `column`), ascending by sample_id.
    column : of the classes; `UNLABELLED` is none.
    weigh : whether an image's loss is weighted by its `confidence`.
    soft : table of (sample_id, pseudo_label, weight) or None; its lines of classes and images that
        are left out are dropped.
    alone : every other image is kept too, each in a class of its own.
    pairs : table of (source, target) or None, images that may be of one identity. Where the two are
        of different classes, each masks the other's.
    """
    from cdp.recognizer.fit import select_classes

    classes = samples[column].to_numpy()
    if classes.dtype.kind not in "iu":
        classes = samples[column].factorize(sort=True)[0]
    if alone:
        classes = _number_leftovers(classes, min_size)
        min_size = 1
    rows, label = select_classes(classes, min_size=min_size)
    numbers = np.unique(classes[rows])
    if len(numbers) < 2:
        return None
    masked = targets = None
    if pairs is not None:
        masked = _mask_pairs(samples.sample_id.to_numpy(), pairs, classes)
        masked = masked.renumber(rows, numbers)
    if soft is not None:
        targets = _list_targets(samples.sample_id, soft).renumber(rows, numbers)
    chosen = samples.iloc[rows]
    weight = chosen.confidence.to_numpy(np.float32) if weigh else None
    return LabelledSet(tuple(chosen.path), tuple(chosen.sha256), label, weight, targets, masked)


def _number_leftovers(classes: np.ndarray, min_size: int) -> np.ndarray:
    """Give each image without a class, or of too small a one, a new class."""
    from cdp.recognizer.fit import select_classes

    left = np.ones(len(classes), bool)
    left[select_classes(classes, min_size=min_size)[0]] = False
    numbered = classes.copy()
    numbered[left] = int(classes.max(initial=UNLABELLED)) + 1 + np.arange(left.sum())
    return numbered


def _list_targets(sample_id: Any, soft: Any) -> SoftTargets:
    """The table of soft labels by row of `sample_id`, ascending; weights of 0 are dropped."""
    from cdp.training.sets import SoftTargets

    soft = soft.sort_values(["sample_id", "pseudo_label"])
    place = np.searchsorted(sample_id, soft.sample_id)
    known = np.isin(soft.sample_id, sample_id) & (soft.weight > 0).to_numpy()
    return SoftTargets(
        place[known], soft.pseudo_label.to_numpy()[known], soft.weight.to_numpy(np.float64)[known]
    )


def _mask_pairs(sample_id: np.ndarray, pairs: Any, classes: np.ndarray) -> MaskedNegatives:
    """The two images of each pair that have different classes, and the class of the other.

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
