"""auxiliary losses: each re-derived in float64, a number at a time, and its gradient checked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cdp.errors import ConfigError
from cdp.models.auxiliary import AUXILIARIES, build_auxiliary

NAMES = sorted(
    name
    for name, kind in AUXILIARIES.items()
    if "score" in vars(kind)  # a loss of embeddings alone; the others are in test_seen_losses.py
)
BATCH, DIM, IDENTITIES = 8, 3, 4


pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]


def problem(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(BATCH, DIM)) * rng.uniform(0.5, 3, (BATCH, 1))
    return torch.from_numpy(embedding), torch.from_numpy(rng.integers(0, IDENTITIES, BATCH))


def squared(a: np.ndarray, b: np.ndarray) -> float:
    return float(sum((a - b) ** 2))


def mean_of(points: list[np.ndarray]) -> np.ndarray:
    return sum(points) / len(points)


def derive_center(x, y, module):
    return [0.5 * squared(p, module.center[c].numpy()) for p, c in zip(x, y, strict=True)]


def derive_contrastive_center(x, y, module):
    centers = module.center.detach().numpy()
    return [
        0.5
        * squared(p, centers[c])
        / (sum(squared(p, centers[j]) for j in range(IDENTITIES) if j != c) + 1.0)
        for p, c in zip(x, y, strict=True)
    ]


def derive_range(x, y, module):
    groups = {c: [p for p, d in zip(x, y, strict=True) if d == c] for c in sorted(set(y))}
    widths = []
    for points in groups.values():
        if len(points) < 2:
            continue
        all_pairs = [squared(points[i], points[j]) for i in range(len(points)) for j in range(i)]
        largest = sorted(all_pairs)[-2:]
        widths.append(len(largest) / sum(1 / d for d in largest))
    loss = sum(widths) / len(widths) if widths else 0.0
    means = [mean_of(points) for points in groups.values()]
    if len(means) > 1:
        nearest = min(squared(means[i], means[j]) for i in range(len(means)) for j in range(i))
        loss += 2.0 * max(0.0, 5.0 - nearest)
    return [loss] * len(x)


@pytest.mark.parametrize("length", [1e6, 1e12, 1e18, 1e25])
def test_range_loss_has_finite_gradients_at_huge_lengths(length):
    embedding = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * length
    embedding.requires_grad_()
    loss = AUXILIARIES["range"](8, 3).score(embedding, torch.tensor([0, 0, 0, 1, 1, 2])).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(embedding.grad).all()


def derive_coco(x, y, module):
    def cosine(a, b):
        return float(sum(a * b) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b)))

    means = {c: mean_of([p for p, d in zip(x, y, strict=True) if d == c]) for c in set(y)}
    return [
        math.log(sum(math.exp(9 * cosine(p, m)) for m in means.values())) - 9 * cosine(p, means[c])
        for p, c in zip(x, y, strict=True)
    ]


def derive_angular(x, y, module):
    unit = [p / math.sqrt(sum(p * p)) for p in x]
    tan2 = math.tan(0.7) ** 2
    terms = []
    for a in range(len(x)):
        for p in range(len(x)):
            if a == p or y[a] != y[p]:
                continue
            total = 1.0
            for n in range(len(x)):
                if y[n] != y[a]:
                    inner = 4 * tan2 * sum((unit[a] + unit[p]) * unit[n])
                    total += math.exp(inner - 2 * (1 + tan2) * sum(unit[a] * unit[p]))
            terms.append(math.log(total))
    return [sum(terms) / len(terms) if terms else 0.0] * len(x)


def derive_batch_triplet(x, y, module):
    genuine, impostor = [], []
    for i in range(len(x)):
        for j in range(i):
            cosine = sum(x[i] * x[j]) / math.sqrt(sum(x[i] ** 2) * sum(x[j] ** 2))
            (genuine if y[i] == y[j] else impostor).append(float(cosine))
    if not genuine or not impostor:
        return [0.0] * len(x)

    def deviation(values):
        mean = sum(values) / len(values)
        return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-8) - 1e-4

    hinge = 0.8 + sum(impostor) / len(impostor) - sum(genuine) / len(genuine)
    return [max(0.0, hinge) + 0.5 * (deviation(genuine) + deviation(impostor))] * len(x)


CASES = {
    "batch_triplet": (derive_batch_triplet, {"spread": 0.5}),
    "center": (derive_center, {}),
    "contrastive_center": (derive_contrastive_center, {}),
    "range": (derive_range, {"margin": 5.0}),
    "coco": (derive_coco, {"scale": 9.0}),
    "angular": (derive_angular, {"bound_rad": 0.7}),
}


def test_every_loss_has_a_derivation() -> None:
    assert sorted(CASES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_loss_by_hand(name: str, seed: int) -> None:
    derive, params = CASES[name]
    embedding, label = problem(seed)
    module = build_auxiliary(name, DIM, IDENTITIES, seed=seed, **params).double()
    if name == "center":
        module.center.copy_(torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(4, 3))))
        module.eval()
    found = module.score(embedding, label)
    expected = derive(list(embedding.numpy()), label.tolist(), module)
    assert found.shape == (BATCH,)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_right(name: str) -> None:
    embedding, label = problem(4)
    module = build_auxiliary(name, DIM, IDENTITIES, **CASES[name][1]).double().eval()
    assert torch.autograd.gradcheck(
        lambda e: module.score(e, label).mean(), embedding.requires_grad_(), atol=1e-6
    )


def test_centers_follow_their_images() -> None:
    """Wen et al. 2016, eq. 4, on two classes; the third has no image and stays."""
    module = build_auxiliary("center", 2, 3, rate=0.5).double()
    embedding = torch.tensor([[2.0, 0.0], [4.0, 0.0], [0.0, 6.0]]).double()
    module.score(embedding, torch.tensor([0, 0, 1]))
    # class 0: 0 + .5 * (2 + 4) / (1 + 2); class 1: 0 + .5 * 6 / (1 + 1)
    expected = [[1.0, 0.0], [0.0, 1.5], [0.0, 0.0]]
    np.testing.assert_allclose(module.center.numpy(), expected)
    module.eval()
    module.score(embedding, torch.tensor([0, 0, 1]))
    np.testing.assert_allclose(module.center.numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_following_it_separates_the_identities(name: str) -> None:
    """Free points go down its gradient: it falls, and people end narrower for their distance."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(24, 8, generator=generator).requires_grad_()
    label = torch.arange(24) % 4
    module = build_auxiliary(name, 8, 4)
    optimizer = torch.optim.Adam([points, *module.parameters()], lr=0.05)

    def width() -> float:
        distance = torch.cdist(points.detach(), points.detach())
        same = label[:, None] == label[None, :]
        return (distance[same].mean() / distance[~same].mean()).item()

    start, losses = width(), []
    for _ in range(150):
        loss = module(points, label).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert width() < 0.8 * start


@pytest.mark.parametrize("name", NAMES)
def test_extremes_stay_finite(name: str) -> None:
    module = build_auxiliary(name, DIM, IDENTITIES)
    for label in ([0, 0, 0, 0], [0, 1, 2, 3], [2, 2, 1, 1]):
        embedding = torch.tensor([[50.0, 0, 0], [50.0, 0, 0], [0, 0, 0], [1e-4, 0, 0]])
        embedding.requires_grad_()
        loss = module(embedding, torch.tensor(label))
        loss.mean().backward()
        assert torch.isfinite(loss).all()
        assert torch.isfinite(embedding.grad).all()


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"unknown auxiliary loss 'focal'.*center"):
        build_auxiliary("focal", 8, 4)
    with pytest.raises(ConfigError, match="no parameter alpha; it has: bound_rad"):
        build_auxiliary("angular", 8, 4, alpha=45)
    with pytest.raises(ConfigError, match=r"\(radians\) expected, got 45"):
        build_auxiliary("angular", 8, 4, bound_rad=45.0)
    with pytest.raises(ConfigError, match=r"0\.\.1, got 2"):
        build_auxiliary("center", 8, 4, rate=2.0)
    with pytest.raises(ConfigError, match="scale of COCO"):
        build_auxiliary("coco", 8, 4, scale=-1.0)
