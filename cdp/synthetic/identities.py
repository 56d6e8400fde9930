"""Synthetic faces: a data set of drawn identities with known truth, without any file.

An identity is a vector of facial traits (head, jaw, skin, eyes, brows, nose, mouth, hair, beard,
mark); an image is that identity under nuisance: pose, expression, light, occlusion, blur,
resolution and noise. The faces are cartoons that keep the structure of the problem: nuisance moves
an image further than identity does, some identities look alike, image counts have a long tail, and
some identities have one image only.

The contract:
- Image `row` is a pure function of (settings, its identity, its index within the identity): it
  does not depend on the batch it is drawn in, on the order, on the process or on the thread.
- The identities of the splits are disjoint: labelled, then unlabelled, then evaluation.
- With `nuisance=0` all images of an identity are the same picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import ndtri

from cdp.errors import ConfigError, DataError
from cdp.synthetic.painter import draw_faces
from cdp.synthetic.traits import FAMILIES, NUISANCES, TRAIT_COUNT, draw_uniform

SPLITS = ("labelled", "unlabelled", "evaluation")

_CHUNK = 1024
"""Images whose traits and nuisances are drawn at once."""


@dataclass(frozen=True)
class SyntheticFaces:
    """A seeded set of drawn faces: the identity and split of each image, and its pixels on demand.

    Parameters
    ----------
    seed : same settings and seed, same set on every machine (pixels to rounding).
    size_px : side of the square images, >= 16.
    labelled_identities, unlabelled_identities, evaluation_identities : number in each split.
    images_min, images_max : images of an identity; counts have a long tail between them.
    one_image_share : share of the unlabelled identities with a single image.
    evaluation_images : images of each evaluation identity.
    nuisance : strength of all that is not identity; 0 none, 1 as tuned (`traits.FULL_STRENGTH`).
    resemblance : in [0, 1); how much the identities of one family (a random few) look alike.

    Raises
    ------
    ConfigError : a setting is outside its range.
    """

    seed: int = 0
    size_px: int = 48
    labelled_identities: int = 120
    unlabelled_identities: int = 360
    evaluation_identities: int = 150
    images_min: int = 6
    images_max: int = 40
    one_image_share: float = 0.15
    evaluation_images: int = 8
    nuisance: float = 1.0
    resemblance: float = 0.5

    def __post_init__(self) -> None:
        at_least = {
            "size_px": 16,
            "labelled_identities": 0,
            "unlabelled_identities": 0,
            "evaluation_identities": 0,
            "images_min": 1,
            "images_max": self.images_min,
            "evaluation_images": 1,
            "nuisance": 0,
            "one_image_share": 0,
            "resemblance": 0,
            "seed": 0,
        }
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ConfigError(
                    f"expected {name} >= {low}, got {getattr(self, name)!r} for synthetic faces"
                )
        for name, high in (("one_image_share", 1.0), ("resemblance", 0.99)):
            if getattr(self, name) > high:
                raise ConfigError(
                    f"expected {name} <= {high}, got {getattr(self, name)!r} for synthetic faces"
                )

    def __len__(self) -> int:
        return len(self.identity)

    @cached_property
    def _image_count(self) -> np.ndarray:
        """(c,) int64, the number of images of each identity."""
        identities = (
            self.labelled_identities + self.unlabelled_identities + self.evaluation_identities
        )
        uniform = draw_uniform(self.seed, np.arange(identities), -1, 2)
        # A power law between the limits: density ~ count^-2.
        low, high = float(self.images_min), float(self.images_max) + 1.0
        count = (1.0 / (1.0 / low - uniform[:, 0] * (1.0 / low - 1.0 / high))).astype(np.int64)
        count = np.clip(count, self.images_min, self.images_max)
        unlabelled = self.identity_split == "unlabelled"
        count[unlabelled & (uniform[:, 1] < self.one_image_share)] = 1
        count[self.identity_split == "evaluation"] = self.evaluation_images
        return count

    @cached_property
    def identity_split(self) -> np.ndarray:
        """(c,) str, the split of each identity."""
        return np.repeat(
            SPLITS,
            [self.labelled_identities, self.unlabelled_identities, self.evaluation_identities],
        )

    @cached_property
    def identity(self) -> np.ndarray:
        """(n,) int64, the identity on each image, ascending from 0."""
        return np.repeat(np.arange(len(self._image_count)), self._image_count)

    @cached_property
    def index(self) -> np.ndarray:
        """(n,) int64, the number of each image within its identity, from 0."""
        first = np.cumsum(self._image_count) - self._image_count
        return np.arange(len(self.identity)) - first[self.identity]

    @cached_property
    def split(self) -> np.ndarray:
        """(n,) str, one of `SPLITS` for each image."""
        return self.identity_split[self.identity]

    def name(self, row: int) -> str:
        """A path-like name of an image, `id_0012/0003.png`: unique, sorted as the rows are."""
        return f"id_{self.identity[row]:06d}/{self.index[row]:04d}.png"

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Draw images.

        rows : (m,) integer rows, in any order, repeats allowed.
        Returns (m, s, s, 3) uint8 RGB. Raises DataError for a row outside the set.
        """
        rows = np.asarray(rows, np.int64).reshape(-1)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise DataError(
                f"expected rows in 0 .. {len(self) - 1}, got {rows.min()} to {rows.max()}"
            )
        image = np.empty((len(rows), self.size_px, self.size_px, 3), np.uint8)
        for low in range(0, len(rows), _CHUNK):
            part = rows[low : low + _CHUNK]
            image[low : low + _CHUNK] = draw_faces(
                self.traits(self.identity[part]),
                draw_uniform(self.seed, self.identity[part], self.index[part], len(NUISANCES)),
                size_px=self.size_px,
                nuisance=self.nuisance,
            )
        return image

    def traits(self, identity: np.ndarray) -> np.ndarray:
        """The trait vectors of identities.

        identity : (m,) integer. Returns (m, TRAIT_COUNT) float64, standard normal, within 2.2.
        Every identity belongs to one of `FAMILIES` families, across the splits, and shares a part
        of its vector with it: these are look-alikes.
        """
        own = ndtri(draw_uniform(self.seed, identity, -2, TRAIT_COUNT + 2))
        family = (draw_uniform(self.seed, identity, -3, 1)[:, 0] * FAMILIES).astype(np.int64)
        shared = ndtri(draw_uniform(self.seed, family, -4, TRAIT_COUNT + 2))
        mixed = np.sqrt(1.0 - self.resemblance) * own + np.sqrt(self.resemblance) * shared
        return np.clip(mixed[:, :TRAIT_COUNT], -2.2, 2.2)

    def draw_contact_sheet(
        self, *, identities: int = 8, columns: int = 10, split: str = "labelled"
    ) -> np.ndarray:
        """Draw some identities, one a row, one image a column; gaps stay white.

        Returns (identities * s, columns * s, 3) uint8: the first identities of the split with the
        most images up to `columns`.
        """
        size = self.size_px
        member = np.flatnonzero(self.identity_split == split)
        order = member[np.argsort(-np.minimum(self._image_count[member], columns), kind="stable")]
        sheet = np.full((identities * size, columns * size, 3), 255, np.uint8)
        for place, identity in enumerate(order[:identities]):
            rows = np.flatnonzero(self.identity == identity)[:columns]
            strip = self.draw(rows).transpose(1, 0, 2, 3).reshape(size, len(rows) * size, 3)
            sheet[place * size : (place + 1) * size, : strip.shape[1]] = strip
        return sheet
