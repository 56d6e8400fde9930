"""onnx_export: the ONNX model computes the recognizer's vectors, or it is not exported."""

import numpy as np
import onnx
import pytest
import torch

from cdp.embedding import OnnxEmbedder
from cdp.errors import BackendError
from cdp.inspection import map_occlusion
from cdp.models import build_backbone
from cdp.recognizer import onnx_export as portable
from cdp.recognizer.recognizer import Recognizer

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def recognizer() -> Recognizer:
    """Untrained, but with moments unlike those it starts with."""
    backbone = build_backbone("residual", input_px=20, embedding_dim=24, width=0.5, seed=3)
    backbone.train()
    with torch.no_grad():
        backbone(torch.randn(64, 3, 20, 20, generator=torch.Generator().manual_seed(0)))
    return Recognizer(backbone, device="cpu")


@pytest.fixture(scope="module")
def model(recognizer) -> bytes:
    return portable.export_onnx(recognizer, notes={"made of": "noise"})


def test_any_number_of_faces_of_any_side(recognizer, model) -> None:
    embedder = OnnxEmbedder(model)
    assert (embedder.input_px, embedder.embedding_dim) == (20, 24)
    rng = np.random.default_rng(1)
    for count, side in ((1, 20), (7, 20), (5, 64), (3, 12)):
        faces = rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)
        theirs, norm = embedder.embed(faces)
        np.testing.assert_allclose(theirs, recognizer.embed(faces), atol=1e-4)
        np.testing.assert_allclose(norm, 1, atol=1e-4)


def test_the_file_describes_itself(model) -> None:
    proto = onnx.load_from_string(model)
    onnx.checker.check_model(proto)
    assert [value.name for value in proto.graph.input] == ["image"]
    assert [value.name for value in proto.graph.output] == ["embedding"]
    assert {prop.key: prop.value for prop in proto.metadata_props}["made of"] == "noise"


def test_a_network_and_its_export_look_at_the_same_places(recognizer, model) -> None:
    """The export sees the mirror image too, so the network is asked for it."""
    faces = np.random.default_rng(2).integers(0, 256, (3, 20, 20, 3)).astype(np.uint8)
    ours = map_occlusion(recognizer.embedder, faces, cells=4, flip=True)
    theirs = map_occlusion(OnnxEmbedder(model), faces, cells=4)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert ours.max() > 0.01
    assert np.abs(map_occlusion(recognizer.embedder, faces, cells=4) - theirs).max() > 1e-3


def test_a_model_that_differs_is_refused(recognizer, model) -> None:
    other = Recognizer(build_backbone("residual", input_px=20, embedding_dim=24, width=0.5))
    assert portable.measure_difference(recognizer, model) < 1e-4
    assert portable.measure_difference(other, model) > 0.1
    # Without the mirror image it is another function.
    assert portable.measure_difference(recognizer, model, flip=False) > 1e-3
    portable.check_agreement(recognizer, model)
    with pytest.raises(BackendError, match=r"differ by .* where rounding explains 0\.0001"):
        portable.check_agreement(other, model)
