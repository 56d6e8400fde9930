"""A gallery: enrolled people and their vectors, to identify faces in.

The contract:
- A gallery takes unit vectors of one width; with a recognizer it takes faces too.
- `identify` compares a probe with every image of every person; a person's similarity is that of
  the nearest image. Below the threshold a probe is nobody's: None.
- A saved gallery is one safetensors file: vectors, names, threshold, and the digest of the
  recognizer's weights; another recognizer is refused. It runs nothing when loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cdp.errors import DataError

if TYPE_CHECKING:
    from cdp.recognizer.recognizer import Recognizer

BLOCK = 1024
MEASURED = 4096
"""Most enrolled images that are compared with all others by `measure_nearest_others`."""
_VERSION = "1"


@dataclass(frozen=True)
class Match:
    """Who a probe is.

    name : the person, or None where the nearest one is not near enough.
    nearest : the nearest person, whatever the threshold.
    similarity : cosine to that person's nearest image, in [-1, 1].
    margin : how much nearer that person is than the next one; inf in a gallery of one.
    """

    name: str | None
    nearest: str
    similarity: float
    margin: float


class Gallery:
    """Enrolled people.

    Parameters
    ----------
    recognizer : Recognizer or None
        Embeds faces; without one, vectors are given.
    threshold : float
        Cosine a probe must exceed to be somebody, in [-1, 1]. Take `threshold@fpir` or
        `threshold@far` of a run's metrics or of the model card; it holds for probes like those.

    Examples
    --------
    >>> import numpy as np
    >>> gallery = Gallery(threshold=0.5)
    >>> gallery.enrol("ann", np.eye(4, dtype=np.float32)[:2])
    >>> gallery.enrol("bob", np.eye(4, dtype=np.float32)[2:3])
    >>> [match.name for match in gallery.identify(np.eye(4, dtype=np.float32)[[1, 3]])]
    ['ann', None]
    """

    def __init__(self, recognizer: Recognizer | None = None, *, threshold: float = 0.3) -> None:
        if not -1 <= threshold <= 1:
            raise DataError(f"threshold: a cosine in [-1, 1] expected, got {threshold}")
        self.recognizer = recognizer
        self.threshold = float(threshold)
        self._model = "" if recognizer is None else digest_weights(recognizer)
        self._names: list[str] = []
        self._blocks: list[np.ndarray] = []
        self._person: list[int] = []

    def __len__(self) -> int:
        """Number of people."""
        return len(self._names)

    @property
    def names(self) -> list[str]:
        """The people, in the order they were enrolled."""
        return list(self._names)

    def enrol(self, name: str, images: np.ndarray) -> None:
        """Add images of one person, who may be enrolled already.

        Parameters
        ----------
        name : str
        images : (n, d) float32 of unit length, or (n, s, s, 3) uint8 aligned faces, n >= 1.

        Raises
        ------
        DataError
            Another shape or width, no image, faces without a recognizer.
        """
        vectors = self._embed(images)
        if not len(vectors):
            raise DataError(f"{name!r}: one image or more expected")
        if self._blocks and vectors.shape[1] != self._blocks[0].shape[1]:
            raise DataError(
                f"{name!r}: vectors of {self._blocks[0].shape[1]} numbers are enrolled, got "
                f"{vectors.shape[1]}; a gallery is of one model"
            )
        if name not in self._names:
            self._names.append(name)
        self._blocks.append(vectors)
        self._person += [self._names.index(name)] * len(vectors)

    def remove(self, name: str) -> None:
        """Take one person out, with all images; DataError for a name that is not enrolled."""
        if name not in self._names:
            raise DataError(f"{name!r} is not enrolled; enrolled are {len(self)} people")
        gone = self._names.index(name)
        vectors, person = self._stack()
        kept = person != gone
        self._blocks = [vectors[kept]] if kept.any() else []
        self._person = [each - (each > gone) for each in person[kept].tolist()]
        del self._names[gone]

    def identify(self, images: np.ndarray) -> list[Match]:
        """Who each probe is.

        Parameters
        ----------
        images : as in `enrol`.

        Raises
        ------
        DataError
            Nobody is enrolled, or as in `enrol`.
        """
        if not self._names:
            raise DataError("nobody is enrolled; call enrol first")
        probes = self._embed(images)
        vectors, person = self._stack()
        if probes.shape[1] != vectors.shape[1]:
            raise DataError(
                f"probes of {vectors.shape[1]} numbers expected, got {probes.shape[1]}; a gallery "
                "is of one model"
            )
        order = np.argsort(person, kind="stable")
        starts = np.searchsorted(person[order], np.arange(len(self)))
        found: list[Match] = []
        for start in range(0, len(probes), BLOCK):
            cosine = probes[start : start + BLOCK] @ vectors[order].T
            best = np.maximum.reduceat(cosine, starts, axis=1)
            found += [self._judge(row) for row in best]
        return found

    def measure_nearest_others(self) -> np.ndarray:
        """How near each enrolled image is to the people that it does not show.

        Each enrolled person is an unknown one to the rest, so the share of these cosines above the
        threshold is about that of unknown people like them who would be taken for somebody.

        Returns
        -------
        (m,) float32
            Cosine of an image to the nearest image of another person: of each image, or of
            `MEASURED` of them at even steps; empty for fewer than two people.
        """
        if len(self) < 2:
            return np.empty(0, np.float32)
        vectors, person = self._stack()
        chosen = np.linspace(0, len(vectors) - 1, min(len(vectors), MEASURED)).astype(np.int64)
        nearest = []
        for start in range(0, len(chosen), BLOCK):
            rows = chosen[start : start + BLOCK]
            cosine = vectors[rows] @ vectors.T
            cosine[person[rows, None] == person] = -1
            nearest.append(cosine.max(axis=1))
        return np.concatenate(nearest).astype(np.float32)

    def _judge(self, best: np.ndarray) -> Match:
        """best : (people,) cosine to each person's nearest image."""
        nearest = int(best.argmax())
        similarity = float(best[nearest])
        rest = np.delete(best, nearest)
        margin = similarity - float(rest.max()) if len(rest) else float("inf")
        name = self._names[nearest]
        return Match(name if similarity > self.threshold else None, name, similarity, margin)

    def _embed(self, images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.ndim == 4 and images.dtype == np.uint8:
            if self.recognizer is None:
                raise DataError(
                    "faces need a recognizer; make the gallery with one, or give vectors"
                )
            return self.recognizer.embed(images)
        if images.ndim != 2 or images.dtype.kind != "f":
            raise DataError(
                "vectors (n, d) of floats or faces (n, s, s, 3) uint8 expected, got "
                f"{images.shape} {images.dtype}"
            )
        length = np.linalg.norm(images, axis=1)
        if not np.isfinite(length).all() or (np.abs(length - 1) > 1e-2).any():
            raise DataError("vectors of unit length expected; divide each by its length")
        return images.astype(np.float32)

    def _stack(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, d) vectors and (n,) the person of each."""
        if len(self._blocks) > 1:
            self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0], np.asarray(self._person, np.int64)

    # -- files

    def save(self, path: str | PathLike[str]) -> None:
        """Write vectors, names and threshold; the recognizer is a file of its own."""
        from safetensors.numpy import save_file

        if not self._names:
            raise DataError("nobody is enrolled; there is nothing to save")
        vectors, person = self._stack()
        notes = {"format": "cdp-gallery", "version": _VERSION, "threshold": repr(self.threshold),
                 "names": json.dumps(self._names), "model": self._model}  # fmt: skip
        save_file({"vectors": vectors, "person": person}, str(path), metadata=notes)

    @classmethod
    def load(cls, path: str | PathLike[str], recognizer: Recognizer | None = None) -> Gallery:
        """Read a saved gallery.

        Raises
        ------
        DataError
            No such file, no gallery, or one of another recognizer.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise DataError(f"no gallery at {path}; make one with Gallery.save or `cdp identify`")
        try:
            with safe_open(str(path), framework="numpy") as stream:
                notes = stream.metadata() or {}
                vectors, person = stream.get_tensor("vectors"), stream.get_tensor("person")
            names: Sequence[str] = json.loads(notes["names"])
            gallery = cls(recognizer, threshold=float(notes["threshold"]))
            for number, name in enumerate(names):
                gallery.enrol(name, vectors[person == number])
        except (SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is no saved gallery: {error}") from error
        enrolled_by = notes.get("model", "")
        if enrolled_by and gallery._model and enrolled_by != gallery._model:
            raise DataError(
                f"{path} was enrolled by another recognizer, whose vectors cannot be compared with "
                "this one's. Name that recognizer, or enrol the people again from their images"
            )
        gallery._model = enrolled_by or gallery._model
        return gallery


def digest_weights(recognizer: Recognizer) -> str:
    """SHA-256 of a recognizer's backbone: its spec and weights, as hex."""
    tensors = recognizer.backbone.state_dict()
    total = hashlib.sha256(repr(recognizer.backbone.spec).encode())
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
