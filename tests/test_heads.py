"""heads: each loss re-derived in float64, a number at a time, and its gradient checked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses

from cdp.errors import ConfigError
from cdp.models.heads import HEADS, build_head, default_scale

SEPARATE = {"ccl", "subspheres"}
"""Heads whose logits depend on the batch or on parts: derived in test_source_heads.py."""
NAMES = sorted(set(HEADS) - SEPARATE)
BATCH, DIM, IDENTITIES = 7, 5, 4


pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(BATCH, DIM)) * rng.uniform(0.5, 3, (BATCH, 1))
    return torch.from_numpy(embedding), torch.from_numpy(rng.integers(0, IDENTITIES, BATCH))


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(v - logits[label]) for v in logits))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)))


def derive(name: str, embedding: np.ndarray, label: int, weight: np.ndarray, norms: list[float]):
    """Loss and logits of one sample by the formulas of the papers."""
    length = math.sqrt(sum(embedding**2))
    if name in ("softmax", "l2softmax"):
        seen = embedding if name == "softmax" else 12.0 * embedding / length
        logits = [float(sum(seen * row)) for row in weight]
        return cross_entropy(logits, label), logits
    if name in ("sphereface", "largemargin"):
        angles = [math.acos(cosine(embedding, row)) for row in weight]
        scales = [
            length * (math.sqrt(sum(row**2)) if name == "largemargin" else 1.0) for row in weight
        ]
        logits = [s * math.cos(a) for s, a in zip(scales, angles, strict=True)]
        # psi falls over all of 0..pi: each quarter is a cosine turned and shifted to fit.
        quarter = math.floor(angles[label] / (math.pi / 4))
        psi = (-1) ** quarter * math.cos(4 * angles[label]) - 2 * quarter
        psi = (2 * math.cos(angles[label]) + psi) / 3
        with_margin = [scales[i] * psi if i == label else value for i, value in enumerate(logits)]
        return cross_entropy(with_margin, label), logits
    scale = 20.0
    cosines = [cosine(embedding, row) for row in weight]
    own = cosines[label]
    if name == "normface":
        harder = own
    elif name in ("cosface", "domain_balance"):  # all factors are 1 before the first step
        harder = own - 0.3
    elif name == "arcface":
        angle = math.acos(own)
        inside = angle + 0.4 < math.pi
        harder = math.cos(angle + 0.4) if inside else own - 0.4 * math.sin(0.4)
    elif name == "adaface":
        mean = sum(norms) / len(norms)
        std = math.sqrt(sum((n - mean) ** 2 for n in norms) / (len(norms) - 1))
        quality = (length - mean) / (std + 1e-3) * 0.333
        quality = max(-1.0, min(1.0, quality))
        angle = min(max(math.acos(own) - 0.4 * quality, 1e-3), math.pi - 1e-3)
        harder = math.cos(angle) - (0.4 * quality + 0.4)
    else:
        raise AssertionError(f"no derivation of {name}: write one")
    with_margin = [scale * (harder if i == label else c) for i, c in enumerate(cosines)]
    return cross_entropy(with_margin, label), [scale * c for c in cosines]


def classes_of(head: torch.nn.Module) -> torch.Tensor:
    """The weights of a head, (identities, d)."""
    weight = next(p for p in head.parameters() if p.ndim == 2).detach()
    return weight if len(weight) == IDENTITIES else weight.T


PARAMS = {
    "softmax": {},
    "l2softmax": {"radius": 12.0},
    "sphereface": {"margin": 4, "floor": 2.0},
    "largemargin": {"margin": 4, "floor": 2.0},
    "normface": {"scale": 20.0},
    "cosface": {"scale": 20.0, "margin": 0.3},
    "domain_balance": {"scale": 20.0, "margin": 0.3},
    "arcface": {"scale": 20.0, "margin_rad": 0.4},
    "adaface": {"scale": 20.0, "margin": 0.4},
}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_loss_and_logits_by_hand(name: str, seed: int) -> None:
    embedding, label = problem(seed)
    head = build_head(name, DIM, IDENTITIES, seed=seed, **PARAMS[name]).double()
    weight = classes_of(head).numpy()
    norms = [math.sqrt(sum(e**2)) for e in embedding.numpy()]
    loss, logits = head.score(embedding, label)
    for i in range(BATCH):
        expected_loss, expected_logits = derive(
            name, embedding[i].numpy(), int(label[i]), weight, norms
        )
        assert loss[i].item() == pytest.approx(expected_loss, abs=1e-6)
        np.testing.assert_allclose(logits[i].detach(), expected_logits, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_right(name: str) -> None:
    embedding, label = problem(3)
    head = build_head(name, DIM, IDENTITIES, **PARAMS[name]).double()
    head.score(embedding, label)
    head.eval()
    if name == "adaface":
        # Quality is a constant to the gradient: hold it at 0 for the finite differences.
        head.norm_std.fill_(1e12)
    assert torch.autograd.gradcheck(
        lambda e: head.score(e, label).loss, embedding.requires_grad_(), atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"softmax", "sphereface", "largemargin"}))
def test_only_direction_and_margin_matter(name: str) -> None:
    embedding, label = problem(1)
    head = build_head(name, DIM, IDENTITIES, **PARAMS[name]).double()
    plain = head.score(embedding, label)
    head.margin_share = 0.0
    without = head.score(embedding, label)
    assert (without.loss <= plain.loss + 1e-12).all()
    assert torch.equal(without.logits, plain.logits)
    expected = torch.nn.functional.cross_entropy(without.logits, label, reduction="none")
    np.testing.assert_allclose(without.loss.detach(), expected.detach(), atol=1e-5)
    head.eval()
    np.testing.assert_allclose(
        head.score(3 * embedding, label).logits.detach(), plain.logits.detach(), atol=1e-9
    )


@pytest.mark.parametrize("name", ["sphereface", "largemargin"])
def test_the_multiplied_angle_is_annealed(name: str) -> None:
    """SphereFace's (lambda cos + psi) / (1 + lambda), lambda = 1 / margin_share - 1."""
    embedding, label = problem(6)
    head = build_head(name, DIM, IDENTITIES, floor=0.0).double()

    def own_logit(share: float) -> torch.Tensor:
        head.margin_share = share
        loss, logits = head.score(embedding, label)
        # The loss gives the own logit v: loss = log(exp(v) + rest) - v.
        rest = torch.exp(logits).sum(1) - torch.exp(logits.gather(1, label[:, None])).squeeze(1)
        return torch.log(rest / torch.expm1(loss))

    plain, full = own_logit(0.0), own_logit(1.0)
    for strength in (1.0, 3.0):
        expected = (strength * plain + full) / (1 + strength)
        annealed = own_logit(1 / (1 + strength))
        np.testing.assert_allclose(annealed.detach(), expected.detach(), atol=1e-6)
        head.floor = strength
        np.testing.assert_allclose(own_logit(1.0).detach(), expected.detach(), atol=1e-6)
        head.floor = 0.0


@pytest.mark.parametrize("seed", range(5))
def test_margins_agree_with_pytorch_metric_learning(seed: int) -> None:
    """An independent check of our formulas: the library's, in its own units."""
    embedding, label = problem(seed)
    cases = {
        "arcface": losses.ArcFaceLoss(IDENTITIES, DIM, margin=math.degrees(0.4), scale=20),
        "cosface": losses.CosFaceLoss(IDENTITIES, DIM, margin=0.3, scale=20),
        "normface": losses.NormalizedSoftmaxLoss(IDENTITIES, DIM, temperature=1 / 20),
    }
    for name, theirs in cases.items():
        head = build_head(name, DIM, IDENTITIES, seed=seed, **PARAMS[name]).double()
        theirs.W.data = head.weight.detach().T.clone()
        ours = head.score(embedding, label).loss.mean()
        assert ours.item() == pytest.approx(theirs(embedding, label).item(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_eval_does_not_depend_on_the_batch(name: str) -> None:
    embedding, label = problem(2)
    head = build_head(name, DIM, IDENTITIES, **PARAMS[name]).double()
    head.score(embedding, label)
    head.eval()
    before = {k: v.clone() for k, v in head.state_dict().items()}
    together = head.score(embedding, label).loss
    rows = [slice(i, i + 1) for i in range(BATCH)]
    alone = torch.cat([head.score(embedding[row], label[row]).loss for row in rows])
    np.testing.assert_allclose(together.detach(), alone.detach(), atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_class_is_left_out_of_loss_and_gradient(name: str) -> None:
    """By hand: the loss over the other classes alone, and no pull on the masked class."""
    embedding, label = problem(5)
    head = build_head(name, DIM, IDENTITIES, **PARAMS[name]).double()
    weight = classes_of(head).numpy()
    norms = [math.sqrt(sum(e**2)) for e in embedding.numpy()]
    row = torch.tensor([0, 0, 3])
    others = (label[row] + torch.tensor([1, 2, 3])) % IDENTITIES
    loss, _ = head.score(embedding, label, torch.stack([row, others], dim=1))
    for i in range(BATCH):
        kept = [c for c in range(IDENTITIES) if c not in others[row == i].tolist()]
        own = kept.index(int(label[i]))
        # A head's logits are a class's own affair: without a class the others' stay the same.
        expected, _ = derive(name, embedding[i].numpy(), own, weight[kept], norms)
        assert loss[i].item() == pytest.approx(expected, abs=1e-6)


def test_adaface_moments_run() -> None:
    head = build_head("adaface", DIM, IDENTITIES, momentum=0.25)
    label = torch.zeros(2, dtype=torch.int64)
    head(torch.tensor([[3.0, 0, 0, 0, 0], [5.0, 0, 0, 0, 0]]), label)
    assert head.norm_mean.item() == pytest.approx(4)
    assert head.norm_std.item() == pytest.approx(math.sqrt(2))
    head(torch.tensor([[8.0, 0, 0, 0, 0], [8.0, 0, 0, 0, 0]]), label)
    assert head.norm_mean.item() == pytest.approx(5)
    assert head.norm_std.item() == pytest.approx(0.75 * math.sqrt(2))
    head(torch.ones(1, 5), label[:1])  # one sample has no spread: nothing is learned from it
    assert head.norm_mean.item() == pytest.approx(5)


def test_adaface_gives_the_better_image_the_margin_of_the_cosine() -> None:
    head = build_head("adaface", 2, 2, scale=20.0, concentration=1.0).double()
    head.norm_mean.fill_(10.0)
    head.norm_std.fill_(1.0)
    target = torch.full((3,), 0.5, dtype=torch.float64)
    head.eval()
    poor, usual, good = head.penalise(target, torch.tensor([5.0, 10.0, 50.0]).double()).tolist()
    assert poor == pytest.approx(math.cos(math.acos(0.5) + 0.4), abs=1e-4)  # ArcFace
    assert usual == pytest.approx(0.5 - 0.4, abs=1e-4)  # CosFace
    assert good == pytest.approx(math.cos(math.acos(0.5) - 0.4) - 0.8, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_extremes_stay_finite(name: str) -> None:
    head = build_head(name, DIM, IDENTITIES)
    weight = classes_of(head)
    embedding = torch.cat([weight[:1] * 50, -weight[:1] * 50, torch.zeros(1, DIM)])
    embedding.requires_grad_()
    loss, _ = head(embedding, torch.zeros(3, dtype=torch.int64))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(embedding.grad).all()


def test_scale_grows_with_the_identities() -> None:
    scales = [default_scale(n) for n in (2, 100, 10_000, 1_000_000, 10**9, 10**15)]
    assert scales == sorted(scales)
    assert scales[0] == 16
    assert scales[-1] == 64


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"unknown head 'sphere'.*adaface"):
        build_head("sphere", 8, 4)
    with pytest.raises(ConfigError, match=r"no parameter margin; it has: scale, margin_rad"):
        build_head("arcface", 8, 4, margin=28.6)
    with pytest.raises(ConfigError, match="2 identities"):
        build_head("softmax", 8, 1)
    with pytest.raises(ConfigError, match=r"whole number in 1\.\.8, got 2\.5"):
        build_head("sphereface", 8, 4, margin=2.5)
    with pytest.raises(ConfigError, match="floor of 0 or above"):
        build_head("largemargin", 8, 4, floor=-1.0)
    with pytest.raises(ConfigError, match="radius must be above 0"):
        build_head("l2softmax", 8, 4, radius=0.0)
    with pytest.raises(ConfigError, match="scale"):
        build_head("cosface", 8, 4, scale=-1.0)
