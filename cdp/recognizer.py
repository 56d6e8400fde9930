"""The product: a low-resolution recognizer, trained on true and pseudo labels together.

The contract:
- The identities of the two sets are disjoint, so each set has a classification head of its own on
  one trunk, and each head's loss weighs as much as its set's share of images (Zhan et al. 2018,
  section 3.4).
- Images without a pseudo-label, and of clusters below `min_size`, are left out; the classes that
  remain are numbered anew. The true labels' numbering is of no importance either.
- A `Recognizer` is a backbone and all there is to know to use it, in one safetensors file: no code
  is run when it is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cdp.embedding import BackboneEmbedder
from cdp.errors import ConfigError, DataError
from cdp.models import Backbone, build_backbone, load_model, pack_model, save_model, unpack_model
from cdp.models.heads import build_head
from cdp.training import Branch, State, TrainingPlan, train_model
from cdp.types import UNLABELLED


class Recognizer:
    """Faces in, unit vectors out.

    backbone : Backbone
    meta : mapping of str to JSON values
        What a user should know of it: how and on what it was trained.
    device : str
        "auto", "cpu", "cuda", ...

    Examples
    --------
    >>> import numpy as np
    >>> recognizer = Recognizer(build_backbone("plain", input_px=24), {"note": "untrained"})
    >>> faces = np.zeros((2, 40, 40, 3), dtype=np.uint8)
    >>> recognizer.embed(faces).shape
    (2, 128)
    """

    def __init__(
        self, backbone: Backbone, meta: Mapping[str, Any] | None = None, *, device: str = "auto"
    ) -> None:
        self.backbone = backbone
        self.meta = dict(meta or {})
        self.embedder = BackboneEmbedder(backbone, device=device)

    @property
    def input_px(self) -> int:
        """Side of the faces it looks at, in pixels."""
        return self.backbone.spec.input_px

    @property
    def embedding_dim(self) -> int:
        return self.backbone.spec.embedding_dim

    def embed(self, images: np.ndarray, *, batch_size: int = 256, flip: bool = True) -> np.ndarray:
        """Embed aligned faces.

        Parameters
        ----------
        images : (n, s, s, 3) uint8, RGB
            Faces aligned as `cdp.images.align.align_face` does, at any side s; brought to
            `input_px` here.
        batch_size : int
        flip : bool
            Average with the mirror image.

        Returns
        -------
        vectors : (n, embedding_dim) float32, unit length
            The product of two is the cosine of their faces. `embedder.embed` gives the norms too.
        """
        return self.embedder.embed(images, batch_size=batch_size, flip=flip)[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and string metadata: what a safetensors file holds."""
        return pack_model(self.backbone, self.meta)

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, device: str = "auto"
    ) -> Recognizer:
        """The recognizer whose `state` this is; `DataError` when it is none."""
        return cls(*unpack_model(tensors, metadata), device=device)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        save_model(path, self.backbone, self.meta)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Recognizer:
        """Read what `save` wrote; `DataError` when the file is missing or damaged."""
        return cls(*load_model(path), device=device)


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
    min_size: int = 2,
    share: float | None = None,
    backbone: str = "residual",
    input_px: int = 24,
    embedding_dim: int = 128,
    width: float = 1.0,
    head: str = "adaface",
    head_params: Mapping[str, Any] | None = None,
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
    min_size : int
        Smallest pseudo-class that is learned.
    share : float or None
        Part of the pseudo-labelled set in batch and loss, in (0, 1); None: its part of the images.
    backbone, input_px, embedding_dim, width
        As `build_backbone`.
    head, head_params
        As `build_head`; both heads alike.
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
        Nothing to train on: fewer than two classes in either set, or images and labels that do not
        match.
    ConfigError, StageError
        As `build_backbone`, `build_head` and `train_model`.
    """
    if share is not None and not 0 < share < 1:
        raise ConfigError(f"share between 0 and 1 expected, got {share}")
    sets: list[tuple[np.ndarray, np.ndarray, np.ndarray | None, float | None]] = []
    for name, pictures, classes, weight, smallest, part in (
        ("labelled", images, label, None, 1, None if share is None else 1 - share),
        ("pseudo-labelled", pseudo_images, pseudo_label, confidence, min_size, share),
    ):
        if pictures is None or classes is None:
            continue
        if len(pictures) != len(classes) or (weight is not None and len(weight) != len(classes)):
            raise DataError(
                f"one label (and weight) an image expected in the {name} set, got "
                f"{len(pictures)} images and {len(classes)} labels"
            )
        rows, renumbered = select_classes(classes, min_size=smallest)
        if len(renumbered) == 0 or renumbered.max() < 1:
            continue
        kept = pictures if len(rows) == len(pictures) else np.asarray(pictures[rows])
        sets.append((kept, renumbered, None if weight is None else weight[rows], part))
    if not sets:
        raise DataError(
            "at least two identities with enough images are needed to train a recognizer, in the "
            "labelled or the pseudo-labelled set; neither has them. Lower min_size or the "
            "propagation threshold"
        )
    network = build_backbone(
        backbone, input_px=input_px, embedding_dim=embedding_dim, width=width, seed=plan.seed
    )
    branches = []
    for number, (pictures, classes, weight, part) in enumerate(sets):
        classifier = build_head(
            head,
            embedding_dim,
            int(classes.max()) + 1,
            seed=plan.seed + number,
            **dict(head_params or {}),
        )
        single = len(sets) == 1
        branches.append(Branch(classifier, pictures, classes, weight, None if single else part))
    history = train_model(
        network,
        branches,
        plan,
        device=device,
        resume=resume,
        on_epoch=on_epoch,
        progress=progress,
        description=description,
    )
    return Recognizer(network, meta, device=device), history
