"""Identification of probes in a gallery: closed-set rank-k and open-set TPIR@FPIR.

The contract:
- A tie never helps: a similarity equal to the threshold or to the mate's counts as an error.
- Similarities are computed in blocks: memory is O(block x gallery), whatever the probe count.
- `rank_k` and `tpir_at_fpir` are library surface and independent oracles: `cdp.metrics.protocols`
  computes the same figures with resamples, and its tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cdp.errors import DataError
from cdp.metrics.verification import threshold_at_far


def sample_probe_gallery(identity: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split images for identification: one gallery image an identity, the others are probes.

    identity : (n,) integer >= 0. The gallery image is drawn uniformly by `seed`.
    Returns (probe, gallery), ascending int64 rows; an identity with one image is in the
    gallery only and serves as a distractor.
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

    A probe's rank is 1 + the number of gallery images of other identities, and distractors, that
    are at least as similar as its best mate.

    Parameters
    ----------
    probe, gallery : (p, d) and (g, d) float32, unit length; no probe may itself be in the gallery.
    probe_identity, gallery_identity : (p,) and (g,) integer.
    ks : ranks, each >= 1.
    distractor : (q, d) float32, unit length: images of identities without a probe, or None.
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

    Probes whose identity is not in the gallery are unmated. The threshold is the lowest at which
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
            "some identities out of the gallery"
        )
    threshold = threshold_at_far(found.other[~mated], fpir)
    return float(np.mean((found.best[mated] > threshold) & (found.rank[mated] <= rank)))


@dataclass(frozen=True)
class Identification:
    """Ranks and best similarities of probes in a gallery.

    rank : (p,) int64, as in `rank_k`; undefined for a probe that has no mate.
    best : (p,) float64, similarity of its best mate; -inf without one.
    other : (p,) float64, similarity of the best non-mate or distractor; -inf without one.
    """

    rank: np.ndarray
    best: np.ndarray
    other: np.ndarray

    @property
    def mated(self) -> np.ndarray:
        """Whether each probe's identity is in the gallery, (p,) bool."""
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
        non_mate = np.where(mate, -np.inf, similarity)
        other[part] = non_mate.max(axis=1)
        ahead = (non_mate >= best[part, None]).sum(axis=1)
        if distractor is not None and len(distractor):
            away = probe[part] @ np.asarray(distractor).T
            other[part] = np.maximum(other[part], away.max(axis=1))
            ahead += (away >= best[part, None]).sum(axis=1)
        rank[part] = ahead + 1
    return Identification(rank, best, other)


def _blocks(count: int, block: int) -> Iterator[slice]:
    return (slice(low, min(low + block, count)) for low in range(0, count, block))
