"""The labelled people, to be found among other images, or clusters of them.

The contract:
- Enters: the committee's vectors of images, maybe their clusters. Leaves: the most likely labelled
  person of each image and the probability that it is that person (an open set: it may be nobody).
- The share of images that show a labelled person is estimated from the images themselves.
- The same bits with any number of threads.

Source: ours; the estimate of the share is that of Saerens, Latinne & Decaestecker (2002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

from cdp.arrays.cosine import make_unit
from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.arrays.threads import limit_blas, list_blocks
from cdp.errors import DataError
from cdp.label_check.likelihood import SetLikelihood
from cdp.types import UNLABELLED, View, load_view

BELIEVED = 0.5
"""An image whose label is right with no more probability than this is not trained on."""
APART = 0.05
"""An unlabelled image that shows a labelled person with more probability than this is no negative
example, and neither is a label that may be another one's person."""

_MARGIN = 1e-6
"""Probabilities count as at least this and at most 1 - this."""


@dataclass(frozen=True)
class LabelledPeople:
    """The labelled people, to be found among other images.

    likelihood : how sets are compared. centres : a (people, d_v) float32 array a view, unit rows.
    size : (people,) float64, number of images. label : (people,) int64, the label of each.
    open_set : slope and shift: how much more likely the best of all comparisons is of the person
    shown than of a person who is not among the labelled ones.
    """

    likelihood: SetLikelihood
    centres: tuple[np.ndarray, ...]
    size: np.ndarray
    label: np.ndarray
    open_set: tuple[float, float]

    def extend(
        self, views: Sequence[View], identity: np.ndarray, believed: np.ndarray
    ) -> LabelledPeople:
        """The same with all people of a larger labelled set.

        Of more people the best comparison with somebody else is better by chance; the shift of the
        open set grows with the logarithm of their number.

        Parameters
        ----------
        views : (n, d_v) arrays, or functions that load them. identity : (n,) int64, the labels.
        believed : (n,) bool, the images to take the centres of.
        """
        labels = np.unique(identity[believed])
        number = np.minimum(np.searchsorted(labels, identity), len(labels) - 1)
        groups = group_rows(number, len(labels), believed)
        centres = tuple(normalise(groups @ make_unit(load_view(view))[0]) for view in views)
        size = np.bincount(number, believed, len(labels))
        slope, shift = self.open_set
        shift -= float(np.log(len(labels) / len(self.label)))
        return LabelledPeople(self.likelihood, centres, size, labels, (slope, shift))

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        likelihood = self.likelihood
        return {
            **{f"centres.{number:02d}": centre for number, centre in enumerate(self.centres)},
            "size": self.size,
            "label": self.label,
            "open_set": np.array(self.open_set),
            "centre": likelihood.centre,
            "spread": likelihood.spread,
            "coefficient": likelihood.coefficient,
            "least_noise": np.array(likelihood.least_noise),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> LabelledPeople:
        """The inverse of `state`."""
        names = sorted(name for name in state if name.startswith("centres."))
        likelihood = SetLikelihood(
            state["centre"], state["spread"], state["coefficient"], float(state["least_noise"])
        )
        slope, shift = state["open_set"].tolist()
        centres = tuple(state[name] for name in names)
        return cls(likelihood, centres, state["size"], state["label"], (slope, shift))

    def compare(self, centres: Sequence[np.ndarray], size: np.ndarray) -> np.ndarray:
        """(sets, people) float32, the logarithm of the likelihood ratio of every pair.

        centres : a (sets, d_v) array of unit rows a view. size : (sets,) images of each.
        """
        cosines = [
            np.asarray(one, np.float32) @ other.T
            for one, other in zip(centres, self.centres, strict=True)
        ]
        return self.likelihood.combine(cosines, 1 / size[:, None] + 1 / self.size)

    def find(
        self, views: Sequence[View], label: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labelled person that each image shows, if any.

        Parameters
        ----------
        views : (m, d_v) arrays of the same models, or functions that load them.
        label : (m,) int64, the images' clusters, which are then compared as a whole; -1 or None for
            an image on its own.

        Returns
        -------
        label : (m,) int64, the label of the most likely person.
        probability : (m,) float32, the probability that it is that person: the share of the images
            that show a labelled person is estimated, and each labelled person is as likely before.
        """
        units = [make_unit(load_view(view))[0] for view in views]
        for number, (unit, centre) in enumerate(zip(units, self.centres, strict=True)):
            if unit.shape[1] != centre.shape[1]:
                raise DataError(
                    f"view {number} has {centre.shape[1]} dimensions labelled and {unit.shape[1]} "
                    "unlabelled: they are not of one model"
                )
        place, size = number_sets(len(units[0]), label)
        groups = group_rows(place, len(size)) if len(size) < len(place) else None
        best = np.empty(len(size), np.int64)
        share, top = np.empty(len(size)), np.empty(len(size))
        with limit_blas():
            for block in list_blocks(0, len(size)):
                if groups is None:
                    centres = [unit[block] for unit in units]
                else:
                    centres = [normalise(groups[block] @ unit) for unit in units]
                ratio = self.compare(centres, size[block])
                best[block] = ratio.argmax(1)
                top[block] = ratio.max(1)
                share[block] = np.exp(top[block] - add_exponentials(ratio))
        slope, shift = self.open_set
        probability = estimate_share(slope * top + shift, size)
        return self.label[best][place], (probability * share).astype(np.float32)[place]

    def assign(
        self, views: Sequence[View], label: np.ndarray, confidence: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labelled person of each image, by its cluster and by itself.

        An image shows its cluster's person as far as it belongs to the cluster, and else the person
        that it shows by itself; the odds of that are multiplied by those of the image alone. So
        neither a mixed cluster nor a single comparison decides without the other.

        Parameters
        ----------
        views, label : as for `find`.
        confidence : (m,) float in [0, 1], the probability that each image belongs to its cluster.

        Returns
        -------
        label, probability : as of `find`; probability 0 where the image by itself shows another
            person than its cluster.
        """
        together, likely = self.find(views, label)
        alone, own = self.find(views)
        follows = np.where(label == UNLABELLED, 0, confidence)
        same = together == alone
        by_cluster = follows * likely + same * (1 - follows) * own
        by_itself = (1 - follows) * own + same * follows * likely
        both = to_log_odds(np.where(same, by_cluster, by_itself), margin=_MARGIN)
        both += to_log_odds(own, margin=_MARGIN)
        agrees = same | (by_itself > by_cluster)
        return alone, np.where(agrees, to_probability(both), 0).astype(np.float32)


def group_rows(group: np.ndarray, groups: int, weight: np.ndarray | None = None) -> csr_matrix:
    """The (groups, n) matrix whose product with n rows is the weighted sum of each group's rows.

    group : (n,) int64. weight : (n,) of each row; None: one each.
    """
    count = len(group)
    value = np.ones(count, np.float32) if weight is None else weight.astype(np.float32)
    return csr_matrix((value, (group, np.arange(count))), shape=(groups, count))


def normalise(total: np.ndarray) -> np.ndarray:
    """Rows at unit length; a sum of zero stays, and is near to nothing."""
    unit: np.ndarray = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)
    return unit


def add_exponentials(ratio: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of the exponentials of each row, (n,) float64."""
    top = ratio.max(1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        added = np.log(np.exp(ratio - safe[:, None]).sum(1, dtype=np.float64))
    return np.asarray(safe + added, np.float64)


def estimate_share(ratio: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Probabilities from likelihood ratios alone, at the share of ones that explains them best.

    ratio : (n,) float, logarithms. weight : (n,) float > 0, how many cases each stands for.
    """
    low, high = -18.0, 18.0
    odds = np.clip(ratio, -80, 80)
    for _ in range(48):
        share = (low + high) / 2
        probability = 1 / (1 + np.exp(-(odds + share)))
        mean = float(np.average(probability, weights=weight))
        low, high = (share, high) if mean > 1 / (1 + np.exp(-share)) else (low, share)
    found: np.ndarray = 1 / (1 + np.exp(-(odds + (low + high) / 2)))
    return found


def number_sets(count: int, label: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The set of each image, clusters first, and the number of images of each set."""
    if label is None:
        return np.arange(count), np.ones(count)
    place = np.array(label, np.int64)
    alone = np.flatnonzero(place == UNLABELLED)
    clusters = int(place.max(initial=-1)) + 1
    place[alone] = clusters + np.arange(len(alone))
    return place, np.bincount(place, minlength=clusters + len(alone)).astype(np.float64)
