"""retrain: the classes, soft labels and masked negatives that reach the recognizer."""

import numpy as np
import pandas as pd
import pytest

from pipelines.decisions import CorrectionTable, list_active
from pipelines.training.sets import name_clusters, select_clusters, select_labelled

pytestmark = pytest.mark.torch

SAMPLES = pd.DataFrame(
    {
        "sample_id": [10, 11, 12, 13, 14, 15],
        "path": list("abcdef"),
        "sha256": list("ABCDEF"),
        "pseudo_label": [4, 4, 7, 7, 9, -1],
        "confidence": [0.9, 0.8, 0.7, 0.6, 0.5, 0.0],
    }
)
SOFT = pd.DataFrame(
    {
        "sample_id": [15, 13, 13, 10, 10, 12, 14],
        "pseudo_label": [4, 7, 4, 9, 4, 7, 7],
        "weight": [1.0, 0.75, 0.25, 0.5, 0.5, 0.0, 1.0],
    }
)


def test_classes_and_images_left_out_take_their_soft_labels_along() -> None:
    chosen = select_clusters(SAMPLES, "pseudo_label", 2, weigh=True, soft=SOFT)
    assert chosen.paths == ("a", "b", "c", "d")
    assert chosen.label.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(chosen.weight, [0.9, 0.8, 0.7, 0.6])
    # Cluster 9 has one image; samples 14 and 15 are in no class; a weight of 0 is dropped.
    assert chosen.soft.row.tolist() == [0, 3, 3]
    assert chosen.soft.label.tolist() == [0, 0, 1]
    assert chosen.soft.weight.tolist() == [0.5, 0.25, 0.75]


PAIRS = pd.DataFrame({"source": [10, 12, 14, 13, 10], "target": [15, 15, 15, 14, 12]})
"""Images 14 and 15 are alone; 10 and 12 have clusters."""


def test_leftovers_are_classes_and_masked_where_in_doubt() -> None:
    chosen = select_clusters(SAMPLES, "pseudo_label", 2, weigh=False, alone=True, pairs=PAIRS)
    assert chosen.paths == tuple("abcdef")
    assert chosen.label.tolist() == [0, 0, 1, 1, 2, 3]
    masked = set(
        zip(
            chosen.masked_negatives.row.tolist(),
            chosen.masked_negatives.label.tolist(),
            strict=True,
        )
    )
    # Both ends of every pair, but none its own class.
    apart = {(0, 3), (5, 0), (2, 3), (5, 1), (4, 3), (5, 2), (3, 2), (4, 1), (0, 1), (2, 0)}
    assert masked == apart
    without = select_clusters(SAMPLES, "pseudo_label", 2, weigh=False, alone=True)
    assert without.masked_negatives is None
    assert without.digest() != chosen.digest()


def test_an_identity_split_over_two_clusters_is_not_pushed_apart() -> None:
    within = pd.DataFrame({"source": [10, 10], "target": [11, 12]})
    pairs = pd.concat([PAIRS, within])
    chosen = select_clusters(SAMPLES, "pseudo_label", 2, weigh=False, pairs=pairs)
    masked = set(
        zip(
            chosen.masked_negatives.row.tolist(),
            chosen.masked_negatives.label.tolist(),
            strict=True,
        )
    )
    # 10 and 12 are of two clusters, 10 and 11 of one, 14 and 15 of none.
    assert masked == {(0, 1), (2, 0)}


def test_identities_with_one_image_are_treated_alike_where_the_truth_is_used() -> None:
    known = SAMPLES.assign(identity=["p", "p", "q", "r", "r", "s"])
    dropped = select_clusters(known, "identity", 2, weigh=False)
    kept = select_clusters(known, "identity", 2, weigh=False, alone=True)
    assert dropped.paths == ("a", "b", "d", "e")
    assert kept.paths == tuple("abcdef")
    people = pd.Series(kept.label).groupby(known.identity.to_numpy()).nunique()
    assert (people == 1).all()
    assert len(set(kept.label.tolist())) == known.identity.nunique()


def test_soft_labels_are_part_of_what_determines_a_model() -> None:
    hard = select_clusters(SAMPLES, "pseudo_label", 2, weigh=False)
    soft = select_clusters(SAMPLES, "pseudo_label", 2, weigh=False, soft=SOFT)
    other = select_clusters(
        SAMPLES, "pseudo_label", 2, weigh=False, soft=SOFT.assign(weight=SOFT.weight + 0.1)
    )
    assert len({hard.digest(), soft.digest(), other.digest()}) == 3
    assert select_clusters(SAMPLES, "pseudo_label", 3, weigh=False, soft=SOFT) is None


def test_images_that_reviewers_named_are_labelled(tmp_path) -> None:
    """An image of a named one's cluster is of that person too; undone or denied, it is not."""
    samples = pd.DataFrame(
        {
            "sample_id": np.arange(8),
            "path": list("abcdefgh"),
            "sha256": list("ABCDEFGH"),
            "split": ["labelled", *["unlabelled"] * 6, "evaluation"],
            "identity": ["Ann", *[None] * 6, "Eve"],
        }
    )
    label = pd.Series([0, 0, 0, 1, 1, -1], np.arange(1, 7))
    table = CorrectionTable(tmp_path)
    table.append("ada", "name", [["B"]], identity="Ann")
    table.append("ada", "name", [["G"]], identity="Bob")
    table.append("ada", "deny", [["E"]], identity="Ann")
    table.append("ada", "accept", [["E", "F"]])
    found = name_clusters(samples, label, list_active(table.read()))
    assert np.flatnonzero(found.split == "labelled").tolist() == [0, 1, 2, 3, 6]
    assert found.identity.fillna("").tolist() == ["Ann"] * 4 + [""] * 2 + ["Bob", "Eve"]
    chosen = select_labelled(None, samples=found)
    assert (chosen.paths, chosen.label.tolist()) == (tuple("abcdg"), [0, 0, 0, 0, 1])
    table.append("ada", "undo", undoes=1)
    found = name_clusters(samples, label, list_active(table.read()))
    assert found.identity.fillna("").tolist() == ["Ann"] + [""] * 5 + ["Bob", "Eve"]
    assert samples.split.tolist() == ["labelled", *["unlabelled"] * 6, "evaluation"]
