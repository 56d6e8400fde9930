"""Clusterings to be doubted: nothing found, everything in one, embeddings all alike."""

import numpy as np
import pytest

from cdp.propagation.doubt import ALIKE, describe_doubt, holds_most_rows, measure_likeness

pytestmark = pytest.mark.torch


def test_nothing_found_names_the_causes():
    text = describe_doubt(np.full(100, -1))
    for cause in ("no cluster was found", "threshold", "two images", "wrong pixels"):
        assert cause in text


@pytest.mark.parametrize(("share", "holds_most"), [(0.5, False), (0.51, True), (1.0, True)])
def test_a_cluster_of_more_than_half_holds_most_rows(share, holds_most):
    label = np.full(200, -1)
    label[: round(200 * share)] = 0
    assert holds_most_rows(label) is holds_most
    text = describe_doubt(label)
    assert ("one person does dominate" in text) is holds_most
    assert text.startswith(f"one cluster holds {round(200 * share)} of 200") or not holds_most


def test_a_handful_of_rows_is_not_judged():
    assert describe_doubt(np.zeros(10, np.int64)) == ""
    assert describe_doubt(np.full(10, -1)) == ""


def test_likeness_separates_one_person_from_many():
    generator = np.random.default_rng(0)
    many = generator.normal(size=(300, 64))
    one = generator.normal(size=64) + 0.5 * many
    for rows, alike in ((many, False), (one, True)):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert (measure_likeness(unit) >= ALIKE) is alike
    assert measure_likeness(many[:1]) == 0
