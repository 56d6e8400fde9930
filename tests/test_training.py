"""training: it learns, resumes to the bit, weights its training sets, and names its errors."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from cdp.errors import BackendError, ConfigError, DataError, StageError
from cdp.images.degradation import DEGRADATIONS, degrade
from cdp.models import build_backbone
from cdp.models.auxiliary import AUXILIARIES, build_auxiliary
from cdp.models.heads import HEADS, build_head
from cdp.training.distillation import fit_target
from cdp.training.loop import _Trainer, train_model
from cdp.training.plan import HISTORY, TrainingPlan, resolve_device, resolve_precision
from cdp.training.sets import MaskedNegatives, SoftTargets, TrainingSet

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]


def draw_people(people: int, each: int, side: int = 16, seed: int = 0):
    """A noisy pattern a person."""
    rng = np.random.default_rng(seed)
    patterns = rng.uniform(40, 215, (people, side, side, 3))
    label = np.repeat(np.arange(people), each)
    noisy = patterns[label] + rng.normal(0, 30, (len(label), side, side, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), label


def make(people: int = 6, each: int = 8, *, head: str = "adaface", count: int = 1):
    backbone = build_backbone("plain", input_px=16, embedding_dim=16, width=0.5)
    training_sets = []
    for number in range(count):
        images, label = draw_people(people, each, seed=number)
        training_sets.append(TrainingSet(build_head(head, 16, people, seed=number), images, label))
    return backbone, training_sets


PLAN = TrainingPlan(
    epochs=4, batch_size=16, degradation=DEGRADATIONS["adaface"], seed=3, precision="float32"
)
"""Losses are compared to the last digits, so not in bfloat16, which "auto" may choose."""


def train(backbone, training_sets, plan=PLAN, **options):
    return train_model(backbone, training_sets, plan, device="cpu", progress=False, **options)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head_learns(head: str) -> None:
    backbone, training_sets = make(head=head)
    plan = dataclasses.replace(PLAN, epochs=6, degradation=DEGRADATIONS["none"], flip=False)
    history = train(backbone, training_sets, plan)
    assert history[-1]["accuracy"] > 0.9
    assert not backbone.training


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_resuming_ends_with_the_same_bits(optimizer: str, ema_decay: float | None) -> None:
    rate = 0.1 if optimizer == "sgd" else 2e-3
    plan = dataclasses.replace(PLAN, optimizer=optimizer, ema_decay=ema_decay, learning_rate=rate)
    states = []
    backbone, training_sets = make(count=2)
    whole = train(backbone, training_sets, plan, on_epoch=states.append)
    assert len(states) == plan.epochs
    for epoch in (1, 3, 4):
        again, fresh = make(count=2)
        kept = load(save(states[epoch - 1]))
        after = []
        history = train(again, fresh, plan, resume=kept, on_epoch=after.append)
        assert len(after) == plan.epochs - epoch
        for key, value in backbone.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), (epoch, key)
        for one, other in zip(training_sets, fresh, strict=True):
            assert torch.equal(one.head.weight, other.head.weight)
        for key in set(HISTORY) - {"seconds"}:
            assert [h[key] for h in history] == [h[key] for h in whole]


def test_a_seed_is_a_result() -> None:
    def weights(seed: int) -> torch.Tensor:
        backbone, training_sets = make()
        train(backbone, training_sets, dataclasses.replace(PLAN, seed=seed, epochs=1))
        return torch.cat([p.flatten() for p in backbone.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_torch_is_left_as_it_was() -> None:
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    backbone, training_sets = make()
    train(backbone, training_sets, dataclasses.replace(PLAN, epochs=1))
    assert torch.equal(torch.rand(2), expected)
    assert before == (
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


def test_the_average_is_the_average() -> None:
    """The EMA, recomputed from the weights after each step."""
    plan = dataclasses.replace(PLAN, epochs=2, ema_decay=0.5)
    backbone, training_sets = make(each=2)
    trainer = _Trainer(backbone, training_sets, plan, torch.device("cpu"))
    key = "ending.2.weight"
    expected = backbone.state_dict()[key].clone()
    original = trainer.optimizer.step
    steps = []

    def step(*arguments):
        original(*arguments)
        decay = min(0.5, (1 + len(steps)) / (10 + len(steps)))
        expected.mul_(decay).add_(backbone.state_dict()[key], alpha=1 - decay)
        steps.append(1)

    trainer.optimizer.step = step

    class Bar:
        def update(self): ...
        def set_postfix(self, **_): ...

    trainer.run_epoch(Bar())
    trainer.run_epoch(Bar())
    np.testing.assert_allclose(trainer.average[key], expected, atol=1e-6)
    trainer.finish()
    np.testing.assert_allclose(backbone.state_dict()[key], expected, atol=1e-6)


def test_losses_are_weighted_by_share() -> None:
    """The loss of a batch, re-derived from the heads' own outputs."""
    backbone, training_sets = make(count=2)
    weight = np.linspace(0, 1, len(training_sets[1].images))
    shared = [
        dataclasses.replace(training_sets[0], share=1.0),
        dataclasses.replace(training_sets[1], share=3.0, weight=weight),
    ]
    trainer = _Trainer(backbone, shared, PLAN, torch.device("cpu"))
    backbone.eval()
    for head in trainer.heads:
        head.eval()
    images, targets = trainer.batches.load(0)
    assert [len(target.label) for target in targets] == [4, 12]
    total, _ = trainer._loss(images, targets)
    embedding = backbone(images)
    first = shared[0].head(embedding[:4], targets[0].label).loss.mean()
    second = shared[1].head(embedding[4:], targets[1].label).loss
    rows, _ = trainer.batches.orders[1].take(0, 12)
    second = (second * torch.from_numpy(weight[rows]).float()).mean()
    assert total.item() == pytest.approx((0.25 * first + 0.75 * second).item(), rel=1e-5)


def test_shares_default_to_the_numbers_of_images() -> None:
    backbone, (first, second) = make(count=2)
    longer = dataclasses.replace(
        second, images=np.tile(second.images, (3, 1, 1, 1)), label=np.tile(second.label, 3)
    )
    trainer = _Trainer(backbone, [first, longer], PLAN, torch.device("cpu"))
    np.testing.assert_allclose(trainer.batches.shares, [0.25, 0.75])
    assert trainer.counts == [4, 12]
    assert trainer.steps_per_epoch == math.ceil(4 * 48 / 16)


def test_a_share_of_two_numbers_moves_with_the_square_of_the_epochs() -> None:
    """By hand: four epochs weigh 1, 15/16, 3/4 and 7/16 of the way back, .78125 in the mean."""
    backbone, (first, second) = make(count=2)
    moving = [dataclasses.replace(first, share=(0.25, 0.75)),
              dataclasses.replace(second, share=(0.75, 0.25))]  # fmt: skip
    trainer = _Trainer(backbone, moving, PLAN, torch.device("cpu"))
    steps = [epoch * trainer.steps_per_epoch for epoch in range(4)]
    expected = [0.25, 0.28125, 0.375, 0.53125]
    assert [trainer._weigh_sets(step)[0] for step in steps] == pytest.approx(expected)
    np.testing.assert_allclose(trainer.batches.shares, [0.359375, 0.640625])
    assert trainer.counts == [6, 10]
    states = []
    whole = train(backbone, moving, PLAN, on_epoch=states.append)
    again, fresh = make(count=2)
    fresh = [
        dataclasses.replace(new, share=old.share) for new, old in zip(fresh, moving, strict=True)
    ]
    assert train(again, fresh, PLAN, resume=states[1])[-1]["loss"] == whole[-1]["loss"]


def test_an_image_without_weight_changes_nothing() -> None:
    backbone, (training_set,) = make(each=2)
    before = training_set.head.weight.detach().clone()
    plan = dataclasses.replace(PLAN, epochs=1, weight_decay=0.0)
    nothing = dataclasses.replace(training_set, weight=np.zeros(len(training_set.images)))
    history = train(backbone, [nothing], plan)
    assert history[0]["loss"] == 0
    assert torch.equal(training_set.head.weight, before)


def loss_of(trainer, images, targets):
    trainer.backbone.eval()
    for head in trainer.heads:
        head.eval()
    return trainer._loss(images, targets)[0].item()


def test_soft_targets_are_a_weighted_mean_of_losses() -> None:
    """Re-derived from the head's own losses, image by image and class by class."""
    backbone, (training_set,) = make(each=2)
    count = len(training_set.images)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.integers(0, count - 3, 2 * count))  # the last images have hard labels alone
    soft = SoftTargets(rows, rng.integers(0, 6, len(rows)), rng.uniform(0.1, 2, len(rows)))
    weight = rng.uniform(0.1, 2, count)
    soft_training_set = dataclasses.replace(training_set, soft=soft, weight=weight)
    trainer = _Trainer(backbone, [soft_training_set], PLAN, torch.device("cpu"))
    images, targets = trainer.batches.load(0)
    found = loss_of(trainer, images, targets)
    shown, _ = trainer.batches.orders[0].take(0, PLAN.batch_size)
    embedding = backbone(images)
    expected = 0.0
    for place, row in enumerate(shown):
        entries = np.flatnonzero(soft.row == row)
        shares = soft.weight[entries] / soft.weight[entries].sum() if len(entries) else [1.0]
        classes = soft.label[entries] if len(entries) else [training_set.label[row]]
        for share, c in zip(shares, classes, strict=True):
            loss = training_set.head(embedding[place : place + 1], torch.tensor([c])).loss.item()
            expected += weight[row] * share * loss / len(shown)
    assert found == pytest.approx(expected, rel=1e-4)


def test_soft_targets_equal_to_the_labels_change_nothing() -> None:
    results = []
    for soft in (False, True):
        backbone, (training_set,) = make(head="cosface")
        rows = np.arange(len(training_set.images))
        if soft:
            same = SoftTargets(rows, training_set.label, np.full(len(rows), 0.3))
            training_set = dataclasses.replace(training_set, soft=same)
        history = train(backbone, [training_set])
        results.append((history[-1]["loss"], history[-1]["accuracy"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_masked_negatives_reach_the_head(soft: bool) -> None:
    """Image by image, from the head's own losses without the class; hard labels and soft ones."""
    backbone, (training_set,) = make(each=2)
    count = len(training_set.images)
    rows = np.arange(count)
    masked = MaskedNegatives(rows, (training_set.label + 1 + rows % 5) % 6)
    if soft:  # the masked class is some images' second class
        targets = SoftTargets(rows.repeat(2), np.c_[training_set.label, masked.label].ravel(),
                              np.tile([0.75, 0.25], count))  # fmt: skip
        training_set = dataclasses.replace(training_set, soft=targets)
    trainer = _Trainer(backbone, [dataclasses.replace(training_set, masked_negatives=masked)], PLAN,
                       torch.device("cpu"))  # fmt: skip
    images, targets_of_batch = trainer.batches.load(0)
    found = loss_of(trainer, images, targets_of_batch)
    shown, _ = trainer.batches.orders[0].take(0, PLAN.batch_size)
    embedding = backbone(images)
    expected = 0.0
    for place, row in enumerate(shown):
        part, own = embedding[place : place + 1], int(training_set.label[row])
        without = torch.tensor([[0, int(masked.label[row])]])
        loss = training_set.head(part, torch.tensor([own]), without).loss.item()
        if soft:
            second = training_set.head(part, torch.tensor([int(masked.label[row])])).loss.item()
            loss = 0.75 * loss + 0.25 * second
        expected += loss / len(shown)
    assert found == pytest.approx(expected, rel=1e-4)


def test_auxiliary_losses_are_added_by_their_weight() -> None:
    backbone, (training_set,) = make()
    added = build_auxiliary("coco", 16, 6)
    trainer = _Trainer(
        backbone,
        [dataclasses.replace(training_set, auxiliaries=((0.25, added),))],
        PLAN,
        torch.device("cpu"),
    )
    images, targets = trainer.batches.load(0)
    found = loss_of(trainer, images, targets)
    embedding, label = backbone(images), targets[0].label
    expected = (
        training_set.head(embedding, label).loss.mean() + 0.25 * added(embedding, label).mean()
    )
    assert found == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", sorted(name for name, kind in AUXILIARIES.items() if "score" in vars(kind))
)
def test_every_auxiliary_loss_trains_and_resumes(name: str) -> None:
    """The head learns beside it, it changes what is learned, and its own state is part of the
    checkpoint."""
    plan = dataclasses.replace(
        PLAN, epochs=6, degradation=DEGRADATIONS["none"], flip=False, learning_rate=0.05,
        sampling="identity", images_per_identity=2,
    )  # fmt: skip
    states = []

    def measure(weight: float, **options) -> float:
        backbone, (training_set,) = make(each=6, head="normface")
        added = build_auxiliary(name, 16, 6)
        training_set = dataclasses.replace(training_set, auxiliaries=((weight, added),))
        history = train(backbone, [training_set], plan, **options)
        assert history[-1]["accuracy"] > 0.9
        images = torch.from_numpy(training_set.images)
        with torch.inference_mode():
            faces = degrade(images, torch.arange(len(images)), DEGRADATIONS["none"], 16)
            return added(backbone(faces), torch.from_numpy(training_set.label)).mean().item()

    weight = 0.01 if name in ("center", "range") else 0.3
    whole = measure(weight, on_epoch=states.append)
    assert whole == measure(weight, resume=states[2])
    assert whole != measure(0.0)


def test_a_teacher_is_followed_without_labels() -> None:
    """The student learns where the teacher points; a set without a head needs no label."""
    images, label = draw_people(6, 8)
    target = fit_target(np.random.default_rng(0).normal(size=(6, 16))[label], 16)
    backbone, _ = make()
    plan = dataclasses.replace(PLAN, epochs=12, degradation=DEGRADATIONS["none"], flip=False)
    history = train(backbone, [TrainingSet(None, images, None, teacher=target)], plan)
    assert history[-1]["loss"] < 0.2 < history[0]["loss"]
    assert history[-1]["accuracy"] == 0


def test_the_teachers_part_of_the_loss() -> None:
    """All images that have a teacher alike, whatever their set; classes by their own shares."""
    backbone, (training_set, other) = make(count=2)
    target = fit_target(np.random.default_rng(1).normal(size=(48, 16)), 16)
    training_sets = [
        dataclasses.replace(training_set, teacher=target),
        TrainingSet(None, other.images, None, teacher=target, share=3.0),
    ]
    training_sets[0] = dataclasses.replace(training_sets[0], share=1.0)
    plan = dataclasses.replace(PLAN, distil_weight=0.7, class_weight=0.4)
    trainer = _Trainer(backbone, training_sets, plan, torch.device("cpu"))
    assert trainer.counts == [4, 12]
    images, targets = trainer.batches.load(0)
    found = loss_of(trainer, images, targets)
    embedding = backbone(images)
    rows = [order.take(0, n)[0] for order, n in zip(trainer.batches.orders, (4, 12), strict=True)]
    shown = torch.from_numpy(target[np.concatenate(rows)])
    away = 1 - (embedding * shown).sum(1) / embedding.norm(dim=1)
    expected = (
        0.4 * training_set.head(embedding[:4], targets[0].label).loss.mean() + 0.7 * away.mean()
    )
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_weight_the_heads_are_not_trained() -> None:
    backbone, (training_set,) = make()
    target = fit_target(np.random.default_rng(1).normal(size=(len(training_set.images), 16)), 16)
    before = [value.detach().clone() for value in training_set.head.parameters()]
    plan = dataclasses.replace(PLAN, class_weight=0.0, weight_decay=0.0)
    history = train(backbone, [dataclasses.replace(training_set, teacher=target)], plan)
    assert history[-1]["loss"] < 2
    assert history[-1]["accuracy"] == 0
    for old, new in zip(before, training_set.head.parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ConfigError, match="nothing to learn"):
        train(backbone, [training_set], plan)


def test_learning_rate_and_margin_follow_the_plan() -> None:
    backbone, training_sets = make()
    plan = TrainingPlan(
        epochs=10, batch_size=16, learning_rate=0.5, warmup_epochs=2, margin_warmup_epochs=4
    )
    trainer = _Trainer(backbone, training_sets, plan, torch.device("cpu"))
    assert trainer.steps_per_epoch == 3
    rates = [plan.learning_rate_at(step, trainer.steps_per_epoch) for step in range(30)]
    np.testing.assert_allclose(rates[:6], 0.5 * np.arange(1, 7) / 6)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert rates[18] == pytest.approx(0.25)
    assert rates[-1] < 0.01
    shares = [plan.margin_share_at(step, trainer.steps_per_epoch) for step in range(30)]
    np.testing.assert_allclose(shares[:13], np.minimum(np.arange(13) / 12, 1))


def test_history_has_a_record_an_epoch() -> None:
    backbone, training_sets = make()
    history = train(backbone, training_sets)
    assert [h["epoch"] for h in history] == [1, 2, 3, 4]
    assert [h["step"] for h in history] == [3, 6, 9, 12]
    for record in history:
        assert tuple(record) == HISTORY
        assert isinstance(record["epoch"], int)
        assert 0 <= record["accuracy"] <= 1
        assert record["seconds"] > 0


def test_memory_maps_and_single_images_will_do(tmp_path) -> None:
    images, label = draw_people(2, 1)
    np.save(tmp_path / "faces.npy", images)
    mapped = np.load(tmp_path / "faces.npy", mmap_mode="r")
    backbone, _ = make()
    training_set = TrainingSet(build_head("adaface", 16, 2), mapped, label)
    history = train(backbone, [training_set], dataclasses.replace(PLAN, epochs=2))
    assert len(history) == 2


def test_divergence_is_an_error() -> None:
    backbone, training_sets = make(head="softmax")
    plan = dataclasses.replace(PLAN, learning_rate=1e30, gradient_clip=None, warmup_epochs=0)
    with pytest.raises(StageError, match=r"diverged.*epoch \d+.*learning_rate \(now 1e\+30\)"):
        train(backbone, training_sets, plan)


def test_state_that_does_not_fit_is_an_error() -> None:
    states = []
    backbone, training_sets = make()
    train(backbone, training_sets, on_epoch=states.append)
    wider, _ = make(), None
    other = build_backbone("plain", input_px=16, embedding_dim=16, width=1.0)
    with pytest.raises(DataError, match="does not fit"):
        train(other, wider[1], resume=states[0])
    with pytest.raises(DataError, match="does not fit"):
        train(*make(), resume={})
    shorter = dataclasses.replace(PLAN, epochs=2)
    with pytest.raises(DataError, match=r"epoch 4, the plan ends at 2"):
        train(*make(), shorter, resume=states[3])


def test_errors() -> None:
    backbone, (training_set,) = make()
    with pytest.raises(DataError, match="nothing to train on"):
        train(backbone, [])
    teacher = np.ones((len(training_set.images), 5), np.float32)
    with pytest.raises(DataError, match="length 16 expected, as the student's, got 5"):
        train(backbone, [dataclasses.replace(training_set, teacher=teacher)])
    for wrong in (
        {"optimizer": "lion"},
        {"precision": "float16"},
        {"epochs": 0},
        {"batch_size": 1},
        {"learning_rate": 0.0},
        {"ema_decay": 1.0},
        {"distil_weight": -1.0},
        {"class_weight": -1.0},
    ):
        with pytest.raises(ConfigError):
            dataclasses.replace(PLAN, **wrong)
    with pytest.raises(ConfigError, match="shares above 0"):
        train(backbone, [dataclasses.replace(training_set, share=0.0)])


def test_devices() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(BackendError, match="'meteor'"):
        resolve_device("meteor")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="choose cpu or auto"):
            resolve_device("cuda")
    assert resolve_precision("float32", torch.device("cpu")) == torch.float32
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_bfloat16_trains_too() -> None:
    backbone, training_sets = make(each=4)
    plan = dataclasses.replace(PLAN, epochs=1, precision="bfloat16")
    assert math.isfinite(train(backbone, training_sets, plan)[0]["loss"])
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


def test_progress_goes_to_stderr(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    backbone, training_sets = make(each=2)
    plan = dataclasses.replace(PLAN, epochs=1)
    train_model(backbone, training_sets, plan, device="cpu", description="base")
    shown = capsys.readouterr()
    assert "base" in shown.err
    assert shown.out == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_learns_as_well() -> None:
    backbone, training_sets = make()
    plan = dataclasses.replace(PLAN, epochs=6, degradation=DEGRADATIONS["none"], flip=False)
    history = train_model(backbone, training_sets, plan, device="cuda", progress=False)
    assert history[-1]["accuracy"] > 0.9
    assert next(backbone.parameters()).device.type == "cpu"
