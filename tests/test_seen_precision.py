"""seen losses in bfloat16: what reads maps, twins and parts computes in float32, stays finite."""

import dataclasses

import numpy as np
import pytest
import torch
from test_extension_points import SEEING, SEEING_PLAN, make_seeing, train

from cdp.models.auxiliary import AUXILIARIES, MapLoss, Seen, Twin
from cdp.training.loop import _Trainer

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]

MAP_LOSSES = sorted(name for name, kind in AUXILIARIES.items() if issubclass(kind, MapLoss))


def make_trainer(name: str, precision: str) -> _Trainer:
    """One loss beside the head's, on a network whose batch normalisations have seen a batch."""
    plan = dataclasses.replace(SEEING_PLAN, precision=precision)
    made = make_seeing(AUXILIARIES[name].neck or "own", [name], sets=1)
    return _Trainer(*made, plan, torch.device("cpu"))


def observe(trainer: _Trainer) -> Seen:
    """What the loss sees of the first batch."""
    images, targets = trainer.batches.load(0)
    features, twins = trainer.observer.run(images, targets, 0)
    (training_set,) = trainer.training_sets
    ((_, loss),) = training_set.auxiliaries
    return trainer.observer.show(
        loss, training_set, targets[0], trainer.rows[0], features, twins, 0.5
    )


def round_to_half(value):
    """Floating numbers in bfloat16, those of a twin included."""
    if isinstance(value, Twin | Seen):
        names = [field.name for field in dataclasses.fields(value)]
        parts = {name: round_to_half(getattr(value, name)) for name in names}
        return dataclasses.replace(value, **parts)
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.bfloat16() if is_float else value


@pytest.mark.parametrize("name", SEEING)
def test_a_loss_of_half_numbers_is_that_of_the_same_in_float32(name: str) -> None:
    """Under autocast too: nothing in the loss is computed in bfloat16."""
    trainer = make_trainer(name, "float32")
    ((_, loss),) = trainer.training_sets[0].auxiliaries
    half = round_to_half(observe(trainer))
    with torch.autocast("cpu", torch.bfloat16):
        found = loss.look(half)
    expected = loss.look(half.to_float())
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", SEEING)
def test_a_network_in_bfloat16_gives_the_loss_of_float32(name: str) -> None:
    """Within what the rounding of the maps explains, with a finite gradient in the trunk."""
    found = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(name, precision)
        ((_, loss),) = trainer.training_sets[0].auxiliaries
        value = loss.look(observe(trainer)).mean()
        value.backward()
        gradient = trainer.backbone.trunk[0][0].weight.grad
        assert torch.isfinite(gradient).all()
        found.append((value.item(), gradient.flatten()))
    (first, slope), (second, other) = found
    assert second == pytest.approx(first, rel=0.05, abs=0.01)
    assert torch.nn.functional.cosine_similarity(slope, other, dim=0) > 0.3


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_extreme_maps_stay_finite(name: str) -> None:
    """Maps of zeros, and maps as large as bfloat16 rounds coarsely: value and gradient."""
    trainer = make_trainer(name, "float32")
    ((_, loss),) = trainer.training_sets[0].auxiliaries
    seen = observe(trainer)
    for factor in (0.0, 1e4):
        scaled = (seen.map.detach() * factor).bfloat16().requires_grad_()
        twin = seen.twin and dataclasses.replace(seen.twin, map=scaled.detach())
        shown = dataclasses.replace(seen, map=scaled, twin=twin)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss.look(shown)
        assert torch.isfinite(value).all(), factor
        (gradient,) = torch.autograd.grad(value.sum(), scaled)
        assert torch.isfinite(gradient).all(), factor


def test_all_of_them_train_in_bfloat16() -> None:
    for neck in ("own", "subdecisions"):
        names = [name for name in SEEING if AUXILIARIES[name].neck in (None, neck)]
        plan = dataclasses.replace(SEEING_PLAN, precision="bfloat16", epochs=1)
        made = make_seeing(neck, names)
        assert np.isfinite(train(*made, plan)[-1]["loss"])
        assert all(torch.isfinite(value).all() for value in made[0].state_dict().values())
