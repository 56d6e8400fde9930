"""Which labels to believe: wrong names, people with two labels, labelled people among unlabelled.

The contract:
- Enters: the committee's vectors of labelled images, and their labels. Leaves: for each image the
  probability that its label is right and the person it seems to be, for each label the label it is
  a second one of, and a model that finds the labelled people among other images.
- Nothing is taken for granted but that most labels are right. An image's label is right, another
  labelled person's, or an unknown person's; the shares of the three are estimated with the
  likelihoods by expectation and maximisation over the images themselves. Where labels contradict
  nothing the estimated share of wrong ones is zero, and nothing changes.
- An image is compared with the centre of its label's other images, never with itself.
- With few people (`LEAST_IDENTITIES`) nothing can be estimated, and every label is believed.
- The same bits with any number of threads.

Source: ours; the idea of estimating which labels are wrong from the data itself is that of
confident learning (Northcutt, Jiang & Chuang 2021), the estimated shares of unlabelled people are
those of Saerens, Latinne & Decaestecker (2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from cdp.arrays.cosine import make_unit
from cdp.arrays.threads import limit_blas, list_blocks
from cdp.label_check.likelihood import SetLikelihood, fit_logistic
from cdp.types import UNLABELLED, View, load_view

LEAST_IDENTITIES = 10
"""Labels with two images or more, below which no label is doubted."""
BELIEVED = 0.5
"""An image whose label is right with no more probability than this is not trained on."""
APART = 0.05
"""An unlabelled image that shows a labelled person with more probability than this is no negative
example, and neither is a label that may be another one's person."""
_ROUNDS = 10
_SETTLED = 0.01
"""Change of any image's probability below which the rounds end."""
_NEGATIVES = 30
"""Other labels an image is compared with while fitting."""
_LEAST_SIZE = 0.5
"""Expected images of a label, below which it has none."""
_LARGEST_SHARE = 0.1
"""Most weight that one label's images have while fitting."""
_JOINS = 3
"""Times labels are joined: with fewer people counted twice, others are seen more clearly."""
_FIRST_DOUBT = 0.1
"""Weight at the start of an image that is nearer to another label's centre than to its own."""


@dataclass(frozen=True)
class LabelCheck:
    """The result of `check_labels`.

    right : (n,) float32, the probability that each image's label is right.
    apart : (n,) bool, whether the label of each image is surely not a larger label's person.
    seems : (n,) int64, the label that fits an image best among the others; -1 where none is likely.
    seems_probability : (n,) float32, the probability that it is that person's.
    person : (labels,) int64, the label that each label is joined to: itself, or the larger label of
        the same person. person_probability : (labels,) float32; 1 for itself.
    wrong_share : estimated share of images with a wrong label.
    people : the model of the labelled people; None where there were too few.
    """

    right: np.ndarray
    apart: np.ndarray
    seems: np.ndarray
    seems_probability: np.ndarray
    person: np.ndarray
    person_probability: np.ndarray
    wrong_share: float
    people: LabelledPeople | None

    @property
    def believed(self) -> np.ndarray:
        """(n,) bool, the images whose labels are taken for right."""
        return self.right > BELIEVED

    @property
    def trained(self) -> np.ndarray:
        """(n,) bool, the images to train on: believed, and of labels that are surely different."""
        return self.believed & self.apart


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
        place, size = _number_sets(len(units[0]), label)
        groups = None
        if len(size) < len(place):
            groups = csr_matrix(
                (np.ones(len(place), np.float32), (place, np.arange(len(place)))),
                shape=(len(size), len(place)),
            )
        best = np.empty(len(size), np.int64)
        share, top = np.empty(len(size)), np.empty(len(size))
        with limit_blas():
            for block in list_blocks(0, len(size)):
                if groups is None:
                    centres = [unit[block] for unit in units]
                else:
                    centres = [_normalise(groups[block] @ unit) for unit in units]
                ratio = self.compare(centres, size[block])
                best[block] = ratio.argmax(1)
                top[block] = ratio.max(1)
                share[block] = np.exp(top[block] - _add_exponentials(ratio))
        slope, shift = self.open_set
        probability = _estimate_share(slope * top + shift, size)
        return self.label[best][place], (probability * share).astype(np.float32)[place]


def check_labels(views: Sequence[View], identity: np.ndarray, *, seed: int = 0) -> LabelCheck:
    """Find the labels that the images contradict.

    Parameters
    ----------
    views : one (n, d_v) array a model, the base first, or a function that loads it.
    identity : (n,) int64, the labels, 0 .. labels - 1, each used.
    seed : decides which other labels an image is compared with while fitting.
    """
    count = int(identity.max(initial=-1)) + 1
    size = np.bincount(identity, minlength=count)
    if (size >= 2).sum() < LEAST_IDENTITIES:
        return _believe_all(identity, count)
    units = [make_unit(load_view(view))[0] for view in views]
    with limit_blas():
        person, sure = np.arange(count), np.ones(count, np.float32)
        rows = _Rows(units, identity, count, seed)
        rows.fit()
        for _ in range(_JOINS):
            joined, joined_sure, unsure = rows.join_labels()
            if (joined == np.arange(count)).all():
                break
            sure = np.minimum(sure, joined_sure[person])
            person = joined[person]
            rows = _Rows(units, person[identity], count, seed, rows.likelihood)
            rows.fit()
        return rows.conclude(person, sure, unsure)


def _believe_all(identity: np.ndarray, count: int) -> LabelCheck:
    number = len(identity)
    return LabelCheck(
        np.ones(number, np.float32),
        np.ones(number, bool),
        np.full(number, UNLABELLED, np.int64),
        np.zeros(number, np.float32),
        np.arange(count),
        np.ones(count, np.float32),
        0.0,
        None,
    )


Examples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of pairs of sets: cosines, noise, whether they are one person's, and weights."""


class _Rows:
    """Labelled images while the check is fitted.

    right : (n,) float64, the probability of each label. wrong, unknown : the share of wrong labels,
    and of those the share of people without a label.
    """

    def __init__(
        self,
        units: list[np.ndarray],
        identity: np.ndarray,
        labels: int,
        seed: int,
        likelihood: SetLikelihood | None = None,
    ) -> None:
        self.units, self.identity, self.likelihood = units, identity, likelihood
        self.labels = labels
        self.used = np.bincount(identity, minlength=labels) > 0
        self.wrong, self.unknown = 0.02, 0.5
        random = np.random.default_rng([seed, 0x6C61])
        present = np.flatnonzero(self.used)
        place = np.searchsorted(present, identity)
        other = random.integers(0, len(present) - 1, (len(identity), _NEGATIVES))
        self.other = present[other + (other >= place[:, None])]
        self.halves = random.permutation(len(identity)) % 2 == 0
        self.right = np.ones(len(identity))
        self._measure()
        mean = np.mean(self.own, axis=0), np.mean(self.cosines, axis=0)
        mean[1][np.arange(len(identity)), identity] = -1
        nearer = self.has_others & (mean[0] < mean[1].max(1))
        self.right[nearer] = _FIRST_DOUBT

    def fit(self) -> None:
        """Alternate between the likelihoods and the probabilities of the labels."""
        for _ in range(_ROUNDS):
            before = self.right
            self._measure()
            self._fit_likelihood()
            self._judge()
            if np.abs(self.right - before).max() < _SETTLED:
                break

    def _measure(self) -> None:
        """Cosines of every image with every label's centre, and with its own without the image."""
        weight = self.right.astype(np.float32)
        rows = np.arange(len(weight))
        groups = csr_matrix((weight, (self.identity, rows)), shape=(self.labels, len(weight)))
        self.size = np.bincount(self.identity, self.right, self.labels)
        self.own_size = self.size[self.identity] - self.right
        self.has_others = self.own_size > _LEAST_SIZE
        self.cosines, self.own, self.centres = [], [], []
        for unit in self.units:
            total = groups @ unit
            self.centres.append(_normalise(total))
            self.cosines.append(unit @ self.centres[-1].T)
            rest = total[self.identity] - unit * weight[:, None]
            length = np.maximum(np.linalg.norm(rest, axis=1), 1e-6)
            self.own.append(np.einsum("nd,nd->n", unit, rest) / length)

    def _fit_likelihood(self) -> None:
        """Compare images with labels, images with half labels, and half labels with each other."""
        rows = np.arange(len(self.identity))
        far = np.stack([cosine[rows[:, None], self.other] for cosine in self.cosines], -1)
        weight = self._limit(self.right, self.identity, self.own_size)
        near = np.stack(self.own, -1)
        sizes = self.own_size, self.size[self.other]
        kinds = [_balance(near, far, np.ones(len(rows)), sizes, weight)]
        halves = [self._take_half(half) for half in (self.halves, ~self.halves)]
        second = np.flatnonzero(~self.halves)
        images = [unit[second] for unit in self.units], np.ones(len(second)), self.identity[second]
        kinds.append(self._compare(*images, self.right[second], halves[0], self.other[second]))
        present, first = np.unique(self.identity, return_index=True)
        labels = [centre[present] for centre in halves[1][0]], halves[1][1][present], present
        weight = np.minimum(1, halves[1][1][present])
        kinds.append(self._compare(*labels, weight, halves[0], self.other[first]))
        cosine, noise, same, weight = map(np.concatenate, zip(*kinds, strict=True))
        self.likelihood = SetLikelihood.fit(cosine, noise, same, weight, self.likelihood)

    def _compare(
        self,
        left: list[np.ndarray],
        left_size: np.ndarray,
        label: np.ndarray,
        weight: np.ndarray,
        half: tuple[list[np.ndarray], np.ndarray],
        other: np.ndarray,
    ) -> Examples:
        """Sets of given labels against half of their label, and of others."""
        rows = np.arange(len(label))
        cosines = [one @ centre.T for one, centre in zip(left, half[0], strict=True)]
        near = np.stack([cosine[rows, label] for cosine in cosines], -1)
        far = np.stack([cosine[rows[:, None], other] for cosine in cosines], -1)
        weight = self._limit(weight, label, half[1][label])
        return _balance(near, far, left_size, (half[1][label], half[1][other]), weight)

    def _take_half(self, half: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The centres and sizes of the labels, of half of the images."""
        weight = (self.right * half).astype(np.float32)
        rows = np.arange(len(weight))
        groups = csr_matrix((weight, (self.identity, rows)), shape=(self.labels, len(weight)))
        size = np.bincount(self.identity, weight, self.labels)
        return [_normalise(groups @ unit) for unit in self.units], size

    def _limit(self, weight: np.ndarray, label: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Weights with no label above `_LARGEST_SHARE` of them, 0 where a set is empty."""
        weight = np.where(size > _LEAST_SIZE, weight, 0)
        total = np.bincount(label, weight, self.labels)
        share = total / max(total.sum(), 1e-9)
        limited: np.ndarray = weight * np.minimum(
            1, _LARGEST_SHARE / np.maximum(share[label], 1e-9)
        )
        return limited

    def _judge(self) -> None:
        """Probabilities of the labels, and the shares of wrong ones and unknown people."""
        assert self.likelihood is not None
        noise = 1 + 1 / np.maximum(self.own_size, _LEAST_SIZE)
        own = np.where(self.has_others, self.likelihood.combine(self.own, noise), 0.0)
        self.own_ratio = own
        ratio = self.likelihood.combine(self.cosines, 1 + 1 / np.maximum(self.size, _LEAST_SIZE))
        ratio[np.arange(len(ratio)), self.identity] = -np.inf
        ratio[:, self.size <= _LEAST_SIZE] = -np.inf
        self.best, top, total = ratio.argmax(1), ratio.max(1), _add_exponentials(ratio)
        slope, shift = self.open_set = self._fit_open_set(top, self.right)
        other = slope * top + shift
        for _ in range(50):
            shares = np.log([1 - self.wrong, self.wrong * (1 - self.unknown)])
            parts = np.stack(
                [shares[0] + own, shares[1] + other, np.full(len(own), np.log(self.wrong))]
            )
            parts[2] += np.log(self.unknown)
            posterior = np.exp(parts - np.logaddexp.reduce(parts, axis=0))
            seen = posterior[:, self.has_others]
            wrong = seen[1:].sum() / max(seen.shape[1], 1)
            self.unknown = float(np.clip(seen[2].sum() / max(seen[1:].sum(), 1e-12), 0.01, 0.99))
            settled = abs(wrong - self.wrong) < 1e-5
            self.wrong = float(np.clip(wrong, 1e-6, 0.5))
            if settled:
                break
        self.right = posterior[0]
        self.other_probability = posterior[1] * np.exp(top - total)

    def _fit_open_set(self, top: np.ndarray, weight: np.ndarray) -> tuple[float, float]:
        """Compare images' likelihood ratios with their own labels to the best of other people.

        Returns slope and shift: how much more likely a ratio is an own one than such a best one.
        """
        own = self.own_ratio[self.has_others]
        ratio = np.concatenate([own, top]).astype(np.float64)
        same = np.arange(len(ratio)) < len(own)
        limited = self._limit(self.right, self.identity, self.own_size)[self.has_others]
        both = np.concatenate([limited / limited.sum(), weight / weight.sum()]) / 2
        slope, shift = fit_logistic(np.column_stack([ratio, np.ones(len(ratio))]), same, both)
        return max(float(slope), 0.0), float(shift)

    def join_labels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels of one person: each label's larger one, how sure that is, and which are unsure.

        A label that may be a larger one's person, with a probability above `APART` but not enough
        to join them, is unsure.
        """
        present = np.flatnonzero(self.size > _LEAST_SIZE)
        people = self._people(present)
        ratio = people.compare(people.centres, people.size)
        np.fill_diagonal(ratio, -np.inf)
        total = _add_exponentials(ratio)
        # the best of the other labels may be the person's second one, the next is somebody else's
        best, second = ratio.max(1), np.partition(ratio, -2, axis=1)[:, -2]
        slope, shift = self._fit_open_set(second, np.ones(len(present)))
        any_other = _estimate_share(slope * best + shift, np.ones(len(present)))
        probability = any_other[:, None] * np.exp(ratio - total[:, None])
        probability = np.minimum(probability, probability.T)
        group = connected_components(csr_matrix(probability > BELIEVED), directed=False)[1]
        order = np.lexsort((np.arange(len(present)), -self.size[present], group))
        _, first = np.unique(group[order], return_index=True)
        person, sure = np.arange(self.labels), np.ones(self.labels, np.float32)
        person[present] = present[order[first]][group]
        joined = person[present] != present
        sure[present[joined]] = probability.max(1)[joined]
        rank = np.empty(len(present), np.int64)
        rank[np.lexsort((np.arange(len(present)), -self.size[present]))] = np.arange(len(present))
        larger = (rank[None, :] < rank[:, None]) & (group[None, :] != group[:, None])
        unsure = np.zeros(self.labels, bool)
        unsure[present] = ((probability > APART) & larger).any(1)
        return person, sure, unsure

    def _people(self, present: np.ndarray) -> LabelledPeople:
        assert self.likelihood is not None
        centres = tuple(centre[present] for centre in self.centres)
        return LabelledPeople(self.likelihood, centres, self.size[present], present, self.open_set)

    def conclude(
        self, person: np.ndarray, person_probability: np.ndarray, unsure: np.ndarray
    ) -> LabelCheck:
        likely = self.other_probability > BELIEVED
        return LabelCheck(
            self.right.astype(np.float32),
            ~unsure[self.identity],
            np.where(likely, self.best, UNLABELLED),
            self.other_probability.astype(np.float32),
            person,
            person_probability,
            self.wrong,
            self._people(np.flatnonzero(self.size > _LEAST_SIZE)),
        )


def _balance(
    near: np.ndarray,
    far: np.ndarray,
    left_size: np.ndarray,
    right_size: tuple[np.ndarray, np.ndarray],
    weight: np.ndarray,
) -> Examples:
    """Pairs of sets of one person and of two, of the same weight, so that sizes say nothing.

    near : (n, views). far : (n, others, views). weight : (n,), of the near pairs.
    left_size : (n,). right_size : (n,) and (n, others).
    """
    noise = [1 / np.maximum(size, _LEAST_SIZE) for size in right_size]
    left = 1 / np.maximum(left_size, _LEAST_SIZE)
    seen = weight > 0
    kept = (right_size[1] > _LEAST_SIZE) & (left_size > _LEAST_SIZE)[:, None]
    number = int(kept.sum())
    return (
        np.concatenate([near[seen], far[kept]]),
        np.concatenate([(left + noise[0])[seen], (left[:, None] + noise[1])[kept]]),
        np.concatenate([np.ones(int(seen.sum()), bool), np.zeros(number, bool)]),
        np.concatenate([weight[seen], np.full(number, weight.sum() / max(number, 1))]),
    )


def _normalise(total: np.ndarray) -> np.ndarray:
    """Rows at unit length; a sum of zero stays, and is near to nothing."""
    unit: np.ndarray = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-6)
    return unit


def _add_exponentials(ratio: np.ndarray) -> np.ndarray:
    """Logarithm of the sum of the exponentials of each row, (n,) float64."""
    top = ratio.max(1)
    safe = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):
        added = np.log(np.exp(ratio - safe[:, None]).sum(1, dtype=np.float64))
    return np.asarray(safe + added, np.float64)


def _estimate_share(ratio: np.ndarray, weight: np.ndarray) -> np.ndarray:
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


ISSUES = ("wrong_name", "second_label")


def list_issues(
    check: LabelCheck | None,
    identity: np.ndarray | None = None,
    rows: np.ndarray | None = None,
    names: np.ndarray | None = None,
) -> pd.DataFrame:
    """Every image whose label is doubted, the surest first; none without a check.

    Parameters
    ----------
    check : the result of `check_labels`.
    identity : (n,) int64, the labels that were checked.
    rows : (n,) int64, the number that each image is listed by.
    names : (labels,) name of each label.

    Returns
    -------
    DataFrame
        row; issue ("wrong_name" or "second_label"); label, the name given; seems, the name that
        fits best, None where no labelled person is likely; probability of the issue.
    """
    columns = ["row", "issue", "label", "seems", "probability"]
    if check is None or identity is None or rows is None or names is None:
        return pd.DataFrame({name: [] for name in columns})
    person = check.person[identity]
    wrong, second = ~check.believed, check.believed & (person != identity)
    listed = np.concatenate([np.flatnonzero(wrong), np.flatnonzero(second)])
    is_wrong = wrong[listed]
    seems = np.where(is_wrong, check.seems[listed], person[listed])
    probability = np.where(
        is_wrong, 1 - check.right[listed], check.person_probability[identity[listed]]
    )
    found = pd.DataFrame(
        {
            "row": rows[listed],
            "issue": np.where(is_wrong, *ISSUES),
            "label": names[identity[listed]],
            "seems": [names[each] if each >= 0 else None for each in seems],
            "probability": probability,
        }
    )
    order = np.lexsort((found.row, -found.probability))
    return found.iloc[order].reset_index(drop=True)


def _number_sets(count: int, label: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The set of each image, clusters first, and the number of images of each set."""
    if label is None:
        return np.arange(count), np.ones(count)
    place = np.array(label, np.int64)
    alone = np.flatnonzero(place == UNLABELLED)
    clusters = int(place.max(initial=-1)) + 1
    place[alone] = clusters + np.arange(len(alone))
    return place, np.bincount(place, minlength=clusters + len(alone)).astype(np.float64)
