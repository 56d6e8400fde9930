"""Labelled images while the check of their labels is fitted.

The contract:
- Likelihoods, probabilities of the labels and the shares of wrong ones are fitted in turns, by
  expectation and maximisation. An image is compared with the centre of its label's other images.
- Callers limit BLAS to one thread.

Source: ours.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from cdp.label_check.likelihood import SetLikelihood, fit_logistic
from cdp.label_check.people import (
    APART,
    BELIEVED,
    LabelledPeople,
    OpenSet,
    add_exponentials,
    estimate_share,
    group_rows,
    normalise,
)

_ROUNDS = 10
"""Turns of likelihoods and probabilities, at most."""
_SETTLED = 0.01
"""Change of any image's probability below which the rounds end."""
_NEGATIVES = 30
"""Other labels an image is compared with while fitting."""
_LEAST_SIZE = 0.5
"""Expected images of a label, below which it has none."""
_LARGEST_SHARE = 0.1
"""Most weight that one label's images have while fitting."""
_FIRST_DOUBT = 0.1
"""Weight at the start of an image that is nearer to another label's centre than to its own."""
Examples = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of pairs of sets: cosines, noise, whether they are one person's, and weights."""


class LabelledRows:
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
        if nearer.any():
            self.right[nearer] = _FIRST_DOUBT
            self._measure()

    def fit(self) -> None:
        """Alternate between the likelihoods and the probabilities of the labels."""
        for turn in range(_ROUNDS):
            before = self.right
            if turn:
                self._measure()
            self._fit_likelihood()
            self._judge()
            if np.abs(self.right - before).max() < _SETTLED:
                break

    def _measure(self) -> None:
        """Cosines of every image with every label's centre, and with its own without the image."""
        weight = self.right.astype(np.float32)
        groups = group_rows(self.identity, self.labels, weight)
        self.size = np.bincount(self.identity, self.right, self.labels)
        self.own_size = self.size[self.identity] - self.right
        self.has_others = self.own_size > _LEAST_SIZE
        self.cosines, self.own, self.centres = [], [], []
        for unit in self.units:
            total = groups @ unit
            self.centres.append(normalise(total))
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
        groups = group_rows(self.identity, self.labels, weight)
        size = np.bincount(self.identity, weight, self.labels)
        return [normalise(groups @ unit) for unit in self.units], size

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
        self.best, top, total = ratio.argmax(1), ratio.max(1), add_exponentials(ratio)
        slope, shift = self.open_set = self._fit_open_set(top, self.right)
        self.best_other = top
        other = slope * top + shift
        evidence = np.stack([own, other, np.zeros(len(own))])
        for _ in range(50):
            named, unknown = self.wrong * (1 - self.unknown), self.wrong * self.unknown
            parts = np.log([1 - self.wrong, named, unknown])[:, None] + evidence
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
        people = self.list_people(np.arange(self.labels))
        ratio = people.compare(people.centres, people.size)
        np.fill_diagonal(ratio, -np.inf)
        total = add_exponentials(ratio)
        # the best of the other labels may be the person's second one, the next is somebody else's
        best, second = ratio.max(1), np.partition(ratio, -2, axis=1)[:, -2]
        slope, shift = self._fit_open_set(second, np.ones(len(present)))
        any_other = estimate_share(slope * best + shift, np.ones(len(present)))
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

    def list_people(self, labels: np.ndarray) -> LabelledPeople:
        """The people with an image; `labels` are the names of the numbers."""
        assert self.likelihood is not None
        present = np.flatnonzero(self.size > _LEAST_SIZE)
        centres = tuple(centre[present] for centre in self.centres)
        weight = self._limit(self.right, self.identity, self.own_size)[self.has_others]
        open_set = OpenSet(
            *self.open_set,
            self.own_ratio[self.has_others].astype(np.float32),
            weight.astype(np.float32),
            self.best_other.astype(np.float32),
        )
        return LabelledPeople(
            self.likelihood, centres, self.size[present], labels[present], open_set
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
