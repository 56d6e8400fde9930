"""inspection: planted filters and faces are found where they are."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

from cdp.embedding import BackboneEmbedder, OnnxEmbedder
from cdp.errors import ConfigError, DataError
from cdp.images.preprocessing import PRESETS
from cdp.inspection import locate_filters, map_attention, map_occlusion, overlay_maps
from cdp.inspection.occlusion import find_span
from cdp.models import build_backbone, save_model
from cdp.models.backbone import Backbone, BackboneSpec
from pipelines.export.__main__ import main
from pipelines.export.heatmaps import draw_model

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


class Planted(Backbone):
    """A map of brightness in cells of 4 px; the vector looks at row 1, column 2 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = BackboneSpec("planted", 16, 2, 1.0)
        self.trunk = nn.AvgPool2d(4)
        self.ending = nn.Flatten()
        self.weight = nn.Parameter(torch.zeros(1))
        self.measure_maps()
        self.ending = Look()


class Look(nn.Module):
    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        seen = feature_map[:, 0, 1, 2]
        return torch.stack([seen, 0.2 * seen + 1], 1)


def draw_spot(row: int, column: int) -> np.ndarray:
    face = np.full((16, 16, 3), 127, np.uint8)
    face[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 250
    return face


def test_a_planted_filter_is_located() -> None:
    faces = np.stack([draw_spot(1, 2)] * 3 + [draw_spot(3, 2)])
    found = locate_filters(Planted().eval(), faces)
    np.testing.assert_allclose(found.place, [[(3 * 1.5 + 3.5) / 16, 2.5 / 4]] * 3)
    # rows 1, 1, 1 and 3 of four: a standard deviation of .866 cells
    np.testing.assert_allclose(found.spread, [[0.8660 / 4, 0]] * 3, atol=1e-4)
    assert found.response[0].argmax() == 1 * 4 + 2
    assert found.response.max() == 1
    assert found.spreadness == pytest.approx(0, abs=1e-12)


def test_heat_lies_where_the_network_looks() -> None:
    face = draw_spot(1, 2)[None]
    heat = map_attention(Planted().eval(), face, np.array([[1.0, 0.0]]))
    assert heat.shape == (1, 16, 16)
    row, column = divmod(int(heat[0].argmax()), 16)
    assert (row // 4, column // 4) == (1, 2)
    assert heat.max() == 1
    with pytest.raises(DataError, match=r"a reference \(1, 2\) expected, got \(1, 3\)"):
        map_attention(Planted().eval(), face, np.zeros((1, 3)))


def test_a_cover_costs_where_the_network_looks() -> None:
    embedder = BackboneEmbedder(Planted(), device="cpu")
    loss = map_occlusion(embedder, draw_spot(1, 2)[None], cells=4, patch=0.25)
    assert loss[0].argmax() == 1 * 4 + 2
    assert np.count_nonzero(loss > 1e-4) == 1
    assert find_span(0, 4, 0.5, 16) == slice(0, 6)
    assert find_span(3, 4, 0.01, 16) == slice(14, 15)
    with pytest.raises(ConfigError, match=r"a patch of 0\.\.1 expected, got 4 and 2"):
        map_occlusion(embedder, draw_spot(1, 2)[None], cells=4, patch=2)


@pytest.mark.parametrize("neck", ["own", "subdecisions", "trunk_branch"])
def test_maps_of_real_networks(neck: str) -> None:
    backbone = build_backbone("residual", input_px=16, embedding_dim=16, neck=neck).eval()
    faces = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3)).astype(np.uint8)
    for early, side in ((True, 4), (False, 2)):
        heat = map_attention(backbone, faces, early=early)
        assert heat.shape == (3, 16, 16)
        assert 0 <= heat.min() <= heat.max() <= 1
        assert locate_filters(backbone, faces, early=early).response.shape[1:] == (side, side)
    assert all(p.grad is None for p in backbone.parameters())


def test_hot_is_red_and_cold_is_blue() -> None:
    maps = np.array([[[0.0, 2.0]]])
    (picture,) = overlay_maps(np.zeros((1, 8, 8, 3), np.uint8), maps, share=1.0)
    assert picture[0, 0].tolist() == [0, 0, 128]
    assert picture[0, 7].tolist() == [128, 0, 0]
    with pytest.raises(DataError, match="a map of each of 1 faces"):
        overlay_maps(np.zeros((1, 8, 8, 3), np.uint8), np.zeros((2, 1, 1)))


def test_a_page_of_heat_maps(tmp_path, capsys) -> None:
    model, out = tmp_path / "net.safetensors", tmp_path / "page.png"
    save_model(model, build_backbone("plain", input_px=16, embedding_dim=16, width=0.5).eval())
    command = ["heatmaps", "--model", str(model), "--count", "3", "--out", str(out)]
    assert main(command) == 0
    assert "3 faces, 1 models" in capsys.readouterr().out
    with Image.open(out) as page:
        assert page.size == (150 + 3 * 100, 4 * 100 + 4)
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["heatmaps", "--model", "none.onnx", "--out", str(tmp_path / "b.png")]) == 2
    assert "a model expected at none.onnx" in capsys.readouterr().err


def write_cells(path) -> None:
    """An ONNX model whose vector is the brightness of 4 x 4 cells: the range of pixels matters."""
    pool = helper.make_node(
        "AveragePool", ["image"], ["cells"], kernel_shape=[4, 4], strides=[4, 4]
    )
    flat = helper.make_node("Flatten", ["cells"], ["embedding"])
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 16, 16])
    vector = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 48])
    graph = helper.make_graph([pool, flat], "cells", [image], [vector])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(made.SerializeToString())


def test_an_onnx_model_is_shown_its_preset(tiny, tmp_path, capsys) -> None:
    """By name, one for all or one for each; else by the labelled people of the data set."""
    model = tmp_path / "cells.onnx"
    write_cells(model)
    faces = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    signed = PRESETS["insightface"]
    found = draw_model(model, faces, 2, signed)["cells\nocclusion"]
    embedder = OnnxEmbedder(model.read_bytes(), preprocessing=signed)
    assert np.array_equal(found, overlay_maps(faces, map_occlusion(embedder, faces)))
    assert not np.array_equal(found, draw_model(model, faces, 2)["cells\nocclusion"])

    def export(*options):
        pages = len(list(tmp_path.glob("*.png")))
        out = tmp_path / f"{pages}.png"
        data = ["--data", str(tiny.parents[1] / "data.yaml"), "--count", "2"]
        code = main(["heatmaps", "--model", str(model), *options, *data, "--out", str(out)])
        return code, "".join(capsys.readouterr()), out

    pages = {}
    for preset in ("plain", "insightface", "adaface"):
        code, text, out = export("--preset", preset)
        assert code == 0
        assert f"cells is shown {PRESETS[preset].describe()}" in text
        pages[preset] = np.asarray(Image.open(out))
    assert not np.array_equal(pages["plain"], pages["insightface"])
    code, text, out = export()  # the labelled people are separated better by signed pixels
    assert code == 0
    assert "it separates the labelled people better so than by RGB in 0..255" in text
    assert not np.array_equal(np.asarray(Image.open(out)), pages["plain"])
    code, text, _ = export("--preset", "plain", "adaface")
    assert code == 2
    assert "one for all ONNX models or one for each expected, got 2 for 1 of them" in text
