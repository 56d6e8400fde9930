"""The compiled MLP against autograd, finite differences and a second thread."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cdp.mediator.mlp import CHUNK, Perceptron, Rows
from cdp.mediator.mlp_training import train_ensemble
from cdp.mediator.settings import MediatorSettings

pytestmark = [pytest.mark.torch, pytest.mark.trains]

WIDTH = 7


def draw_rows(count: int, seed: int, limit: float = np.inf) -> Rows:
    random = np.random.default_rng(seed)
    features = random.normal(2, 3, (count, WIDTH)).astype(np.float32)
    truth = (features[:, 0] + random.normal(size=count) > 2).astype(np.float32)
    mean, inverse = features.mean(0), 1 / features.std(0)
    return Rows(features, truth, mean, inverse.astype(np.float32), limit)


def draw_network(seed: int = 0, hidden=(9, 5), **options) -> Perceptron:
    return Perceptron(WIDTH, hidden, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("batch", [1, 2, 64, 2 * CHUNK + 3])
def test_steps_are_those_of_autograd(optimizer, batch):
    rows = draw_rows(2000, 1, limit=1.5)
    ours = draw_network(optimizer=optimizer, learning_rate=0.01, weight_decay=0.01)
    layers = [torch.tensor(layer, requires_grad=True) for layer in ours.layers]
    theirs = (
        torch.optim.AdamW(layers, lr=0.01, weight_decay=0.01)
        if optimizer == "adam"
        else torch.optim.SGD(layers, lr=0.01, momentum=0.9, weight_decay=0.01)
    )
    mean, inverse, limit = rows.how
    known = torch.from_numpy(((rows.features - mean) * inverse).clip(-limit, limit))
    random = np.random.default_rng(2)
    for _ in range(20):
        chosen = random.integers(0, 2000, batch)
        inputs, truth = known[chosen], torch.from_numpy(rows.truth[chosen]).long()
        hidden = torch.relu(torch.relu(inputs @ layers[0] + layers[1]) @ layers[2] + layers[3])
        logits = hidden @ layers[4] + layers[5]
        loss = torch.nn.functional.cross_entropy(logits, truth)
        found = ours.logits(rows, chosen)
        np.testing.assert_allclose(found, (logits[:, 1] - logits[:, 0]).detach(), atol=2e-4)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        assert ours.learn(rows, chosen) == pytest.approx(loss.item(), abs=1e-5)
    for one, other in zip(ours.layers, layers, strict=True):
        np.testing.assert_allclose(one, other.detach(), atol=5e-5, rtol=5e-4)


def test_dropout_gradients_are_those_of_the_loss():
    rows, chosen = draw_rows(40, 3), np.arange(40)

    def measure(shift, place):
        network = draw_network(3, (6, 6), dropout=0.5, optimizer="sgd")
        network.value[place] += shift
        loss = network.learn(rows, chosen)
        return loss, network.gradient.copy()

    gradient = measure(0.0, 0)[1]
    for place in (0, 10, 40, 70, 80, 95):
        numeric = (measure(5e-3, place)[0] - measure(-5e-3, place)[0]) / 1e-2
        assert gradient[place] == pytest.approx(numeric, abs=2e-3)


def test_a_second_thread_changes_no_bit():
    rows = draw_rows(3000, 4)
    random = np.random.default_rng(5)
    batches = [random.integers(0, 3000, 1024) for _ in range(30)]
    alone = draw_network(6, dropout=0.2)
    with ThreadPoolExecutor(1) as pool:
        helped = draw_network(6, dropout=0.2, helper=pool)
        for chosen in batches:
            assert alone.learn(rows, chosen) == helped.learn(rows, chosen)
    np.testing.assert_array_equal(alone.value, helped.value)


def test_mapped_features_are_read_where_they_lie(tmp_path):
    rows = draw_rows(500, 7)
    np.save(tmp_path / "features.npy", rows.features)
    mapped = Rows(np.load(tmp_path / "features.npy", mmap_mode="r"), rows.truth, *rows.how)
    one, other = draw_network(8), draw_network(8)
    for _ in range(3):
        assert one.learn(rows, np.arange(500)) == other.learn(mapped, np.arange(500))


def test_no_number_of_threads_changes_an_ensemble():
    count = 600
    fold = np.random.default_rng(4).integers(0, 5, count)
    held = (fold[:, None] == np.arange(5)).astype(np.float32)
    settings = MediatorSettings(epochs=2, batch_size=64)

    def train(workers: int) -> tuple[np.ndarray, list]:
        weight = np.ones(count, np.float32)
        found = train_ensemble(draw_rows(count, 5), held, weight, settings, 0, workers)
        return np.concatenate([part.ravel() for layer in found[0] for part in layer]), found[1]

    parameters, history = train(1)
    assert [row["member"] for row in history] == sorted(row["member"] for row in history)
    for workers in (2, 3, 4, 6, 12):
        again, same = train(workers)
        np.testing.assert_array_equal(again, parameters)
        assert same == history
