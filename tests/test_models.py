"""models: every family keeps the contract, is built the same twice, and survives packing."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from cdp.errors import ConfigError, DataError
from cdp.models import (
    BACKBONES,
    build_backbone,
    load_model,
    pack_model,
    save_model,
    unpack_model,
)

FAMILIES = sorted(BACKBONES)


pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


def faces(count: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_five_families_and_more() -> None:
    assert {"residual", "dense", "plain", "inception", "separable"} <= set(BACKBONES)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("input_px", [12, 20, 33])
def test_shape_and_finite_gradient(name: str, input_px: int) -> None:
    backbone = build_backbone(name, input_px=input_px, embedding_dim=40, width=0.5)
    embedding = backbone(faces(4, input_px))
    assert embedding.shape == (4, 40)
    embedding.square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("name", FAMILIES)
def test_eval_looks_at_one_image_at_a_time(name: str) -> None:
    backbone = build_backbone(name)
    backbone(faces(16, 24, seed=1))
    backbone.eval()
    images = faces(6, 24)
    with torch.no_grad():
        together = backbone(images)
        alone = torch.cat([backbone(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_are_near_the_root_of_the_dimension(name: str) -> None:
    norm = build_backbone(name)(faces(64, 24)).norm(dim=1)
    assert abs(norm.square().mean().item() - 128) < 2


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_follow_the_seed_and_torch_keeps_its_own(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (build_backbone(name, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_width_scales_the_number_of_weights() -> None:
    def weigh(width: float) -> int:
        return sum(p.numel() for p in build_backbone("plain", width=width).parameters())

    assert weigh(0.5) < weigh(1.0) < weigh(2.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_packing_returns_the_same_backbone(name: str) -> None:
    backbone = build_backbone(name, input_px=16, embedding_dim=32, width=0.5)
    backbone(faces(8, 16))
    backbone.to(memory_format=torch.channels_last)
    tensors, metadata = pack_model(backbone, {"trained_on": ["a", 1]})
    assert all(t.is_contiguous() for t in tensors.values())
    assert all(isinstance(v, str) for v in metadata.values())
    again, meta = unpack_model(load(save(tensors)), metadata)
    assert meta == {"trained_on": ["a", 1]}
    assert again.spec == backbone.spec
    backbone.eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(faces(3, 16)), backbone(faces(3, 16)), atol=1e-5)


def test_packed_tensors_are_copies() -> None:
    backbone = build_backbone("plain")
    tensors, _ = pack_model(backbone)
    before = {k: v.clone() for k, v in tensors.items()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensors[k], before[k]) for k in before)


def test_files(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    backbone = build_backbone("plain", width=0.5).eval()
    save_model(path, backbone, {"note": "é"})
    again, meta = load_model(path)
    assert meta == {"note": "é"}
    with torch.no_grad():
        assert torch.equal(again(faces(2, 24)), backbone(faces(2, 24)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"safetensors model expected at .*model\.safetensors"):
        load_model(path)
    with pytest.raises(DataError, match=r"safetensors model expected"):
        load_model(tmp_path / "none.safetensors")


def test_errors_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"unknown backbone 'resnet'.*residual, dense"):
        build_backbone("resnet")
    for wrong in ({"input_px": 4}, {"embedding_dim": 0}, {"width": 0.0}):
        with pytest.raises(ConfigError):
            build_backbone("plain", **wrong)
    tensors, metadata = pack_model(build_backbone("plain"))
    with pytest.raises(DataError, match="not a model of ours"):
        unpack_model(tensors, {})
    del tensors["ending.2.weight"]
    with pytest.raises(DataError, match="weights that fit"):
        unpack_model(tensors, metadata)
