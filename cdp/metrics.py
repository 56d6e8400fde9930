"""How good are pseudo-labels, probabilities and embeddings: the field's numbers, exactly computed.

Three groups: partitions against truth (`score_pairwise`, `score_bcubed`, `score_nmi`),
probabilities against outcomes (`measure_calibration`), and embeddings against identities
(verification, identification, open-set identification).

The contract:
- Nothing is estimated where it can be counted: partitions are scored from their sparse
  contingency table, in O(n log n) time and O(n) memory, never by listing pairs.
- An image without a pseudo-label (`UNLABELLED`) is a cluster of its own: discarding images
  costs recall and is never rewarded.
- A score is a share in [0, 1]. A share of nothing is 1 where no error was possible (documented
  at each function) and an error where the question makes no sense.
- A tie never helps: a similarity equal to the threshold or to the mate's is held against the
  system under test.
- Similarities are computed in blocks: memory is O(block x gallery), whatever the probe count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.types import UNLABELLED

# --- partitions ---------------------------------------------------------------------------


def score_pairwise(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """Pairwise precision, recall and F of a clustering.

    Over all n(n-1)/2 unordered pairs of images: precision is the share of pairs put together
    that belong together, recall the share of pairs that belong together that were put together.

    Parameters
    ----------
    truth : (n,) integer, the true identity of each image, all >= 0.
    label : (n,) integer, the cluster of each image; `UNLABELLED` is a cluster of its own.

    Returns
    -------
    (precision, recall, f) : floats in [0, 1]; f is their harmonic mean, 0 when both are 0.
        With no pair put together precision is 1; with no true pair recall is 1 (no error was
        possible). No image at all scores (1, 1, 1).

    Raises
    ------
    DataError : the shapes differ, are not (n,), or an identity is unknown.

    Source: Zhan et al. 2018, section 4.2 (pairwise recall and precision).
    """
    count, row, column = _contingency(truth, label)
    both = _pair_count(count)
    true = _pair_count(np.bincount(row, weights=count))
    predicted = _pair_count(np.bincount(column, weights=count))
    precision = both / predicted if predicted else 1.0
    recall = both / true if true else 1.0
    return precision, recall, _harmonic_mean(precision, recall)


def score_bcubed(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """BCubed precision, recall and F of a clustering.

    Each image's precision is the share of its cluster that has its identity, itself included;
    its recall the share of its identity found in its cluster. The scores are the means over
    images, so a large identity weighs by its images and not by their square.

    Parameters, raises and ties as in `score_pairwise`. No image at all scores (1, 1, 1).

    Source: Amigo et al., *A comparison of extrinsic clustering evaluation metrics*, 2009.
    """
    count, row, column = _contingency(truth, label)
    if not count.size:
        return 1.0, 1.0, 1.0
    squared = count.astype(np.float64) ** 2
    total = float(count.sum())
    precision = float((squared / np.bincount(column, weights=count)[column]).sum() / total)
    recall = float((squared / np.bincount(row, weights=count)[row]).sum() / total)
    return precision, recall, _harmonic_mean(precision, recall)


def score_amid_strangers(truth: np.ndarray, label: np.ndarray) -> tuple[float, float, float]:
    """BCubed precision, recall and F of known people clustered together with strangers.

    As `score_bcubed`, the mean over the known images: a stranger belongs with no known person,
    whether strangers are put together rightly is no matter.

    Parameters
    ----------
    truth : (n,) integer, the identity of each image; below 0 a stranger.
    label : (n,) integer, the cluster of each image; `UNLABELLED` is a cluster of its own.

    Returns
    -------
    (precision, recall, F) : floats in [0, 1]; 1 without a known image.
    """
    truth, label = np.asarray(truth), np.asarray(label)
    known = truth >= 0
    count, row, column = _contingency(truth[known], label[known])
    if not count.size:
        return 1.0, 1.0, 1.0
    # Columns number the clusters of the known: what was put there of strangers joins them.
    own = label[known]
    lone = own == UNLABELLED
    cluster = np.unique(own[~lone])
    mixed = label[~known]
    mixed = mixed[np.isin(mixed, cluster)]
    strangers = np.bincount(np.searchsorted(cluster, mixed), minlength=len(cluster))
    strangers = np.append(strangers, np.zeros(int(lone.sum()), np.int64))
    inside, people = np.bincount(column, weights=count), np.bincount(row, weights=count)
    squared = count.astype(np.float64) ** 2
    precision = float((squared / (inside + strangers)[column]).sum() / count.sum())
    recall = float((squared / people[row]).sum() / count.sum())
    return precision, recall, _harmonic_mean(precision, recall)


def score_nmi(truth: np.ndarray, label: np.ndarray) -> float:
    """Normalised mutual information of a clustering, arithmetic normalisation.

    I(truth; label) / mean(H(truth), H(label)), in [0, 1]; 1 when both entropies are 0 (every
    image in one cluster, and rightly). Not adjusted for chance: many singletons score high, so
    read it beside `score_pairwise`.

    Parameters and raises as in `score_pairwise`.
    """
    count, row, column = _contingency(truth, label)
    if not count.size:
        return 1.0
    share = count / count.sum()
    by_identity = np.bincount(row, weights=share)
    by_cluster = np.bincount(column, weights=share)
    entropy = -(by_identity @ np.log(by_identity)) - (by_cluster @ np.log(by_cluster))
    if entropy <= 0.0:
        return 1.0
    information = share @ (np.log(share) - np.log(by_identity[row]) - np.log(by_cluster[column]))
    return float(np.clip(2.0 * information / entropy, 0.0, 1.0))


def _contingency(truth: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The non-empty cells of identity x cluster: (count, identity row, cluster column)."""
    truth, label = np.asarray(truth), np.asarray(label)
    if truth.ndim != 1 or truth.shape != label.shape:
        raise DataError(
            f"expected truth and label of one shape (n,), got {truth.shape} and {label.shape}; "
            "pass one identity and one cluster an image"
        )
    for name, value in (("truth", truth), ("label", label)):
        if value.size and not np.issubdtype(value.dtype, np.integer):
            raise DataError(f"expected integers in {name}, got dtype {value.dtype}; encode them")
    if truth.size and truth.min() < 0:
        raise DataError(
            f"expected every identity known (>= 0), got {truth.min()} at row {truth.argmin()}; "
            "leave images of unknown identity out of the score"
        )
    if label.size and label.min() < UNLABELLED:
        raise DataError(
            f"expected labels >= {UNLABELLED}, got {label.min()} at row {label.argmin()}"
        )
    row = np.unique(truth, return_inverse=True)[1].astype(np.int64)
    column = np.unique(label, return_inverse=True)[1].astype(np.int64)
    alone = label == UNLABELLED
    column[alone] = column.max(initial=0) + 1 + np.arange(alone.sum())
    column = np.unique(column, return_inverse=True)[1].astype(np.int64)
    width = int(column.max(initial=0)) + 1
    cell, count = np.unique(row * width + column, return_counts=True)
    return count, cell // width, cell % width


def _pair_count(size: np.ndarray) -> int:
    """How many unordered pairs groups of these sizes hold, as an exact integer."""
    whole = np.rint(size).astype(np.int64)
    return int((whole * (whole - 1) // 2).sum())


def _harmonic_mean(precision: float, recall: float) -> float:
    total = precision + recall
    return 2.0 * precision * recall / total if total else 0.0


# --- probabilities ------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """A reliability curve over equal-width bins of [0, 1], and its summary.

    error : expected calibration error, the count-weighted mean of |share - probability|.
    edge : (bins + 1,) float64, the borders; a bin holds its lower border, the last one both.
    probability : (bins,) float64, mean predicted probability in the bin; nan when it is empty.
    share : (bins,) float64, share of pairs that are true in the bin; nan when it is empty.
    count : (bins,) int64, pairs in the bin.
    """

    error: float
    edge: np.ndarray
    probability: np.ndarray
    share: np.ndarray
    count: np.ndarray


def measure_calibration(probability: np.ndarray, same: np.ndarray, bins: int = 15) -> Calibration:
    """Compare predicted probabilities with what came true.

    Parameters
    ----------
    probability : (m,) float in [0, 1], predicted that a pair is of one identity.
    same : (m,) bool, whether it is.
    bins : number of equal-width bins, >= 1.

    Raises
    ------
    DataError : no pair, shapes that differ, a probability outside [0, 1] or NaN, bins < 1.

    Source: Naeini et al., *Obtaining well calibrated probabilities using Bayesian binning*, 2015.
    """
    probability, same = _scored(probability, same, "probability")
    if bins < 1:
        raise DataError(f"expected at least one bin, got {bins}")
    if probability.min() < 0.0 or probability.max() > 1.0:
        raise DataError(
            f"expected probabilities in [0, 1], got {probability.min()} to {probability.max()}; "
            "pass the mediator's output, not a similarity"
        )
    edge = np.linspace(0.0, 1.0, bins + 1)
    place = np.clip(np.searchsorted(edge, probability, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=probability, minlength=bins) / count
        share = np.bincount(place, weights=same, minlength=bins) / count
    filled = count > 0
    error = float(np.abs(mean - share)[filled] @ count[filled] / count.sum())
    return Calibration(error, edge, mean, share, count)


def _scored(
    value: np.ndarray, same: np.ndarray, name: str = "similarity"
) -> tuple[np.ndarray, np.ndarray]:
    """Checked copies: finite float64 values and bool truth of one shape (m,), m >= 1."""
    value, same = np.asarray(value, np.float64), np.asarray(same)
    if value.ndim != 1 or value.shape != same.shape or not value.size:
        raise DataError(
            f"expected {name} and same of one shape (m,), m >= 1, got {value.shape} and "
            f"{same.shape}"
        )
    if not np.isfinite(value).all():
        raise DataError(f"expected finite values in {name}, got NaN or infinity; check the model")
    return value, same.astype(bool)


# --- verification -------------------------------------------------------------------------


@dataclass(frozen=True)
class VerificationPairs:
    """Pairs of images to be told apart, in folds that share no person.

    source, target : (m,) int64, row numbers of the images.
    same : (m,) bool, whether both show one person.
    fold : (m,) int64, 0 .. folds - 1; every person's pairs lie in one fold.
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

    People are dealt to folds at random, those with two images or more first, so that each fold
    gets its share of them. Genuine pairs go round the people of the fold, a pair each, until
    there are `pairs_per_fold` or none is left: no person with many images dominates. As many
    impostor pairs join them, each of two people drawn uniformly and an image of each. No pair
    comes twice.

    Parameters
    ----------
    identity : (n,) integer, all >= 0: the people of the evaluation split, and no one else.
    pairs_per_fold : the genuine pairs wanted in a fold, and the impostor pairs.
    folds : number of folds, >= 2.
    seed : same seed, same pairs.

    Returns
    -------
    VerificationPairs, ordered by fold, genuine pairs first. A fold that has fewer genuine pairs
    than asked for (or fewer impostor pairs) holds what there is of them, balanced.

    Raises
    ------
    DataError : fewer than `2 * folds` people, or fewer than `folds` with two images.
    """
    identity = np.asarray(identity)
    if identity.ndim != 1 or (identity.size and identity.min() < 0):
        raise DataError(f"expected identities (n,) >= 0, got shape {identity.shape}; drop unknowns")
    if folds < 2 or pairs_per_fold < 1:
        raise DataError(f"expected folds >= 2 and pairs >= 1, got {folds} and {pairs_per_fold}")
    order = np.argsort(identity, kind="stable")
    person, start, size = np.unique(identity[order], return_index=True, return_counts=True)
    several = int((size > 1).sum())
    if len(person) < 2 * folds or several < folds:
        raise DataError(
            f"expected at least {2 * folds} people, {folds} of them with two images, for {folds} "
            f"folds; got {len(person)} people, {several} with two; keep more people for "
            "evaluation or ask for fewer folds"
        )
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(person))
    dealt = shuffled[np.argsort(size[shuffled] < 2, kind="stable")]
    part: list[tuple[np.ndarray, np.ndarray, bool, int]] = []
    for fold in range(folds):
        people = dealt[fold::folds]
        genuine = _genuine_pairs(start[people], size[people], pairs_per_fold, rng)
        impostor = _impostor_pairs(start[people], size[people], len(genuine), rng)
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
    """Up to `wanted` distinct same-person pairs (g, 2), taken in rounds, a pair a person."""
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
    """Up to `wanted` distinct pairs (w, 2) of two people, each person equally likely."""
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
    same person when the similarity is above it.

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
    """Whether each pair is told right by the threshold of the other folds, (m,) bool.

    Parameters and raises as in `verification_accuracy`.
    """
    similarity, same = _scored(similarity, same)
    fold = np.asarray(fold)
    if fold.shape != similarity.shape:
        raise DataError(f"expected fold of shape {similarity.shape}, got {fold.shape}")
    names = np.unique(fold)
    if len(names) < 2:
        raise DataError(f"expected at least two folds, got {len(names)}; nothing to learn from")
    right = np.empty(len(same), bool)
    for name in names:
        held_out = fold == name
        threshold = _best_threshold(similarity[~held_out], same[~held_out])
        right[held_out] = (similarity[held_out] > threshold) == same[held_out]
    return right


def _best_threshold(similarity: np.ndarray, same: np.ndarray) -> float:
    """The middle one of the thresholds with the most right decisions by `similarity > t`."""
    order = np.argsort(similarity, kind="stable")
    value, truth = similarity[order], same[order]
    # right[i]: the first i pairs are refused, the others accepted.
    right = np.concatenate([[0], np.cumsum(~truth)])
    right = right + truth.sum() - np.concatenate([[0], np.cumsum(truth)])
    middle = np.concatenate([[value[0] - 1.0], (value[:-1] + value[1:]) / 2.0, [value[-1]]])
    # Equal values cannot be parted: such a cut would refuse what it counts as accepted.
    right[1:-1][value[:-1] == value[1:]] = -1
    best = np.flatnonzero(right == right.max())
    return float(middle[best[len(best) // 2]])


def threshold_at_far(impostor: np.ndarray, far: float) -> float:
    """The lowest threshold that accepts at most a share `far` of impostors (`similarity > t`).

    impostor : (m,) float similarities of pairs of two people, m >= 1, finite.
    far : false acceptance rate, in [0, 1). Below 1 / m the threshold is the highest impostor.
    Raises DataError for no impostor, NaN, or a rate outside [0, 1).
    """
    impostor = _scored(impostor, np.zeros(np.shape(impostor), bool), "impostor")[0]
    if not 0.0 <= far < 1.0:
        raise DataError(f"expected a false acceptance rate in [0, 1), got {far}")
    allowed = math.floor(far * len(impostor) + 1e-9)
    place = len(impostor) - 1 - allowed
    return float(np.partition(impostor, place)[place])


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float) -> float:
    """True acceptance rate at a false acceptance rate, TAR@FAR.

    genuine, impostor : (g,) and (m,) float similarities of same- and two-person pairs.
    far : as in `threshold_at_far`, which sets the threshold and raises.
    Returns the share of genuine similarities above the threshold.
    Raises DataError for no genuine pair.
    """
    genuine = _scored(genuine, np.ones(np.shape(genuine), bool), "genuine")[0]
    return float(np.mean(genuine > threshold_at_far(impostor, far)))


# --- identification -----------------------------------------------------------------------


def sample_probe_gallery(identity: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split images for identification: one gallery image a person, the others are probes.

    identity : (n,) integer >= 0. The gallery image is drawn uniformly by `seed`.
    Returns (probe, gallery), ascending int64 rows; a person with one image is in the gallery
    only and serves as a distractor.
    """
    identity = np.asarray(identity)
    shuffled = np.random.default_rng(seed).permutation(len(identity))
    gallery = np.sort(shuffled[np.unique(identity[shuffled], return_index=True)[1]])
    return np.setdiff1d(np.arange(len(identity)), gallery), gallery


def rank_k(
    probe: np.ndarray,
    probe_identity: np.ndarray,
    gallery: np.ndarray,
    gallery_identity: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    *,
    distractor: np.ndarray | None = None,
    block: int = 1024,
) -> dict[int, float]:
    """Closed-set identification: the share of probes whose mate is among the k best images.

    A probe's rank is 1 + the number of gallery images of other people, and distractors, that
    are at least as similar as its best mate.

    Parameters
    ----------
    probe, gallery : (p, d) and (g, d) float32, unit length; no probe may itself be in the gallery.
    probe_identity, gallery_identity : (p,) and (g,) integer.
    ks : ranks, each >= 1.
    distractor : (q, d) float32, unit length: images of people who are no probe, or None.
    block : probes compared at once.

    Returns
    -------
    {k: share of probes with rank <= k}

    Raises
    ------
    DataError : no probe, a probe without a mate in the gallery, widths that differ, NaN.

    Source: Kemelmacher-Shlizerman et al., *The MegaFace Benchmark*, 2016 (rank-k with distractors).
    """
    found = identify(
        probe, probe_identity, gallery, gallery_identity, distractor=distractor, block=block
    )
    orphan = np.flatnonzero(~found.mated)
    if orphan.size:
        raise DataError(
            f"expected a mate in the gallery for each probe, {orphan.size} have none (first: row "
            f"{orphan[0]}); leave them out or use tpir_at_fpir"
        )
    return {int(k): float(np.mean(found.rank <= k)) for k in ks}


def tpir_at_fpir(
    probe: np.ndarray,
    probe_identity: np.ndarray,
    gallery: np.ndarray,
    gallery_identity: np.ndarray,
    fpir: float,
    *,
    rank: int = 20,
    block: int = 1024,
) -> float:
    """Open-set identification: the true positive rate at a false positive rate.

    Probes whose person is not in the gallery are unmated. The threshold is the lowest at which
    at most a share `fpir` of them has any gallery image above it. A mated probe is a true
    positive when its best mate is above that threshold and its rank (as in `rank_k`) is <= `rank`.

    Parameters as in `rank_k`; fpir in [0, 1).

    Raises
    ------
    DataError : no mated probe, no unmated probe, and as in `rank_k`.

    Source: Cheng et al., *Surveillance Face Recognition Challenge*, 2018 (TPIR20@FPIR).
    """
    found = identify(probe, probe_identity, gallery, gallery_identity, block=block)
    mated = found.mated
    if mated.all() or not mated.any():
        raise DataError(
            f"expected mated and unmated probes, got {mated.sum()} mated of {len(mated)}; keep "
            "some people out of the gallery"
        )
    threshold = threshold_at_far(found.other[~mated], fpir)
    return float(np.mean((found.best[mated] > threshold) & (found.rank[mated] <= rank)))


@dataclass(frozen=True)
class Identification:
    """What each probe finds in a gallery.

    rank : (p,) int64, as in `rank_k`; without meaning for a probe that has no mate.
    best : (p,) float64, similarity of its best mate; -inf without one.
    other : (p,) float64, similarity of the best stranger or distractor; -inf without one.
    """

    rank: np.ndarray
    best: np.ndarray
    other: np.ndarray

    @property
    def mated(self) -> np.ndarray:
        """Whether each probe's person is in the gallery, (p,) bool."""
        return ~np.isneginf(self.best)


def identify(
    probe: np.ndarray,
    probe_identity: np.ndarray,
    gallery: np.ndarray,
    gallery_identity: np.ndarray,
    *,
    distractor: np.ndarray | None = None,
    block: int = 1024,
) -> Identification:
    """Compare probes with a gallery once, for all figures; parameters as in `rank_k`.

    Raises
    ------
    DataError : no probe, no gallery, widths that differ, NaN.
    """
    probe, gallery = np.asarray(probe), np.asarray(gallery)
    probe_identity, gallery_identity = np.asarray(probe_identity), np.asarray(gallery_identity)
    sides = [("probe", probe), ("gallery", gallery)]
    sides += [] if distractor is None else [("distractor", np.asarray(distractor))]
    for name, vectors in sides:
        if vectors.ndim != 2 or vectors.shape[1:] != probe.shape[1:]:
            raise DataError(f"expected {name} vectors (n, d) of one width, got {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise DataError(f"expected finite {name} vectors, got NaN or infinity")
    if not len(probe) or not len(gallery):
        raise DataError(f"expected probes and a gallery, got {len(probe)} and {len(gallery)}")
    if len(probe_identity) != len(probe) or len(gallery_identity) != len(gallery):
        raise DataError(
            f"expected an identity a vector, got {len(probe_identity)} for {len(probe)} probes and "
            f"{len(gallery_identity)} for {len(gallery)} gallery images"
        )
    rank = np.empty(len(probe), np.int64)
    best = np.empty(len(probe))
    other = np.empty(len(probe))
    for part in _blocks(len(probe), block):
        similarity = probe[part] @ gallery.T
        mate = probe_identity[part, None] == gallery_identity
        best[part] = np.where(mate, similarity, -np.inf).max(axis=1)
        stranger = np.where(mate, -np.inf, similarity)
        other[part] = stranger.max(axis=1)
        # A stranger is -inf where it is a mate; a probe without a mate has no rank to speak of.
        ahead = (stranger >= best[part, None]).sum(axis=1)
        if distractor is not None and len(distractor):
            away = probe[part] @ np.asarray(distractor).T
            other[part] = np.maximum(other[part], away.max(axis=1))
            ahead += (away >= best[part, None]).sum(axis=1)
        rank[part] = ahead + 1
    return Identification(rank, best, other)


def _blocks(count: int, block: int) -> Iterator[slice]:
    return (slice(low, min(low + block, count)) for low in range(0, count, block))


# --- summaries ----------------------------------------------------------------------------


def bootstrap_interval(
    value: np.ndarray,
    identity: np.ndarray,
    *,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, resampling people and not images.

    Images of one person are not independent; an interval over images would be too narrow.

    Parameters
    ----------
    value : (m,) float, for instance 1 for each right decision.
    identity : (m,) integer, the person (or, for pairs, the fold or first person) of each value.
    level : coverage, in (0, 1). draws : resamples, >= 1. seed : same seed, same interval.

    Returns
    -------
    (low, high) : floats; equal when there is one person.

    Raises
    ------
    DataError : no value, shapes that differ, NaN, or a level outside (0, 1).
    """
    value, _ = _scored(value, np.zeros(np.shape(identity), bool), "value")
    if not 0.0 < level < 1.0 or draws < 1:
        raise DataError(f"expected level in (0, 1) and draws >= 1, got {level} and {draws}")
    person = np.unique(np.asarray(identity), return_inverse=True)[1]
    total = np.bincount(person, weights=value)
    size = np.bincount(person)
    people = len(size)
    drawn = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), draws)
    mean = (drawn @ total) / (drawn @ size)
    low, high = np.quantile(mean, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def gap_closed(labelled_only: float, with_pseudo: float, supervised: float) -> float:
    """The share of the gap between labelled-only and fully supervised that pseudo-labels close.

    Arguments are one metric, higher is better, of the three subjects on the same people. 0 is no
    gain, 1 is as good as true labels; it may leave [0, 1]. nan when supervision itself gains
    nothing (no gap to close). The paper's headline: 61.78, 78.18, 78.52 -> .98.
    """
    gap = supervised - labelled_only
    return (with_pseudo - labelled_only) / gap if gap > 0.0 else math.nan
