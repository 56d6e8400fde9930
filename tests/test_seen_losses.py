"""auxiliary losses that see maps, twins and parts: each derived by hand on small numbers."""

import math

import numpy as np
import pytest
import torch

from cdp.errors import ConfigError
from cdp.images.degradation import DEGRADATIONS, degrade, find_variations
from cdp.images.twins import cover_faces, shuffle_cells
from cdp.models import build_backbone
from cdp.models.auxiliary import Seen, Twin, build_auxiliary
from cdp.models.auxiliary.auxiliary import reverse_gradient
from cdp.models.auxiliary.consistency import (
    measure_divergence,
    weigh_divergence,
)
from cdp.models.auxiliary.construction import measure_displacement
from cdp.models.auxiliary.domain import rise
from cdp.models.auxiliary.feature_diversity import compare_uncovered
from cdp.models.auxiliary.mutual_channel import measure_spread, pool_channels
from cdp.models.auxiliary.promotion import promote
from cdp.models.auxiliary.spatial_diversity import measure_overlap
from cdp.models.heads import build_head

pytestmark = [pytest.mark.torch, pytest.mark.trains, pytest.mark.usefixtures("one_thread")]

LN3 = math.log(3)


def backbone_with(neck: str = "own"):
    return build_backbone("plain", input_px=16, embedding_dim=8, width=0.5, neck=neck)


# ------------------------------------------------------------------------------------- consistency


def test_divergence_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/4, 3/4): KL = .5 ln 3 = .5493 either way."""
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    parts = torch.stack([p, q]).log()[None]
    np.testing.assert_allclose(measure_divergence(parts)[0, 0, 1], LN3 / 2, rtol=1e-6)
    np.testing.assert_allclose(measure_divergence(parts)[0, 1, 0], LN3 / 2, rtol=1e-6)
    same = torch.stack([p, p, p]).log()[None]
    np.testing.assert_allclose(weigh_divergence(same, torch.ones(1, 3) / 3), [0.0], atol=1e-6)


def test_the_less_informed_follow() -> None:
    """With all weight on the first part, it is followed and gets no gradient."""
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.tensor([[1.0, 0, 0]]).expand(2, 3)
    weigh_divergence(logits.log_softmax(2), weight).sum().backward()
    assert logits.grad[:, 0].abs().max() < 1e-7
    assert (logits.grad[:, 1:].abs().amax(2) > 1e-3).all()


def test_consistency_is_built_from_the_head_and_the_parts() -> None:
    loss = build_auxiliary("consistency", 8, 4, backbone=backbone_with("subdecisions"), entropy=0.5)
    head = build_head("cosface", 8, 4, seed=1)
    parts, label = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3)), [0, 2]
    weight = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    seen = Seen(parts[:, 0], torch.tensor(label), parts=parts, part_weight=weight, head=head)
    found = loss.look(seen).detach()
    for row in range(2):
        p = [
            torch.softmax(head(parts[row, i][None], torch.tensor([0])).logits[0], 0).detach()
            for i in range(3)
        ]
        total = sum(
            float(weight[row, i]) * float((p[i] * (p[i] / p[j]).log()).sum())
            for i in range(3) for j in range(3) if i != j
        )  # fmt: skip
        entropy = -sum(float(w) * math.log(float(w)) for w in weight[row])
        assert found[row].item() == pytest.approx(total / 6 - 0.5 * entropy, rel=1e-4)


# ------------------------------------------------------------------------------------------- maps


def test_mutual_channels_by_hand() -> None:
    """Two classes, two channels, two cells: softmaxes (3/4, 1/4) and (1/4, 3/4) spread to 1.5."""
    grouped = torch.tensor([[[[LN3, 0.0], [0.0, LN3]], [[0.0, 0.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(measure_spread(grouped), [[1.5, 1.0]], rtol=1e-6)
    logits = pool_channels(grouped, torch.ones(1, 2, dtype=torch.bool))
    np.testing.assert_allclose(logits, [[LN3, 0.0]], rtol=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(-math.log(0.75), rel=1e-5)
    masked = pool_channels(grouped, torch.tensor([[True, False]]))
    np.testing.assert_allclose(masked, [[LN3 / 2, 0.0]], rtol=1e-6)


def test_mutual_channel_sums_both_terms() -> None:
    loss = build_auxiliary("mutual_channel", 8, 2, backbone=backbone_with(), kept=1.0)
    feature_map = torch.randn(3, 64, 2, 2, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1, 1])
    found = loss.look(Seen(feature_map[:, :8, 0, 0], label, feature_map, seeds=torch.arange(3)))
    weight = loss.convolution.weight.detach()
    made = torch.nn.functional.conv2d(feature_map, weight).reshape(3, 2, 2, 4)
    logits = made.max(2).values.mean(2)
    spread = made.softmax(3).max(2).values.sum(2).mean(1) / 2
    for row in range(3):
        ce = -float(logits[row].log_softmax(0)[label[row]])
        assert found[row].item() == pytest.approx(
            1.5 * ce + 20 * (1 - float(spread[row])), rel=1e-4
        )


def test_overlap_of_filters() -> None:
    one = torch.rand(1, 1, 9) + 0.1
    np.testing.assert_allclose(measure_overlap(one.expand(1, 4, 9)), [1.0], rtol=1e-5)
    apart = torch.eye(9)[None, :4]
    np.testing.assert_allclose(measure_overlap(apart), [0.0], atol=1e-6)
    dead = torch.cat([apart, torch.zeros(1, 5, 9)], 1)
    np.testing.assert_allclose(measure_overlap(dead), [0.0], atol=1e-6)
    # K filters on n cells overlap by (K/n - 1)/(K - 1) at the least.
    spread = torch.eye(9)[torch.arange(126) % 9][None]
    np.testing.assert_allclose(measure_overlap(spread), [(126 / 9 - 1) / 125], rtol=1e-4)


def test_only_what_is_uncovered_is_compared() -> None:
    first, second = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    second[0, 0, 0, 0], second[0, 1, 1, 1] = 8.0, 3.0
    cover = torch.zeros(1, 4, 4, dtype=torch.bool)
    cover[0, 1, 1] = True  # one pixel of the first of four cells
    assert compare_uncovered(first, second, cover).item() == pytest.approx(3 / (3 * 2))
    assert compare_uncovered(first, first, cover).item() == 0
    assert compare_uncovered(first, second, torch.ones(1, 4, 4, dtype=torch.bool)).item() == 0


def test_map_and_relation_distillation() -> None:
    first = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    sharp = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).requires_grad_()
    label = torch.tensor([0, 1])
    maps = build_auxiliary("map_distillation", 2, 2, backbone=backbone_with())
    shown = Seen(first, label, first[:, :, None, None], Twin(sharp, sharp[:, :, None, None]))
    np.testing.assert_allclose(maps.look(shown), [0.4, 0.0], atol=1e-6)
    relations = build_auxiliary("relation_distillation", 2, 2)
    # cosines between the two: .6 degraded, 1 sharp; half of (.4)^2 each
    found = relations.look(Seen(first.requires_grad_(), label, twin=Twin(sharp)))
    np.testing.assert_allclose(found.detach(), [0.08, 0.08], atol=1e-6)
    found.sum().backward()
    assert sharp.grad is None


# ----------------------------------------------------------------------------------- construction


def test_shuffled_cells_come_back() -> None:
    images = torch.arange(5 * 3 * 9 * 9).float().reshape(5, 3, 9, 9)
    seeds = torch.arange(5)
    shuffled, origin = shuffle_cells(images, seeds, 3)
    assert not torch.equal(shuffled, images)
    assert torch.equal(origin.sort(1).values, torch.arange(9).expand(5, 9))
    for row in range(5):
        for cell in range(9):
            (y, x), (v, u) = divmod(cell, 3), divmod(int(origin[row, cell]), 3)
            assert max(abs(y - v), abs(x - u)) < 2 * 1 + 1
            found = shuffled[row, :, 3 * y : 3 * y + 3, 3 * x : 3 * x + 3]
            assert torch.equal(found, images[row, :, 3 * v : 3 * v + 3, 3 * u : 3 * u + 3])
    still, places = shuffle_cells(images, seeds, 3, reach=0)
    assert torch.equal(still, images)
    assert torch.equal(places, torch.arange(9).expand(5, 9))


def test_a_place_is_a_function_of_the_seed_alone() -> None:
    images, seeds = torch.rand(6, 3, 16, 16), torch.arange(6) * 7
    for make in (cover_faces, lambda i, s: shuffle_cells(i, s, 2)):
        whole, info = make(images, seeds)
        part, part_info = make(images[2:4], seeds[2:4])
        assert torch.equal(whole[2:4], part)
        assert torch.equal(info[2:4], part_info)


def test_displacement_by_hand() -> None:
    origin = torch.tensor([[3, 2, 1, 0]])
    perfect = torch.tensor([[[1.0, 1, 0, 0], [1, 0, 1, 0]]])
    assert measure_displacement(perfect, origin, 2).item() == 0
    assert measure_displacement(perfect * 0 + 0.5, origin, 2).item() == pytest.approx(0.5)


def test_construction_sums_its_three_terms() -> None:
    loss = build_auxiliary("construction", 8, 3, backbone=backbone_with())
    head = build_head("cosface", 8, 3, seed=1)
    torch.manual_seed(0)
    embedding, other = torch.randn(2, 2, 8)
    first, second = torch.randn(2, 2, 64, 2, 2)
    label, origin = torch.tensor([0, 2]), torch.tensor([[0, 1, 3, 2], [1, 0, 2, 3]])
    twin = Twin(other, second, origin)
    found = loss.look(Seen(embedding, label, first, twin, head=head)).detach()
    classes = head(other, label).loss.detach()
    loss.requires_grad_(False)
    for row in range(2):
        whole = -loss.whole(embedding[row]).log_softmax(0)[0]
        broken = -loss.whole(other[row]).log_softmax(0)[1]
        true = [torch.arange(4), origin[row]]
        away = 0.0
        for each, places in zip((first, second), true, strict=True):
            located = loss.location(each[row][None]).reshape(2, 4)
            away += float((located - torch.stack([places // 2, places % 2])).abs().mean())
        total = 0.5 * classes[row] + 0.1 * (whole + broken) / 2 + 0.1 * away / 2
        assert found[row].item() == pytest.approx(float(total), rel=1e-4)


def test_the_head_learns_no_moments_from_a_twin() -> None:
    head = build_head("adaface", 8, 3)
    loss = build_auxiliary("construction", 8, 3, backbone=backbone_with())
    maps, origin = torch.zeros(2, 64, 2, 2), torch.arange(4).expand(2, 4)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    loss.look(Seen(torch.randn(2, 8), torch.tensor([0, 1]), maps,
                   Twin(torch.randn(2, 8), maps, origin), head=head))  # fmt: skip
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert head.training


# ------------------------------------------------------------------------------------- adversaries


def test_a_reversed_gradient() -> None:
    value = torch.tensor([2.0]).requires_grad_()
    (reverse_gradient(value) * 3).backward()
    assert value.grad.item() == -3


def test_domain_loss_by_hand() -> None:
    """At chance the loss is ln 2; the embedding moves so that the classifier does worse."""
    loss = build_auxiliary("domain", 4, 2)
    degraded, sharp = torch.ones(3, 4).requires_grad_(), -torch.ones(3, 4)
    seen = Seen(degraded, torch.zeros(3, dtype=torch.long), twin=Twin(sharp), progress=0.5)
    logits = [loss.classifier(each)[:, 0] for each in (degraded, sharp)]
    expected = (torch.log1p(logits[0].exp()) + torch.log1p((-logits[1]).exp())) / 2
    np.testing.assert_allclose(loss.look(seen).detach(), expected.detach(), rtol=1e-5)
    loss.look(seen).sum().backward()
    better = torch.autograd.grad(expected.sum(), degraded)[0]
    np.testing.assert_allclose(degraded.grad, -rise(0.5) * better, rtol=1e-4)
    assert rise(0.0) == 0
    assert rise(1.0) == pytest.approx(0.9999, abs=1e-4)


def test_decorrelation_by_hand() -> None:
    loss = build_auxiliary("decorrelation", 8, 2, parts=4)
    assert (loss.known_half.sum(1) == 4).all()
    assert torch.equal(loss.known_half[:, ::2], loss.known_half[:, 1::2])  # slices of two
    embedding = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    variation = torch.tensor([[True, False, True], [False, False, True]])
    seen = Seen(embedding, torch.tensor([0, 1]), variation=variation)
    total = torch.zeros(2)
    for number in range(3):
        mask = loss.known_half[number]
        for layer, half in ((loss.knows[number], mask), (loss.ignores[number], 1 - mask)):
            logit = layer(embedding * half)[:, 0]
            sign = torch.where(variation[:, number], -1.0, 1.0)
            total = total + torch.log1p((sign * logit).exp())
    found = loss.look(seen)
    np.testing.assert_allclose(found.detach(), (total / 3).detach(), rtol=1e-5)


def test_variations_are_those_of_the_degradation() -> None:
    """Where none is found, a degradation with only these kinds leaves the image as it is."""
    seeds, recipe = torch.arange(64), DEGRADATIONS["surveillance"]
    found = find_variations(seeds, recipe, 24)
    assert 0 < found.float().mean() < 1
    import dataclasses

    kinds = {"low_res_rate": 0, "noise_rate": 2, "mask_rate": 1}
    images = torch.randint(0, 256, (64, 24, 24, 3), dtype=torch.uint8)
    plain = degrade(images, seeds, DEGRADATIONS["none"], 24)
    rates = {"low_res_px": recipe.low_res_px, "mask_rate": 0.06, "low_res_rate": 0.6}
    rates |= {"noise_rate": 0.4, "sunglasses_rate": 0.06, "patch_rate": 0.1}
    for name, column in kinds.items():
        kept = {"low_res_px": rates["low_res_px"], name: rates[name]}
        if name == "mask_rate":
            kept |= {"sunglasses_rate": 0.06, "patch_rate": 0.1}
        changed = degrade(images, seeds, dataclasses.replace(DEGRADATIONS["none"], **kept), 24)
        differs = (changed - plain).abs().amax((1, 2, 3)) > 1e-3
        assert not (differs & ~found[:, column]).any(), name
        assert (differs & found[:, column]).sum() > 0.7 * found[:, column].sum(), name


# --------------------------------------------------------------------------------------- promotion


def test_promotion_by_hand() -> None:
    """Squared norms 4 and 16 are frequent, mean 10; the rare 1 misses it by 9."""
    weight = torch.tensor([[2.0, 0], [0, 4.0], [1.0, 0]])
    assert promote(weight, torch.tensor([False, False, True])).item() == 81
    for all_alike in (torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)):
        assert promote(weight, all_alike).item() == 0
    loss = build_auxiliary("promotion", 2, 3, rare=1)
    loss.prepare(torch.tensor([0, 0, 1, 1, 2]))
    assert loss.is_rare.tolist() == [False, False, True]
    head = build_head("softmax", 2, 3)
    with torch.no_grad():
        head.linear.weight.copy_(weight)
    np.testing.assert_allclose(
        loss.look(Seen(weight, torch.arange(3), head=head)).detach(), [81] * 3
    )
    with pytest.raises(ConfigError, match="choose the head softmax"):
        loss.look(Seen(weight, torch.arange(3), head=build_head("cosface", 2, 3)))


# ------------------------------------------------------------------------------------------ errors


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="reads the neck 'subdecisions', got 'own'"):
        build_auxiliary("consistency", 8, 4, backbone=backbone_with())
    with pytest.raises(ConfigError, match="reads a feature map: give the backbone"):
        build_auxiliary("spatial_diversity", 8, 4)
    with pytest.raises(ConfigError, match="at most 20000 classes"):
        build_auxiliary("mutual_channel", 8, 20_001, backbone=backbone_with())
    with pytest.raises(ConfigError, match=r"2 to 4 channels \(the map's cells\)"):
        build_auxiliary("mutual_channel", 8, 4, backbone=backbone_with(), channels=5)
    with pytest.raises(ConfigError, match="parts or more that divide 8"):
        build_auxiliary("decorrelation", 8, 4, parts=3)
