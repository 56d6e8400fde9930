"""Verification of claims: a probe against one enrolled person, accepted above a cosine.

The contract:
- A pair is a probe and an enrolled person; its similarity is that to the person's nearest image, as
  `cdp.Gallery` compares. It is genuine where the probe shows that person, else an impostor pair.
- Resamples draw the probes' identities; the gallery stays as it is.
- Memory is that of the impostor pairs that the rates reach, not of all pairs.

Source: TAR@FAR as in `cdp.metrics.verification`; the pairs are ours, those of a system in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cdp.errors import DataError
from cdp.metrics.protocols import Resamples, Score

_BLOCK = 512
"""Probes compared with all gallery images at once."""


def score_claims(
    probe: np.ndarray,
    wanted: np.ndarray,
    rows: np.ndarray,
    gallery: np.ndarray,
    names: np.ndarray,
    resamples: Resamples,
    rates: Sequence[float],
) -> list[Score]:
    """TAR@FAR of probes against enrolled people, and the cosine that gives each FAR.

    Parameters
    ----------
    probe : (p, d) float32, unit length.
    wanted : (p,) integer, who each probe shows; may be nobody of the gallery.
    rows : (p,) int64, each probe's row among the images the resamples are of.
    gallery : (g, d) float32, unit length. names : (g,) integer, who each image shows.
    rates : false acceptance rates in (0, 1); one that allows no impostor pair is left out.

    Returns
    -------
    `tar@far=...` with the number of genuine pairs, then `threshold@far=...` with that of impostor
    pairs. No score where there is no genuine or no impostor pair.

    Raises
    ------
    DataError : no gallery, or lengths that differ.
    """
    if (
        not len(gallery)
        or len(names) != len(gallery)
        or len({len(probe), len(wanted), len(rows)}) > 1
    ):
        raise DataError(
            f"a gallery, and an identity and a row a probe expected, got {len(gallery)} gallery "
            f"images, {len(probe)} probes, {len(wanted)} identities, {len(rows)} rows"
        )
    order = np.argsort(names, kind="stable")
    people, first = np.unique(names[order], return_index=True)
    known = np.isin(wanted, people)
    impostors = len(probe) * len(people) - int(known.sum())
    measurable = [rate for rate in rates if rate * impostors >= 1]
    if not known.any() or not measurable:
        return []
    images, share = np.ascontiguousarray(gallery[order]), 1.5 * max(measurable)
    identity = resamples.identity[rows]
    weights = resamples.weight
    # Impostor pairs of a resample: each probe with everybody but its own person.
    allowed = weights @ np.bincount(identity, len(people) - known, minlength=weights.shape[1])
    while True:
        kept = min(impostors, int(share * impostors) + 2)
        genuine, top, owner = _compare(probe, wanted, images, people, first, kept)
        owner = identity[owner]
        if kept == impostors or np.all(weights[:, owner].sum(1) > max(measurable) * allowed):
            break
        share *= 2
    mated = identity[known]
    scores, cuts = [], []
    for rate in measurable:
        threshold = float(top[int(rate * impostors + 1e-9)])
        draws = np.full((2, len(weights)), np.nan)
        for number, weight in enumerate(weights):
            if not allowed[number] or not weight[mated].any():
                continue
            passed = np.cumsum(weight[owner])
            place = np.searchsorted(passed, rate * allowed[number] * (1 + 1e-12), side="right")
            cut = top[min(place, len(top) - 1)]
            draws[:, number] = (weight[mated] @ (genuine > cut)) / weight[mated].sum(), cut
        value = float(np.mean(genuine > threshold))
        scores.append(Score(f"tar@far={rate:g}", value, len(genuine), draws[0]))
        cuts.append(Score(f"threshold@far={rate:g}", threshold, impostors, draws[1]))
    return scores + cuts


def _compare(
    probe: np.ndarray,
    wanted: np.ndarray,
    images: np.ndarray,
    people: np.ndarray,
    first: np.ndarray,
    kept: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genuine similarities in the probes' order; the `kept` highest impostor ones, descending, and
    the probe of each."""
    genuine = []
    top, owner = np.empty(0, np.float32), np.empty(0, np.int64)
    for low in range(0, len(probe), _BLOCK):
        part = np.arange(low, min(low + _BLOCK, len(probe)))
        nearest = np.maximum.reduceat(probe[part] @ images.T, first, axis=1)
        same = wanted[part, None] == people
        genuine.append(nearest[same])
        row, column = np.nonzero(~same)
        top = np.concatenate([top, nearest[row, column]])
        owner = np.concatenate([owner, part[row]])
        if len(top) > kept:
            best = np.argpartition(-top, kept - 1)[:kept]
            top, owner = top[best], owner[best]
    order = np.lexsort((owner, -top))
    return np.concatenate(genuine), top[order], owner[order]
