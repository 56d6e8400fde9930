"""Train a recognizer on labelled faces and on the clusters of unlabelled ones.

    python examples/train_recognizer.py

Synthetic faces, small enough for half a minute. A committee of three small networks learns from one
half of the labelled identities; the other half trains the mediator, which finds clusters among the
unlabelled images. A recognizer that learns from labelled images and clusters is compared with one
that knows the labelled images only, on held-out identities.
"""

import numpy as np

from cdp import ConsensusClusterer, FaceSet, SyntheticFaces, TrainingPlan, train_recognizer
from cdp.metrics import sample_verification_pairs, score_pairwise, verification_accuracy
from cdp.recognizer import RecognizerSpec

FAMILIES = ("plain", "residual", "separable")
PLAN = TrainingPlan(epochs=8, batch_size=32)


def train(family: str, known: FaceSet, pseudo: FaceSet | None = None):
    """A recognizer of 20 px faces."""
    spec = RecognizerSpec(backbone=family, input_px=20, embedding_dim=48, width=0.5)
    return train_recognizer(known, pseudo, spec=spec, plan=PLAN, progress=False)[0]


def measure_accuracy(recognizer, faces: np.ndarray, identity: np.ndarray) -> float:
    """Verification accuracy over folds of drawn pairs, thresholds from the other folds."""
    vectors = recognizer.embed(faces)
    pairs = sample_verification_pairs(identity, folds=5, pairs_per_fold=100, seed=0)
    similarity = np.sum(vectors[pairs.source] * vectors[pairs.target], axis=1)
    return verification_accuracy(similarity, pairs.same, pairs.fold)[0]


def main() -> None:
    faces = SyntheticFaces(
        labelled_identities=40, unlabelled_identities=60, evaluation_identities=30,
        images_min=6, images_max=10, evaluation_images=6, size_px=32,
    )  # fmt: skip
    images, identity = faces.draw(np.arange(len(faces))), faces.identity
    labelled, unlabelled, held_out = (
        np.flatnonzero(faces.split == split) for split in ("labelled", "unlabelled", "evaluation")
    )

    half = labelled[identity[labelled] % 2 == 0]
    rest = np.setdiff1d(labelled, half)
    committee = [train(family, FaceSet(images[half], identity[half])) for family in FAMILIES]

    clusterer = ConsensusClusterer(k=10)
    labels = clusterer.fit_predict(
        [member.embed(images[unlabelled]) for member in committee],
        labelled_views=[member.embed(images[rest]) for member in committee],
        labelled_ids=identity[rest],
    )
    precision, recall, f = score_pairwise(identity[unlabelled], labels)
    print(f"{len(labelled)} labelled and {len(unlabelled)} unlabelled images")
    print(f"{labels.max() + 1} clusters: precision {precision:.2f}, recall {recall:.2f}, F {f:.2f}")

    known = FaceSet(images[labelled], identity[labelled])
    pseudo = FaceSet(images[unlabelled], labels, min_size=2)
    print("verification accuracy on held-out identities")
    for name, clusters in (("labelled only", None), ("with pseudo-labels", pseudo)):
        recognizer = train("plain", known, clusters)
        accuracy = measure_accuracy(recognizer, images[held_out], identity[held_out])
        print(f"  {name:20}{accuracy:.3f}")
        assert accuracy > 0.6


if __name__ == "__main__":
    main()
