"""Verification: pairs of images, accuracy over folds, and TAR at a given FAR.

The contract:
- A pair is accepted when its similarity is above the threshold: a tie counts as rejected.
- Folds share no identity; a threshold is fitted on the other folds.
- `verification_accuracy` and `tar_at_far` are library surface and independent oracles:
  `cdp.metrics.protocols` computes the same figures with resamples, and its tests compare the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError


def check_scores(
    value: np.ndarray, same: np.ndarray, name: str = "similarity"
) -> tuple[np.ndarray, np.ndarray]:
    """Check values and truth of pairs: finite float64 and bool copies of one shape (m,), m >= 1."""
    value, same = np.asarray(value, np.float64), np.asarray(same)
    if value.ndim != 1 or value.shape != same.shape or not value.size:
        raise DataError(
            f"expected {name} and same of one shape (m,), m >= 1, got {value.shape} and "
            f"{same.shape}"
        )
    if not np.isfinite(value).all():
        raise DataError(f"expected finite values in {name}, got NaN or infinity; check the model")
    return value, same.astype(bool)


@dataclass(frozen=True)
class VerificationPairs:
    """A verification protocol: genuine and impostor pairs in folds that share no identity.

    source, target : (m,) int64, row numbers of the images.
    same : (m,) bool, whether both show one identity.
    fold : (m,) int64, 0 .. folds - 1; all pairs of an identity lie in one fold.
    """

    source: np.ndarray
    target: np.ndarray
    same: np.ndarray
    fold: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def sample_verification_pairs(
    identity: np.ndarray, pairs_per_fold: int = 300, folds: int = 10, seed: int = 0
) -> VerificationPairs:
    """Draw a balanced verification protocol in the manner of LFW.

    Identities are distributed over folds at random, those with two images or more first, so that
    each fold gets its share of them. Genuine pairs are taken in rounds, one an identity of the
    fold, until there are `pairs_per_fold` or none is left: no identity with many images dominates.
    The same number of impostor pairs is added, each of two identities drawn uniformly and an image
    of either. No pair comes twice.

    Parameters
    ----------
    identity : (n,) integer, all >= 0, of the evaluation split alone.
    pairs_per_fold : the genuine pairs wanted in a fold, and the impostor pairs.
    folds : number of folds, >= 2.
    seed : same seed, same pairs.

    Returns
    -------
    VerificationPairs, ordered by fold, genuine pairs first. A fold that has fewer genuine pairs
    than asked for (or fewer impostor pairs) holds what there is of them, balanced.

    Raises
    ------
    DataError : fewer than `2 * folds` identities, or fewer than `folds` with two images.
    """
    identity = np.asarray(identity)
    if identity.ndim != 1 or (identity.size and identity.min() < 0):
        raise DataError(f"expected identities (n,) >= 0, got shape {identity.shape}; drop unknowns")
    if folds < 2 or pairs_per_fold < 1:
        raise DataError(f"expected folds >= 2 and pairs >= 1, got {folds} and {pairs_per_fold}")
    order = np.argsort(identity, kind="stable")
    name, start, size = np.unique(identity[order], return_index=True, return_counts=True)
    several = int((size > 1).sum())
    if len(name) < 2 * folds or several < folds:
        raise DataError(
            f"expected at least {2 * folds} identities, {folds} of them with two images, for "
            f"{folds} folds; got {len(name)}, {several} with two; keep more identities for "
            "evaluation or ask for fewer folds"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(name))
    dealt = shuffled[np.argsort(size[shuffled] < 2, kind="stable")]
    part: list[tuple[np.ndarray, np.ndarray, bool, int]] = []
    for fold in range(folds):
        drawn = dealt[fold::folds]
        genuine = _genuine_pairs(start[drawn], size[drawn], pairs_per_fold, rng)
        impostor = _impostor_pairs(start[drawn], size[drawn], len(genuine), rng)
        genuine = genuine[: len(impostor)]
        for pair, same in ((genuine, True), (impostor, False)):
            part.append((order[pair[:, 0]], order[pair[:, 1]], same, fold))
    return VerificationPairs(
        source=np.concatenate([source for source, _, _, _ in part]),
        target=np.concatenate([target for _, target, _, _ in part]),
        same=np.concatenate([np.full(len(source), same) for source, _, same, _ in part]),
        fold=np.concatenate(
            [np.full(len(source), fold, dtype=np.int64) for source, _, _, fold in part]
        ),
    )


def _genuine_pairs(
    start: np.ndarray, size: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `wanted` distinct genuine pairs (g, 2), taken in rounds, a pair an identity."""
    key: list[np.ndarray] = []
    pair: list[np.ndarray] = []
    for first, images in zip(start, size, strict=True):
        possible = int(images) * (int(images) - 1) // 2
        rank = rng.choice(possible, size=min(possible, wanted), replace=False)
        # Unrank (i, j), i < j, from j (j - 1) / 2 + i; the square root is exact below 2^50.
        j = (np.sqrt(8.0 * rank + 1.0).astype(np.int64) + 1) // 2
        pair.append(first + np.stack([rank - j * (j - 1) // 2, j], axis=1))
        key.append(np.arange(len(rank)) + rng.random(len(rank)))
    return np.concatenate(pair)[np.argsort(np.concatenate(key), kind="stable")][:wanted]


def _impostor_pairs(
    start: np.ndarray, size: np.ndarray, wanted: int, rng: np.random.Generator
) -> np.ndarray:
    """Up to `wanted` distinct pairs (w, 2) of two identities, each equally likely."""
    images = int(size.sum())
    possible = (images**2 - int((size.astype(np.int64) ** 2).sum())) // 2
    if possible <= 4 * wanted:
        owner = np.repeat(np.arange(len(size)), size)
        row = np.concatenate([first + np.arange(n) for first, n in zip(start, size, strict=True)])
        i, j = np.triu_indices(images, 1)
        keep = owner[i] != owner[j]
        every = np.stack([row[i[keep]], row[j[keep]]], axis=1)
        return every[rng.permutation(len(every))[:wanted]]
    found = np.empty((0, 2), np.int64)
    while len(found) < wanted:
        a = rng.integers(len(size), size=2 * wanted)
        b = (a + rng.integers(1, len(size), size=2 * wanted)) % len(size)
        one = start[a] + (rng.random(2 * wanted) * size[a]).astype(np.int64)
        two = start[b] + (rng.random(2 * wanted) * size[b]).astype(np.int64)
        drawn = np.stack([np.minimum(one, two), np.maximum(one, two)], axis=1)
        found = np.concatenate([found, drawn])
        found = found[np.sort(np.unique(found, axis=0, return_index=True)[1])]
    return found[:wanted]


def compare_pairs(
    embedding: np.ndarray, source: np.ndarray, target: np.ndarray, *, block: int = 65536
) -> np.ndarray:
    """Cosine of listed pairs of unit vectors.

    embedding : (n, d) float32 of unit length; source, target : (m,) integer rows.
    Returns (m,) float32. Memory is O(block x d).
    """
    similarity = np.empty(len(source), np.float32)
    for low in range(0, len(source), block):
        part = slice(low, low + block)
        similarity[part] = np.einsum(
            "md,md->m", embedding[source[part]], embedding[target[part]], dtype=np.float32
        )
    return similarity


def verification_accuracy(
    similarity: np.ndarray, same: np.ndarray, fold: np.ndarray
) -> tuple[float, float]:
    """Verification accuracy as LFW defines it: the threshold comes from the other folds.

    For each fold the threshold that is best on all other folds (a midpoint between two
    neighbouring similarities; the middle one of equally good ones) decides the fold's pairs:
    one identity when the similarity is above it.

    Parameters
    ----------
    similarity : (m,) float, higher is more alike.
    same : (m,) bool.
    fold : (m,) integer, at least two different values.

    Returns
    -------
    (mean, std) : over folds; std is the population standard deviation.

    Raises
    ------
    DataError : no pair, shapes that differ, NaN, or a single fold.

    Source: Huang et al., *Labeled Faces in the Wild*, 2007, section on the 10-fold protocol.
    """
    right = decide_by_folds(similarity, same, fold)
    accuracy = [np.mean(right[fold == name]) for name in np.unique(fold)]
    return float(np.mean(accuracy)), float(np.std(accuracy))


def decide_by_folds(similarity: np.ndarray, same: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Whether each pair is decided correctly by the threshold fitted on the other folds, (m,) bool.

    Parameters and raises as in `verification_accuracy`.
    """
    similarity, same = check_scores(similarity, same)
    fold = np.asarray(fold)
    if fold.shape != similarity.shape:
        raise DataError(f"expected fold of shape {similarity.shape}, got {fold.shape}")
    names = np.unique(fold)
    if len(names) < 2:
        raise DataError(
            f"expected at least two folds, got {len(names)}; a threshold needs other folds"
        )
    right = np.empty(len(same), bool)
    for name in names:
        held_out = fold == name
        threshold = _best_threshold(similarity[~held_out], same[~held_out])
        right[held_out] = (similarity[held_out] > threshold) == same[held_out]
    return right


def _best_threshold(similarity: np.ndarray, same: np.ndarray) -> float:
    """The middle one of the thresholds with the most correct decisions by `similarity > t`."""
    order = np.argsort(similarity, kind="stable")
    value, truth = similarity[order], same[order]
    # right[i]: the first i pairs are rejected, the others accepted.
    right = np.concatenate([[0], np.cumsum(~truth)])
    right = right + truth.sum() - np.concatenate([[0], np.cumsum(truth)])
    middle = np.concatenate([[value[0] - 1.0], (value[:-1] + value[1:]) / 2.0, [value[-1]]])
    # No threshold lies between equal values: such a cut would reject pairs counted as accepted.
    right[1:-1][value[:-1] == value[1:]] = -1
    best = np.flatnonzero(right == right.max())
    return float(middle[best[len(best) // 2]])


def threshold_at_far(impostor: np.ndarray, far: float) -> float:
    """The lowest threshold that accepts at most a share `far` of impostors (`similarity > t`).

    impostor : (m,) float similarities of pairs of two identities, m >= 1, finite.
    far : false acceptance rate, in [0, 1). Below 1 / m the threshold is the highest impostor.
    Raises DataError for no impostor, NaN, or a rate outside [0, 1).
    """
    impostor = check_scores(impostor, np.zeros(np.shape(impostor), bool), "impostor")[0]
    if not 0.0 <= far < 1.0:
        raise DataError(f"expected a false acceptance rate in [0, 1), got {far}")
    allowed = math.floor(far * len(impostor) + 1e-9)
    place = len(impostor) - 1 - allowed
    return float(np.partition(impostor, place)[place])


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float) -> float:
    """True acceptance rate at a false acceptance rate, TAR@FAR.

    genuine, impostor : (g,) and (m,) float similarities of genuine and impostor pairs.
    far : as in `threshold_at_far`, which sets the threshold and raises.
    Returns the share of genuine similarities above the threshold.
    Raises DataError for no genuine pair.
    """
    genuine = check_scores(genuine, np.ones(np.shape(genuine), bool), "genuine")[0]
    return float(np.mean(genuine > threshold_at_far(impostor, far)))
