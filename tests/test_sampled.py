"""sampled softmax: the whole head where the sample is whole, else the sample and nothing more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_training import PLAN, draw_people, train

from cdp.errors import ConfigError
from cdp.models import build_backbone
from cdp.models.heads import SampledHead, build_head
from cdp.training.plan import OPTIMIZERS
from cdp.training.sets import TrainingSet

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]


def sample(head: SampledHead, label: torch.Tensor, number: int) -> torch.Tensor:
    """The classes of a step that trains nothing."""
    with head.step(number, label, 1.0, torch.optim.SGD(head.parameters(), lr=0.1)):
        return head.active


def wrap(whole, size: int, **options) -> SampledHead:
    """A sampled head that starts from the classes of a whole one."""
    inner = build_head("adaface", whole.embedding_dim, size, scale=whole.scale)
    head = SampledHead(inner, whole.identity_count, **options)
    head.table.copy_(whole.weight.detach())
    return head


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_sample_of_all_is_the_whole_head(optimizer: str) -> None:
    images, label = draw_people(6, 8)
    rate = 0.1 if optimizer == "sgd" else 2e-3
    plan = replace(PLAN, optimizer=optimizer, learning_rate=rate, epochs=2)
    whole = build_head("adaface", 16, 6)
    sampled = wrap(whole, 6, memories=OPTIMIZERS[optimizer])
    weights, histories = [], []
    for head in (whole, sampled):
        backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
        histories.append(train(backbone, [TrainingSet(head, images, label)], plan))
        weights.append(backbone.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key
    assert torch.equal(whole.weight, sampled.table)
    for one, other in zip(*histories, strict=True):
        assert (one["loss"], one["accuracy"]) == (other["loss"], other["accuracy"])


def test_a_step_sees_the_batch_and_a_fair_draw_of_the_rest() -> None:
    head = build_head("cosface", 4, 1000, sampled_classes=60)
    label = torch.tensor([5, 999, 5, 0])
    seen = np.zeros(1000, int)
    for step in range(600):
        active = sample(head, label, step).numpy()
        assert len(active) == 60
        assert (np.diff(active) > 0).all()
        assert {0, 5, 999} <= set(active.tolist())
        seen[active] += 1
    np.testing.assert_array_equal(seen[[0, 5, 999]], 600)
    others = np.delete(seen, [0, 5, 999])
    expected = 600 * 57 / 997
    assert abs(others.mean() - expected) < 1e-9
    # Binomial counts: a chi-square of 997 cells, within five of its standard deviations.
    chi = ((others - expected) ** 2 / (expected * (1 - 57 / 997))).sum()
    assert abs(chi - 997) < 5 * np.sqrt(2 * 997)
    again = sample(head, label, 3)
    assert not torch.equal(again, sample(head, label, 4))
    assert torch.equal(again, sample(head, label, 3))


def test_loss_and_gradient_are_those_of_the_sample_alone() -> None:
    whole = build_head("arcface", 5, 40).double()
    inner = build_head("arcface", 5, 12, scale=whole.scale)
    head = SampledHead(inner, 40).double()
    head.table.copy_(whole.weight.detach())
    rng = np.random.default_rng(0)
    embedding = torch.from_numpy(rng.normal(size=(6, 5))).requires_grad_()
    label = torch.from_numpy(rng.integers(0, 40, 6))
    sample(head, label, 0)
    few = build_head("arcface", 5, 12, scale=whole.scale).double()
    with torch.no_grad():
        few.weight.copy_(whole.weight[head.active])
    ours = head.score(embedding, label)
    theirs = few.score(embedding, head.place(label))
    np.testing.assert_array_equal(head.active[head.place(label)], label)
    assert torch.equal(ours.loss, theirs.loss)
    ours.loss.sum().backward()
    theirs.loss.sum().backward()
    assert torch.equal(head.inner.weight.grad, few.weight.grad)


def test_masked_classes_are_found_in_the_sample() -> None:
    head = build_head("arcface", 5, 40, sampled_classes=12).double()
    rng = np.random.default_rng(0)
    embedding = torch.from_numpy(rng.normal(size=(6, 5)))
    label = torch.from_numpy(rng.integers(0, 20, 6))
    sample(head, label, 0)
    head.inner.weight.data.normal_()
    others = [(row, c) for row in range(6) for c in (7, 11, 21, 39) if c != label[row]]
    found = head.score(embedding, label, torch.tensor(others)).loss
    place = {int(c): i for i, c in enumerate(head.active)}
    seen = torch.tensor([(row, place[c]) for row, c in others if c in place])
    assert 0 < len(seen) < len(others)
    expected = head.inner.score(embedding, head.place(label), seen).loss
    assert torch.equal(found, expected)


def test_a_step_that_fails_leaves_the_tables_and_the_margin() -> None:
    head = build_head("cosface", 4, 30, sampled_classes=10)
    before = head.table.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    shares = []

    def fail() -> None:
        with head.step(0, torch.arange(3), 0.25, optimizer), torch.no_grad():
            shares.append(head.margin_share)
            head.inner.weight.zero_()
            raise ValueError("diverged")

    with pytest.raises(ValueError, match="diverged"):
        fail()
    assert [*shares, head.margin_share] == [0.25, 1.0]
    assert torch.equal(head.table, before)


def test_classes_outside_the_sample_stay_as_they_are() -> None:
    images, label = draw_people(6, 4)
    head = build_head("adaface", 16, 500, sampled_classes=20)
    before = head.table.clone()
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
    train(backbone, [TrainingSet(head, images, label)], replace(PLAN, epochs=1))
    moved = (head.table != before).any(1)
    assert moved[:6].all()
    assert 20 <= moved.sum() <= 2 * 20  # two steps
    assert torch.equal(head.table_momentum_buffer.any(1), moved)


def test_resuming_a_sampled_training_ends_with_the_same_bits() -> None:
    images, label = draw_people(12, 4)
    results = []
    states: list = []
    for resume in (None, 1):
        head = build_head("adaface", 16, 12, sampled_classes=10)
        backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
        plan = replace(PLAN, batch_size=8, epochs=3)
        options = {"on_epoch": states.append} if resume is None else {"resume": states[resume]}
        train(backbone, [TrainingSet(head, images, label)], plan, **options)
        results.append((head.table.clone(), backbone.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    for key, value in results[0][1].items():
        assert torch.equal(value, results[1][1][key]), key


def test_a_million_identities_fit() -> None:
    """What a step allocates grows with the sample: logits and gradient, not a million rows."""
    count, sample_size, batch = 1_000_000, 2_000, 64
    head = build_head("adaface", 8, count, sampled_classes=sample_size, scale=64.0)
    assert head.table.shape == (count, 8)
    assert sum(p.numel() for p in head.parameters()) == sample_size * 8
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    label = torch.from_numpy(np.random.default_rng(0).integers(0, count, batch))
    embedding = torch.randn(batch, 8, generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(30):
        with head.step(step, label, 1.0, optimizer):
            loss, logits = head(embedding, label)
            assert logits.shape == (batch, sample_size)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < 0.5 * losses[0]


def test_errors() -> None:
    with pytest.raises(ConfigError, match="head softmax cannot be sampled; these can: adaface"):
        build_head("softmax", 8, 100, sampled_classes=10)
    head = build_head("normface", 8, 100, sampled_classes=3)
    with pytest.raises(ConfigError, match="cannot hold the 4 of one batch; raise sampled_classes"):
        sample(head, torch.arange(4), 0)
    assert not isinstance(build_head("normface", 8, 5, sampled_classes=9), SampledHead)
    with pytest.raises(ConfigError, match="a sample of at most the 4 identities"):
        SampledHead(build_head("normface", 8, 5), 4)
