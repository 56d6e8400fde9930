"""restoration: shapes, losses at chance, and that a trained restorer beats plain enlargement."""

import math

import numpy as np
import pytest
import torch

from cdp.embedding import BackboneEmbedder
from cdp.errors import ConfigError, DataError
from cdp.images.degradation import reduce_faces
from cdp.models import build_backbone, save_model
from cdp.restoration import (
    RestorationPlan,
    RestoringEmbedder,
    build_restorer,
    load_restorer,
    restore_faces,
    save_restorer,
    train_restorer,
)
from cdp.restoration.network import Discriminator, enlarge_plainly
from cdp.restoration.training import judge_pictures
from cdp.synthetic import SyntheticFaces

pytestmark = [
    pytest.mark.torch,
    pytest.mark.slow,
    pytest.mark.trains,
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def faces():
    return SyntheticFaces(seed=3, size_px=32).draw(np.arange(0, 1200, 10))


def to_float(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_before_training_it_enlarges_bilinearly() -> None:
    small = torch.rand(2, 3, 12, 12) * 2 - 1
    restorer = build_restorer()
    first, second = restorer.restore_twice(small)
    assert first.shape == (2, 3, 48, 48)
    assert torch.equal(first, enlarge_plainly(small))
    assert torch.equal(second, first)
    assert restorer(torch.zeros(1, 3, 7, 7)).shape == (1, 3, 28, 28)


def test_the_discriminator_at_chance() -> None:
    discriminator = Discriminator(8)
    with torch.no_grad():
        discriminator.layers[-1].weight.zero_()
        discriminator.layers[-1].bias.zero_()
    pictures = torch.rand(5, 3, 16, 16)
    loss = judge_pictures(discriminator, pictures, pictures, torch.tensor([1.0, 1, 1, 0, 0]))
    assert loss.item() == pytest.approx(8 * math.log(2), rel=1e-6)


def test_a_trained_restorer_beats_plain_enlargement(faces) -> None:
    """On held-out faces, from 8 to 32 px: less squared error than bilinear and nearest."""
    plan = RestorationPlan(small_px=8, steps=60, batch_size=6, blocks=1, width=8)
    restorer, history = train_restorer(faces[:100], plan, device="cpu", progress=False)
    small = reduce_faces(faces[100:], 8)
    found = to_float(restore_faces(restorer, small))
    goal = to_float(faces[100:])
    error = (found - goal).square().mean().item()
    plain = (enlarge_plainly(to_float(small)) - goal).square().mean().item()
    nearest = to_float(small).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert error < 0.97 * plain < (nearest - goal).square().mean().item()
    pixels = [record["pixels"] for record in history]
    assert np.mean(pixels[-20:]) < np.mean(pixels[:20])


def test_without_adversaries_it_is_plain_regression(faces) -> None:
    """The discriminator then changes nothing, and the seed is the result."""
    plan = RestorationPlan(small_px=8, steps=3, batch_size=4, blocks=1, width=8)
    alone = RestorationPlan(**{**vars(plan), "adversary": 0.0, "face": 0.0})
    one, _ = train_restorer(faces[:20], alone, device="cpu", progress=False)
    two, _ = train_restorer(faces[:20], alone, device="cpu", progress=False)
    other, _ = train_restorer(faces[:20], plan, device="cpu", progress=False)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    assert not torch.equal(one.enlarging[0].weight, other.enlarging[0].weight)


def test_identity_is_kept_by_a_recognizer(faces) -> None:
    recognizer = build_backbone("plain", input_px=16, embedding_dim=8, width=0.5).eval()
    before = {key: value.clone() for key, value in recognizer.state_dict().items()}
    plan = RestorationPlan(small_px=8, steps=2, batch_size=4, blocks=1, width=8, identity=1.0)
    restorer, _ = train_restorer(
        faces[:20], plan, recognizer=recognizer, device="cpu", progress=False
    )
    assert all(torch.equal(value, before[key]) for key, value in recognizer.state_dict().items())
    assert not restorer.training
    with pytest.raises(ConfigError, match="identity needs a recognizer"):
        train_restorer(faces[:20], plan, device="cpu", progress=False)


def test_files_and_embedders(tmp_path, faces) -> None:
    restorer = build_restorer(8, 1, seed=2)
    with torch.no_grad():
        restorer.refining[-1].weight.normal_(std=0.01)
    path = tmp_path / "restorer.safetensors"
    save_restorer(path, restorer)
    again = load_restorer(path)
    small = reduce_faces(faces[:3], 8)
    assert np.array_equal(restore_faces(again, small), restore_faces(restorer, small))
    plain = BackboneEmbedder(build_backbone("plain", input_px=16, embedding_dim=8), device="cpu")
    vectors, _ = RestoringEmbedder(plain, again, 8).embed(faces[:3])
    expected, _ = plain.embed(restore_faces(again, small))
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    save_model(path, plain.backbone)
    with pytest.raises(DataError, match="a restorer of ours expected"):
        load_restorer(path)
    with pytest.raises(DataError, match="a restorer of ours expected"):
        load_restorer(tmp_path / "none.safetensors")


def test_errors(faces) -> None:
    with pytest.raises(DataError, match="faces of 48 px or more expected"):
        train_restorer(faces, progress=False)
    with pytest.raises(ConfigError, match="small_px of 4"):
        RestorationPlan(small_px=2)
    with pytest.raises(ConfigError, match="weights of 0 or above"):
        RestorationPlan(face=-1.0)
    with pytest.raises(ConfigError, match="width and blocks of 1 or more"):
        build_restorer(0)
    with pytest.raises(DataError, match="uint8 expected"):
        restore_faces(build_restorer(), np.zeros((1, 3, 8, 8), np.uint8))


def test_a_restorer_is_exported_with_its_page(tmp_path, capsys) -> None:
    from PIL import Image

    from pipelines.export.__main__ import main

    (tmp_path / "few.yaml").write_text(
        "{name: few, kind: synthetic, size_px: 32, synthetic: {labelled_identities: 3, "
        "unlabelled_identities: 2, evaluation_identities: 2, images_max: 6}}"
    )
    out = tmp_path / "restorer"
    command = ["restorer", "--data", str(tmp_path / "few.yaml"), "--px", "8", "--steps", "2"]
    assert main([*command, "--device", "cpu", "--out", str(out)]) == 0
    assert "8 px to 32 px, trained on " in capsys.readouterr().out
    assert load_restorer(out / "restorer.safetensors").width == 16
    with Image.open(out / "restorer.png") as page:
        assert page.size == (150 + 8 * 100, 4 * 100 + 4)
    assert main([*command, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    command[4] = "16"
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "choose a smaller --px" in capsys.readouterr().err
