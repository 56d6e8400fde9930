"""Cluster embeddings of several models, with labelled identities to learn from.

    python examples/cluster_embeddings.py

Three made-up models see a long-tailed set: a few identities have dozens of images, most have one to
five. CDP learns from other identities, whose names are known, and is compared with the best that
the first model alone can do when its threshold is tuned on the truth.
"""

import numpy as np

from cdp import ConsensusClusterer
from cdp.metrics import score_bcubed, score_pairwise

DIMENSIONS = (96, 64, 64)
NOISE = (1.3, 1.4, 1.5)
"""Length of an image's deviation from its identity's centre, whose length is 1; one per model."""


def draw_views(identity: np.ndarray, seed: int) -> list[np.ndarray]:
    """One (n, d) float32 array per model: the centre of the identity, and noise."""
    rng = np.random.default_rng(seed)
    views = []
    for dimension, noise in zip(DIMENSIONS, NOISE, strict=True):
        centre = rng.normal(size=(identity.max() + 1, dimension)) / np.sqrt(dimension)
        deviation = rng.normal(size=(len(identity), dimension)) / np.sqrt(dimension)
        views.append((centre[identity] + noise * deviation).astype(np.float32))
    return views


def tune_single_model(view: np.ndarray, identity: np.ndarray) -> tuple[float, np.ndarray]:
    """The threshold that is best against the truth, and the labels it gives."""
    best_f, best_threshold, best_labels = -1.0, 0.0, np.zeros(0)
    for threshold in np.arange(0.2, 0.8, 0.05):
        labels = ConsensusClusterer(min_similarity=threshold, min_votes=0).fit_predict(view)
        f = score_pairwise(identity, labels)[2]
        if f > best_f:
            best_f, best_threshold, best_labels = f, threshold, labels
    return best_threshold, best_labels


def main() -> None:
    rng = np.random.default_rng(0)
    labelled_identity = np.repeat(np.arange(120), rng.integers(2, 12, 120))
    size = np.concatenate([rng.integers(30, 60, 5), rng.integers(1, 6, 200)])
    identity = np.repeat(np.arange(len(size)), size)  # the truth, used for scores alone
    names = np.array([f"person {number:03d}" for number in labelled_identity])
    views = draw_views(identity, seed=1)
    labelled_views = draw_views(labelled_identity, seed=2)

    clusterer = ConsensusClusterer()
    labels = clusterer.fit_predict(views, labelled_views=labelled_views, labelled_ids=names)
    threshold, single = tune_single_model(views[0], identity)

    print(f"{len(identity)} images of {len(size)} identities, {np.sum(size == 1)} with one image")
    print(f"{'':34}pairwise F   BCubed F   clusters")
    results = {f"first model, oracle threshold {threshold:.2f}": single, "CDP": labels}
    for name, found in results.items():
        pairwise, bcubed = score_pairwise(identity, found)[2], score_bcubed(identity, found)[2]
        print(f"{name:34}{pairwise:10.3f}{bcubed:11.3f}{found.max() + 1:11}")
    print(f"CDP's own estimate, without truth: pairwise F {clusterer.quality_.f:.3f}")
    doubtful = np.argsort(np.where(labels < 0, 2, clusterer.probabilities_))[:3]
    print(f"least certain images: rows {', '.join(str(row) for row in doubtful)}")
    assert score_pairwise(identity, labels)[2] > score_pairwise(identity, single)[2]


if __name__ == "__main__":
    main()
