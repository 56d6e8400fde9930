"""The labelled people, to be found among other images, or clusters of them.

The contract:
- Enters: the committee's vectors of images, maybe their clusters. Leaves: the most likely labelled
  person of each image and the probability that it is that person (an open set: it may be nobody).
- The share of images that show a labelled person is estimated from the images themselves, and so is
  how well the best comparison of an image that shows nobody may fit (`fit_open_set`).
- The same bits with any number of threads.

Source: ours; the estimate of the share is that of Saerens, Latinne & Decaestecker (2002), learning
from positive and unlabelled examples by expectation and maximisation follows Elkan & Noto (2008).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import csr_matrix

from cdp.arrays.cosine import make_unit
from cdp.arrays.log_odds import to_log_odds, to_probability
from cdp.arrays.threads import limit_blas, list_blocks
from cdp.errors import DataError
from cdp.label_check.likelihood import SetLikelihood, fit_logistic
from cdp.types import UNLABELLED, View, load_view

BELIEVED = 0.5
"""An image whose label is right with no more probability than this is not trained on."""
APART = 0.05
"""An unlabelled image that shows a labelled person with more probability than this is no negative
example, and neither is a label that may be another one's person."""

CORRELATION = 0.5
"""Correlation of what a cluster and what an image by itself says of a person, as between the pairs
of one image (`cdp.propagation.quality`)."""

_ROUNDS, _SETTLED = 30, 1e-3
"""Rounds of the fit of the open set, at most, and the change of any probability that ends them."""
_LEAST_SHARE = 1e-3
"""Share of labelled people for which the open set is fitted at least: of fewer too little is seen.
"""
_MARGIN = 1e-6
"""Probabilities count as at least this and at most 1 - this."""


@dataclass(frozen=True)
class OpenSet:
    """How much more likely the best of all comparisons is of the person shown than of another.

    slope, shift : of the logarithm of that ratio, linear in the comparison's. own : (p,) float32,
    comparisons of labelled images with their own people, with their weights, (p,) float32. other :
    (q,) float32, the best comparisons of labelled images with other people.
    """

    slope: float
    shift: float
    own: np.ndarray
    weight: np.ndarray
    other: np.ndarray

    def extend(self, times: float) -> OpenSet:
        """The same for so many times the people: the best of them is better by chance."""
        more = float(np.log(times))
        other = self.other + np.float32(more / max(self.slope, 1e-6))
        return replace(self, shift=self.shift - more, other=other)

    def fit(self, best: np.ndarray) -> tuple[OpenSet, np.ndarray]:
        """Fit it to the images that are searched, most of which may show nobody.

        Labelled images are examples of people who are shown; the images themselves, each with the
        probability that it shows nobody, are examples of people who are not. The two have the
        weights that they have among the images: at equal weights the fit would be good where
        either is as likely, far from where the probability is one half.

        best : (m,) float, the best comparison of each image; without any nothing changes.

        Returns
        -------
        fitted : with another slope and shift. probability : (m,) float, of showing the best person.
        """
        if not len(best):
            return self, np.empty(0)
        found, one = self, np.ones(len(best))
        probability = estimate_share(self.slope * best + self.shift, one)
        ratio = np.concatenate([self.own, self.other, best]).astype(np.float64)
        inputs = np.column_stack([ratio, np.ones(len(ratio))])
        same = np.arange(len(ratio)) < len(self.own)
        for _ in range(_ROUNDS):
            share = float(np.clip(probability.mean(), _LEAST_SHARE, 0.5))
            others = np.concatenate([np.ones(len(self.other)), 1 - probability])
            shown = share * self.weight / self.weight.sum()
            weight = np.concatenate([shown, (1 - share) * others / others.sum()])
            slope, shift = fit_logistic(inputs, same, weight)
            if slope <= 0:
                break
            found = replace(self, slope=float(slope), shift=float(shift - _find_odds(share)))
            before = probability
            probability = estimate_share(found.slope * best + found.shift, one)
            if np.abs(probability - before).max() < _SETTLED:
                break
        return found, probability


@dataclass(frozen=True)
class FoundPeople:
    """The labelled person that each of some images shows by itself, if any.

    label : (m,) int64, of the most likely person. probability : (m,) float32, that it is that
    person. share : of the images that show a labelled person. open_set : fitted to these images.
    """

    label: np.ndarray
    probability: np.ndarray
    share: float
    open_set: OpenSet

    def state(self) -> dict[str, np.ndarray]:
        """Everything but the examples of the open set, as arrays alone."""
        fitted = np.array([self.open_set.slope, self.open_set.shift, self.share])
        return {"label": self.label, "probability": self.probability, "fitted": fitted}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], people: LabelledPeople) -> FoundPeople:
        """The inverse of `state`; `people` found them."""
        slope, shift, share = state["fitted"].tolist()
        open_set = replace(people.open_set, slope=slope, shift=shift)
        return cls(state["label"], state["probability"], share, open_set)


@dataclass(frozen=True)
class LabelledPeople:
    """The labelled people, to be found among other images.

    likelihood : how sets are compared. centres : a (people, d_v) float32 array a view, unit rows.
    size : (people,) float64, number of images. label : (people,) int64, the label of each.
    open_set : of the labelled images.
    """

    likelihood: SetLikelihood
    centres: tuple[np.ndarray, ...]
    size: np.ndarray
    label: np.ndarray
    open_set: OpenSet

    def extend(
        self, views: Sequence[View], identity: np.ndarray, believed: np.ndarray
    ) -> LabelledPeople:
        """The same with all people of a larger labelled set.

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
        open_set = self.open_set.extend(len(labels) / len(self.label))
        return LabelledPeople(self.likelihood, centres, size, labels, open_set)

    def state(self) -> dict[str, np.ndarray]:
        """Everything needed to restore it, as arrays alone."""
        likelihood, open_set = self.likelihood, self.open_set
        return {
            **{f"centres.{number:02d}": centre for number, centre in enumerate(self.centres)},
            "size": self.size,
            "label": self.label,
            "open_set": np.array([open_set.slope, open_set.shift]),
            "own": open_set.own,
            "own_weight": open_set.weight,
            "other": open_set.other,
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
        open_set = OpenSet(slope, shift, *(state[key] for key in ("own", "own_weight", "other")))
        centres = tuple(state[name] for name in names)
        return cls(likelihood, centres, state["size"], state["label"], open_set)

    def compare(self, centres: Sequence[np.ndarray], size: np.ndarray) -> np.ndarray:
        """(sets, people) float32, the logarithm of the likelihood ratio of every pair.

        centres : a (sets, d_v) array of unit rows a view. size : (sets,) images of each.
        """
        cosines = [
            np.asarray(one, np.float32) @ other.T
            for one, other in zip(centres, self.centres, strict=True)
        ]
        return self.likelihood.combine(cosines, 1 / size[:, None] + 1 / self.size)

    def find(self, views: Sequence[View]) -> FoundPeople:
        """The labelled person that each image shows by itself, if any.

        The share of the images that show a labelled person is estimated, and each labelled person
        is as likely before.

        Parameters
        ----------
        views : (m, d_v) arrays of the same models, or functions that load them.
        """
        units = self._load_units(views)
        count = len(units[0])
        best, top, likeliest = self._compare_all(units, np.arange(count), np.ones(count))
        with limit_blas():
            open_set, probability = self.open_set.fit(top)
        share = float(probability.mean()) if count else 0.0
        probability = (probability * likeliest).astype(np.float32)
        return FoundPeople(self.label[best], probability, share, open_set)

    def find_clusters(
        self, views: Sequence[View], label: np.ndarray, found: FoundPeople
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labelled person that each image's cluster shows as a whole, if any.

        Parameters
        ----------
        views : as for `find`. label : (m,) int64, the images' clusters; -1 for an image on its own.
        found : by `find`, on the same images.

        Returns
        -------
        label, probability : as of `FoundPeople`.
        """
        place, size = number_sets(label)
        best, top, likeliest = self._compare_all(self._load_units(views), place, size)
        open_set = found.open_set
        probability = estimate_share(open_set.slope * top + open_set.shift, size) * likeliest
        return self.label[best][place], probability.astype(np.float32)[place]

    def assign(
        self,
        views: Sequence[View],
        label: np.ndarray,
        confidence: np.ndarray,
        found: FoundPeople | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labelled person of each image, by its cluster and by itself.

        An image shows its cluster's person as far as it belongs to the cluster, and else the person
        that it shows by itself. The evidence of that and the evidence of the image alone are added,
        as two of correlation `CORRELATION`: neither a mixed cluster nor a single comparison
        decides without the other.

        Parameters
        ----------
        views, label : as for `find_clusters`.
        confidence : (m,) float in [0, 1], the probability that each image belongs to its cluster.
        found : by `find`, on the same images; None: they are searched.

        Returns
        -------
        label, probability : as of `FoundPeople`; probability 0 where the image by itself shows
            another person than its cluster.
        """
        found = self.find(views) if found is None else found
        together, likely = self.find_clusters(views, label, found)
        alone, own = found.label, found.probability
        follows = np.where(label == UNLABELLED, 0, confidence)
        same = together == alone
        by_cluster = follows * likely + same * (1 - follows) * own
        by_itself = (1 - follows) * own + same * follows * likely
        prior = _find_odds(found.share)
        evidence = to_log_odds(np.where(same, by_cluster, by_itself), margin=_MARGIN) - prior
        evidence += to_log_odds(own, margin=_MARGIN) - prior
        evidence /= np.where(label == UNLABELLED, 2, 1 + CORRELATION)
        agrees = same | (by_itself > by_cluster)
        return alone, np.where(agrees, to_probability(evidence + prior), 0).astype(np.float32)

    def _load_units(self, views: Sequence[View]) -> list[np.ndarray]:
        units = [make_unit(load_view(view))[0] for view in views]
        for number, (unit, centre) in enumerate(zip(units, self.centres, strict=True)):
            if unit.shape[1] != centre.shape[1]:
                raise DataError(
                    f"view {number} has {centre.shape[1]} dimensions labelled and {unit.shape[1]} "
                    "unlabelled: they are not of one model"
                )
        return units

    def _compare_all(
        self, units: list[np.ndarray], place: np.ndarray, size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best person of each set, the comparison with it, and its share of all comparisons.

        place : (m,) int64, the set of each image. size : (sets,) images of each.
        """
        groups = group_rows(place, len(size)) if len(size) < len(place) else None
        best = np.empty(len(size), np.int64)
        likeliest, top = np.empty(len(size)), np.empty(len(size))
        with limit_blas():
            for block in list_blocks(0, len(size)):
                if groups is None:
                    centres = [unit[block] for unit in units]
                else:
                    centres = [normalise(groups[block] @ unit) for unit in units]
                ratio = self.compare(centres, size[block])
                best[block] = ratio.argmax(1)
                top[block] = ratio.max(1)
                likeliest[block] = np.exp(top[block] - add_exponentials(ratio))
        return best, top, likeliest


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


def number_sets(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The set of each image, clusters first, and the number of images of each set."""
    place = np.array(label, np.int64)
    alone = np.flatnonzero(place == UNLABELLED)
    clusters = int(place.max(initial=-1)) + 1
    place[alone] = clusters + np.arange(len(alone))
    return place, np.bincount(place, minlength=clusters + len(alone)).astype(np.float64)


def _find_odds(share: float) -> float:
    """Logarithm of the odds of a share."""
    return float(to_log_odds(np.array([share]), margin=_MARGIN)[0])
