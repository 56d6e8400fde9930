"""separation: how far apart people lie, and the way to show a model its faces, on known answers."""

import numpy as np
import pytest

from cdp.errors import DataError
from cdp.images.preprocessing import CANDIDATES, PRESETS, Preprocessing
from cdp.separation import (
    MARGIN,
    choose_people,
    compare_separations,
    measure_separation,
    rank_preprocessing,
)


def draw_vectors(noise: float, people: int = 10, images: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    identity = np.repeat(np.arange(people), images)
    vectors = rng.normal(size=(people, 16))[identity] + noise * rng.normal(size=(len(identity), 16))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), identity


def test_separation_is_that_of_its_definition() -> None:
    vectors, identity = draw_vectors(0.6)
    found = measure_separation(vectors, identity)
    one, two = [], []
    for i in range(len(vectors)):
        for j in range(i):
            (one if identity[i] == identity[j] else two).append(float(vectors[i] @ vectors[j]))
    nearer = np.mean([(a > b) + (a == b) / 2 for a in one for b in two])
    assert found.nearer == pytest.approx(nearer)
    expected = (np.mean(one) - np.mean(two)) / np.sqrt((np.var(one) + np.var(two)) / 2)
    assert found.distance == pytest.approx(expected)
    assert measure_separation(np.ones((30, 16)), identity).nearer == 0.5
    with pytest.raises(DataError, match="two people"):
        measure_separation(vectors[:3], identity[:3])


@pytest.mark.parametrize("wanted", CANDIDATES)
def test_the_way_a_model_wants_is_found(wanted: Preprocessing) -> None:
    good, identity = draw_vectors(0.4)
    bad, _ = draw_vectors(3.0)
    ranked = rank_preprocessing(lambda way: good if way == wanted else bad, identity, CANDIDATES[0])
    assert ranked[0][0] == wanted
    assert len(ranked) == len(CANDIDATES)


def test_what_is_given_stays_unless_another_is_clearly_better() -> None:
    good, identity = draw_vectors(0.40)
    little, _ = draw_vectors(0.41)
    given = PRESETS["adaface"]
    ranked = rank_preprocessing(lambda way: little if way == given else good, identity, given)
    assert ranked[0][0] == given

    # Where no way separates people, nothing is concluded.
    noise = [
        draw_vectors(50.0)[0],
        *(np.roll(draw_vectors(50.0)[0], row, 0) for row in range(1, 8)),
    ]
    ways = iter(noise)
    assert rank_preprocessing(lambda way: next(ways), identity, given)[0][0] == given

    def fail(way: Preprocessing) -> np.ndarray:
        raise DataError("no vectors")

    with pytest.raises(DataError, match="whatever it is shown"):
        rank_preprocessing(fail, identity, given)


def shuffle_images(vectors: np.ndarray, seed: int) -> np.ndarray:
    """The same vectors with other noise: another way that is as good."""
    noisy = vectors + 0.15 * np.random.default_rng(seed).normal(size=vectors.shape)
    return noisy / np.linalg.norm(noisy, axis=1, keepdims=True)


def test_few_people_change_nothing_by_chance() -> None:
    """Of ways that are equally good one looks the best; on few people by more than the margin."""
    given, changed, larger = CANDIDATES[0], 0, 0
    for seed in range(12):
        vectors, identity = draw_vectors(0.5, people=5)
        ways = {way: shuffle_images(vectors, 100 * seed + n) for n, way in enumerate(CANDIDATES)}
        distance = {way: measure_separation(v, identity).distance for way, v in ways.items()}
        larger += max(distance.values()) > MARGIN * distance[given]
        changed += rank_preprocessing(ways.__getitem__, identity, given)[0][0] != given
    assert larger >= 6
    assert changed <= larger / 3


def test_resamples_are_those_of_people() -> None:
    good, identity = draw_vectors(0.4, people=12)
    bad, _ = draw_vectors(1.5, people=12)
    assert compare_separations(good, bad, identity) == 1.0
    assert compare_separations(bad, good, identity) == 0.0
    assert compare_separations(good, good, identity) == 0.0
    # One person alone makes the first way better: resamples without that person do not.
    mixed = bad.copy()
    mixed[identity == 0] = np.eye(16)[0]
    assert 0.2 < compare_separations(mixed, bad, identity) < 0.999
    names = np.array([f"person {each}" for each in identity])
    assert compare_separations(good, bad, names) == 1.0


def test_layout_and_output_hold_for_every_way() -> None:
    good, identity = draw_vectors(0.4)
    given = Preprocessing(layout="nhwc", output="embedding", input_px=96)
    for way, _ in rank_preprocessing(lambda way: good, identity, given):
        assert (way.layout, way.output, way.input_px) == ("nhwc", "embedding", 96)


def test_people_are_chosen_with_two_images_or_more() -> None:
    identity = ["alone", *("ann",) * 5, *("bob",) * 2, *(f"p{i}" for i in range(40) for _ in "ab")]
    rows = choose_people(identity, people=100)
    chosen = [identity[row] for row in rows]
    assert "alone" not in chosen
    assert chosen.count("ann") == 3
    assert chosen.count("bob") == 2
    assert (np.diff(rows) > 0).all()
    assert len({identity[row] for row in choose_people(identity, people=7)}) == 7
    assert len(choose_people(["a", "b", "c"])) == 0
