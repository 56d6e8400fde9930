"""resuming: a training that is killed and resumed ends with the bits of one that was not.

Orders, necks and the losses that read maps are resumed in their own tests; here are the heads, the
losses that read a head or a neck's gate, and trainings in bfloat16.
"""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from test_extension_points import collect_state, list_losses, make_seeing
from test_training import PLAN, train

from cdp.images.degradation import DEGRADATIONS
from cdp.models.auxiliary import AUXILIARIES, MapLoss, build_auxiliary
from cdp.models.heads import HEADS, build_head

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]

QUICK = dataclasses.replace(
    PLAN, epochs=2, batch_size=16, learning_rate=0.02, degradation=DEGRADATIONS["none"]
)


def end_twice(make, plan):
    """The state after a whole training, and after one that went on from its first epoch."""
    states = []
    whole, again = make(), make()
    history = train(*whole, plan, on_epoch=states.append)
    assert np.isfinite([record["loss"] for record in history]).all()
    train(*again, plan, resume=load(save(states[0])))
    return collect_state(*whole), collect_state(*again)


def check_equal(whole, again) -> None:
    assert whole.keys() == again.keys()
    for key, value in whole.items():
        assert torch.equal(value, again[key]), key


@pytest.mark.parametrize("head", sorted(HEADS))
def test_every_head_resumes(head: str) -> None:
    """Class vectors, running moments, factors and the margin's warm-up are in the checkpoint."""
    check_equal(*end_twice(lambda: make_seeing(head=head), QUICK))


def test_factors_are_renewed_alike_after_resuming(monkeypatch) -> None:
    """The steps are counted on, so that factors are renewed at the same ones."""
    monkeypatch.setattr("cdp.models.heads.domain_balance.RENEWAL_STEPS", 3)
    plan = dataclasses.replace(QUICK, batch_size=10)
    whole, again = end_twice(lambda: make_seeing(head="domain_balance"), plan)
    check_equal(whole, again)
    assert whole["head0.factor"].std() > 0


@pytest.mark.parametrize(
    ("neck", "loss", "head"), [("own", "promotion", "softmax"), ("balanced", "gate", None)]
)
def test_losses_that_ask_the_head_resume(neck: str, loss: str, head: str | None) -> None:
    head = head or "domain_balance"
    check_equal(*end_twice(lambda: make_seeing(neck, [loss], head=head), QUICK))


@pytest.mark.parametrize("sampling", ["image", "identity", "reversed", "bilateral"])
def test_bfloat16_resumes_in_every_order(sampling: str) -> None:
    plan = dataclasses.replace(QUICK, precision="bfloat16", sampling=sampling, epochs=2)
    losses = list_losses("own") if sampling == "image" else ()
    check_equal(*end_twice(lambda: make_seeing(losses=losses), plan))


@pytest.mark.parametrize("kind", ["head", "loss"])
def test_heads_and_losses_compute_in_float32(kind: str) -> None:
    """Whatever autocast says: the same number as from the same values in float32."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(12, 16, generator=generator).bfloat16()
    label = torch.arange(12) % 4
    if kind == "head":
        made = {name: build_head(name, 16, 4).eval() for name in HEADS}
    else:
        plain = [name for name, each in AUXILIARIES.items() if "score" in vars(each)]
        made = {name: build_auxiliary(name, 16, 4).eval() for name in plain}
    for name, module in made.items():
        with torch.autocast("cpu", torch.bfloat16):
            found = module(half, label)
        expected = module(half.float(), label)
        found, expected = (getattr(each, "loss", each) for each in (found, expected))
        assert found.dtype == torch.float32, name
        assert torch.equal(found, expected), name


def test_losses_of_maps_have_one_base() -> None:
    for name, kind in AUXILIARIES.items():
        assert issubclass(kind, MapLoss) == (kind.reads is not None), name
