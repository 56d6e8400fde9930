"""Whether an embedder separates people, and which preprocessing of an ONNX model does so best.

The contract:
- Enters: faces of known people, two or more of most. No threshold is involved.
- `measure_separation` compares the cosines of pairs of one person with those of pairs of two.
- `rank_preprocessing` shows one model the same faces in each usual way. A model that is shown the
  wrong range or order of colours separates people less, often not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cdp.errors import DataError
from cdp.images.preprocessing import CANDIDATES, Preprocessing

Embed = Callable[[Preprocessing], np.ndarray]
LEAST_NEARER = 0.75
"""Share of pairs of one person nearer than those of two, below which nothing is concluded."""
MARGIN = 1.05
"""How much better another way must separate people before it replaces the one that was assumed."""
SURE = 0.99
"""Share of resamples of the people in which it must be better: few people say little."""
DRAWS = 400


@dataclass(frozen=True)
class Separation:
    """How far apart the cosines of one person's pairs lie from those of two people's.

    distance : difference of the two means over their pooled standard deviation (d').
    nearer : probability, in [0, 1], that a pair of one person has the larger cosine; .5 is chance.
    """

    distance: float
    nearer: float


def measure_separation(vectors: np.ndarray, identity: np.ndarray) -> Separation:
    """Compare the cosines of all pairs.

    Source: d' is the sensitivity index of signal detection; the other is the area under the ROC.

    Parameters
    ----------
    vectors : (n, d) float32 of unit length.
    identity : (n,) of any type.

    Raises
    ------
    DataError
        No pair of one person, or none of two.
    """
    cosine = np.asarray(vectors, np.float64) @ np.asarray(vectors, np.float64).T
    first, second = np.triu_indices(len(cosine), 1)
    same = np.asarray(identity)[first] == np.asarray(identity)[second]
    one, two = cosine[first, second][same], cosine[first, second][~same]
    if not len(one) or not len(two):
        raise DataError("two people, one of them with two images, are needed to compare cosines")
    spread = np.sqrt((one.var() + two.var()) / 2)
    distance = (one.mean() - two.mean()) / max(spread, 1e-12)
    below = np.searchsorted(np.sort(two), one, "left") + np.searchsorted(np.sort(two), one, "right")
    return Separation(float(distance), float(below.mean() / (2 * len(two))))


def rank_preprocessing(
    embed: Embed, identity: np.ndarray, given: Preprocessing
) -> list[tuple[Preprocessing, Separation]]:
    """Every usual way to show a model its faces, the one that separates people best first.

    Source: ours.

    Parameters
    ----------
    embed : shows the model its faces and returns (n, d) unit vectors; DataError counts as none.
    identity : (n,) of the faces.
    given : the way that is assumed. It stays first unless another is `MARGIN` times better, is so
        whoever of the people is looked at, and separates people at all; its layout, output and side
        hold for all.

    Raises
    ------
    DataError
        The model fails whatever it is shown.
    """
    others = (
        replace(given, mean=way.mean, scale=way.scale, channels=way.channels) for way in CANDIDATES
    )
    ways = dict.fromkeys([given, *others])
    found: list[tuple[Preprocessing, Separation]] = []
    vectors: dict[Preprocessing, np.ndarray] = {}
    failure: DataError | None = None
    for way in ways:
        try:
            vectors[way] = embed(way)
            found.append((way, measure_separation(vectors[way], identity)))
        except DataError as error:
            failure = error
    if not found:
        raise DataError("the model gives no vectors, whatever it is shown") from failure
    found.sort(key=lambda each: -each[1].distance)
    before = dict(found).get(given)
    best = found[0][1]
    if before is not None and (
        best.nearer < LEAST_NEARER
        or best.distance < MARGIN * max(before.distance, 0.0)
        or compare_separations(vectors[found[0][0]], vectors[given], identity) < SURE
    ):
        found.sort(key=lambda each: each[0] != given)
    return found


def compare_separations(
    first: np.ndarray, second: np.ndarray, identity: np.ndarray, *, seed: int = 0
) -> float:
    """Share of resamples of the people in which the first vectors separate them better (d').

    Source: the paired bootstrap (Efron), over people, since pairs of one person are no independent
    draws.

    Parameters
    ----------
    first, second : (n, d) float32 of unit length, of the same faces.
    identity : (n,) of any type.
    seed : of the resamples.
    """
    code = np.unique(np.asarray(identity), return_inverse=True)[1]
    people = int(code.max()) + 1
    times = np.random.default_rng(seed).multinomial(people, np.full(people, 1 / people), DRAWS)
    better = [_resample(each, code, times.astype(np.float64)) for each in (first, second)]
    with np.errstate(invalid="ignore"):
        known = np.isfinite(better[0]) & np.isfinite(better[1])
    return float((better[0] > better[1])[known].mean()) if known.any() else 0.0


def _resample(vectors: np.ndarray, code: np.ndarray, times: np.ndarray) -> np.ndarray:
    """d' of each resample (draws,), NaN where it has no pair of one or of two people.

    times : (draws, people), how often each person is drawn.
    """
    cosine = np.asarray(vectors, np.float64) @ np.asarray(vectors, np.float64).T
    member = (code[:, None] == np.arange(times.shape[1])).astype(np.float64)
    powers = [np.ones_like(cosine), cosine, cosine**2]
    for each in powers:
        np.fill_diagonal(each, 0.0)
    sums = [member.T @ each @ member for each in powers]  # of the pairs of any two people
    one = [times @ np.diag(each) for each in sums]
    two = [((times @ (each - np.diag(np.diag(each)))) * times).sum(1) for each in sums]
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = [each[1] / each[0] for each in (one, two)]
        spread = [each[2] / each[0] - mid**2 for each, mid in zip((one, two), mean, strict=True)]
        pooled = np.sqrt(np.maximum(sum(spread) / 2, 1e-24))
        distance: np.ndarray = (mean[0] - mean[1]) / pooled
    return distance


def choose_people(
    identity: Sequence[object], *, people: int = 32, images: int = 3, seed: int = 0
) -> np.ndarray:
    """Rows of a few images of a few people, ascending; of people with two images or more.

    Parameters
    ----------
    identity : (n,) of the images.
    people, images : how many people, and images of each, at most.
    seed : of the choice.
    """
    names, code = np.unique(np.asarray(identity, dtype=object).astype(str), return_inverse=True)
    count = np.bincount(code, minlength=len(names))
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(count >= 2))[:people]
    rows = [rng.permutation(np.flatnonzero(code == name))[:images] for name in chosen]
    return np.sort(np.concatenate(rows)) if rows else np.empty(0, np.int64)
