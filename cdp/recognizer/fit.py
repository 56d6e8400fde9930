"""The product: a low-resolution recognizer, trained on true and pseudo labels together.

The contract:
- The identities of the two sets are disjoint, so each set has a classification head of its own on
  one trunk, and each head's loss weighs as much as its set's share of images (Zhan et al. 2018,
  section 3.4).
- Images without a pseudo-label, and of clusters below `min_size`, are left out of the heads; the
  classes that remain are numbered anew. The true labels' numbering is of no importance either.
- With a teacher every image is trained on, labelled or not: the teacher needs no label.
- A `Recognizer` is a backbone and all there is to know to use it, in one safetensors file: no code
  is run when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from cdp.errors import ConfigError, DataError
from cdp.models import build_backbone
from cdp.models.auxiliary import Auxiliary, build_auxiliary
from cdp.models.heads import build_head
from cdp.recognizer.recognizer import Recognizer
from cdp.training.distillation import fit_target
from cdp.training.loop import train_model
from cdp.training.plan import OPTIMIZERS, State, TrainingPlan
from cdp.training.sets import Branch, FaceRows, MaskedNegatives, Sampling, SoftTargets
from cdp.types import UNLABELLED


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
    images: np.ndarray | None,
    label: np.ndarray | None,
    pseudo_images: np.ndarray | None = None,
    pseudo_label: np.ndarray | None = None,
    *,
    plan: TrainingPlan,
    confidence: np.ndarray | None = None,
    soft: SoftTargets | None = None,
    masked: MaskedNegatives | None = None,
    teacher: np.ndarray | None = None,
    pseudo_teacher: np.ndarray | None = None,
    more_images: np.ndarray | None = None,
    more_teacher: np.ndarray | None = None,
    min_size: int = 2,
    share: float | None = None,
    sampling: Sampling = "image",
    images_per_identity: int = 1,
    backbone: str = "residual",
    input_px: int = 24,
    embedding_dim: int = 128,
    width: float = 1.0,
    head: str = "adaface",
    head_params: Mapping[str, Any] | None = None,
    auxiliaries: Mapping[str, Mapping[str, float]] | None = None,
    sampled_classes: int | None = None,
    meta: Mapping[str, Any] | None = None,
    device: str = "auto",
    resume: Mapping[str, Tensor] | None = None,
    on_epoch: Callable[[State], None] | None = None,
    progress: bool = True,
    description: str = "train recognizer",
) -> tuple[Recognizer, list[dict[str, float]]]:
    """Train a recognizer from scratch on labelled and pseudo-labelled faces.

    Parameters
    ----------
    images, label : (n, s, s, 3) uint8 and (n,) int64, or None
        The labelled set; -1 is left out.
    pseudo_images, pseudo_label : (u, s, s, 3) uint8 and (u,) int64, or None
        The unlabelled set and what propagation says; -1 is left out. Without it, this is the
        labelled-only recognizer: same code, one head.
    plan : TrainingPlan
    confidence : (u,) float or None
        Weight of each pseudo-labelled image's loss, 0 or above.
    soft : SoftTargets or None
        Weighted pseudo-labels of images (rows of `pseudo_images`, numbers of `pseudo_label`) that
        have several. Images without a hard label stay left out, and so do classes that are.
    masked : MaskedNegatives or None
        Classes that images may belong to beside their own, in the same numbers.
    teacher, pseudo_teacher : (n, t) and (u, t) float, unit length, or None
        A stronger model's vectors of these images. Every image that has one is trained to point
        where the teacher does (see `cdp.training.distillation`), those left out above included.
    more_images, more_teacher : (m, s, s, 3) uint8 and (m, t) float, unit length, or None
        Further images that nothing is known of but the teacher's vectors.
    min_size : int
        Smallest pseudo-class that is learned.
    share : float or None
        Part of the pseudo-labelled set in batch and loss, in (0, 1); None: its part of the images.
    sampling, images_per_identity
        As `Branch`; both sets alike.
    backbone, input_px, embedding_dim, width
        As `build_backbone`.
    head, head_params, sampled_classes
        As `build_head`; both heads alike.
    auxiliaries : mapping or None
        Losses added to both heads: name to its parameters as `build_auxiliary`, and the `weight`
        it is added with (1 where it is not given).
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
        Nothing to train on: fewer than two classes in either set and no teacher, or images and
        labels that do not match.
    ConfigError, StageError
        As `build_backbone`, `build_head`, `build_auxiliary` and `train_model`.
    """
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"share between 0 and 1 expected, got {share}")
    known = _Faces("labelled", images, label, teacher=teacher)
    guessed = _Faces(
        "pseudo-labelled", pseudo_images, pseudo_label, confidence, soft, pseudo_teacher, min_size,
        masked,
    )  # fmt: skip
    more = _Faces("further", more_images, None, teacher=more_teacher)
    sets = [each for each in (known, guessed, more) if each.images is not None]
    for each in sets:
        each.check()
    targets = _fit_targets(sets, embedding_dim, plan.seed)
    network = build_backbone(
        backbone, input_px=input_px, embedding_dim=embedding_dim, width=width, seed=plan.seed
    )
    classed: list[tuple[_Faces, Branch]] = []
    rest: list[Branch] = []
    for each, target in zip(sets, targets, strict=True):
        assert each.images is not None
        rows, classes, numbers = each.select()
        if len(rows):
            count, seed = len(numbers), plan.seed + len(classed)
            classifier = build_head(
                head,
                embedding_dim,
                count,
                seed=seed,
                sampled_classes=sampled_classes,
                memories=OPTIMIZERS[plan.optimizer],
                **dict(head_params or {}),
            )
            branch = Branch(
                classifier,
                _pick(each.images, rows),
                classes,
                None if each.weight is None else each.weight[rows],
                soft=None if each.soft is None else each.soft.renumber(rows, numbers),
                masked=None if each.masked is None else each.masked.renumber(rows, numbers),
                teacher=None if target is None else target[rows],
                auxiliaries=_build_added(auxiliaries or {}, embedding_dim, count, seed),
                sampling=sampling,
                images_per_identity=images_per_identity,
            )
            classed.append((each, branch))
        others = np.setdiff1d(np.arange(len(each.images)), rows)
        if target is not None and len(others):
            rest.append(Branch(None, _pick(each.images, others), None, teacher=target[others]))
    if not classed and not rest:
        raise DataError(
            "at least two identities with enough images are needed to train a recognizer, in the "
            "labelled or the pseudo-labelled set; neither has them. Lower min_size or the "
            "propagation threshold"
        )
    history = train_model(
        network,
        [*_divide(classed, rest, share), *rest],
        plan,
        device=device,
        resume=resume,
        on_epoch=on_epoch,
        progress=progress,
        description=description,
    )
    return Recognizer(network, meta, device=device), history


@dataclass(frozen=True)
class _Faces:
    """One of the two sets as it was given."""

    name: str
    images: np.ndarray | None
    label: np.ndarray | None
    weight: np.ndarray | None = None
    soft: SoftTargets | None = None
    teacher: np.ndarray | None = None
    min_size: int = 1
    masked: MaskedNegatives | None = None

    def check(self) -> None:
        assert self.images is not None
        for title, values in (
            ("label", self.label),
            ("weight", self.weight),
            ("teacher vector", self.teacher),
        ):
            if values is not None and len(values) != len(self.images):
                raise DataError(
                    f"one {title} an image expected in the {self.name} set, got "
                    f"{len(self.images)} images and {len(values)} {title}s"
                )

    def select(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows to be classified, their classes numbered anew, and the classes' numbers before."""
        none = np.empty(0, np.int64)
        if self.label is None:
            return none, none, none
        rows, renumbered = select_classes(self.label, min_size=self.min_size)
        numbers = np.unique(np.asarray(self.label)[rows])
        return (rows, renumbered, numbers) if len(numbers) > 1 else (none, none, none)


def _fit_targets(sets: Sequence[_Faces], embedding_dim: int, seed: int) -> list[np.ndarray | None]:
    """The teacher's vectors of all sets as one target, given back a set."""
    taught = [each.teacher for each in sets if each.teacher is not None]
    if not taught:
        return [None] * len(sets)
    if len({vectors.shape[1:] for vectors in taught}) > 1:
        raise DataError("the vectors of the teacher are of different lengths; use one model")
    target = fit_target(np.concatenate(taught), embedding_dim, seed=seed)
    parts = iter(np.split(target, np.cumsum([len(vectors) for vectors in taught])[:-1]))
    return [None if each.teacher is None else next(parts) for each in sets]


def _build_added(
    wanted: Mapping[str, Mapping[str, float]], embedding_dim: int, count: int, seed: int
) -> tuple[tuple[float, Auxiliary], ...]:
    return tuple(
        (
            params.get("weight", 1.0),
            build_auxiliary(
                name,
                embedding_dim,
                count,
                seed=seed,
                **{key: value for key, value in params.items() if key != "weight"},
            ),
        )
        for name, params in wanted.items()
    )


def _divide(
    classed: Sequence[tuple[_Faces, Branch]], rest: Sequence[Branch], share: float | None
) -> list[Branch]:
    """Give the pseudo-labelled set its share of what the two sets have together."""
    branches = [branch for _, branch in classed]
    if share is None or len(classed) < 2:
        return branches
    together = sum(len(branch.images) for branch in branches)
    everything = together + sum(len(branch.images) for branch in rest)
    first, second = ((part * together / everything) for part in (1 - share, share))
    return [replace(branches[0], share=first), replace(branches[1], share=second)]


def _pick(images: np.ndarray, rows: np.ndarray) -> np.ndarray | FaceRows:
    return images if len(rows) == len(images) else FaceRows(images, rows)
