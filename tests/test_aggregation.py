"""aggregation: pooled vectors and attention weights by hand, and what training learns."""

import math

import numpy as np
import pytest
import torch

from cdp.aggregation import (
    NeuralAggregator,
    fuse_parts,
    pool_vectors,
    train_aggregator,
    weigh_by_norm,
)
from cdp.aggregation.attention import attend
from cdp.errors import DataError
from cdp.models import build_backbone
from cdp.recognizer import Recognizer

pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]

AXES = np.eye(2, dtype=np.float32)


def test_means_by_hand() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], np.float32)
    group = np.array([7, 3, 7, 7])
    np.testing.assert_allclose(
        pool_vectors(vectors, group), [[0, 1], [2 / math.sqrt(5), 1 / math.sqrt(5)]], rtol=1e-6
    )
    weight = weigh_by_norm(np.array([1.0, 5, 4, 1]), power=0.5)
    np.testing.assert_allclose(weight, [1, math.sqrt(5), 2, 1])
    np.testing.assert_allclose(
        pool_vectors(vectors, group, weight)[1], [math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-6
    )


def test_parts_count_by_their_lengths() -> None:
    """Lengths 3 and 1, variances 1/3 and 1: weights .75 and .25, in each part alone."""
    raw = np.array([[3.0, 0, 0, 1], [0, 1, 0, 5]], np.float32)
    fused = fuse_parts(raw, np.zeros(2, int), 2)
    expected = np.array([0.75, 0.25, 0, 1])
    np.testing.assert_allclose(fused[0], expected / np.linalg.norm(expected), rtol=1e-6)
    one = fuse_parts(raw[:1], np.zeros(1, int), 2)
    np.testing.assert_allclose(one, [[math.sqrt(0.5), 0, 0, math.sqrt(0.5)]], rtol=1e-6)


def test_attention_by_hand() -> None:
    vectors = torch.from_numpy(AXES)[None]
    everything = torch.ones(1, 2, dtype=torch.bool)
    pooled, weight = attend(vectors, everything, torch.tensor([[math.log(3), 0]]))
    np.testing.assert_allclose(weight, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(pooled, [[0.75, 0.25]], rtol=1e-6)
    masked = attend(vectors, torch.tensor([[False, True]]), torch.tensor([[9.0, 0]]))[1]
    np.testing.assert_allclose(masked, [[0, 1]])


def test_two_blocks_by_hand() -> None:
    """W = 0 and b = q: the second block asks with tanh(q)."""
    nan = NeuralAggregator(2)
    np.testing.assert_allclose(nan.pool(AXES, np.zeros(2, int)), pool_vectors(AXES, [0, 0]))
    with torch.no_grad():
        nan.query[0] = nan.second.bias[0] = 1.0
        nan.second.weight.zero_()
    weight = 1 / (1 + math.exp(-math.tanh(1.0)))
    expected = np.array([weight, 1 - weight])
    found = nan.pool(AXES, np.zeros(2, int))
    np.testing.assert_allclose(found[0], expected / np.linalg.norm(expected), rtol=1e-5)
    np.testing.assert_allclose(nan.pool(AXES, np.array([1, 0])), AXES[::-1], atol=1e-6)
    turned = nan.pool(AXES[::-1], np.zeros(2, int))
    np.testing.assert_allclose(found, turned, rtol=1e-6)
    assert sum(p.numel() for p in nan.parameters()) == 2 * 2 + 2 * 2


def test_training_learns_which_pictures_to_follow() -> None:
    """Good vectors carry a mark in the last coordinate, poor ones are noise: the mark is found."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(12, 8))
    label = np.repeat(np.arange(12), 20)
    good = rng.random(240) < 0.4
    vectors = np.where(good[:, None], centre[label], 0) + rng.normal(size=(240, 8)) * np.where(
        good[:, None], 0.3, 2.0
    )
    vectors = np.concatenate([vectors, np.where(good, 3.0, -3.0)[:, None]], 1).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nan = train_aggregator(vectors, label, steps=300, learning_rate=0.02, seed=1)
    again = train_aggregator(vectors, label, steps=300, learning_rate=0.02, seed=1)
    assert torch.equal(nan.query, again.query)
    everything = torch.ones(1, 240, dtype=torch.bool)
    _, weight = nan.attend_twice(torch.from_numpy(vectors)[None], everything)
    assert weight[0, good].mean() > 2 * weight[0, ~good].mean()


def test_a_recognizer_embeds_sets() -> None:
    recognizer = Recognizer(build_backbone("plain", input_px=16, embedding_dim=8), device="cpu")
    faces = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3)).astype(np.uint8)
    vectors, norm = recognizer.embedder.embed(faces, flip=True)
    group = np.array([4, 4, 9, 4, 9])
    found = recognizer.embed_set(faces, group)
    np.testing.assert_allclose(found, pool_vectors(vectors, group, norm), atol=1e-6)
    plain = recognizer.embed_set(faces, group, weigh="mean")
    np.testing.assert_allclose(plain, pool_vectors(vectors, group), atol=1e-6)
    parts = recognizer.embed_set(faces, group, weigh="parts", parts=4)
    expected = fuse_parts(vectors * norm[:, None], group, 4)
    np.testing.assert_allclose(parts, expected, atol=1e-6)
    learned = recognizer.embed_set(faces, group, weigh=NeuralAggregator(8))
    np.testing.assert_allclose(learned, plain, atol=1e-6)
    alone = recognizer.embed_set(faces)
    assert alone.shape == (8,)
    np.testing.assert_allclose(alone, pool_vectors(vectors, np.zeros(5, int), norm)[0], atol=1e-6)


def test_errors() -> None:
    with pytest.raises(DataError, match="the vectors of set 2 cancel"):
        pool_vectors(np.array([[1.0, 0], [-1, 0]]), np.array([2, 2]))
    with pytest.raises(DataError, match="a set each expected"):
        pool_vectors(AXES, np.array([1]))
    with pytest.raises(DataError, match="weight of 0 or above"):
        pool_vectors(AXES, np.array([1, 1]), np.array([1, -1]))
    with pytest.raises(DataError, match="in 3 equal parts"):
        fuse_parts(AXES, np.array([1, 1]), 3)
    with pytest.raises(DataError, match="two people with two pictures"):
        train_aggregator(AXES, np.array([0, 1]))
    recognizer = Recognizer(build_backbone("plain", input_px=16, embedding_dim=8), device="cpu")
    with pytest.raises(DataError, match="weigh of mean, norm, quality, parts"):
        recognizer.embed_set(np.zeros((1, 16, 16, 3), np.uint8), weigh="best")
