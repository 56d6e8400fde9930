"""Pooling without training: sets of vectors to one unit vector each.

The contract:
- Sets are given by a number an image; results come in ascending order of these numbers.
- The order of the images changes nothing but the last bits. A set of one image is that image.
- A set whose weighed vectors cancel has no direction: a `DataError`.
"""

from __future__ import annotations

import numpy as np

from cdp.errors import DataError


def pool_vectors(
    vectors: np.ndarray, group: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Weighed mean of each set, brought to unit length.

    Parameters
    ----------
    vectors : (n, d) float
    group : (n,) integer, the set of each vector
    weight : (n,) float, 0 or above, or None
        None weighs all alike.

    Returns
    -------
    pooled : (sets, d) float32, unit length, sets in ascending order of their numbers.

    Raises
    ------
    DataError
        No vectors, other shapes, or a set without a direction.
    """
    if vectors.ndim != 2 or not len(vectors) or np.shape(group) != vectors.shape[:1]:
        raise DataError(
            f"vectors (n, d) and a set each expected, got {vectors.shape} and {np.shape(group)}"
        )
    if weight is not None and (np.shape(weight) != vectors.shape[:1] or np.min(weight) < 0):
        raise DataError("one weight of 0 or above a vector expected")
    names, place = np.unique(group, return_inverse=True)
    weighed = vectors.astype(np.float64)
    if weight is not None:
        weighed = weighed * np.asarray(weight, dtype=np.float64)[:, None]
    total = np.zeros((len(names), vectors.shape[1]))
    np.add.at(total, place, weighed)
    return _normalise(total, names)


def weigh_by_norm(norm: np.ndarray, power: float = 1.0) -> np.ndarray:
    """Weights of unit vectors from the norms they had: norm ** power, (n,) to (n,).

    The norm follows image quality (AdaFace, Kim et al. 2022, section 3.2); with power 1 the pooled
    vector is the mean of the raw embeddings. Ours.
    """
    return np.asarray(norm, dtype=np.float64) ** power


def fuse_parts(raw: np.ndarray, group: np.ndarray, parts: int) -> np.ndarray:
    """Weighed mean a part: each part of an image counts as its length there.

    For embeddings of the head `subspheres`, whose parts' lengths are confidences: with a variance
    of 1 / confidence this is the fusion by inverse variances of URFace (Shi et al. 2020).

    Parameters
    ----------
    raw : (n, d) float, embeddings before they are brought to unit length
    group : (n,) integer
    parts : int
        Equal slices of an embedding; it divides d.

    Returns
    -------
    fused : (sets, d) float32, unit length
        Each part of length 1 where all images agree on it, shorter where they do not.
    """
    if raw.ndim != 2 or parts < 1 or raw.shape[1] % parts:
        raise DataError(f"embeddings (n, d) in {parts} equal parts expected, got {raw.shape}")
    names, place = np.unique(group, return_inverse=True)
    split = raw.reshape(len(raw), parts, -1).astype(np.float64)
    total = np.zeros((len(names), parts, split.shape[2]))
    length = np.zeros((len(names), parts))
    np.add.at(total, place, split)
    np.add.at(length, place, np.linalg.norm(split, axis=2))
    fused = total / np.maximum(length, 1e-12)[:, :, None]
    return _normalise(fused.reshape(len(names), -1), names)


def _normalise(total: np.ndarray, names: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(total, axis=1, keepdims=True)
    lost = np.flatnonzero(~(length[:, 0] > 1e-12))
    if len(lost):
        raise DataError(
            f"the vectors of set {names[lost[0]]} cancel or weigh nothing; it has no direction"
        )
    return (total / length).astype(np.float32)
