"""quality of faces: each kind by its definition, and that it can be compared between images."""

import math

import numpy as np
import pytest
import torch

from cdp.embedding import BackboneEmbedder
from cdp.errors import ConfigError, DataError
from cdp.models import build_backbone
from cdp.recognizer.quality import compare_parts, measure_quality

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


def draw_faces(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 20, 20, 3)).astype(np.uint8)


def test_consistency_by_hand() -> None:
    """Three parts: two equal, one at 90 degrees: distances 0 and twice sqrt(2)."""
    parts = torch.tensor([[[1.0, 0], [3, 0], [0, 2]], [[1, 1], [1, 1], [2, 2]]])
    mean = 2 * math.sqrt(2) / 3
    np.testing.assert_allclose(compare_parts(parts), [2 / (1 + math.exp(mean)), 1], rtol=1e-6)


def test_norm_and_confidence_are_those_of_the_embedding() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=8, width=0.5).eval()
    faces = draw_faces(7)
    vectors, norm = BackboneEmbedder(backbone, device="cpu").embed(faces)
    np.testing.assert_allclose(measure_quality(backbone, faces, batch_size=3), norm, rtol=1e-4)
    raw = (vectors * norm[:, None]).reshape(7, 4, 2)
    expected = np.linalg.norm(raw, axis=2).min(1)
    found = measure_quality(backbone, faces, "confidence", parts=4)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_consistency_of_a_network() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=8, neck="subdecisions").eval()
    found = measure_quality(backbone, draw_faces(4), "consistency")
    assert ((found > 0) & (found <= 1)).all()
    alone = measure_quality(backbone, draw_faces(4)[2:3], "consistency")
    np.testing.assert_allclose(alone, found[2:3], rtol=1e-4)


def test_errors() -> None:
    backbone = build_backbone("plain", input_px=16, embedding_dim=8).eval()
    with pytest.raises(ConfigError, match="a quality of norm, consistency, confidence expected"):
        measure_quality(backbone, draw_faces(1), "beauty")
    with pytest.raises(ConfigError, match="needs the neck subdecisions, got 'own'"):
        measure_quality(backbone, draw_faces(1), "consistency")
    with pytest.raises(ConfigError, match="parts that divide 8 expected, got 3"):
        measure_quality(backbone, draw_faces(1), "confidence", parts=3)
    with pytest.raises(DataError, match="uint8 expected"):
        measure_quality(backbone, np.zeros((1, 3, 16, 16), np.uint8))
