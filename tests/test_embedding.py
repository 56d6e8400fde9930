"""embedding: two kinds of models, one behaviour, checked against each model's own output."""

import pickle

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from cdp.embedding import BackboneEmbedder, OnnxEmbedder
from cdp.errors import ConfigError, DataError
from cdp.images.degradation import reduce_faces
from cdp.images.preprocessing import PRESETS, Preprocessing
from cdp.models import BACKBONES, build_backbone

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("one_thread")]


def draw_faces(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def make_onnx(
    side: int | str = 8,
    *,
    batch: int | str = "n",
    dim: int = 6,
    channels: int = 3,
    outputs: int = 1,
    weight: np.ndarray | None = None,
) -> bytes:
    """A model that multiplies the pixels by a matrix."""
    pixels = channels * (side if isinstance(side, int) else 8) ** 2
    if weight is None:
        weight = np.random.default_rng(1).normal(size=(pixels, dim)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["embedding"]),
        helper.make_node("Identity", ["embedding"], ["again"]),
    ]
    found = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, dim])
        for name in ("embedding", "again")
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, side, side])],
        found[:outputs],
        [helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.ravel())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


WEIGHT = np.random.default_rng(1).normal(size=(3 * 64, 6)).astype(np.float32)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_backbone_vectors_are_its_normalised_outputs(name: str) -> None:
    faces = draw_faces(10, 24)
    backbone = build_backbone(name)
    backbone(torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(0)))
    vectors, norm = BackboneEmbedder(backbone, device="cpu").embed(faces, batch_size=4)
    pictures = torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        raw = backbone(pictures).numpy()
        mirrored = backbone(pictures.flip(3)).numpy()
    np.testing.assert_allclose(norm, np.linalg.norm(raw, axis=1), rtol=1e-3)
    np.testing.assert_allclose(vectors, raw / np.linalg.norm(raw, axis=1)[:, None], atol=1e-4)
    vectors, norm = BackboneEmbedder(backbone, device="cpu").embed(faces, flip=True)
    mean = (raw + mirrored) / 2
    np.testing.assert_allclose(norm, np.linalg.norm(mean, axis=1), rtol=1e-3)
    np.testing.assert_allclose(vectors, mean / np.linalg.norm(mean, axis=1)[:, None], atol=1e-4)


def test_backbone_takes_any_side() -> None:
    embedder = BackboneEmbedder(build_backbone("plain"), device="cpu")
    large = draw_faces(4, 60)
    small = reduce_faces(large, 24)
    np.testing.assert_allclose(embedder.embed(large)[0], embedder.embed(small)[0], atol=2e-2)
    assert embedder.embed(draw_faces(2, 12))[0].shape == (2, 128)


def test_onnx_gets_rgb_in_0_to_255() -> None:
    faces = draw_faces(7, 8)
    vectors, norm = OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(faces, batch_size=3)
    raw = faces.transpose(0, 3, 1, 2).reshape(7, -1).astype(np.float64) @ WEIGHT
    np.testing.assert_allclose(norm, np.linalg.norm(raw, axis=1), rtol=1e-4)
    np.testing.assert_allclose(vectors, raw / np.linalg.norm(raw, axis=1)[:, None], atol=1e-5)
    vectors, _ = OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(faces, flip=True)
    raw += faces[:, :, ::-1].transpose(0, 3, 1, 2).reshape(7, -1).astype(np.float64) @ WEIGHT
    np.testing.assert_allclose(vectors, raw / np.linalg.norm(raw, axis=1)[:, None], atol=1e-5)


def test_onnx_sees_reduced_faces_enlarged_again() -> None:
    faces = draw_faces(5, 16)
    embedder = OnnxEmbedder(make_onnx(weight=WEIGHT), reduce_px=4)
    small = reduce_faces(faces, 4)
    large = np.stack([cv2.resize(f.astype(np.float32), (8, 8)) for f in small])
    raw = large.transpose(0, 3, 1, 2).reshape(5, -1) @ WEIGHT
    expected = raw / np.linalg.norm(raw, axis=1)[:, None]
    np.testing.assert_allclose(embedder.embed(faces)[0], expected, atol=1e-4)
    # Faces that are small already are left as small as they are.
    np.testing.assert_allclose(embedder.embed(small)[0], expected, atol=1e-4)


def test_onnx_with_a_fixed_batch_gets_it_filled() -> None:
    faces = draw_faces(7, 8)
    free = OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(faces)[0]
    fixed = OnnxEmbedder(make_onnx(batch=4, weight=WEIGHT)).embed(faces)[0]
    np.testing.assert_allclose(fixed, free, atol=1e-6)


def test_onnx_travels_to_another_process() -> None:
    embedder = OnnxEmbedder(make_onnx(weight=WEIGHT), reduce_px=4, name="tiny.onnx")
    again = pickle.loads(pickle.dumps(embedder))
    faces = draw_faces(3, 8)
    np.testing.assert_array_equal(again.embed(faces)[0], embedder.embed(faces)[0])
    assert (again.reduce_px, again.name, again.embedding_dim) == (4, "tiny.onnx", 6)


def test_parts_equal_the_whole() -> None:
    faces = draw_faces(50, 24)
    for embedder in (
        BackboneEmbedder(build_backbone("residual"), device="cpu"),
        OnnxEmbedder(make_onnx(weight=WEIGHT)),
    ):
        whole, norm = embedder.embed(faces)
        parts = [embedder.embed(faces[i : i + 7]) for i in range(0, 50, 7)]
        np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), whole, atol=1e-5)
        np.testing.assert_allclose(np.concatenate([p[1] for p in parts]), norm, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
        assert embedder.embed(faces[:0])[0].shape == (0, embedder.embedding_dim)


@pytest.mark.parametrize(
    ("way", "low", "high", "reverse"),
    [
        (PRESETS["plain"], 0, 255, False),
        (PRESETS["sface"], 0, 255, False),
        (PRESETS["insightface"], -1, 1, False),
        (PRESETS["edgeface"], -1, 1, False),
        (PRESETS["adaface"], -1, 1, True),
        (Preprocessing(0.0, 255.0), 0, 1, False),
        (Preprocessing((10.0, 20.0, 30.0), (1.0, 2.0, 4.0), "bgr"), None, None, True),
    ],
)
def test_a_model_is_shown_what_its_preset_says(way, low, high, reverse) -> None:
    faces = draw_faces(4, 8)
    faces[0, 0, 0], faces[0, 0, 1] = 0, 255
    shown = faces.astype(np.float64)[..., ::-1] if reverse else faces.astype(np.float64)
    shown = (shown - np.array(way.mean)) / np.array(way.scale)
    if low is not None:
        assert (shown.min(), shown.max()) == (low, high)
    raw = shown.transpose(0, 3, 1, 2).reshape(4, -1) @ WEIGHT
    expected = raw / np.linalg.norm(raw, axis=1)[:, None]
    vectors, _ = OnnxEmbedder(make_onnx(weight=WEIGHT), preprocessing=way).embed(faces)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_facenet_is_shown_160_px() -> None:
    way = PRESETS["facenet"]
    assert (way.mean, way.scale, way.channels, way.input_px) == (127.5, 128.0, "rgb", 160)


def test_scales_upside_down_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean 127.5 and scale 127.5 give -1\.\.1"):
        Preprocessing(127.5, 1 / 127.5)
    with pytest.raises(ConfigError, match="above 0"):
        Preprocessing(scale=0.0)


def test_channels_last_free_sides_and_further_outputs_are_read() -> None:
    faces = draw_faces(5, 8)
    expected = OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(faces)[0]
    last = edit_onnx(lambda graph: put_channels_last(graph))
    np.testing.assert_allclose(OnnxEmbedder(last).embed(faces)[0], expected, atol=1e-6)
    free = OnnxEmbedder(make_onnx("side", weight=WEIGHT))
    assert free.input_px is None
    np.testing.assert_allclose(free.embed(faces)[0], expected, atol=1e-6)
    fixed = OnnxEmbedder(make_onnx("side", weight=WEIGHT), preprocessing=Preprocessing(input_px=8))
    small = draw_faces(5, 4)
    there = OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(small)[0]
    np.testing.assert_allclose(fixed.embed(small)[0], there, atol=1e-6)
    with pytest.raises(DataError, match=r"leaves the side free, name it \(`input_px`\)"):
        free.embed(small)
    normed = edit_onnx(add_norm)
    np.testing.assert_allclose(OnnxEmbedder(normed).embed(faces)[0], expected, atol=1e-6)
    second = make_onnx(outputs=2, weight=WEIGHT)
    named = OnnxEmbedder(second, preprocessing=Preprocessing(output="again"))
    np.testing.assert_allclose(named.embed(faces)[0], expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(named))
    assert again.preprocessing == named.preprocessing


def edit_onnx(edit) -> bytes:
    model = onnx.load_from_string(make_onnx(weight=WEIGHT))
    edit(model.graph)
    return model.SerializeToString()


def put_channels_last(graph) -> None:
    graph.node.insert(0, helper.make_node("Transpose", ["image"], ["first"], perm=[0, 3, 1, 2]))
    graph.node[1].input[0] = "first"
    del graph.input[:]
    shape = ["n", 8, 8, 3]
    graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))


def add_norm(graph) -> None:
    graph.node.append(helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1], keepdims=1))
    graph.output.append(helper.make_tensor_value_info("norm", TensorProto.FLOAT, ["n", 1]))


def test_broken_vectors_are_refused() -> None:
    faces = draw_faces(5, 8)
    for value in (np.nan, np.inf, 0.0):
        weight = np.full((3 * 64, 6), value, np.float32)
        with pytest.raises(DataError, match=r"bad\.onnx: embedding of image 0 is NaN.*5 of 5"):
            OnnxEmbedder(make_onnx(weight=weight), name="bad.onnx").embed(faces)
    black = np.concatenate([faces, np.zeros_like(faces[:1])])
    with pytest.raises(DataError, match=r"image 5 .*1 of 6"):
        OnnxEmbedder(make_onnx(weight=WEIGHT)).embed(black)


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"m\.onnx: an ONNX model expected"):
        OnnxEmbedder(b"not a model", name="m.onnx")
    with pytest.raises(DataError, match=r"\(n, 3, p, p\).*found: image"):
        OnnxEmbedder(make_onnx(channels=1))
    with pytest.raises(
        DataError, match=r"one output \(n, d\) expected, found: embedding.*again.*name"
    ):
        OnnxEmbedder(make_onnx(outputs=2))
    with pytest.raises(DataError, match=r"named 'third' expected, found: embedding"):
        OnnxEmbedder(make_onnx(outputs=2), preprocessing=Preprocessing(output="third"))
    with pytest.raises(DataError, match="input_px 9 does not fit"):
        OnnxEmbedder(make_onnx(), preprocessing=Preprocessing(input_px=9))
    with pytest.raises(DataError, match="uint8 expected"):
        OnnxEmbedder(make_onnx()).embed(draw_faces(2, 8).astype(np.float32))


def test_onnx_checks_itself() -> None:
    onnx.checker.check_model(onnx.load_from_string(make_onnx()))


def test_real_models_separate_identities_at_24_px(data_root) -> None:
    """A few people of LFW: the same person's images are nearer than others', in each model."""
    from cdp.images.decode import decode_image

    people = [p for p in sorted((data_root / "lfw112").iterdir()) if len(list(p.iterdir())) >= 4]
    chosen = people[:: len(people) // 8][:8]
    faces = np.stack(
        [decode_image(f.read_bytes()) for p in chosen for f in sorted(p.iterdir())[:4]]
    )
    label = np.repeat(np.arange(len(chosen)), 4)
    same = label[:, None] == label[None, :]
    for path in sorted((data_root / "onnx").glob("*.onnx")):
        embedder = OnnxEmbedder(path.read_bytes(), reduce_px=24, name=path.name)
        assert embedder.input_px == 112
        vectors, norm = embedder.embed(faces)
        np.testing.assert_allclose(norm, 1, atol=1e-3)
        cosine = vectors @ vectors.T
        nearest = label[np.argsort(-cosine, axis=1)[:, 1]]
        assert (nearest == label).mean() > 0.85, path.name
        assert cosine[same].mean() > cosine[~same].mean() + 0.3
