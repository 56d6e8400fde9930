"""orders: BBN's reversed sampler, its schedule and its mixtures, derived by hand."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.stats import chisquare
from test_training import PLAN, draw_people, make, train

from cdp.errors import ConfigError
from cdp.models.heads import build_head
from cdp.training.batches import BilateralOrder, Order, Targets
from cdp.training.classification import classify, classify_bilaterally, mix_halves
from cdp.training.plan import TrainingPlan
from cdp.training.sets import SoftTargets, TrainingSet

pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]


def make_long_tail():
    """Three identities of 4, 2 and 1 images, their rows not in order."""
    images, _ = draw_people(7, 1)
    label = np.array([0, 1, 0, 2, 0, 1, 0])
    return TrainingSet(build_head("cosface", 16, 3), images, label)


def test_rare_identities_are_drawn_most_often() -> None:
    """Sizes 4, 2, 1: probabilities 1/7, 2/7, 4/7, and each image of an identity alike."""
    training_set = make_long_tail()
    rows, _ = Order(training_set, 5, 0, sampling="reversed").take(0, 7000)
    drawn = np.bincount(training_set.label[rows])
    assert chisquare(drawn, [1000, 2000, 4000]).pvalue > 1e-3
    assert chisquare(np.bincount(rows)[[0, 2, 4, 6]]).pvalue > 1e-3
    again, _ = Order(training_set, 5, 0, sampling="reversed").take(100, 50)
    assert np.array_equal(again, rows[100:150])


def test_half_of_each_step_is_reversed() -> None:
    training_set = make_long_tail()
    order = BilateralOrder(training_set, 1, 0, count=6)
    rows, seeds = order.take(12, 18)  # steps 2, 3 and 4
    usual = Order(training_set, 1, 0).take(6, 9)[0].reshape(3, 3)
    assert np.array_equal(rows.reshape(3, 2, 3)[:, 0], usual)
    for step in (2, 3, 4):
        part = slice(6 * (step - 2), 6 * (step - 1))
        for whole, alone in zip((rows, seeds), order.take(6 * step, 6), strict=True):
            assert np.array_equal(whole[part], alone)
    assert not np.array_equal(rows.reshape(3, 2, 3)[:, 0], rows.reshape(3, 2, 3)[:, 1])


def test_the_share_of_the_usual_order_falls() -> None:
    plan = TrainingPlan(epochs=10, sampling="bilateral")
    found = [plan.usual_share_at(epoch * 7 + 3, 7) for epoch in (0, 5, 9)]
    np.testing.assert_allclose(found, [1, 0.75, 0.19])


def test_mixtures_by_hand() -> None:
    embedding = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    np.testing.assert_allclose(
        mix_halves(embedding, 0.75), [[1.5, 3, 4.5], [6, 7.5, 6]]
    )  # 2 x .75 of the first two of rows 0 and 1, 2 x .25 of the last of rows 2 and 3


def make_targets(label, masked=None, soft=None) -> Targets:
    seeds = torch.zeros(len(label), dtype=torch.int64)
    return Targets(torch.tensor(label), None, soft, masked, None, seeds)


def test_the_loss_is_that_of_both_labels() -> None:
    head = build_head("cosface", 4, 3, scale=10.0)
    embedding = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    target = make_targets([0, 1, 2, 1])
    loss, _ = classify_bilaterally(head, embedding, target, 0.75)
    mixed = mix_halves(embedding, 0.75)
    for row, (usual, rare) in enumerate([(0, 2), (1, 1)]):
        expected = sum(
            share * head(mixed[row : row + 1], torch.tensor([label])).loss
            for share, label in ((0.75, usual), (0.25, rare))
        )
        assert loss[row].item() == loss[row + 2].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_usual_order_alone_is_plain_training() -> None:
    """With a = 1 and an embedding whose second half is empty, only the usual image counts."""
    head = build_head("cosface", 4, 3)
    embedding = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    embedding[:, 2:] = 0
    target = make_targets([0, 1, 2, 2, 1, 0])
    loss, hits = classify_bilaterally(head, embedding, target, 1.0)
    plain, _ = classify(head, 2 * embedding[:3], make_targets([0, 1, 2]))
    np.testing.assert_allclose(loss[:3].detach(), plain.detach(), rtol=1e-5)
    assert hits.item() % 2 == 0


def test_masked_classes_stay_masked_in_a_mixture() -> None:
    """The class 2 that image 1 masks is left out of its mixture, but for a label of its own."""
    head = build_head("cosface", 4, 3)
    embedding = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    masked = torch.tensor([[1, 2], [0, 2]])
    loss, _ = classify_bilaterally(head, embedding, make_targets([0, 1, 2, 0], masked), 0.5)
    mixed = mix_halves(embedding, 0.5)
    only = torch.tensor([[0, 2]])
    expected = sum(0.5 * head(mixed[1:], torch.tensor([own]), only).loss for own in (1, 0))
    assert loss[1].item() == pytest.approx(expected.item(), rel=1e-5)
    own = 0.5 * (
        head(mixed[:1], torch.tensor([0]), only).loss + head(mixed[:1], torch.tensor([2])).loss
    )
    assert loss[0].item() == pytest.approx(own.item(), rel=1e-5)


@pytest.mark.parametrize("sampling", ["reversed", "bilateral"])
def test_it_trains_and_resumes_to_the_bit(sampling: str) -> None:
    plan = dataclasses.replace(
        PLAN, epochs=4, batch_size=16, sampling=sampling, margin_warmup_epochs=0
    )
    states = []
    backbone, training_sets = make(count=2)
    history = train(backbone, training_sets, plan, on_epoch=states.append)
    assert np.isfinite([record["loss"] for record in history]).all()
    again, fresh = make(count=2)
    train(again, fresh, plan, resume=load(save(states[0])))
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_soft_targets_are_refused() -> None:
    backbone, (training_set,) = make()
    soft = SoftTargets(np.array([0]), np.array([1]), np.array([1.0]))
    plan = dataclasses.replace(PLAN, sampling="bilateral")
    with pytest.raises(ConfigError, match="one class an image: set targets to hard"):
        train(backbone, [dataclasses.replace(training_set, soft=soft)], plan)
    with pytest.raises(ConfigError, match="sampling of image, identity, reversed, bilateral"):
        TrainingPlan(sampling="backwards")
