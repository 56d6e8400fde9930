"""Training of the recognizer on true and pseudo labels together.

The contract:
- The identities of the labelled and the pseudo-labelled set are disjoint, so each set has its own
  classification head on one trunk, and each head's loss is weighted by the set's share of the
  images (Zhan et al. 2018, section 3.4).
- Images without a label, and of classes below `min_size`, are left out of the heads; the remaining
  classes are numbered anew, so labels may be any numbers.
- With a teacher every image that has a teacher vector is trained on, labelled or not.
- A pretrained backbone starts where it is: a teacher's vectors are turned onto its own.
- Same values, same seed: the same weights, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from cdp.embedding import BackboneEmbedder
from cdp.errors import ConfigError, DataError
from cdp.models import Backbone, build_backbone
from cdp.models.auxiliary import Auxiliary, build_auxiliary
from cdp.models.heads import Head, build_head
from cdp.recognizer.recognizer import Recognizer
from cdp.training.distillation import Start, fit_target
from cdp.training.loop import train_model
from cdp.training.plan import OPTIMIZERS, State, TrainingPlan
from cdp.training.sets import FaceRows, MaskedNegatives, Share, SoftTargets, TrainingSet
from cdp.types import UNLABELLED

START_IMAGES = 4096
"""Images on which a teacher's vectors are turned onto those of a pretrained student, at most."""


@dataclass(frozen=True)
class FaceSet:
    """Faces with labels, as they are given to `train_recognizer`.

    images : (n, s, s, 3) uint8, RGB; a memory map will do
    label : (n,) int64 or None
        Any numbers; `UNLABELLED` (-1) for none. None: no image has a label.
    weight : (n,) float or None
        Factor on each image's loss, 0 or above; None is 1 for all.
    soft : SoftTargets or None
        Several weighted classes of some images: rows of `images`, numbers of `label`. Images
        without a hard label stay left out, and so do classes that are.
    masked_negatives : MaskedNegatives or None
        Classes that are left out of an image's negatives, in the same rows and numbers.
    teacher : (n, t) float, unit length, or None
        A stronger model's vectors of the images, which are trained to point in their direction (see
        `cdp.training.distillation`), those without a label included.
    min_size : int
        Smallest class that is kept.

    Raises
    ------
    DataError
        Labels, weights or teacher vectors that are not one an image.
    """

    images: np.ndarray
    label: np.ndarray | None = None
    weight: np.ndarray | None = None
    soft: SoftTargets | None = None
    masked_negatives: MaskedNegatives | None = None
    teacher: np.ndarray | None = None
    min_size: int = 1

    def __post_init__(self) -> None:
        for title, values in (
            ("label", self.label),
            ("weight", self.weight),
            ("teacher vector", self.teacher),
        ):
            if values is not None and len(values) != len(self.images):
                raise DataError(
                    f"one {title} an image expected in a face set, got {len(self.images)} images "
                    f"and {len(values)} {title}s"
                )

    def select_classes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the kept classes, their labels numbered anew, and the classes' old numbers.

        All three are empty with fewer than two classes: a head needs two.
        """
        none = np.empty(0, np.int64)
        if self.label is None:
            return none, none, none
        rows, renumbered = select_classes(self.label, min_size=self.min_size)
        classes = np.unique(np.asarray(self.label)[rows])
        return (rows, renumbered, classes) if len(classes) > 1 else (none, none, none)

    def pick(self, rows: np.ndarray) -> np.ndarray | FaceRows:
        """Some images, ascending; read when they are indexed."""
        return self.images if len(rows) == len(self.images) else FaceRows(self.images, rows)


@dataclass(frozen=True)
class RecognizerSpec:
    """The architecture and the losses of a recognizer; both heads alike.

    backbone, input_px, embedding_dim, width, neck
        As `build_backbone`.
    head, head_params, sampled_classes
        As `build_head`.
    auxiliaries : mapping of str to mapping
        Losses added to the heads: name to the parameters of `build_auxiliary`, and the `weight` of
        the loss (1 by default).
    """

    backbone: str = "residual"
    input_px: int = 24
    embedding_dim: int = 128
    width: float = 1.0
    neck: str = "own"
    head: str = "adaface"
    head_params: Mapping[str, Any] = field(default_factory=dict)
    auxiliaries: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    sampled_classes: int | None = None

    def make_backbone(self, *, seed: int) -> Backbone:
        """A backbone with fresh weights."""
        return build_backbone(
            self.backbone,
            input_px=self.input_px,
            embedding_dim=self.embedding_dim,
            width=self.width,
            neck=self.neck,
            seed=seed,
        )

    def make_head(self, class_count: int, *, seed: int, optimizer: str) -> Head:
        """A head with fresh weights, to be trained by an optimizer of `OPTIMIZERS`."""
        return build_head(
            self.head,
            self.embedding_dim,
            class_count,
            seed=seed,
            sampled_classes=self.sampled_classes,
            memories=OPTIMIZERS[optimizer],
            **self.head_params,
        )

    def make_auxiliaries(
        self, class_count: int, *, seed: int, backbone: Backbone
    ) -> tuple[tuple[float, Auxiliary], ...]:
        """The added losses of a backbone with fresh weights, each after its factor."""
        added = []
        for name, params in self.auxiliaries.items():
            own = {key: value for key, value in params.items() if key != "weight"}
            loss = build_auxiliary(
                name, self.embedding_dim, class_count, seed=seed, backbone=backbone, **own
            )
            added.append((params.get("weight", 1.0), loss))
        return tuple(added)


def select_classes(label: np.ndarray, *, min_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows of classes that are large enough, and their classes numbered anew.

    Parameters
    ----------
    label : (n,) int64
        `UNLABELLED` (-1) for none.
    min_size : int
        Smallest class that is kept.

    Returns
    -------
    rows : (m,) int64, ascending
    renumbered : (m,) int64 in 0..classes-1, in the order of `label`'s numbers.
    """
    label = np.asarray(label)
    labelled = np.flatnonzero(label != UNLABELLED)
    _, inverse, size = np.unique(label[labelled], return_inverse=True, return_counts=True)
    rows = labelled[size[inverse] >= min_size]
    renumbered = np.unique(label[rows], return_inverse=True)[1]
    return rows, renumbered.astype(np.int64)


def train_recognizer(
    labelled: FaceSet | None,
    pseudo: FaceSet | None = None,
    extra: FaceSet | None = None,
    *,
    spec: RecognizerSpec,
    plan: TrainingPlan,
    pretrained: Backbone | None = None,
    pseudo_share: Share | None = None,
    meta: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[State], None] | None = None,
    progress: bool = True,
    description: str = "train recognizer",
) -> tuple[Recognizer, list[dict[str, float]]]:
    """Train a recognizer on labelled and pseudo-labelled faces.

    Parameters
    ----------
    labelled : FaceSet or None
        The labelled set.
    pseudo : FaceSet or None
        The unlabelled set with its pseudo-labels. Without it, this is the labelled-only recognizer:
        same code, one head.
    extra : FaceSet or None
        Unlabelled images used for distillation only: teacher vectors, no labels.
    spec : RecognizerSpec
    plan : TrainingPlan
    pretrained : Backbone or None
        Trained further, in place, where the default is a backbone of `spec` with fresh weights; of
        `spec` the heads and losses are used. See `open_pretrained`.
    pseudo_share : float, (first, last) or None
        Part of the pseudo-labelled set in batch and loss, in (0, 1); None: its part of the images.
        Of a pair the loss's part moves from `first` to `last`, see `TrainingSet`.
    meta : mapping or None
        Kept with the recognizer.
    device, resume, on_epoch, progress, description
        As `train_model`.

    Returns
    -------
    recognizer : Recognizer
    history : list of dict
        As `train_model`.

    Raises
    ------
    DataError
        Nothing to train on: fewer than two classes in either set and no teacher; or extra images
        with labels or without a teacher.
    ConfigError, StageError
        As `build_backbone`, `build_head`, `build_auxiliary` and `train_model`; or a pretrained
        backbone whose vectors have another length than `spec` says.

    Examples
    --------
    >>> import numpy as np
    >>> images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    >>> recognizer, history = train_recognizer(
    ...     FaceSet(images, np.arange(12) // 3),
    ...     spec=RecognizerSpec("plain", input_px=16, embedding_dim=32),
    ...     plan=TrainingPlan(epochs=1, batch_size=4),
    ...     device="cpu",
    ...     progress=False,
    ... )
    >>> recognizer.embed(images).shape
    (12, 32)
    """
    if pseudo_share is not None and not all(0 < part < 1 for part in _pair(pseudo_share)):
        raise ConfigError(f"pseudo_share between 0 and 1 expected, got {pseudo_share}")
    if extra is not None and (extra.teacher is None or extra.label is not None):
        raise DataError("extra images are used for distillation only: give teacher, no label")
    face_sets = [each for each in (labelled, pseudo, extra) if each is not None]
    backbone = pretrained or spec.make_backbone(seed=plan.seed)
    if backbone.spec.embedding_dim != spec.embedding_dim:
        raise ConfigError(
            f"embedding_dim: {backbone.spec.embedding_dim} expected, the length of the pretrained "
            f"network's vectors, got {spec.embedding_dim}"
        )
    targets = _fit_targets(face_sets, spec.embedding_dim, pretrained, device, plan.seed)
    training_sets = _make_training_sets(face_sets, targets, spec, plan, pseudo_share, backbone)
    history = train_model(
        backbone,
        training_sets,
        plan,
        device=device,
        resume=resume,
        on_epoch=on_epoch,
        progress=progress,
        description=description,
    )
    return Recognizer(backbone, meta, device=device), history


def _make_training_sets(
    face_sets: Sequence[FaceSet],
    targets: Sequence[np.ndarray | None],
    spec: RecognizerSpec,
    plan: TrainingPlan,
    pseudo_share: Share | None,
    backbone: Backbone,
) -> list[TrainingSet]:
    """One set with a head a face set that has classes, then one without for its other images."""
    classified: list[TrainingSet] = []
    distilled: list[TrainingSet] = []
    for faces, target in zip(face_sets, targets, strict=True):
        rows, label, classes = faces.select_classes()
        if len(rows):
            seed, count = plan.seed + len(classified), len(classes)
            soft, masked = faces.soft, faces.masked_negatives
            classified.append(
                TrainingSet(
                    spec.make_head(count, seed=seed, optimizer=plan.optimizer),
                    faces.pick(rows),
                    label,
                    None if faces.weight is None else faces.weight[rows],
                    soft=None if soft is None else soft.renumber(rows, classes),
                    masked_negatives=None if masked is None else masked.renumber(rows, classes),
                    teacher=None if target is None else target[rows],
                    auxiliaries=spec.make_auxiliaries(count, seed=seed, backbone=backbone),
                )
            )
        others = np.setdiff1d(np.arange(len(faces.images)), rows)
        if target is not None and len(others):
            distilled.append(TrainingSet(None, faces.pick(others), None, teacher=target[others]))
    if not classified and not distilled:
        raise DataError(
            "at least two identities with enough images are needed to train a recognizer, in the "
            "labelled or the pseudo-labelled set; neither has them. Lower min_size or the "
            "propagation threshold"
        )
    return [*_divide(classified, distilled, pseudo_share), *distilled]


def _fit_targets(
    face_sets: Sequence[FaceSet],
    embedding_dim: int,
    pretrained: Backbone | None,
    device: str,
    seed: int,
) -> list[np.ndarray | None]:
    """Distillation targets, fitted on the teacher's vectors of all sets together; None a set
    without."""
    followed = [each for each in face_sets if each.teacher is not None]
    vectors = [each.teacher for each in followed if each.teacher is not None]
    if not vectors:
        return [None] * len(face_sets)
    if len({each.shape[1:] for each in vectors}) > 1:
        raise DataError("the vectors of the teacher are of different lengths; use one model")
    start = None if pretrained is None else _find_start(followed, pretrained, device)
    target = fit_target(np.concatenate(vectors), embedding_dim, start=start, seed=seed)
    parts = iter(np.split(target, np.cumsum([len(each) for each in vectors])[:-1]))
    return [None if each.teacher is None else next(parts) for each in face_sets]


def _find_start(face_sets: Sequence[FaceSet], pretrained: Backbone, device: str) -> Start:
    """What the student makes of at most `START_IMAGES` of its images, evenly spread over them."""
    counts = [len(each.images) for each in face_sets]
    rows = np.unique(np.linspace(0, sum(counts) - 1, START_IMAGES).astype(np.int64))
    embedder = BackboneEmbedder(pretrained, device=device)
    raw = np.empty((len(rows), embedder.embedding_dim), np.float32)
    for each, first in zip(face_sets, np.cumsum([0, *counts]).tolist(), strict=False):
        mine = np.flatnonzero((rows >= first) & (rows < first + len(each.images)))
        vectors, norm = embedder.embed(each.pick(rows[mine] - first))  # type: ignore[arg-type]
        raw[mine] = vectors * norm[:, None]
    return Start(rows, raw)


def _divide(
    classified: Sequence[TrainingSet], distilled: Sequence[TrainingSet], share: Share | None
) -> list[TrainingSet]:
    """Give the pseudo-labelled set its share of what the two sets have together."""
    if share is None or len(classified) < 2:
        return list(classified)
    together = sum(len(each.images) for each in classified)
    everything = together + sum(len(each.images) for each in distilled)
    begin, end = (part * together / everything for part in _pair(share))
    others = [(1 - part) * together / everything for part in _pair(share)]
    return [
        replace(classified[0], share=(others[0], others[1])),
        replace(classified[1], share=(begin, end)),
    ]


def _pair(share: Share) -> tuple[float, float]:
    """A share at the start and at the end of a training."""
    return (share, share) if isinstance(share, int | float) else (share[0], share[1])
