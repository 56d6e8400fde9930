"""heads: centralized coordinates, domain balancing and sub-spheres, derived by hand."""

import math

import numpy as np
import pytest
import torch

from cdp.errors import ConfigError
from cdp.models.heads import build_head
from cdp.models.heads.domain_balance import balance_factors, measure_compactness

pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]


def set_classes(head, rows):
    with torch.no_grad():
        head.weight.copy_(torch.tensor(rows))


# ------------------------------------------------------------------------- centralized coordinates


def test_coordinates_are_centred() -> None:
    head = build_head("ccl", 2, 2)
    centred = head.centre(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    np.testing.assert_allclose(head.mean, [2, 4])
    np.testing.assert_allclose(head.variance, [1, 4])
    np.testing.assert_allclose(centred, [[-1, -1], [1, 1]], atol=1e-5)
    head.centre(torch.tensor([[2.0, 4.0], [2.0, 4.0]]))  # momentum .1 on the second batch
    np.testing.assert_allclose(head.variance, [0.9, 3.6], rtol=1e-6)
    head.eval()
    head.centre(torch.tensor([[9.0, 9.0], [7.0, 7.0]]))
    np.testing.assert_allclose(head.variance, [0.9, 3.6], rtol=1e-6)


@pytest.mark.parametrize(("angle", "harder"), [(0.0, 0.5), (math.pi / 2, 1.8208), (3.1, 3.1066)])
def test_the_angular_margin_fades(angle: float, harder: float) -> None:
    """theta + .5 (1 - theta / pi), of a vector of length 3 on a sphere of two classes."""
    head = build_head("ccl", 2, 2, margin_rad=0.5).eval().double()
    set_classes(head, [[2.0, 0.0], [0.0, -5.0]])
    embedding = 3 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    loss, logits = head.score(embedding, torch.tensor([0]))
    other = -3 * math.sin(angle)
    own = 3 * math.cos(harder)
    expected = math.log(math.exp(own) + math.exp(other)) - own
    assert loss.item() == pytest.approx(expected, abs=2e-3)
    np.testing.assert_allclose(
        logits.detach(), [[3 * math.cos(angle), -3 * math.sin(angle)]], atol=1e-4
    )


def test_without_margin_it_is_a_softmax_of_unit_classes() -> None:
    head = build_head("ccl", 6, 4, margin_rad=0.0, scale=1.0).double()
    plain = build_head("softmax", 6, 4).double()
    with torch.no_grad():
        plain.linear.weight.copy_(torch.nn.functional.normalize(head.weight, dim=1))
    embedding = torch.randn(32, 6, dtype=torch.float64)
    centred = (embedding - embedding.mean(0)) / embedding.var(0, correction=0).sqrt()
    label = torch.arange(32) % 4
    found = head.score(embedding, label).loss.detach()
    np.testing.assert_allclose(found, plain.score(centred, label).loss.detach(), atol=1e-3)
    assert not head.scale.requires_grad
    assert build_head("ccl", 6, 4, scale=None).scale.requires_grad


# --------------------------------------------------------------------------------- domain balancing


def test_sparse_surroundings_have_the_larger_factor() -> None:
    """Unit vectors at 0, 90 and 180 degrees and .1 rad, two neighbours, scale 1."""
    angles = [0.0, math.pi / 2, math.pi, 0.1]
    weight = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
    compactness = measure_compactness(weight, 2, 1.0)
    np.testing.assert_allclose(compactness, [1.3096, 0.7443, 0.3146, 1.3376], atol=1e-4)
    np.testing.assert_allclose(
        balance_factors(compactness), [0.506, 0.891, 2.0, 0.5], atol=1e-3
    )  # 2.107 and .496 before the bounds


def test_the_margin_follows_the_class() -> None:
    head = build_head("domain_balance", 3, 4, scale=10.0, margin=0.3)
    head.factor.copy_(torch.tensor([0.5, 2.0, 1.0, 1.0]))
    embedding, label = torch.eye(3)[:2] * 4, torch.tensor([0, 1])
    loss, logits = head.score(embedding, label)
    for row, factor in enumerate((0.5, 2.0)):
        harder = logits[row].detach().clone()
        harder[row] -= 10 * 0.3 * factor
        assert loss[row].item() == pytest.approx(-harder.log_softmax(0)[row].item(), rel=1e-5)


def test_factors_are_renewed_every_fifty_steps() -> None:
    head = build_head("domain_balance", 8, 6)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    label = torch.arange(6)
    seen = []
    for number in (0, 1, 49, 50):
        with torch.no_grad():
            head.weight.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(number)))
        with head.step(number, label, 1.0, optimizer):
            seen.append(head.factor.clone())
    assert not torch.equal(seen[0], torch.ones(6))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])


# -------------------------------------------------------------------------------------- sub-spheres


def test_parts_by_hand() -> None:
    """Confidences 2 and 4, both parts at class 0, class 1 orthogonal, margin 1: logits 3 and 0."""
    head = build_head(
        "subspheres", 4, 2, parts=2, scale=1.0, margin=1.0, confidence_decay=0.0
    ).double()
    set_classes(head, [[7.0, 0, 0, 5.0], [0, 1.0, 2.0, 0]])
    usual = math.sqrt(2)
    embedding = torch.tensor([[2 * usual, 0, 0, 4 * usual]], dtype=torch.float64)
    np.testing.assert_allclose(head.measure_confidence(embedding), [[2, 4]], rtol=1e-6)
    loss, logits = head.score(embedding, torch.tensor([0]))
    np.testing.assert_allclose(logits.detach(), [[3, 0]], atol=1e-9)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)), abs=1e-9)
    head.confidence_decay = 0.001
    again = head.score(embedding, torch.tensor([0])).loss
    assert (again - loss).item() == pytest.approx(0.001 * (4 + 16) / 2, rel=1e-6)


def test_one_part_of_unit_confidence_is_cosface() -> None:
    head = build_head(
        "subspheres", 5, 4, parts=1, scale=20.0, margin=0.3, confidence_decay=0.0
    ).double()
    other = build_head("cosface", 5, 4, scale=20.0, margin=0.3).double()
    set_classes(other, head.weight.tolist())
    embedding = torch.randn(6, 5, dtype=torch.float64)
    embedding = math.sqrt(5) * torch.nn.functional.normalize(embedding, dim=1)
    label = torch.arange(6) % 4
    for found, expected in zip(
        head.score(embedding, label), other.score(embedding, label), strict=True
    ):
        np.testing.assert_allclose(found.detach(), expected.detach(), atol=1e-6)


@pytest.mark.parametrize("name", ["ccl", "subspheres"])
def test_gradients_masks_and_extremes(name: str) -> None:
    head = build_head(name, 4, 3, **({"parts": 2} if name == "subspheres" else {})).double()
    embedding = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    label = torch.arange(6) % 3
    head.score(embedding, label)
    head.eval()
    assert torch.autograd.gradcheck(lambda e: head.score(e, label).loss, embedding, atol=1e-6)
    masked = torch.tensor([[0, 1], [0, 2]])
    lone = head.score(embedding, label, masked).loss[0].item()  # no class is left beside its own
    expected = 0.0
    if name == "subspheres":
        expected = 0.001 * float(head.measure_confidence(embedding.detach())[0].square().mean())
    assert lone == pytest.approx(expected)
    own = 50 * head.weight.detach().float()[:1]
    far = torch.cat([own, -own, torch.zeros(1, 4)]).requires_grad_()
    loss = head.float()(far, torch.zeros(3, dtype=torch.int64)).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(far.grad).all()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="parts that divide 8 expected, got 3"):
        build_head("subspheres", 8, 4, parts=3)
    with pytest.raises(ConfigError, match=r"below pi \(radians\) expected, got 28"):
        build_head("ccl", 8, 4, margin_rad=28.0)
    with pytest.raises(ConfigError, match="1 neighbour or more"):
        build_head("domain_balance", 8, 4, neighbours=0)
    with pytest.raises(ConfigError, match="domain_balance cannot be sampled; these can: adaface"):
        build_head("domain_balance", 8, 40, sampled_classes=10)
