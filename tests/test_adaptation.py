"""adaptation: moments of the target's own pictures, and ADDA on points whose shift is known."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cdp.adaptation import AdaptationPlan, adapt_encoder, adapt_moments
from cdp.adaptation.adversarial import judge_domains, make_discriminator
from cdp.adaptation.moments import prepare_faces
from cdp.errors import ConfigError, DataError
from cdp.images.degradation import DEGRADATIONS
from cdp.models import build_backbone

pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]

CPU = torch.device("cpu")


def draw_faces(count: int, seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 16, 16, 3)).astype(np.uint8)


def build_small():
    return build_backbone("plain", input_px=16, embedding_dim=8, width=0.5).eval()


def test_inputs_of_a_normalisation_have_mean_zero_and_variance_one() -> None:
    """After adapting to one batch the embeddings of that batch are standardised."""
    backbone, images = build_small(), draw_faces(200, high=60)
    weights = {k: v.clone() for k, v in backbone.state_dict().items() if "running" not in k}
    adapt_moments(backbone, images, device="cpu")
    with torch.no_grad():
        embedding = backbone(prepare_faces(images, 16, CPU))
    np.testing.assert_allclose(embedding.mean(0), np.zeros(8), atol=1e-2)
    np.testing.assert_allclose(embedding.var(0, correction=0), np.ones(8), atol=2e-2)
    now = backbone.state_dict()
    assert all(torch.equal(now[k], v) for k, v in weights.items() if "tracked" not in k)
    assert not backbone.training
    assert all(m.momentum == 0.1 for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_all_batches_count_alike() -> None:
    """The first normalisation's mean is the mean over two batches; a rest of one is left out."""
    backbone, images = build_small(), draw_faces(41)
    first = backbone.trunk[0][0]
    with torch.no_grad():
        seen = first(prepare_faces(images, 16, CPU))
    adapt_moments(backbone, images, batch_size=20, device="cpu")
    expected = (seen[:20].mean((0, 2, 3)) + seen[20:40].mean((0, 2, 3))) / 2
    np.testing.assert_allclose(backbone.trunk[0][1].running_mean, expected, atol=1e-4)


def test_adversaries_at_chance() -> None:
    discriminator = make_discriminator(4, 8)
    with torch.no_grad():
        discriminator[4].weight.zero_()
        discriminator[4].bias.zero_()
    loss = judge_domains(discriminator, torch.randn(5, 4), torch.randn(7, 4))
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)


class Shift(nn.Module):
    """x + b, on the mean of an image: the smallest network with something to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))
        self.spec = build_small().spec.__class__("shift", 8, 1, 1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 10 * images.mean((1, 2, 3))[:, None] + self.shift


def test_a_shift_between_domains_is_learned() -> None:
    """Vectors of the small faces lie 3 above the sharp ones': the target learns to subtract it."""
    rng = np.random.default_rng(0)
    grey = np.clip(rng.normal(100, 15, 400), 0, 255)

    def make(values):
        return np.broadcast_to(values[:, None, None, None], (400, 8, 8, 3)).astype(np.uint8)

    sharp, small = make(grey), make(grey + 3 / 10 * 127.5)
    plan = AdaptationPlan(
        steps=600, learning_rate=0.02, discriminator_rate=0.005, hidden=16, anchor=0.0
    )
    target, history = adapt_encoder(Shift(), sharp, small, plan, device="cpu")
    assert target.shift.item() == pytest.approx(-3, abs=0.5)
    assert history[-1]["discriminator"] == pytest.approx(2 * math.log(2), abs=0.15)


def test_a_large_anchor_keeps_the_network() -> None:
    source, sharp, small = build_small(), draw_faces(40), draw_faces(40, seed=1, high=90)
    adapt_moments(source, sharp, device="cpu")
    before = {k: v.clone() for k, v in source.state_dict().items()}
    ends = []
    for anchor in (0.0, 1000.0):
        plan = AdaptationPlan(
            steps=10,
            batch_size=16,
            learning_rate=1e-3,
            anchor=anchor,
            degradation=DEGRADATIONS["none"],
        )
        target, history = adapt_encoder(source, sharp, small, plan, device="cpu")
        ends.append(history[-1]["anchor"])
        again, _ = adapt_encoder(source, sharp, small, plan, device="cpu")
        for key, value in target.state_dict().items():
            assert torch.equal(value, again.state_dict()[key])
    assert ends[1] < 0.5 * ends[0]
    assert ends[1] < 0.1
    assert all(torch.equal(source.state_dict()[k], v) for k, v in before.items())


def test_errors() -> None:
    with pytest.raises(DataError, match="2 images or more expected to adapt to, got 1"):
        adapt_moments(build_small(), draw_faces(1))
    with pytest.raises(
        DataError, match="sharp and small faces expected to adapt with, got 3 and 0"
    ):
        adapt_encoder(build_small(), draw_faces(3), draw_faces(0))
    with pytest.raises(ConfigError, match="learning rates above 0"):
        AdaptationPlan(learning_rate=0)
