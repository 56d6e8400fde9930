"""Cluster embeddings of several models when no identity is known.

    python examples/cluster_without_labels.py

Without labels the models vote: a pair of images is kept when the first model finds them similar and
enough of the others have them among each other's neighbours. Votes raise precision at no cost in
recall, since models err on different pairs.
"""

import numpy as np

from cdp import ConsensusClusterer
from cdp.metrics import score_pairwise

DIMENSION = 48
MODELS = 4


def draw_views(identity: np.ndarray, seed: int) -> list[np.ndarray]:
    """One (n, d) float32 array per model, noisy enough that each alone confuses identities."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(MODELS, identity.max() + 1, DIMENSION))
    noise = 0.85 * rng.normal(size=(MODELS, len(identity), DIMENSION))
    return list((centres[:, identity] + noise).astype(np.float32))


def main() -> None:
    identity = np.repeat(np.arange(150), 8)  # the truth, used for scores alone
    views = draw_views(identity, seed=0)

    print(f"{len(identity)} images of {identity.max() + 1} identities, {MODELS} models")
    print("votes needed   precision   recall        F   clusters   without label")
    precision = []
    for votes in range(MODELS):
        clusterer = ConsensusClusterer(min_similarity=0.45, min_votes=votes)
        labels = clusterer.fit_predict(views)
        score = score_pairwise(identity, labels)
        precision.append(score[0])
        alone = int((labels == -1).sum())
        print(
            f"{votes:12}{score[0]:12.3f}{score[1]:9.3f}{score[2]:9.3f}{clusterer.n_clusters_:11}"
            f"{alone:16}"
        )
    assert precision[-1] >= precision[0]


if __name__ == "__main__":
    main()
